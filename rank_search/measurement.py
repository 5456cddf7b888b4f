"""What one evaluation of a rank map returned. Pure: no torch, no Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import stdev

from rank_search.errors import NonFiniteLossError


class Fidelity(IntEnum):
    """How a loss was obtained, in ascending order of trust."""

    PREDICTED = 0
    """Closed form, no evaluation."""
    SLICED = 1
    """Evaluated without training of its own."""
    TUNED = 2
    """Evaluated after its own short fine-tune."""
    CONFIRMED = 3
    """Long fine-tune, test split."""

    @property
    def label(self) -> str:
        """The name in files, tables and the database."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Fidelity:
        """Inverse of :attr:`label`."""
        return cls[label.upper()]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One evaluation of one rank map.

    Attributes:
        loss: validation loss, nats per token, or per example of a classifier; always finite.
        standard_error: of ``loss`` over the validation blocks or, where there are folds, over these.
        num_params: parameters of the whole compressed model, in the study's storage form.
        target_params: parameters of its target layers.
        kept_of_targets: kept fraction of the target layers.
        kept_of_model: kept fraction of the whole model.
        fidelity: how ``loss`` was obtained.
        tokens: tokens (or examples) that ``loss`` is a mean over.
        swap_seconds, finetune_seconds, score_seconds: where the trial's time went.
        peak_memory: bytes on the accelerator, or of the process on a CPU.
        metrics: values by name; of folds their mean.
        fold_losses: of every fold, whose mean ``loss`` is; empty where there are none.
        block_losses: of every validation block, weighed so that ``loss`` is their mean; kept apart from the rest, for
            comparisons on the same blocks, and empty where there are folds.
        train_losses: of every step of the trial's own fine-tune, nats per prediction, of folds their mean; kept apart
            likewise, and empty where there is none.
        parts: in so many every batch had to be cut, of the fine-tune or of scoring, because memory ran out; 1: in none.
    """

    loss: float
    standard_error: float
    num_params: int
    target_params: int
    kept_of_targets: float
    kept_of_model: float
    fidelity: Fidelity
    tokens: int
    swap_seconds: float = 0.0
    finetune_seconds: float = 0.0
    score_seconds: float = 0.0
    peak_memory: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    fold_losses: tuple[float, ...] = ()
    block_losses: tuple[float, ...] = field(default=(), compare=False, repr=False)
    train_losses: tuple[float, ...] = field(default=(), compare=False, repr=False)
    parts: int = 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.loss):
            raise NonFiniteLossError(f"validation loss is {self.loss}")

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def fold_deviation(self) -> float | None:
        """Standard deviation of the loss over the folds; None where there are none."""
        return stdev(self.fold_losses) if self.fold_losses else None

    @property
    def seconds(self) -> float:
        """Seconds of the whole evaluation."""
        return self.swap_seconds + self.finetune_seconds + self.score_seconds
