"""Cross-entropy for training, in pieces: no float32 copy of all logits is ever held.

For a vocabulary of 50 000 the logits of a batch are larger than the rest of a step's memory, and torch's own function
passes over four such tensors in float32. Here a piece of rows is raised to float32, and its gradient (softmax minus
one-hot) is written down in the logits' own type at once.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PIECE = 1 << 24
"""Logits in a piece: 64 MiB in float32, which the caches of a large GPU hold."""


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
        rows = max(1, _PIECE // logits.shape[1])
        total = torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        # Under autocast its functions would choose their own types.
        with torch.autocast(logits.device.type, enabled=False):
            for start in range(0, len(logits), rows):
                piece = slice(start, start + rows)
                # A row that is not counted needs some label that exists.
                label = labels[piece].where(counted[piece], 0)
                row = torch.arange(len(label), device=label.device)
                logs = logits[piece].float().log_softmax(1)
                right = logs[row, label]
                total -= (right * weights[piece]).sum()
                if gradient is not None:
                    soft = logs.exp_()
                    soft[row, label] = right.exp() - 1
                    gradient[piece] = soft.mul_(weights[piece][:, None])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None
