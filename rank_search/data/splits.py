"""Calibration, training, validation and test blocks that never share text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rank_search.data.blocks import Blocks, FastTokenizer, blocks_digest, token_blocks
from rank_search.data.sources import Role, Source, Text, read_text
from rank_search.errors import DataError
from rank_search.progress import SILENT, Progress
from rank_search.spec import DataSpec

_ROLES: tuple[Role, ...] = ("train", "validation", "test")
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
    ``data.validation``, or from the end of ``data.train`` where there is none. ``data.test`` is read for one thing
    alone: to refuse it now where a search would see its text. One on the hub is not fetched for that, and is judged
    by dataset and split.

    Raises:
        DataError: a text is missing or too short, or shares text with another one of the study.
    """
    sources = _sources(spec, folder)
    texts = {role: read_text(source) for role, source in sources.items() if role != "test" or source.is_here}
    _refuse_shared_text(texts)
    text, own = texts["train"], texts.get("validation")
    cutter = _Cutter(tokenizer, spec.sequence_length, work_dir, progress)
    blocks = cutter.blocks(text)
    held_out = 0 if own is not None else spec.validation_blocks or max(1, len(blocks) // 10)
    seen = spec.calibration_blocks
    needed = {"calibration": seen, "training": spec.train_blocks or 1, "validation": held_out}
    _check_count(text, len(blocks), needed, spec.sequence_length)
    first_held_out = len(blocks) - held_out
    last = first_held_out if spec.train_blocks is None else seen + spec.train_blocks
    validation = blocks[first_held_out:] if own is None else cutter.first(own, "validation", spec.validation_blocks)
    parts = blocks[:seen], blocks[seen:last], validation
    return Splits(*parts, *map(blocks_digest, parts))


def make_test_blocks(
    spec: DataSpec, tokenizer: FastTokenizer, folder: Path, work_dir: Path, progress: Progress = SILENT
) -> Blocks:
    """Blocks of ``data.test``, which nothing in a search may touch.

    Raises:
        DataError: the study names no test text, it is missing or too short, or it shares text with train or validation.
    """
    check_names_test(spec)
    texts = {role: read_text(source) for role, source in _sources(spec, folder).items()}
    _refuse_shared_text(texts)
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
        _check_count(text, len(blocks), {role: count or 1}, self.sequence_length)
        return blocks[:count]


def _sources(spec: DataSpec, folder: Path) -> dict[Role, Source]:
    """The sources that a study names, no two of them the same rows."""
    sources: dict[Role, Source] = {}
    for role in _ROLES:
        source = Source.of(spec, role, folder)
        if source is None:
            continue
        for other_role, other in sources.items():
            if source.shares_rows_with(other):
                raise DataError(f"{_shared(role, other_role)}: both are {source.label}; {_way_out(role)}")
        sources[role] = source
    return sources


def _check_count(text: Text, found: int, needed: dict[str, int], sequence_length: int) -> None:
    total = sum(needed.values())
    if found < total:
        parts = " + ".join(f"{count} {role}" for role, count in needed.items() if count)
        raise DataError(
            f"text {text.label} has {found} blocks of {sequence_length} tokens, but {total} are needed ({parts}); "
            f"name a longer text, or lower data.sequence_length or the numbers of blocks"
        )


def _refuse_shared_text(texts: dict[Role, Text]) -> None:
    if len(texts) == 1:
        return
    paragraphs = {role: _paragraphs(text.text) for role, text in texts.items()}
    for (other_role, other), (role, text) in combinations(texts.items(), 2):
        if text.digest == other.digest:
            raise DataError(
                f"{_shared(role, other_role)}: {text.label} and {other.label} are the same text; {_way_out(role)}"
            )
        share = _share_held(paragraphs[role], paragraphs[other_role])
        if share > 0.5:
            raise DataError(
                f"{_shared(role, other_role)}: {share:.0%} of the paragraphs of {text.label} stand in {other.label}; "
                f"{_way_out(role)}"
            )


def _shared(role: Role, other_role: Role) -> str:
    return f"data.{role} and data.{other_role} must not share text"


def _way_out(role: Role) -> str:
    if role == "validation":
        return "name another text, or leave data.validation out to cut it from the end of data.train"
    return "name a text that the search does not see"


def _share_held(paragraphs: set[str], others: set[str]) -> float:
    """Share of the long ones among ``paragraphs`` that ``others`` hold too.

    A text of short paragraphs alone is judged by all of them.
    """
    long = {paragraph for paragraph in paragraphs if len(paragraph) >= _LONG_PARAGRAPH} or paragraphs
    return len(long & others) / len(long)


def _paragraphs(text: str) -> set[str]:
    """Distinct paragraphs of a text with white space evened out.

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
