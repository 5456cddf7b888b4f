"""Ranks rounded up while a GPU computes with them, by factors of zeros.

A factor whose both rows are zero adds nothing to the layer's output, gets no gradient, and stays zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.compress.low_rank import LowRankLinear, aligned_rank


@contextmanager
def aligned(model: nn.Module) -> Iterator[None]:
    """The low-rank layers of ``model`` at aligned ranks inside the block; at their own, trained or not, after it."""
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    changed = [layer for layer in layers if aligned_rank(layer.rank, layer.inner.weight.device) != layer.rank]
    for layer in changed:
        more = aligned_rank(layer.rank, layer.inner.weight.device) - layer.rank
        _set_factors(layer, F.pad(layer.inner.weight, (0, 0, 0, more)), F.pad(layer.outer.weight, (0, more)))
    try:
        yield
    finally:
        for layer in changed:
            inner, outer = layer.factors
            _set_factors(layer, inner[: layer.rank].clone(), outer[:, : layer.rank].contiguous())


def _set_factors(layer: LowRankLinear, inner: Tensor, outer: Tensor) -> None:
    for linear, weight in ((layer.inner, inner), (layer.outer, outer)):
        requires_grad = linear.weight.requires_grad
        linear.weight = nn.Parameter(weight.detach(), requires_grad=requires_grad)
