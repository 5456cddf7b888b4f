"""The blocks of a model compiled around their target layers, so that a step is few kernels instead of many.

Half of a step of a small model goes to element-wise operations, each of which reads and writes whole activations.
``torch.compile`` fuses them, but compiles anew for shapes that it has not seen, and every rank map has shapes of its
own. So the target layers, dense ones too, are hidden behind one operator whose ranks are symbols to the compiler: what
was compiled for the first block of the first rank map serves all blocks and all rank maps of a process.

The operator works on bfloat16 copies of the factors, as autocast would make them, but all copies are made at once after
an optimiser step, instead of one by one in every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rank_search.compress.low_rank import LowRankLinear
from rank_search.compress.nested_linear import NestedLinear
from rank_search.cross_entropy import compiled_pieces
from rank_search.model.spread import blocks_of
from rank_search.model.targets import Target, bias_of, weight_matrix
from rank_search.progress import SILENT, Progress

RECOMPILES = 64
"""Of one block's code in a process, before it runs uncompiled. Kinds of blocks should need them, not ranks."""

_known: set[type[nn.Module]] = set()
"""Kinds of blocks that this process has compiled."""

_UNUSED = 2
"""Sides of what stands for a tensor that a layer does not have; 0 and 1 would be constants to the compiler."""


@torch.library.custom_op(
    "rank_search::layer", mutates_args=(), schema="(Tensor x, Tensor inner, Tensor outer, Tensor dense) -> Tensor"
)
def _layer(x: Tensor, inner: Tensor, outer: Tensor, dense: Tensor) -> Tensor:
    """``x (outer inner + dense)ᵀ``; ``inner`` (r, n), ``outer`` (m, r), ``dense`` (m, n); either may be unused."""
    matrix = _matrix(inner, outer, dense)
    return (x @ inner.T) @ outer.T if matrix is None else x @ matrix.T


@_layer.register_fake
def _(x: Tensor, inner: Tensor, outer: Tensor, dense: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], outer.shape[0])


@torch.library.custom_op(
    "rank_search::layer_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor inner, Tensor outer, Tensor dense) -> (Tensor, Tensor, Tensor)",
)
def _layer_backward(g: Tensor, x: Tensor, inner: Tensor, outer: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, inner and outer; the dense part is not trained."""
    matrix = _matrix(inner, outer, dense)
    if matrix is dense:
        return g @ dense, torch.zeros_like(inner), torch.zeros_like(outer)
    rows, inputs = g.flatten(0, -2), x.flatten(0, -2)
    if matrix is not None:
        of_matrix = rows.T @ inputs
        return g @ matrix, outer.T @ of_matrix, of_matrix @ inner.T
    of_hidden = rows @ outer
    return (of_hidden @ inner).view_as(x), of_hidden.T @ inputs, rows.T @ (inputs @ inner.T)


@_layer_backward.register_fake
def _(g: Tensor, x: Tensor, inner: Tensor, outer: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(inner), torch.empty_like(outer)


def _matrix(inner: Tensor, outer: Tensor, dense: Tensor) -> Tensor | None:
    """The layer's matrix; None where it is less work to multiply by one factor after the other.

    With a batch of many vectors, multiplying the factors by each other is no work at all.
    """
    m, n = len(outer), inner.shape[1]
    if len(dense) == m:
        return dense if len(inner) == _UNUSED else torch.addmm(dense, outer, inner)
    return outer @ inner if len(inner) * (m + n) > m * n else None


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *_layer_backward(g.contiguous(), *ctx.saved_tensors), None


_layer.register_autograd(_backward, setup_context=_keep)


class _Parts(NamedTuple):
    """What a layer is made of: factors, a dense matrix, or (in the nested fine-tune) both and the present rank."""

    inner: Float[Tensor, "r n"] | None = None
    outer: Float[Tensor, "m r"] | None = None
    dense: Float[Tensor, "m n"] | None = None
    bias: nn.Parameter | None = None
    rank: Int[Tensor, ""] | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> _Parts:
        """Of what stands in a target layer's place."""
        if isinstance(layer, LowRankLinear):
            return cls(*layer.factors, bias=layer.bias)
        if isinstance(layer, NestedLinear):
            return cls(layer.inner, layer.outer, layer.dense if layer.ever_dense else None, layer.bias, layer.rank)
        return cls(dense=weight_matrix(layer), bias=bias_of(layer))


class _Hidden(nn.Module):
    """A target layer as the compiler sees it: whatever it is, the same operator on the same tensors."""

    def __init__(self, parts: _Parts, dtype: torch.dtype) -> None:
        super().__init__()
        known = parts.dense if parts.dense is not None else parts.inner
        assert known is not None
        m = len(known) if parts.outer is None else len(parts.outer)
        n = known.shape[1]

        def copy(tensor: Tensor | None, *unused: int) -> Tensor:
            if tensor is None:
                return known.new_zeros(unused, dtype=dtype)
            return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)

        self.inner = nn.Parameter(copy(parts.inner, _UNUSED, n))
        self.outer = nn.Parameter(copy(parts.outer, m, _UNUSED))
        self.dense = nn.Parameter(copy(parts.dense, _UNUSED, _UNUSED), requires_grad=False)
        self.bias = parts.bias
        self.rank = parts.rank

    def symbolic(self) -> Iterator[tuple[Tensor, int]]:
        """The tensors and their sides that are to be symbols to the compiler."""
        for tensor, dims in ((self.inner, (0,)), (self.outer, (1,)), (self.dense, (0, 1))):
            for dim in dims:
                yield tensor, dim

    @no_type_check  # the compiler cannot look through what checks shapes while the tests run
    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        outer: Tensor = self.outer
        dense: Tensor = self.dense
        if self.rank is not None:
            outer = outer * (torch.arange(outer.shape[1], device=outer.device) < self.rank).to(outer.dtype)
            dense = dense * (self.rank < 0).to(dense.dtype)
        y: Tensor = _layer(x.to(self.inner.dtype), self.inner, outer, dense)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass(frozen=True)
