"""What the ways to compress and to fine-tune of bench_tries.py share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.allocation import Allocator
from rank_search.compress.low_rank import compressed
from rank_search.factors.bank import tails
from rank_search.factors.build import build_factors
from rank_search.factors.decompose import Factors
from rank_search.model.gradients import put_back
from rank_search.preparing import Prepared
from rank_search.ranks import RankMap
from rank_search.score import score
from rank_search.spec import FinetuneSpec
from rank_search.task import Batch, Examples, Task
from rank_search.train.finetune import finetune

DENSE_RATE = 3e-4
"""Of AdamW for what is no factor."""


class Bench:
    """One study, its texts, and its dense model, which every try leaves as it was."""

    def __init__(self, prepared: Prepared, steps: int) -> None:
        task, splits = prepared.loaded.task, prepared.splits
        self.prepared, self.steps = prepared, steps
        self.model, self.targets = prepared.model, prepared.targets
        self.train = Examples.of(task, splits.train.columns)
        self.validation = Examples.of(task, splits.validation.columns)
        self.calibration = Examples.of(task, splits.calibration.columns)
        self.recalibration = Examples.of(task, splits.recalibration.columns)
        self.bank = {target.name: prepared.bank[target.name] for target in self.targets}
        self.batch = prepared.spec.run.score_batch_blocks

    def spec(self, kept: float, **changes: object) -> FinetuneSpec:
        """The study's fine-tune of a rank map that keeps so much."""
        own = {"steps": self.steps, "dense_learning_rate": DENSE_RATE, **changes}
        return self.prepared.spec.finetune.model_copy(update=own).at(kept, self.prepared.space.storage)

    def closed_form(self, factors: Mapping[str, Factors], kept: float) -> RankMap:
        """By the predicted rises of these factors."""
        return Allocator(self.prepared.space, tails(factors)).closed_form(kept)

    def built(self) -> dict[str, Factors]:
        """What the package makes of the model as it is now."""
        p = self.prepared
        return build_factors(
            self.model, self.targets, self.calibration, p.spec.factors, p.space,
            recalibration=self.recalibration, batch_blocks=self.batch,
        )  # fmt: skip

    def perplexity(self, examples: Examples | None = None) -> float:
        """Of the model as it is now, on the validation text."""
        return score(self.model, examples or self.validation, batch_blocks=self.batch).perplexity

    def after(
        self, factors: Mapping[str, Factors], rank_map: RankMap, spec: FinetuneSpec, seed: int,
        examples: Examples | None = None,
    ) -> float:  # fmt: skip
        """Perplexity after a fine-tune, or without one where ``spec`` has no steps."""
        with put_back(self.model), compressed(self.targets, factors, rank_map) as layers:
            finetune(self.model, list(layers.values()), examples or self.train, spec, seed=seed)
            return self.perplexity()


@dataclass(frozen=True)
class Distilling(Task):
    """A task whose training loss is, by ``share``, the divergence from a teacher's predictions."""

    teacher: nn.Module | None = None
    share: float = 1.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats per prediction."""
        assert self.teacher is not None
        logits, labels = self.predictions(model, batch)
        with torch.no_grad():
            taught, _ = self.predictions(self.teacher, batch)
        divergence = F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean")
        return self.share * divergence + (1 - self.share) * F.cross_entropy(logits, labels)
