"""Published methods of low-rank compression behind one interface: a way to factorise and a way to allocate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from torch import nn

from rank_search.allocation import Allocator, Floats
from rank_search.baselines import rules
from rank_search.baselines.measured import component_changes, sensitivities, untrained_loss
from rank_search.factors.bank import tails
from rank_search.factors.decompose import Factors
from rank_search.factors.gradients import mean_gradients
from rank_search.model.targets import Target
from rank_search.preparing import Prepared
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankMap, RankSpace
from rank_search.spec import Allocation, Method
from rank_search.study.five_types import EVALUATIONS, five_types
from rank_search.task import Examples

SEARCH_BLOCKS = 4
"""Calibration blocks on which the rules that measure many rank maps score them."""


@dataclass(frozen=True, slots=True)
class PublishedMethod:
    """A published method.

    Attributes:
        name: in tables.
        factors: the metric in which it factorises.
        allocation: its rule from a budget to a rank map.
        source: the paper.
    """

    name: str
    factors: Method
    allocation: Allocation
    source: str


_PAPERS: tuple[PublishedMethod, ...] = (
    PublishedMethod("svd", "svd", "uniform", "truncated SVD, the same fraction for all layers"),
    PublishedMethod("fwsvd", "fwsvd", "uniform", "Hsu et al., Language model compression with weighted low-rank, 2022"),
    PublishedMethod("asvd", "asvd", "asvd", "Yuan et al., ASVD: Activation-aware SVD for compressing LLMs, 2023"),
    PublishedMethod("svd-llm", "whitened", "uniform", "Wang et al., SVD-LLM: Truncation-aware SVD, 2024 (whitening)"),
    PublishedMethod("svd-llm-v2", "whitened", "svd-llm-v2", "Wang et al., SVD-LLM V2, 2025"),
    PublishedMethod("zs-svd", "whitened", "zs-svd", "Abbasi et al., Zero Sum SVD, 2026"),
    PublishedMethod("io-svd", "kfac", "io-svd", "Abbasi et al., IO-SVD: Input-output whitened SVD, 2026"),
    PublishedMethod("bolaco", "whitened", "bolaco", "Ji et al., Adaptive feature-based low-rank compression, 2024"),
)
METHODS: Mapping[str, PublishedMethod] = {method.name: method for method in _PAPERS}
"""The methods by name. Without what comes after truncation in some of them (updates of the factors, remapping to eight
bits), and with the Fisher information of labels sampled from the model where a paper takes the text's own or the KL
divergence over the most probable tokens."""


class Allocations:
    """Every allocation rule on one set of factors; what a rule has to measure on the model is measured once.

    Args:
        factors: of the study's bank, the gains of its layers in them. Where they hold all components of a matrix, the
            rules by gradients look at each.
        calibration: where losses and gradients are measured.
        evaluations: of Bolaco's search, at each kept fraction.
        search_blocks: the first calibration blocks, on which ASVD and Bolaco score rank maps.
        seed: of Bolaco's search.
    """

    def __init__(
        self,
        space: RankSpace,
        model: nn.Module,
        targets: Sequence[Target],
        factors: Mapping[str, Factors],
        calibration: Examples,
        *,
        batch_blocks: int,
        evaluations: int = EVALUATIONS,
        search_blocks: int = SEARCH_BLOCKS,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        self._model = model
        self._targets = targets
        self._factors = factors
        self._calibration = calibration
        self._batch_blocks = batch_blocks
        self._evaluations = evaluations
        self._seed = seed
        self._progress = progress
        self._tails = tails(factors)
        self._allocator = Allocator(space, self._tails)
        self._loss = untrained_loss(
            model, targets, factors, calibration[:search_blocks], batch_blocks=min(batch_blocks, search_blocks)
        )

    @classmethod
    def of(cls, prepared: Prepared, *, evaluations: int = EVALUATIONS, search_blocks: int = SEARCH_BLOCKS,
           progress: Progress = SILENT) -> Self:  # fmt: skip
        """The rules on a study's own factors, untrained, and its calibration."""
        spec = prepared.spec
        return cls(
            prepared.space, prepared.model, prepared.targets, prepared.bank.on(prepared.device),
            Examples.of(prepared.loaded.task, prepared.splits.calibration.columns),
            batch_blocks=spec.run.score_batch_blocks, evaluations=evaluations, search_blocks=search_blocks,
            seed=spec.search.seed, progress=progress,
        )  # fmt: skip

    def rank_map(self, allocation: Allocation, kept: float) -> RankMap:
        """The rank map of a rule at a kept fraction of the target layers.

        Raises:
            BudgetError: the kept fraction cannot be met.
            NonFiniteLossError: the model's own loss is not finite.
            StudyFileError: a library that the rule needs is missing.
        """
        return self._rules[allocation](kept)

    def prepare(self, allocation: Allocation) -> None:
        """Measure now what the rule shares among all kept fractions."""
        if allocation == "asvd":
            _ = self._sensitivities
        if allocation in ("zs-svd", "io-svd"):
            _ = self._changes

    @cached_property
    def _rules(self) -> Mapping[Allocation, Callable[[float], RankMap]]:
        allocator = self._allocator
        tokens = len(self._calibration) * self._calibration.sequence_length
        return {
            "closed-form": allocator.closed_form,
            "uniform": allocator.uniform,
            "asvd": lambda kept: rules.asvd(allocator, self._sensitivities, kept),
            "svd-llm-v2": lambda kept: rules.svd_llm_v2(allocator, self._tails, kept, tokens),
            "zs-svd": lambda kept: rules.first_order(allocator, self._changes, kept, zero_sum=True),
            "io-svd": lambda kept: rules.first_order(allocator, self._changes, kept, zero_sum=False),
            "bolaco": lambda kept: five_types(
                allocator, kept, self._loss, evaluations=self._evaluations, seed=self._seed, progress=self._progress
            ),
        }

    @cached_property
    def _sensitivities(self) -> dict[str, dict[float, float]]:
        return sensitivities(self._allocator.space, self._loss, self._progress)

    @cached_property
    def _changes(self) -> dict[str, Floats]:
        gradients = mean_gradients(
            self._model, self._targets, self._calibration, batch_blocks=self._batch_blocks, progress=self._progress
        )
        return component_changes(self._targets, self._factors, gradients)