class Copies:
    """The factors that an optimiser trains, and their copies that take part in a step in their stead."""

    factors: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def hand_gradients_over(self) -> None:
        """Give the copies' gradients to the factors."""
        into, given = [], []
        for factor, copy in zip(self.factors, self.copies, strict=True):
            if copy.grad is not None:
                factor.grad = torch.empty_like(factor)
                into.append(factor.grad)
                given.append(copy.grad)
                copy.grad = None
        if given:
            torch._foreach_copy_(into, given)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies to what the factors are now."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.factors)


NO_COPIES = Copies()


def can_fuse(targets: Sequence[Target]) -> bool:
    """Whether the model can run fused: every target layer is a module of its own."""
    return bool(targets) and not any(target.part for target in targets)


@contextmanager
def fused(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    backend: str = "inductor",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = SILENT,
) -> Iterator[Copies]:
    """``model`` compiled and on copies of its factors inside the block; as it was before, after it.

    Args:
        targets: of which :func:`can_fuse` says that they can; their layers as they stand in the model now.
        backend: of ``torch.compile``.
        dtype: of the copies.
    """
    # Here, since they take a second, which a process that trains nothing need not spend.
    import torch._dynamo
    from torch.fx.experimental import _config as symbols

    copies = Copies()
    places = [(parent, name, getattr(parent, name)) for target in targets for parent, name in target.places]
    hidden: dict[int, _Hidden] = {}
    for parent, name, layer in places:
        if id(layer) not in hidden:
            made = hidden[id(layer)] = _Hidden(_Parts.of(layer), dtype)
            for tensor, side in made.symbolic():
                torch._dynamo.maybe_mark_dynamic(tensor, side)
            if isinstance(layer, LowRankLinear | NestedLinear):
                copies.factors.extend(layer.factors)
                copies.copies.extend((made.inner, made.outer))
        setattr(parent, name, hidden[id(layer)])
    blocks = blocks_of(model)
    kinds = {type(block) for block in blocks}
    if kinds - _known:
        progress.say("compiling the model's blocks, once a process; the first step takes 10 to 20 s")
        _known.update(kinds)
    try:
        with (
            compiled_pieces(),
            _inputs_requiring_grad(model),
            torch._dynamo.config.patch(force_parameter_static_shapes=False, recompile_limit=RECOMPILES),
            symbols.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            for block in blocks:
                # An attribute of the object, before the method of its class.
                block.forward = torch.compile(type(block).forward, backend=backend).__get__(block)
            yield copies
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        for parent, name, layer in places:
            setattr(parent, name, layer)


@contextmanager
def _inputs_requiring_grad(model: nn.Module) -> Iterator[None]:
    """Else the first block, whose input needs no gradient, would be compiled apart from the others."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
