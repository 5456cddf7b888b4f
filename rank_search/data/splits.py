"""Calibration, training, validation and test blocks that never share text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rank_search.data.apart import check_count, named_sources, refuse_shared_text
from rank_search.data.blocks import Blocks, FastTokenizer, token_blocks
from rank_search.data.examples import ExampleTable
from rank_search.data.sources import Source, Text, read_text
from rank_search.errors import DataError
from rank_search.progress import SILENT, Progress
from rank_search.spec import DataSpec


@dataclass(frozen=True, eq=False)
class Splits:
    """The examples of a study; none is in two of the tables.

    With ``folds``, there are no validation examples: each of that many parts of ``train`` is validation once.
    """

    calibration: ExampleTable
    train: ExampleTable
    validation: ExampleTable
    folds: int | None = None

    @property
    def held_out(self) -> tuple[slice, ...]:
        """The rows of ``train`` that each fold holds out, in order and of equal number as near as can be; or none."""
        count, folds = len(self.train), self.folds or 0
        return tuple(slice(count * fold // folds, count * (fold + 1) // folds) for fold in range(folds))

    @cached_property
    def recalibration(self) -> ExampleTable:
        """What a compressed model's statistics are taken on: training examples, as many as there are for calibration.

        Those for calibration themselves where the training examples are fewer, or are validation too, by folds.
        """
        count = len(self.calibration)
        return self.calibration if self.folds or len(self.train) < count else self.train[:count]

    @cached_property
    def calibration_digest(self) -> str:
        """SHA-256 of the calibration examples."""
        return self.calibration.digest

    @cached_property
    def recalibration_digest(self) -> str:
        """SHA-256 of the examples that a compressed model's statistics are taken on."""
        return self.recalibration.digest

    @cached_property
    def train_digest(self) -> str:
        """SHA-256 of the training examples."""
        return self.train.digest

    @cached_property
    def validation_digest(self) -> str:
        """SHA-256 of the validation examples."""
        return self.validation.digest


def make_splits(
    spec: DataSpec,
    tokenizer: FastTokenizer,
    folder: Path,
    work_dir: Path,
    progress: Progress = SILENT,
    folds: int | None = None,
) -> Splits:
    """Blocks for calibration, fine-tune and validation.

    Calibration blocks come from the start of ``data.train``, training blocks follow. Validation blocks come from
    ``data.validation``, or from the end of ``data.train`` where there is none, unless training blocks are to be cut
    into ``folds``. ``data.test`` is read for one thing alone: to refuse it now where a search would see its text. One
    on the hub is not fetched for that, and is judged by dataset and split.

    Raises:
        DataError: a text is missing or too short, or shares text with another one of the study.
    """
    sources = named_sources(spec, folder)
    texts = {role: read_text(source) for role, source in sources.items() if role != "test" or source.is_here}
    refuse_shared_text(texts)
    text, own = texts["train"], texts.get("validation")
    cutter = _Cutter(tokenizer, spec.sequence_length, work_dir, progress)
    blocks = cutter.blocks(text)
    unit = f"blocks of {spec.sequence_length} tokens"
    cut = cut_train(spec, text.label, len(blocks), unit, cut_validation=own is None, folds=folds)
    calibration, train, validation = (blocks[rows] for rows in cut)
    if own is not None:
        validation = cutter.first(own, "validation", spec.validation_blocks)
    return Splits(_table(calibration), _table(train), _table(validation), folds)


def _table(blocks: Blocks) -> ExampleTable:
    return ExampleTable({"input_ids": blocks})


def cut_train(
    spec: DataSpec, label: str, found: int, unit: str, *, cut_validation: bool, folds: int | None
) -> tuple[slice, slice, slice]:
    """Which of the ``found`` blocks or examples of ``data.train`` are calibration, training and validation.

    Raises:
        DataError: there are too few.
    """
    held_out = 0
    if cut_validation and folds is None:
        held_out = spec.validation_blocks or max(1, found // 10)
    seen = spec.calibration_blocks
    needed = {"calibration": seen, "training": spec.train_blocks or folds or 1, "validation": held_out}
    check_count(label, found, unit, needed)
    last = found - held_out if spec.train_blocks is None else seen + spec.train_blocks
    return slice(0, seen), slice(seen, last), slice(found - held_out, found)


def make_test_blocks(
    spec: DataSpec, tokenizer: FastTokenizer, folder: Path, work_dir: Path, progress: Progress = SILENT
) -> Blocks:
    """Blocks of ``data.test``, which nothing in a search may touch.

    Raises:
        DataError: the study names no test text, it is missing or too short, or it shares text with train or validation.
    """
    check_names_test(spec)
    texts = {role: read_text(source) for role, source in named_sources(spec, folder).items()}
    refuse_shared_text(texts)
    return _Cutter(tokenizer, spec.sequence_length, work_dir, progress).first(texts["test"], "test", spec.test_blocks)


def check_names_test(spec: DataSpec) -> None:
    """Refuse a study without a test text.

    Raises:
        DataError: it names none.
    """
    if spec.test is None:
        raise DataError("the study names no test text; add data.test to the study file, or evaluate on a text by name")


def eval_blocks(
    source: Source,
    tokenizer: FastTokenizer,
    sequence_length: int,
    *,
    work_dir: Path,
    blocks: int | None = None,
    progress: Progress = SILENT,
) -> Blocks:
    """The first ``blocks`` blocks of any one source, None for all, (blocks, sequence_length).

    Raises:
        DataError: the text is missing or too short.
    """
    return _Cutter(tokenizer, sequence_length, work_dir, progress).first(read_text(source), "evaluation", blocks)


@dataclass(frozen=True, slots=True)
class _Cutter:
    """Cuts texts into blocks of one length with one tokenizer."""

    tokenizer: FastTokenizer
    sequence_length: int
    work_dir: Path
    progress: Progress

    def blocks(self, text: Text) -> Blocks:
        return token_blocks(text, self.tokenizer, self.sequence_length, work_dir=self.work_dir, progress=self.progress)

    def first(self, text: Text, role: str, count: int | None) -> Blocks:
        blocks = self.blocks(text)
        check_count(text.label, len(blocks), f"blocks of {self.sequence_length} tokens", {role: count or 1})
        return blocks[:count]
