"""From a study file to everything a trial needs: model, target layers, token blocks, factor bank."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel

from rank_search.allocation import Allocator
from rank_search.data.blocks import check_length
from rank_search.data.making import ExampleMaker, maker
from rank_search.data.splits import Splits
from rank_search.factors.bank import BankKey, FactorBank, Piece, TrialBanks, Turn, open_or_build
from rank_search.factors.build import Build, BuildTimes
from rank_search.factors.decompose import Factors
from rank_search.factors.remote import RemoteBanks
from rank_search.metrics.collecting import check_metrics
from rank_search.model.device import resolve_devices
from rank_search.model.load import LoadedModel, load_model
from rank_search.model.memory import in_halves_if_needed
from rank_search.model.targets import Target, find_targets, rank_space, told_of_other_matrices
from rank_search.progress import SILENT, Progress
from rank_search.ranges import ranges_of, shared_steps
from rank_search.ranks import RankSpace
from rank_search.spec import FinetuneSpec, StudyFile, StudySpec
from rank_search.task import Examples
from rank_search.train.checkpoints import Checkpoints
from rank_search.train.nested import nested_finetune, sampled_rank_maps


@dataclass(frozen=True)
class PrepareTimes:
    """Seconds of each step of :func:`prepare`; statistics, decomposition and write are 0 where the bank was found."""

    load: float
    blocks: float
    statistics: float
    decomposition: float
    bank: float
    """Of opening the bank and, where it was built, of writing it."""
    nested: float
    """Of the nested fine-tune, or of finding it made; 0 where that waits until it is asked for."""


@dataclass(frozen=True)
class Prepared:
    """A study's model, target layers, token blocks and factor bank."""

    study: StudyFile
    loaded: LoadedModel
    device: torch.device
    """That of the model's input and output."""
    targets: tuple[Target, ...]
    space: RankSpace
    splits: Splits
    bank: FactorBank
    """Factors as decomposed, scaled by their layers' gains, and their predicted rises."""
    trial_banks: TrialBanks
    """What trials slice: ``bank``, or in nested mode its fine-tuned factors, range by range."""
    built: bool
    """The bank was made now, not found."""
    times: PrepareTimes = field(compare=False)

    @property
    def spec(self) -> StudySpec:
        """The study file's tables."""
        return self.study.spec

    @property
    def model(self) -> PreTrainedModel:
        """The dense model."""
        return self.loaded.model

    @cached_property
    def allocator(self) -> Allocator:
        """Allocations by the bank's predicted rises."""
        return Allocator(self.space, self.bank.tails())


def prepare(
    study: StudyFile,
    *,
    progress: Progress = SILENT,
    nested: bool = True,
    check: Callable[[RankSpace, str], object] = lambda _space, _weights_digest: None,
    check_text: Callable[[Splits], object] = lambda _splits: None,
    turn: Turn | None = None,
) -> Prepared:
    """Load the model, find its target layers, cut the text into blocks, and open or build the factor bank.

    In nested mode the banks of all its ranges are made, too, or (``nested=False``) each when it is first asked for.
    ``check`` may refuse the rank space or the digest of the weights, ``check_text`` the blocks, before anything is
    computed or written. ``turn`` has the workers of several hosts build a bank once; without it, those of this host do.

    Raises:
        InputError: what the study file asks for is not there or does not fit together.
        DecompositionError: naming the layer whose factors cannot be computed.
        BankError: the bank cannot be written or fetched, or is damaged.
    """
    spec = study.spec
    if spec.run.threads is not None:
        torch.set_num_threads(spec.run.threads)
    started = time.perf_counter()
    devices = resolve_devices(spec.run.device, spec.run.gpus_per_model or 1)
    check_metrics(spec.validation.metrics)
    with progress.step("model"):
        loaded = load_model(spec.model, study.folder, *devices)
    if len(devices) > 1:
        progress.say(f"the model is spread over {len(devices)} GPUs; its steps are neither compiled nor recorded")
    targets = find_targets(loaded.model, spec.targets)
    if told := told_of_other_matrices(loaded.model):
        progress.say(told)
    space = rank_space(loaded.model, targets, spec.targets)
    check(space, loaded.weights_digest)
    check_length(spec.data.sequence_length, loaded.max_length)
    Checkpoints.in_folder(study.work_dir, spec.run).remove_stale()
    loaded_at = time.perf_counter()
    splits = maker_for(loaded).splits(spec.data, study.folder, study.work_dir, progress, spec.validation.folds)
    check_text(splits)
    blocks_at = time.perf_counter()
    times = BuildTimes()
    bank = _bank(study, loaded, targets, space, splits, times, progress, turn)
    bank_at = time.perf_counter()
    trial_banks, nested_seconds = TrialBanks.single(bank), 0.0
    if spec.finetune.mode == "nested":
        trial_banks = _nested_banks(study, loaded, targets, space, splits, bank, progress, turn)
        if nested:
            _ = trial_banks.banks
            nested_seconds = time.perf_counter() - bank_at
    return Prepared(
        study, loaded, devices[0], targets, space, splits, bank, trial_banks, times.decomposition > 0,
        PrepareTimes(
            loaded_at - started, blocks_at - loaded_at, times.statistics, times.decomposition,
            bank_at - blocks_at - times.statistics - times.decomposition, nested_seconds,
        ),
    )  # fmt: skip


def maker_for(loaded: LoadedModel) -> ExampleMaker:
    """What makes the examples of a model's task."""
    known: Mapping[str, int | str] = loaded.model.config.label2id or {}
    return maker(loaded.task.name, loaded.tokenizer, {name: int(number) for name, number in known.items()})


def _bank(
    study: StudyFile, loaded: LoadedModel, targets: Sequence[Target], space: RankSpace, splits: Splits,
    times: BuildTimes, progress: Progress, turn: Turn | None,
) -> FactorBank:  # fmt: skip
    """Open the study's factor bank, or build it."""
    spec = study.spec
    key = BankKey.of(
        loaded.revision, loaded.weights_digest, splits.calibration_digest, spec.factors, space,
        splits.recalibration_digest,
    )  # fmt: skip
    batch_blocks = spec.run.calibration_batch_blocks or spec.run.score_batch_blocks
    gib = spec.run.statistics_memory

    def build() -> Iterator[Piece]:
        return Build(
            loaded.model, targets, Examples.of(loaded.task, splits.calibration.columns), spec.factors, space,
            recalibration=Examples.of(loaded.task, splits.recalibration.columns), batch_blocks=batch_blocks,
            memory=None if gib is None else int(gib * 2**30), progress=progress, times=times,
        ).pieces()  # fmt: skip

    device = next(loaded.model.parameters()).device.type
    made = {"model": spec.model.source, "device": device, "calibration_blocks": len(splits.calibration)}
    return open_or_build(
        study.work_dir, key, build, made,
        on_wait=lambda: progress.say("another process is building the factor bank; waiting"), turn=turn,
        remote=_remote(spec, progress),
    )  # fmt: skip


def _remote(spec: StudySpec, progress: Progress) -> RemoteBanks | None:
    return None if spec.run.bank_url is None else RemoteBanks(spec.run.bank_url, progress)


def _nested_banks(
    study: StudyFile, loaded: LoadedModel, targets: Sequence[Target], space: RankSpace, splits: Splits,
    bank: FactorBank, progress: Progress, turn: Turn | None,
) -> TrialBanks:  # fmt: skip
    """The banks of the study's nested fine-tune, each of which is opened, or trained, when it is first asked for.

    Ranges are trained apart from each other: what is finished stays when the rest is interrupted, and processes that
    measure models of several sizes at once (one a GPU, say) train several at once.
    """
    spec = study.spec
    allocator = Allocator(space, bank.tails())
    ranges = ranges_of(spec, space)
    steps = shared_steps(ranges, spec.finetune.nested_steps)
    examples = Examples.of(loaded.task, splits.train.columns)
    factors = {target.name: bank[target.name] for target in targets}
    checkpoints = Checkpoints.in_folder(study.work_dir, spec.run)
    remote = _remote(spec, progress)

    def finetune_of(number: int) -> FinetuneSpec:
        at = spec.finetune.at(sum(ranges[number]) / 2, space.storage)
        return at.model_copy(update={"nested_steps": steps[number]})

    def key_of(number: int) -> BankKey:
        told = {
            "finetune": finetune_of(number).model_dump(exclude={"steps", "tokens", "nested_ranges"}),
            "search": spec.search.model_dump(include={"seed", "multiplier_range"}),
            "range": ranges[number],
            "train": splits.train_digest,
            # The rank maps of the steps leave these as they are, and have ranks of these multiples.
            **({"frozen": space.frozen} if space.frozen else {}),
            **({"multiple": space.multiple} if space.multiple > 1 else {}),
        }
        tuned = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return dataclasses.replace(bank.key, tuned=tuned)

    def make(number: int) -> FactorBank:
        low, high = ranges[number]
        finetune, key = finetune_of(number), key_of(number)

        def build() -> Mapping[str, Factors]:
            progress.say(f"nested fine-tune {number + 1} of {len(ranges)}: kept fractions {low:.2f} to {high:.2f}")
            return in_halves_if_needed(
                lambda parts: nested_finetune(
                    loaded.model, targets, factors, sampled_rank_maps(allocator, spec.search, (low, high)),
                    examples, finetune, seed=spec.search.seed, progress=progress, parts=parts, checkpoint=checkpoint,
                ),
                finetune.batch_blocks,
                lambda: progress.say("out of memory in the nested fine-tune; once more with every batch in two parts"),
            )  # fmt: skip

        checkpoint = checkpoints.of(bank=key.digest)
        tuned_bank = open_or_build(study.work_dir, key, build, bank.made, tell, turn, remote)
        if checkpoint is not None:
            checkpoint.remove()
        return tuned_bank

    def tell() -> None:
        progress.say("another process is making a nested fine-tune; waiting")

    return TrialBanks([high for _, high in ranges], [key_of(number) for number in range(len(ranges))], make)
