"""Texts and tables of a study that must be large enough and share nothing: what is refused, and how it is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from itertools import combinations
from pathlib import Path

from rank_search.data.sources import Role, Source, Text
from rank_search.errors import DataError
from rank_search.spec import DataSpec

_ROLES: tuple[Role, ...] = ("train", "validation", "test")
_LONG_PARAGRAPH = 200
"""Characters from which a paragraph that stands in two texts is no coincidence."""


def named_sources(spec: DataSpec, folder: Path) -> dict[Role, Source]:
    """The sources that a study names, no two of them the same rows.

    Raises:
        DataError: two of them are.
    """
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


def check_count(label: str, found: int, unit: str, needed: Mapping[str, int]) -> None:
    """Refuse a text or table with fewer blocks or examples (``unit``) than its roles need.

    Raises:
        DataError: it has fewer.
    """
    total = sum(needed.values())
    if found < total:
        parts = " + ".join(f"{count} {role}" for role, count in needed.items() if count)
        raise DataError(
            f"text {label} has {found} {unit}, but {total} are needed ({parts}); "
            f"name a longer text, or lower data.sequence_length or the numbers of blocks"
        )


def refuse_shared_rows(rows: Mapping[Role, AbstractSet[str]], labels: Mapping[Role, str]) -> None:
    """Refuse tables that share most of their rows, given as what tells them apart.

    Raises:
        DataError: more than half of a table's rows stand in another role's.
    """
    for other_role, role in combinations(rows, 2):
        share = len(rows[role] & rows[other_role]) / len(rows[role])
        if share > 0.5:
            raise DataError(
                f"{_shared(role, other_role)}: {share:.0%} of the rows of {labels[role]} stand in "
                f"{labels[other_role]}; {_way_out(role)}"
            )


def refuse_shared_text(texts: Mapping[Role, Text]) -> None:
    """Refuse texts that are the same or share most of their paragraphs.

    Raises:
        DataError: two of them do.
    """
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
