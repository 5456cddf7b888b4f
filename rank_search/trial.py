"""A trial: rank map → short fine-tune → validation loss → measurement. Knows nothing of Optuna."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import torch

from rank_search.climbing import Rung, make_rungs
from rank_search.compress.alignment import aligned
from rank_search.compress.low_rank import LowRankLinear, compressed
from rank_search.factors.decompose import Factors
from rank_search.measurement import Fidelity, Measurement
from rank_search.metrics.collecting import Metrics
from rank_search.model.device import synchronize
from rank_search.model.gradients import put_back
from rank_search.model.memory import in_halves_if_needed
from rank_search.model.spread import devices_of
from rank_search.preparing import Prepared
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankMap
from rank_search.score import Score, score
from rank_search.task import Examples
from rank_search.train.checkpoints import Checkpoint, Checkpoints
from rank_search.train.finetune import FinetuneResult, finetune


@dataclass(frozen=True, slots=True)
class Applied:
    """The low-rank layers that stand in the model now, the seconds that putting them there took, and the training loss
    of every step since."""

    layers: dict[str, LowRankLinear]
    swap_seconds: float
    train_losses: tuple[float, ...] = ()


class _Seconds(NamedTuple):
    swap: float
    finetune: float
    score: float


_HALVED = "out of memory in {}; once more with every batch in two parts"


class _Round(NamedTuple):
    score: Score
    seconds: _Seconds
    train_losses: tuple[float, ...]


Look = Callable[[RankMap, float], None]
"""What is called with a rank map and its loss while its model stands."""


class Evaluator:
    """Measures rank maps on one model that stays in memory; its dense weights are bit-identical after every trial.

    Args:
        prepared: what is measured, and how.
        look: called with a rank map and its loss once it is scored at the highest fidelity (with folds, at each of
            them), while the fine-tuned model still stands; the seconds that it takes belong to no measurement.
    """

    def __init__(self, prepared: Prepared, look: Look | None = None) -> None:
        self._prepared = prepared
        self._look = look
        self._spec = prepared.spec
        self._device = prepared.device
        self._devices = devices_of(prepared.model)
        self._factors: dict[str, Mapping[str, Factors]] = {}
        task, splits = prepared.loaded.task, prepared.splits
        self._train = Examples.of(task, splits.train.columns).to(self._device)
        self._validation = Examples.of(task, splits.validation.columns).to(self._device)
        self._held_out = splits.held_out
        self._checkpoints = Checkpoints.in_folder(prepared.study.work_dir, prepared.spec.run)
        self._parts = 1
        self._top = Fidelity.from_label(self._spec.highest_fidelity)

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """What :meth:`climb` measures in turn; the last is what :meth:`measure` does."""
        search = self._spec.search
        blocks = sum(len(validation) for _, validation in self._rounds())
        return make_rungs(search.fidelities, search.sliced_tokens, self._top, blocks, self._train.sequence_length)

    def make_ready(self, rank_map: RankMap) -> None:
        """In nested mode, see that the factors of its range are trained, which may take as long as many trials.

        Raises:
            NonFiniteLossError: the training loss became NaN or infinite.
            BankError: the bank cannot be written or fetched, or is damaged.
        """
        self._factors_at(self._prepared.space.kept_of_targets(rank_map))

    def climb(
        self, rank_map: RankMap, known: int = 0, progress: Progress = SILENT
    ) -> Generator[Measurement, None, None]:
        """Measure ``rank_map`` on one rung after another, but for the first ``known``; close it to go no further.

        Every rung below the top scores the first so many blocks of the validation text, the same for all rank maps.

        Raises:
            RankMapError: it does not fit the model.
            NonFiniteLossError: a loss is NaN or infinite.
        """
        self._prepared.space.validate(rank_map)
        below = self.rungs[known:-1]
        if any(rung.fidelity is Fidelity.PREDICTED for rung in below):
            yield self._predicted(rank_map)
        yield from self._sliced(rank_map, [rung for rung in below if rung.fidelity is Fidelity.SLICED], progress)
        yield self.measure(rank_map, progress)

    def _predicted(self, rank_map: RankMap) -> Measurement:
        rise = self._prepared.allocator.predicted_rise(rank_map)
        return self._measurement(
            rank_map, Score(self._dense_loss + rise, 0.0, 0), _Seconds(0, 0, 0), Fidelity.PREDICTED
        )

    @cached_property
    def _dense_loss(self) -> float:
        return self.score().loss

    def _sliced(self, rank_map: RankMap, rungs: Sequence[Rung], progress: Progress) -> Iterator[Measurement]:
        """Score slices of the bank, as they are, on ever more blocks."""
        if not rungs:
            return
        self._reset_memory()
        started = time.perf_counter()
        factors = self._factors_at(self._prepared.space.kept_of_targets(rank_map))
        with compressed(self._prepared.targets, factors, rank_map, trainable=False):
            synchronize(*self._devices)
            swap = time.perf_counter() - started
            for rung in rungs:
                started = time.perf_counter()
                result = Score.mean_of(
                    [self._score(part, progress, metrics=False) for part in self._first(rung.blocks)]
                )
                synchronize(*self._devices)
                seconds = _Seconds(swap, 0.0, time.perf_counter() - started)
                yield self._measurement(rank_map, result, seconds, rung.fidelity)
                swap = 0.0

    def _first(self, blocks: int | None) -> list[Examples]:
        """The first so many validation blocks, of folds as many of each; None: all."""
        rounds = [validation for _, validation in self._rounds()]
        if blocks is None:
            return rounds
        return [validation[: -(-blocks // len(rounds))] for validation in rounds]

    def measure(self, rank_map: RankMap, progress: Progress = SILENT) -> Measurement:
        """Fine-tune and score ``rank_map``; the same rank map gives the same measurement on one device.

        Raises:
            RankMapError: it does not fit the model.
            NonFiniteLossError: the training or the validation loss is NaN or infinite.
        """
        self._prepared.space.validate(rank_map)
        self._reset_memory()
        rounds = [self._round(rank_map, number, *each, progress) for number, each in enumerate(self._rounds())]
        seconds = _Seconds(*map(sum, zip(*(each.seconds for each in rounds), strict=True)))
        train_losses = tuple(map(fmean, zip(*(each.train_losses for each in rounds), strict=True)))
        return self._measurement(
            rank_map, Score.mean_of([each.score for each in rounds]), seconds, self._top, train_losses
        )

    def _rounds(self) -> Iterator[tuple[Examples, Examples]]:
        """Examples to train and to score on: one pair, or one for each fold."""
        if not self._held_out:
            yield self._train, self._validation
        every = torch.arange(len(self._train), device=self._device)
        for rows in self._held_out:
            yield self._train[torch.cat([every[: rows.start], every[rows.stop :]])], self._train[rows]

    def forget(self, rank_map: RankMap) -> None:
        """Remove what was kept of fine-tunes of ``rank_map``: its measurement is stored, or is not wanted any more."""
        for number, _ in enumerate(self._rounds()):
            if (checkpoint := self._checkpoint(rank_map, number)) is not None:
                checkpoint.remove()

    def _checkpoint(self, rank_map: RankMap, number: int) -> Checkpoint | None:
        """Of the fine-tune of a round."""
        spec, splits = self._spec, self._prepared.splits
        kept = self._prepared.space.kept_of_targets(rank_map)
        return self._checkpoints.of(
            study=spec.name,
            rank_map=rank_map.digest,
            finetune=spec.finetune.model_dump(mode="json"),
            seed=spec.search.seed,
            bank=self._prepared.trial_banks.key_at(kept).digest,
            train=splits.train_digest,
            fold=[number, len(self._held_out)],
        )

    def _round(
        self, rank_map: RankMap, number: int, train: Examples, validation: Examples, progress: Progress
    ) -> _Round:
        started = time.perf_counter()
        with self._applied(rank_map, number, train, progress) as applied:
            synchronize(*self._devices)
            tuned = time.perf_counter()
            result = self._score(validation, progress)
            scored = time.perf_counter()
            if self._look is not None:
                self._look(rank_map, result.loss)
            looked = time.perf_counter()
        synchronize(*self._devices)
        swap = applied.swap_seconds + (time.perf_counter() - looked)
        seconds = _Seconds(swap, tuned - started - applied.swap_seconds, scored - tuned)
        return _Round(result, seconds, applied.train_losses)

    def applied(self, rank_map: RankMap, progress: Progress = SILENT) -> AbstractContextManager[Applied]:
        """The model under ``rank_map``, fine-tuned on all training examples, inside the block; dense after it."""
        return self._applied(rank_map, None, self._train, progress)

    @contextmanager
    def _applied(
        self, rank_map: RankMap, number: int | None, train: Examples, progress: Progress
    ) -> Iterator[Applied]:  # fmt: skip
        """The round ``number`` of a trial; None: none, and nothing is kept of it."""
        checkpoint = None if number is None else self._checkpoint(rank_map, number)
        with ExitStack() as applied:

            def tune(parts: int) -> Applied:
                started = time.perf_counter()
                trainable = number is None or self._trains  # outside of a trial layers may be saved, or trained on
                with ExitStack() as attempt:  # one that fails leaves the model dense for the next
                    layers = attempt.enter_context(self._compressed(rank_map, trainable=trainable))
                    synchronize(*self._devices)
                    swap_seconds = time.perf_counter() - started
                    tuned = self._finetuned(rank_map, layers, train, parts, checkpoint, progress)
                    applied.push(attempt.pop_all())
                return Applied(layers, swap_seconds, tuned.losses)

            yield in_halves_if_needed(
                tune, self._spec.finetune.batch_blocks, lambda: self._halve("the fine-tune", progress)
            )

    @contextmanager
    def _compressed(self, rank_map: RankMap, *, trainable: bool) -> Iterator[dict[str, LowRankLinear]]:
        factors = self._factors_at(self._prepared.space.kept_of_targets(rank_map))
        with (
            self._kept_if_trained(),
            compressed(self._prepared.targets, factors, rank_map, trainable=trainable) as layers,
        ):
            yield layers

    @cached_property
    def _trains(self) -> bool:
        """Whether a trial has steps of its own."""
        return self._spec.finetune.steps_for(self._train.sequence_length) > 0

    def _finetuned(
        self, rank_map: RankMap, layers: Mapping[str, LowRankLinear], train: Examples, parts: int,
        checkpoint: Checkpoint | None, progress: Progress,
    ) -> FinetuneResult:  # fmt: skip
        space = self._prepared.space
        return finetune(
            self._prepared.model,
            list(layers.values()),
            train,
            self._spec.finetune.at(space.kept_of_targets(rank_map), space.storage),
            seed=self._spec.search.seed,
            targets=self._prepared.targets,
            progress=progress,
            parts=parts,
            checkpoint=checkpoint,
        )

    def _halve(self, where: str, progress: Progress) -> None:
        self._parts = 2
        progress.say(_HALVED.format(where))

    def _factors_at(self, kept: float) -> Mapping[str, Factors]:
        """What a rank map of this kept fraction slices."""
        bank = self._prepared.trial_banks.at(kept)
        if bank.key.digest not in self._factors:
            self._factors[bank.key.digest] = bank.on({t.name: t.device for t in self._prepared.targets})
        return self._factors[bank.key.digest]

    def score(self, progress: Progress = SILENT) -> Score:
        """Validation loss of the model as it stands: inside :meth:`applied` the compressed one, else the dense one.

        Of folds the mean, each scored by the same model.
        """
        return Score.mean_of([self._score(validation, progress) for _, validation in self._rounds()])

    def _score(self, examples: Examples, progress: Progress, *, metrics: bool = True) -> Score:
        names, loaded = self._spec.validation.metrics if metrics else (), self._prepared.loaded
        blocks = self._spec.run.score_batch_blocks

        def attempt(parts: int) -> Score:
            return score(
                loaded.model,
                examples,
                batch_blocks=-(-blocks // parts),
                observer=Metrics(names, loaded.task, loaded.tokenizer) if names else None,
                progress=progress,
            )

        with aligned(loaded.model):
            return in_halves_if_needed(attempt, blocks, lambda: self._halve("scoring", progress))

    def _measurement(
        self, rank_map: RankMap, result: Score, seconds: _Seconds, fidelity: Fidelity,
        train_losses: tuple[float, ...] = (),
    ) -> Measurement:  # fmt: skip
        space = self._prepared.space
        return Measurement(
            loss=result.loss,
            standard_error=result.standard_error,
            num_params=space.num_params(rank_map),
            target_params=space.target_params(rank_map),
            kept_of_targets=space.kept_of_targets(rank_map),
            kept_of_model=space.kept_of_model(rank_map),
            fidelity=fidelity,
            tokens=result.tokens,
            swap_seconds=seconds.swap,
            finetune_seconds=seconds.finetune,
            score_seconds=seconds.score,
            peak_memory=self._peak_memory(),
            metrics=result.metrics,
            fold_losses=result.fold_losses,
            block_losses=result.block_losses,
            train_losses=train_losses,
            parts=self._parts,
        )

    def _kept_if_trained(self) -> AbstractContextManager[None]:
        """With ``train = "all"`` the dense parameters are trained along: keep a copy and put it back."""
        all_trained = self._spec.finetune.train == "all" and self._trains
        return put_back(self._prepared.model) if all_trained else nullcontext()

    def _reset_memory(self) -> None:
        self._parts = 1
        if self._device.type == "cuda":
            for device in self._devices:
                torch.cuda.reset_peak_memory_stats(device)

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return sum(map(torch.cuda.max_memory_allocated, self._devices))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux
