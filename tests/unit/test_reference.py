"""The documentation that is written by the code says what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_reference_is_what_the_code_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "write_reference.py", tmp_path], check=True)
    for name in ("study-file.md", "rank_map.schema.json"):
        assert (ROOT / "docs" / name).read_text() == (tmp_path / name).read_text(), "run scripts/write_reference.py"


def test_every_key_of_the_study_file_is_explained() -> None:
    rows = [line for line in (ROOT / "docs" / "study-file.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []
