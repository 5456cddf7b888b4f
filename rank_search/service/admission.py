"""Study files from the network: read, and checked for what only the operator of the service may decide. No torch."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rank_search.errors import StudyFileError
from rank_search.spec import PYTHON_DOCS, RunSpec, StudySpec, parse_study

WHERE = "the study"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_OF_RUN = frozenset(
    {
        "device", "score_batch_blocks", "calibration_batch_blocks", "threads", "lease_seconds",
        "database_patience_seconds",
    }
)  # fmt: skip
"""Keys of ``[run]`` that may be set from elsewhere: neither folders nor places to fetch from."""

_MOST_DOTS = 500
"""In a line of TOML: a key takes time with the square of its parts, 8 s for 64 KiB."""


def read_toml(content: bytes) -> dict[str, Any]:
    """The tables of a TOML body.

    Raises:
        StudyFileError: it is none.
    """
    if max((line.count(b".") for line in content.splitlines()), default=0) > _MOST_DOTS:
        raise StudyFileError(f"{WHERE} has a line with more than {_MOST_DOTS} dots; break it up")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise StudyFileError(f"{WHERE} is not valid TOML: {_told(error)}") from None


def read_json(content: bytes) -> dict[str, Any]:
    """The tables of a JSON body.

    Raises:
        StudyFileError: it is none.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        tables = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise StudyFileError(f"{WHERE} is not valid JSON: {_told(error)}") from None
    if not isinstance(tables, dict):
        raise StudyFileError(f"{WHERE} must be one JSON object, not a {type(tables).__name__}")
    return tables


def admit(tables: dict[str, Any], roots: Sequence[Path]) -> StudySpec:
    """A study file from elsewhere.

    Args:
        roots: folders in which it may name models and texts.

    Raises:
        StudyFileError: against the schema, or it asks for what it may not: code of others, a path outside of the
            roots, a folder or place of its own.
    """
    try:
        spec = parse_study(tables, where=WHERE)
    except (RecursionError, UnicodeError, ValueError) as error:
        raise StudyFileError(f"{WHERE} cannot be read: {_told(error)}") from None
    for table in (spec.model, spec.validation):
        if table.trust_remote_code:
            key = "model" if table is spec.model else "validation"
            raise StudyFileError(f"{WHERE}: {key}.trust_remote_code cannot be set from elsewhere; leave it out")
    for key in type(spec.run).model_fields:
        if key not in _OF_RUN and getattr(spec.run, key) != getattr(RunSpec(), key):
            raise StudyFileError(f"{WHERE}: run.{key} cannot be set from elsewhere; leave it out")
    for key, name in _places(spec):
        check_place(key, name, roots)
    return spec


def check_place(key: str, name: str, roots: Sequence[Path]) -> None:
    """Refuse a model or text that is neither in one of the folders nor named as the hub names them.

    Raises:
        StudyFileError: it is one.
    """
    if "\0" in name:
        raise StudyFileError(f"{WHERE}: {key} has a zero byte in it")
    path = Path(name)
    if path.is_absolute():
        if any(_is_in(path, root) for root in roots):
            return
        told = f"it may name what is in {', '.join(map(str, roots))}" if roots else "no folder is open to it (--root)"
        raise StudyFileError(f"{WHERE}: {key} names a path outside of the service's folders; {told}, or the hub")
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise StudyFileError(
            f"{WHERE}: {key} is neither an absolute path in one of the service's folders nor the name of something on "
            "the hub"
        )
    if Path(name).exists():  # libraries would take it for a path from where their process happens to run
        raise StudyFileError(f"{WHERE}: {key} names a path where the service runs; give it absolute")


def _places(spec: StudySpec) -> Iterator[tuple[str, str]]:
    yield "model.source", spec.model.source
    for role in ("train", "validation", "test"):
        name = getattr(spec.data, role)
        if name is not None and name != PYTHON_DOCS:
            yield f"data.{role}", name


def _is_in(path: Path, root: Path) -> bool:
    """Whether a path, every link on its way followed, leads into a folder."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that no file can have
        return False


def _told(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is too deep"
    return " ".join(str(error).split())[:200]
