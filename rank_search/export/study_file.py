"""A study file as TOML, from its checked form."""

from __future__ import annotations

import json
from typing import Any

from rank_search.spec import StudySpec


def study_toml(spec: StudySpec) -> str:
    """The file with all its keys; those that are None are left out, for TOML has no word for it."""
    tables: dict[str, Any] = spec.model_dump(mode="json")
    lines = [f"{key} = {_value(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *_keys(table)]
    return "\n".join(lines) + "\n"


def _keys(table: dict[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)} = {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


def _text(value: str) -> str:
    """JSON's strings are TOML's, but for one character that only TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
