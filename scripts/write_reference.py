"""Write what the documentation takes from the code: docs/study-file.md and docs/rank_map.schema.json.

python scripts/write_reference.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from _run import run_script
from pydantic import BaseModel

from rank_search.export.rank_map_file import json_schema
from rank_search.spec import StudySpec

HEAD = """# The study file

TOML, checked before anything runs; an unknown key is refused with the nearest known name, one that does nothing beside
the others is told when a study begins. Relative paths start from the study file's folder. A study can be resumed as
long as its file means the same: the keys of `[search]` that say when to stop and all of `[run]` may change, any other
change is refused and named.

`name` is the study's name in the database: letters, digits, `.`, `_` and `-`.
"""


def main() -> None:
    docs = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs"
    (docs / "study-file.md").write_text(study_file_reference(), encoding="utf-8")
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    (docs / "rank_map.schema.json").write_text(f"{schema}\n", encoding="utf-8")


def study_file_reference() -> str:
    """The reference of all keys, as Markdown."""
    parts = [HEAD]
    for name, field in StudySpec.model_fields.items():
        table = field.annotation
        if isinstance(table, type) and issubclass(table, BaseModel):
            summary = (table.__doc__ or "").strip().partition(": ")[2]
            parts.append(f"\n## [{name}]\n\n{summary[:1].upper()}{summary[1:]}\n\n| key | default | |\n|---|---|---|\n")
            parts.extend(_rows(table))
    return "".join(parts)


def _rows(table: type[BaseModel]) -> list[str]:
    schema = table.model_json_schema()["properties"]
    rows = []
    for key, field in table.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default(), default=list)}`"
        choices = schema[key].get("enum")
        told = [" ".join((field.description or "").replace("``", "`").split()).rstrip(".")]
        if choices:
            told.append("one of " + ", ".join(f"`{choice}`" for choice in choices))
        rows.append(f"| `{key}` | {default.replace('null', 'none')} | {'; '.join(text for text in told if text)} |\n")
    return rows


if __name__ == "__main__":
    run_script(main)
