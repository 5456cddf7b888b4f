"""Files of one JSON object a line, to which benchmarks that take long add as they go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """All objects but a last one that was cut off as its process died: that one is measured again."""
    return [json.loads(line) for line in _whole(path).splitlines()]


def cut_short(path: Path) -> None:
    """Remove a last line that was cut off, so that the next one begins where it ought to."""
    text = _whole(path)
    if len(text.encode()) < path.stat().st_size:
        path.write_text(text, encoding="utf-8")


def append_line(path: Path, line: Mapping[str, object]) -> None:
    """Add one object; it is in the file when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def write_merged(
    path: Path, machines: Sequence[Mapping[str, object]], rows: Sequence[Mapping[str, object]], **told: object
) -> None:
    """Rows of all files as one JSON: the first environment, what else is ``told``, other environments, rows."""
    distinct = [machine for i, machine in enumerate(machines) if machine not in machines[:i]]
    merged: dict[str, object] = {"environment": distinct[0] if distinct else {}, **told}
    if len(distinct) > 1:
        merged["other_environments"] = distinct[1:]
    path.write_text(json.dumps({**merged, "rows": rows}, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _whole(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1]
