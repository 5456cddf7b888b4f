"""A trial: rank map → short fine-tune → validation loss → measurement. Knows nothing of Optuna."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rank_search.compress.alignment import aligned
from rank_search.compress.low_rank import LowRankLinear, compressed
from rank_search.factors.decompose import Factors
from rank_search.measurement import Fidelity, Measurement
from rank_search.metrics.collecting import Metrics
from rank_search.model.device import synchronize
from rank_search.preparing import Prepared
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankMap
from rank_search.score import Score, score
from rank_search.task import Examples
from rank_search.train.finetune import finetune


@dataclass(frozen=True, slots=True)
class Applied:
    """The low-rank layers that stand in the model now, and the seconds that putting them there took."""

    layers: dict[str, LowRankLinear]
    swap_seconds: float


class _Seconds(NamedTuple):
    swap: float
    finetune: float
    score: float


class Evaluator:
    """Measures rank maps on one model that stays in memory; its dense weights are bit-identical after every trial."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._spec = prepared.spec
        self._device = prepared.device
        self._factors: dict[str, Mapping[str, Factors]] = {}
        task, splits = prepared.loaded.task, prepared.splits
        self._train = Examples.of(task, splits.train.columns).to(self._device)
        self._validation = Examples.of(task, splits.validation.columns).to(self._device)
        self._held_out = splits.held_out

    def measure(self, rank_map: RankMap, progress: Progress = SILENT) -> Measurement:
        """Fine-tune and score ``rank_map``; the same rank map gives the same measurement on one device.

        Raises:
            RankMapError: it does not fit the model.
            NonFiniteLossError: the training or the validation loss is NaN or infinite.
        """
        self._prepared.space.validate(rank_map)
        self._reset_peak_memory()
        rounds = [self._round(rank_map, *examples, progress) for examples in self._rounds()]
        seconds = _Seconds(*map(sum, zip(*(spent for _, spent in rounds), strict=True)))
        return self._measurement(rank_map, Score.mean_of([result for result, _ in rounds]), seconds)

    def _rounds(self) -> Iterator[tuple[Examples, Examples]]:
        """Examples to train and to score on: one pair, or one for each fold."""
        if not self._held_out:
            yield self._train, self._validation
        every = torch.arange(len(self._train), device=self._device)
        for rows in self._held_out:
            yield self._train[torch.cat([every[: rows.start], every[rows.stop :]])], self._train[rows]

    def _round(
        self, rank_map: RankMap, train: Examples, validation: Examples, progress: Progress
    ) -> tuple[Score, _Seconds]:
        started = time.perf_counter()
        with self._applied(rank_map, train, progress) as applied:
            synchronize(self._device)
            tuned = time.perf_counter()
            result = self._score(validation, progress)
            scored = time.perf_counter()
        synchronize(self._device)
        swap = applied.swap_seconds + (time.perf_counter() - scored)
        return result, _Seconds(swap, tuned - started - applied.swap_seconds, scored - tuned)

    def applied(self, rank_map: RankMap, progress: Progress = SILENT) -> AbstractContextManager[Applied]:
        """The model under ``rank_map``, fine-tuned on all training examples, inside the block; dense after it."""
        return self._applied(rank_map, self._train, progress)

    @contextmanager
    def _applied(self, rank_map: RankMap, train: Examples, progress: Progress) -> Iterator[Applied]:
        kept = self._prepared.space.kept_of_targets(rank_map)
        started = time.perf_counter()
        factors = self._factors_at(kept)
        with self._kept_if_trained(), compressed(self._prepared.targets, factors, rank_map) as layers:
            synchronize(self._device)
            applied = Applied(layers, time.perf_counter() - started)
            finetune(
                self._prepared.model,
                list(layers.values()),
                train,
                self._spec.finetune.at(kept),
                seed=self._spec.search.seed,
                progress=progress,
            )
            yield applied

    def _factors_at(self, kept: float) -> Mapping[str, Factors]:
        """What a rank map of this kept fraction slices."""
        bank = self._prepared.trial_banks.at(kept)
        if bank.key.digest not in self._factors:
            self._factors[bank.key.digest] = bank.on(self._device)
        return self._factors[bank.key.digest]

    def score(self, progress: Progress = SILENT) -> Score:
        """Validation loss of the model as it stands: inside :meth:`applied` the compressed one, else the dense one.

        Of folds the mean, each scored by the same model.
        """
        return Score.mean_of([self._score(validation, progress) for _, validation in self._rounds()])

    def _score(self, examples: Examples, progress: Progress) -> Score:
        names, loaded = self._spec.validation.metrics, self._prepared.loaded
        with aligned(loaded.model):
            return score(
                loaded.model,
                examples,
                batch_blocks=self._spec.run.score_batch_blocks,
                observer=Metrics(names, loaded.task, loaded.tokenizer) if names else None,
                progress=progress,
            )

    def _measurement(self, rank_map: RankMap, result: Score, seconds: _Seconds) -> Measurement:
        space = self._prepared.space
        tuned = self._spec.finetune.steps_for(self._train.sequence_length) > 0
        return Measurement(
            loss=result.loss,
            standard_error=result.standard_error,
            num_params=space.num_params(rank_map),
            target_params=space.target_params(rank_map),
            kept_of_targets=space.kept_of_targets(rank_map),
            kept_of_model=space.kept_of_model(rank_map),
            fidelity=Fidelity.TUNED if tuned else Fidelity.SLICED,
            tokens=result.tokens,
            swap_seconds=seconds.swap,
            finetune_seconds=seconds.finetune,
            score_seconds=seconds.score,
            peak_memory=self._peak_memory(),
            metrics=result.metrics,
            fold_losses=result.fold_losses,
        )

    @contextmanager
    def _kept_if_trained(self) -> Iterator[None]:
        """With ``train = "all"`` the dense parameters are trained along: keep a copy and put it back."""
        if self._spec.finetune.train != "all":
            yield
            return
        parameters = list(self._prepared.model.parameters())
        copies: list[Tensor] = [parameter.detach().clone() for parameter in parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, copy in zip(parameters, copies, strict=True):
                    parameter.copy_(copy)

    def _reset_peak_memory(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux
