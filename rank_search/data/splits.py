"""Calibration, training, validation and test blocks that never share text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rank_search.data.blocks import Blocks, FastTokenizer, blocks_digest, token_blocks
from rank_search.data.sources import Source, Text, read_text
from rank_search.errors import DataError
from rank_search.progress import SILENT, Progress
from rank_search.spec import DataSpec

_LONG_PARAGRAPH = 200
"""Characters from which a paragraph that stands in two texts is no coincidence."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Token blocks of a study, (blocks, sequence_length) each; no block is in two of them.

    The digests are those of the token ids.
    """

    calibration: Blocks
    train: Blocks
    validation: Blocks
    calibration_digest: str
    train_digest: str
    validation_digest: str


def make_splits(
    spec: DataSpec, tokenizer: FastTokenizer, folder: Path, work_dir: Path, progress: Progress = SILENT
) -> Splits:
    """Blocks for calibration, fine-tune and validation.

    Calibration blocks come from the start of ``data.train``, training blocks follow. Validation blocks come from
    ``data.validation``, or from the end of ``data.train`` where there is none.

    Raises:
        DataError: a text is missing or too short, or validation shares text with training.
    """
    source = _train_source(spec, folder)
    own = Source.of(spec, "validation", folder)
    if own is not None:
        _refuse_same_source("validation", own, "train", source)
    cutter = _Cutter(tokenizer, spec.sequence_length, work_dir, progress)
    text = read_text(source)
    blocks = cutter.blocks(text)
    held_out = 0 if own is not None else spec.validation_blocks or max(1, len(blocks) // 10)
    seen = spec.calibration_blocks
    needed = {"calibration": seen, "training": spec.train_blocks or 1, "validation": held_out}
    _check_count(text, len(blocks), needed, spec.sequence_length)
    first_held_out = len(blocks) - held_out
    last = first_held_out if spec.train_blocks is None else seen + spec.train_blocks
    if own is None:
        validation = blocks[first_held_out:]
    else:
        own_text = read_text(own)
        _refuse_same_text("validation", own_text, "train", text)
        validation = cutter.first(own_text, "validation", spec.validation_blocks)
    parts = blocks[:seen], blocks[seen:last], validation
    return Splits(*parts, *map(blocks_digest, parts))


def make_test_blocks(
    spec: DataSpec, tokenizer: FastTokenizer, folder: Path, work_dir: Path, progress: Progress = SILENT
) -> Blocks:
    """Blocks of ``data.test``, which nothing in a search may touch.

    Raises:
        DataError: the study names no test text, it is missing or too short, or it shares text with train or validation.
    """
    source = Source.of(spec, "test", folder)
    if source is None:
        raise DataError("the study names no test text; add data.test to the study file")
    others = [("train", _train_source(spec, folder))]
    validation = Source.of(spec, "validation", folder)
    if validation is not None:
        others.append(("validation", validation))
    for role, other in others:
        _refuse_same_source("test", source, role, other)
    text = read_text(source)
    for role, other in others:
        _refuse_same_text("test", text, role, read_text(other))
    return _Cutter(tokenizer, spec.sequence_length, work_dir, progress).first(text, "test", spec.test_blocks)


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
        _check_count(text, len(blocks), {role: count or 1}, self.sequence_length)
        return blocks[:count]


def _train_source(spec: DataSpec, folder: Path) -> Source:
    source = Source.of(spec, "train", folder)
    assert source is not None, "data.train has a default"
    return source


def _check_count(text: Text, found: int, needed: dict[str, int], sequence_length: int) -> None:
    total = sum(needed.values())
    if found < total:
        parts = " + ".join(f"{count} {role}" for role, count in needed.items() if count)
        raise DataError(
            f"text {text.label} has {found} blocks of {sequence_length} tokens, but {total} are needed ({parts}); "
            f"name a longer text, or lower data.sequence_length or the numbers of blocks"
        )


def _refuse_same_source(role: str, source: Source, other_role: str, other: Source) -> None:
    if source.shares_rows_with(other):
        raise DataError(f"{_shared(role, other_role)}: both are {source.label}; {_way_out(role)}")


def _refuse_same_text(role: str, text: Text, other_role: str, other: Text) -> None:
    if text.digest == other.digest:
        raise DataError(
            f"{_shared(role, other_role)}: {text.label} and {other.label} are the same text; {_way_out(role)}"
        )
    share = _shared_paragraphs(text.text, other.text)
    if share > 0.5:
        raise DataError(
            f"{_shared(role, other_role)}: {share:.0%} of the paragraphs of {text.label} stand in {other.label}; "
            f"{_way_out(role)}"
        )


def _shared(role: str, other_role: str) -> str:
    return f"data.{role} and data.{other_role} must not share text"


def _way_out(role: str) -> str:
    if role == "validation":
        return "name another text, or leave data.validation out to cut it from the end of data.train"
    return "name a text that the search has not seen"


def _shared_paragraphs(text: str, other: str) -> float:
    """Share of the distinct long paragraphs of ``text`` that ``other`` holds too.

    A text of short paragraphs alone is judged by all of them.
    """
    paragraphs = _paragraphs(text)
    long = {paragraph for paragraph in paragraphs if len(paragraph) >= _LONG_PARAGRAPH} or paragraphs
    return len(long & _paragraphs(other)) / len(long)


def _paragraphs(text: str) -> set[str]:
    """Distinct paragraphs with white space evened out.

    A long line is a paragraph of its own (texts of one paragraph a line), shorter ones are joined up to the next
    blank line (texts wrapped by hand).
    """
    found: set[str] = set()
    for passage in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in passage.split("\n")]
        if any(len(line) >= _LONG_PARAGRAPH for line in lines):
            found.update(lines)
        else:
            found.add(" ".join(filter(None, lines)))
    found.discard("")
    return found
