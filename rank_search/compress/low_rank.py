"""The low-rank layer, and putting a rank map into a model and taking it out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.compress.split import SplitLinear
from rank_search.errors import RankMapError
from rank_search.factors.decompose import Factors
from rank_search.model.targets import Target, by_module, weight_matrix
from rank_search.ranks import RankMap

ALIGNMENT = 16
"""Of ranks while a GPU computes with them: tensor cores want every side of a matrix to be a multiple of 8 or more, at
other ranks the products fall back to kernels that take several times as long."""


def aligned_rank(rank: int, device: torch.device) -> int:
    """``rank``, on a GPU rounded up to a multiple of :data:`ALIGNMENT`."""
    return -(-rank // ALIGNMENT) * ALIGNMENT if device.type == "cuda" else rank


def padded(factors: Float[Tensor, "rank d"], rank: int) -> Float[Tensor, "padded d"]:
    """A copy with rows of zeros below ``factors``, up to ``rank`` rows."""
    return F.pad(factors, (0, 0, 0, rank - len(factors)))


class _Linear(nn.Linear):
    """A linear layer made from its weights: random ones before them would be a fifth of the time of a sliced trial."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: nn.Parameter | None, *, trainable: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=trainable)
        self.bias = bias  # type: ignore[assignment]  # which torch's stubs do not take for optional


class LowRankLinear(nn.Module):
    """``y = outer (inner x)`` with ``inner.weight`` (r, n) and ``outer.weight`` (m, r): two-factor storage.

    Both are plain ``nn.Linear``; the bias of the dense layer stays on the outer one.
    """

    def __init__(
        self,
        inner: Float[Tensor, "rank n"],
        outer: Float[Tensor, "m rank"],
        bias: nn.Parameter | None,
        *,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.inner = _Linear(inner, None, trainable=trainable)
        self.outer = _Linear(outer, bias, trainable=trainable)

    @classmethod
    def of(cls, factors: Factors, rank: int, target: Target) -> LowRankLinear:
        """A copy of the first ``rank`` factors, beside the dense layer's own bias."""
        weight = weight_matrix(target.module)
        # Copied into place at once: what is transposed first is copied twice.
        inner, outer = (
            torch.empty(rows.shape, dtype=weight.dtype, device=weight.device).copy_(rows)
            for rows in (factors.inn[:rank], factors.out[:rank].T)
        )
        return cls(inner, outer, target.bias)

    @classmethod
    def reading(cls, factors: Factors, rank: int, target: Target) -> LowRankLinear:
        """The same function, but not to be trained: it reads the bank's own rows where dtype and device are the
        layer's.

        Its rank is the one that a GPU wants (:func:`aligned_rank`): rows of zeros below the inner factors make what the
        outer ones have there count nothing.
        """
        weight = weight_matrix(target.module)
        width = aligned_rank(rank, weight.device)
        inner, outer = (
            rows.to(weight) if len(rows) == width else padded(rows.to(weight), width)
            for rows in (factors.inn[:rank], factors.out[:width])
        )
        return cls(inner, outer.T, target.bias, trainable=False)

    @property
    def rank(self) -> int:
        """r."""
        return self.inner.out_features

    @property
    def full_rank(self) -> int:
        """min(m, n)."""
        return min(self.inner.in_features, self.outer.out_features)

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense layer's bias."""
        return self.outer.bias

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Inner and outer factor, without the bias."""
        return self.inner.weight, self.outer.weight

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Two products instead of one."""
        result: Tensor = self.outer(self.inner(x))
        return result

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        """The matrix that the two factors stand for: for code that reads a layer's matrix instead of calling it."""
        product: Tensor = self.outer.weight @ self.inner.weight
        return product

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix that the two factors stand for, without gradients."""
        return self.weight.detach()


def insert(
    targets: Sequence[Target], factors: Mapping[str, Factors], rank_map: RankMap, *, trainable: bool = True
) -> dict[str, LowRankLinear]:
    """Put the factors of ``rank_map`` in the place of their target layers; :func:`restore` takes them out.

    Layers that are not ``trainable`` read ``factors`` where they lie (:meth:`LowRankLinear.reading`).

    Raises:
        RankMapError: naming the first module that is no target layer, or a rank that the bank does not hold.
    """
    by_name = {target.name: target for target in targets}
    layers: dict[str, LowRankLinear] = {}
    # All checks before the first replacement, so that a refused rank map changes nothing.
    for name, rank in rank_map.items():
        if name not in by_name:
            raise RankMapError(f"{name} is not a target layer of this model; make a rank map for this model")
        if rank > len(factors[name].inn):
            raise RankMapError(
                f"{name} has rank {rank}, but its factor bank ends at {len(factors[name].inn)}; leave it dense"
            )
    make = LowRankLinear.of if trainable else LowRankLinear.reading
    for name, rank in rank_map.items():
        layers[name] = make(factors[name], rank, by_name[name])
    place(targets, layers)
    return layers


def place(targets: Sequence[Target], layers: Mapping[str, nn.Module]) -> None:
    """Put each of ``layers`` (by module name) in all places of its target layer; :func:`restore` undoes it.

    Parts of one module get a :class:`SplitLinear` around them; one that stands there already hands on its dense rest,
    which may have been trained.
    """
    for targets_of_module in by_module(targets):
        chosen = [target for target in targets_of_module if target.name in layers]
        if chosen:
            made = _layer_of(chosen, layers)
            for parent, attribute in chosen[0].places:
                setattr(parent, attribute, made)


def _layer_of(targets: Sequence[Target], layers: Mapping[str, nn.Module]) -> nn.Module:
    """What stands in the places of one module."""
    first = targets[0]
    parts = [target.part for target in targets if target.part]
    if not parts:
        return layers[first.name]
    now = getattr(*first.places[0]) if first.places else first.module
    if isinstance(now, SplitLinear) and now.labels == {part.label for part in parts}:
        return now.with_layers(parts, layers)
    return SplitLinear.of(first.module, parts, layers)


def restore(targets: Sequence[Target]) -> None:
    """Put every dense target layer back in all its places."""
    for target in targets:
        for parent, attribute in target.places:
            if getattr(parent, attribute) is not target.module:
                setattr(parent, attribute, target.module)


@contextmanager
def compressed(
    targets: Sequence[Target], factors: Mapping[str, Factors], rank_map: RankMap, *, trainable: bool = True
) -> Iterator[dict[str, LowRankLinear]]:
    """The model under ``rank_map`` inside the block, the same dense model after it. Yields the low-rank layers, as
    :func:`insert` makes them."""
    layers = insert(targets, factors, rank_map, trainable=trainable)
    try:
        yield layers
    finally:
        restore(targets)
