"""Validation loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.errors import NonFiniteLossError
from rank_search.model.device import autocast, deterministic
from rank_search.progress import SILENT, Progress


@dataclass(frozen=True, slots=True)
class Score:
    """Loss over a set of blocks: mean in nats per token, its standard error over the blocks, predicted tokens."""

    loss: float
    standard_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows a float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def next_token_loss(
    logits: Float[Tensor, "blocks tokens vocabulary"], ids: Int[Tensor, "blocks tokens"], reduction: str = "mean"
) -> Float[Tensor, "*shape"]:
    """Cross-entropy of every token but a block's first, in float32, given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def score(
    model: nn.Module, blocks: Int[Tensor, "blocks tokens"], *, batch_blocks: int, progress: Progress = SILENT
) -> Score:
    """Validation loss of ``model`` over ``blocks``.

    The standard error is that of the blocks' mean losses, or over the tokens where there is one block only.

    Raises:
        NonFiniteLossError: the loss of some block is NaN or infinite.
    """
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    with deterministic(device), progress.step("scoring", len(blocks)) as step:
        for batch in blocks.split(batch_blocks):
            ids = batch.to(device, torch.long)
            with autocast(device):
                logits = model(input_ids=ids, use_cache=False).logits
            losses.append(next_token_loss(logits, ids, "none").view(len(ids), -1))
            step.advance(len(batch))
    return _summary(torch.cat(losses).double().cpu())


def _summary(losses: Float64[Tensor, "blocks predicted"]) -> Score:
    blocks = losses.mean(1)
    loss = float(blocks.mean())
    if not math.isfinite(loss):
        bad = int((~torch.isfinite(blocks)).sum())
        raise NonFiniteLossError(f"validation loss is {loss} ({bad} of {len(blocks)} blocks are not finite)")
    draws = blocks if len(blocks) > 1 else losses.flatten()
    error = float(draws.std() / math.sqrt(len(draws))) if len(draws) > 1 else 0.0
    return Score(loss, error, losses.numel())
