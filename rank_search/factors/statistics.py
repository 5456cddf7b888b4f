"""Layer statistics: second moments of what goes into every target layer and of the gradients that come back.

With ``W (m, n)``: ``A = E[x xᵀ]`` over the layer's inputs and ``G = E[g gᵀ]`` over the gradients of a token's loss at
its outputs, the labels being sampled from the model's own output, so that ``G`` belongs to the true Fisher
information and not to the empirical one (Martens and Grosse, "Optimizing neural networks with Kronecker-factored
approximate curvature", 2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rank_search.errors import NonFiniteLossError, TargetError
from rank_search.model.device import autocast, deterministic
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress


@dataclass(frozen=True)
class LayerStatistics:
    """``A`` (n, n) and ``G`` (m, m) of one target layer in float64; None where a method does not ask for it.

    Layers that read the same tensor (query, key and value, say) share one ``A`` object.
    """

    A: Float64[Tensor, "n n"] | None = None
    G: Float64[Tensor, "m m"] | None = None


def collect_statistics(
    model: PreTrainedModel,
    targets: Sequence[Target],
    blocks: Int[Tensor, "blocks tokens"],
    *,
    batch_blocks: int,
    seed: int,
    inputs: bool = True,
    gradients: bool = True,
    progress: Progress = SILENT,
) -> dict[str, LayerStatistics]:
    """Statistics of every target layer from one forward (and, with ``gradients``, one backward) pass.

    A module that runs several times a token (a layer shared by all blocks) sums its gradients' moments over the runs,
    as its factors are used in each of them.

    Args:
        blocks: calibration, token ids on any device.
        seed: of the sampled labels.

    Raises:
        NonFiniteLossError: the model's output is not finite.
        TargetError: a target layer that the model does not use.
    """
    if not inputs and not gradients:
        return {target.name: LayerStatistics() for target in targets}
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    moments = _Moments(targets, inputs, gradients)
    tokens = 0
    with deterministic(device), moments.recording(), progress.step("calibration", len(blocks)) as step:
        for batch in blocks.split(batch_blocks):
            ids = batch.to(device, torch.long)
            _pass(model, ids, generator, backward=gradients)
            tokens += ids.numel()
            step.advance(len(batch))
    return moments.means(tokens)


def _pass(model: PreTrainedModel, ids: Int[Tensor, "b s"], generator: torch.Generator, *, backward: bool) -> None:
    with torch.set_grad_enabled(backward), autocast(ids.device):
        logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteLossError("the model's output on the calibration blocks is not finite")
    if backward:
        # Block by block, so that the labels do not depend on how many blocks make a batch.
        drawn = [torch.multinomial(block.softmax(-1), 1, generator=generator) for block in logits.detach()]
        labels = torch.cat(drawn).squeeze(1)
        # The sum, not the mean: G is about one token's loss.
        loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        if loss.requires_grad:  # else no target layer had a part in it, which the means will say
            loss.backward()


class _Moments:
    """Sums of outer products, gathered by hooks."""

    def __init__(self, targets: Sequence[Target], inputs: bool, gradients: bool) -> None:
        self._targets = targets
        self._inputs = inputs
        self._gradients = gradients
        self._A: dict[str, Tensor] = {}
        self._G: dict[str, Tensor] = {}
        self._vectors: dict[str, int] = {}
        self._owner: dict[str, str] = {}
        self._last: tuple[Tensor, int, str] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = [
            target.module.register_forward_hook(
                lambda _module, args, output, name=target.name: self._on_forward(name, args[0], output)
            )
            for target in self._targets
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def means(self, tokens: int) -> dict[str, LayerStatistics]:
        """Sums to means.

        Raises:
            TargetError: a layer took no part in what the model computed.
        """
        for target in self._targets:
            if target.name not in (self._G if self._gradients else self._owner):
                raise TargetError(
                    f"{target.name} has no part in the model's output on the calibration blocks; exclude it, or "
                    "calibrate on more text"
                )
        return {
            target.name: LayerStatistics(
                self._mean_inputs(self._owner[target.name]) if self._inputs else None,
                self._G[target.name].div_(tokens) if self._gradients else None,
            )
            for target in self._targets
        }

    def _mean_inputs(self, owner: str) -> Tensor:
        vectors = self._vectors.pop(owner, 0)
        return self._A[owner].div_(vectors) if vectors else self._A[owner]

    def _on_forward(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        if self._inputs:
            self._add_input(name, x.detach())
        if not self._gradients:
            return None
        # No weight needs a gradient here, so the backward pass ends at the first target layers' outputs. Copies,
        # because the model may go on in place, which a leaf forbids, and at which a view (a product with a bias is
        # one) loses its hooks.
        if output.is_leaf:
            output = output.requires_grad_().clone()
        elif output._is_view():
            output = output.clone()
        output.register_hook(lambda g: _add_outer(self._G, name, g))
        return output

    def _add_input(self, name: str, x: Tensor) -> None:
        """Layers called one after the other on the same tensor, unchanged, share the sums of the first."""
        owner = name
        if self._last is not None:
            last, version, last_owner = self._last
            if last.data_ptr() == x.data_ptr() and last.shape == x.shape and version == x._version:
                owner = last_owner
        owner = self._owner.setdefault(name, owner)
        self._last = (x, x._version, owner)
        if owner == name:
            _add_outer(self._A, name, x)
            self._vectors[name] = self._vectors.get(name, 0) + x.numel() // x.shape[-1]


def _add_outer(sums: dict[str, Tensor], name: str, vectors: Float[Tensor, "*batch d"]) -> None:
    # Products in float32, sums in float64: a float32 sum over a whole calibration would lose the small directions.
    # Hooks run under the forward pass's autocast, which would make the product bf16.
    with torch.autocast(vectors.device.type, enabled=False):
        flat = vectors.flatten(0, -2).float()
        product = (flat.T @ flat).double()
    if name in sums:
        sums[name] += product
    else:
        sums[name] = product
