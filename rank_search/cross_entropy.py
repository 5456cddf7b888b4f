"""Cross-entropy for training, in pieces: no float32 copy of all logits is ever held.

For a vocabulary of 50 000 the logits of a batch are larger than the rest of a step's memory, and torch's own function
passes over four such tensors in float32. Here a piece of rows is raised to float32, and its gradient (softmax minus
one-hot) is written down in the logits' own type at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PIECE = 1 << 24
"""Logits in a piece: 64 MiB in float32, which the caches of a large GPU hold."""


_COMPILES: ContextVar[bool] = ContextVar("compiles", default=False)


@contextmanager
def compiled_pieces() -> Iterator[None]:
    """Inside the block, pieces on a GPU are worked on by compiled code: two kernels instead of eight."""
    token = _COMPILES.set(True)
    try:
        yield
    finally:
        _COMPILES.reset(token)


def mean_cross_entropy(
    logits: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], *, ignored: int
) -> Float[Tensor, ""]:
    """Mean over the rows whose label is not ``ignored``, in nats; float32 inside, whatever type the logits have.

    Nothing in it makes the host wait for the device. NaN where every row is ignored, as torch has it.
    """
    loss: Tensor = _MeanCrossEntropy.apply(logits, labels, ignored)  # type: ignore[no-untyped-call]
    return loss


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        counted = labels != ignored
        weights = counted / counted.sum()
        # A row that is not counted needs some label that exists.
        labels = labels.where(counted, 0)
        total = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        # The backward pass runs in a thread that knows nothing of this one's context.
        ctx.compiles = _COMPILES.get() and logits.is_cuda
        piece = _compiled(_piece) if ctx.compiles else _piece
        # Under autocast its functions would choose their own types.
        with torch.autocast(logits.device.type, enabled=False):
            for start in range(0, len(logits), rows := _rows(logits)):
                part = slice(start, start + rows)
                out = None if gradient is None else gradient[part]
                total += piece(logits[part], labels[part], weights[part], out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = _compiled(_scaled) if ctx.compiles else _scaled
        return scaled(gradient, outer[0]), None, None


def _rows(logits: Float[Tensor, "rows classes"]) -> int:
    """Rows of a piece: a power of two, so that a batch is most often cut into equal ones."""
    return 1 << max(0, (_PIECE // logits.shape[1]).bit_length() - 1)


def _piece(logits: Tensor, labels: Tensor, weights: Tensor, gradient: Tensor | None) -> Tensor:
    """The weighed loss of some rows; its gradient is written to ``gradient``."""
    raised = logits.float()
    normaliser = raised.logsumexp(1, keepdim=True)
    loss = ((normaliser - raised.gather(1, labels[:, None])).squeeze(1) * weights).sum()
    if gradient is not None:
        classes = torch.arange(logits.shape[1], device=logits.device)
        soft = (raised - normaliser).exp() - (classes == labels[:, None]).float()
        gradient.copy_(soft * weights[:, None])
    return loss


def _scaled(gradient: Tensor, by: Tensor) -> Tensor:
    return (gradient * by).to(gradient.dtype)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)
