"""Validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.errors import NonFiniteLossError
from rank_search.model.device import autocast, deterministic
from rank_search.progress import SILENT, Progress
from rank_search.task import IGNORED, Batch, Examples


@dataclass(frozen=True, slots=True)
class Score:
    """Loss over a set of examples: mean in nats per prediction, its standard error, number of predictions.

    ``metrics`` maps names to values; ``fold_losses`` are those of the folds that the loss is the mean of, if it is one,
    and ``block_losses``, else, those of the examples, weighed so that the loss is their mean.
    """

    loss: float
    standard_error: float
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    fold_losses: tuple[float, ...] = ()
    block_losses: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows a float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @classmethod
    def mean_of(cls, folds: Sequence[Score]) -> Score:
        """Of several folds, with the standard error of their mean; of a single score, that score."""
        if len(folds) == 1:
            return folds[0]
        losses = [fold.loss for fold in folds]
        return cls(
            fmean(losses),
            stdev(losses) / math.sqrt(len(losses)),
            sum(fold.tokens for fold in folds),
            {name: fmean(fold.metrics[name] for fold in folds) for name in folds[0].metrics},
            tuple(losses),
        )


@runtime_checkable
class Observer(Protocol):
    """Takes in every batch that is scored."""

    def observe(
        self,
        model: nn.Module,
        batch: Batch,
        logits: Float[Tensor, "predictions classes"],
        labels: Int[Tensor, " predictions"],
        losses: Float[Tensor, " predictions"],
    ) -> None:
        """The model's inputs, its output, the labels, some of them ``IGNORED``, and the losses, 0 at those."""

    def values(self) -> dict[str, float]:
        """What came of all batches."""


@torch.no_grad()
def score(
    model: nn.Module,
    examples: Examples,
    *,
    batch_blocks: int,
    observer: Observer | None = None,
    progress: Progress = SILENT,
) -> Score:
    """Validation loss of ``model`` over ``examples``, a mean over all predictions, and what ``observer`` makes of them.

    The standard error is over examples (blocks), or over the predictions where there is one example only.

    Raises:
        NonFiniteLossError: the loss of some block is NaN or infinite.
    """
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    with deterministic(device), progress.step("scoring", len(examples)) as step:
        for batch in examples.batches(batch_blocks, device):
            with autocast(device):
                logits, labels = examples.task.predictions(model, batch)
            each = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
            if observer is not None:
                observer.observe(model, batch, logits, labels, each)
            losses.append(each.view(len(batch["input_ids"]), -1))
            counts.append((labels != IGNORED).view_as(losses[-1]).sum(1))
            step.advance(len(losses[-1]))
    metrics = {} if observer is None else observer.values()
    return _summary(torch.cat(losses).double().cpu(), torch.cat(counts).cpu(), metrics)


def _summary(
    losses: Float64[Tensor, "examples positions"], counts: Int64[Tensor, " examples"], metrics: Mapping[str, float]
) -> Score:
    """From the losses of single predictions, 0 where there is none, and the number of predictions an example."""
    means = losses.sum(1) / counts
    weights = counts / counts.double().mean()
    loss = float((weights * means).mean())
    if not math.isfinite(loss):
        bad = int((~torch.isfinite(means)).sum())
        raise NonFiniteLossError(f"validation loss is {loss} ({bad} of {len(means)} blocks are not finite)")
    # Of a ratio of two means, which for examples of one length is that of a mean.
    draws = weights * means - (weights - 1) * loss
    each = tuple(draws.tolist())
    if len(draws) == 1:
        draws = losses.flatten()
    error = float(draws.std() / math.sqrt(len(draws))) if len(draws) > 1 else 0.0
    return Score(loss, error, int(counts.sum()), metrics, block_losses=each)
