"""What is exported when the disk is full: nothing half-written, what was there before untouched, one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rank_search.study.store import StudyStore
from tests.data.disks import disk_full_at

from .conftest import rank_search
from .test_bad_input import searched as searched  # the fixture


@pytest.mark.parametrize(
    ("arguments", "size", "says"),
    [
        (["export", "study.toml", "--knee", "-o", "out.json"], 500, "rank map file out.json"),
        (["db", "export", "study.toml", "-o", "out.gz"], 500, "write elsewhere"),
        (["apply", "rank_map.json", "--no-finetune", "-o", "out"], 40_000, "free space or choose another folder"),
    ],
    ids=["rank map", "study", "checkpoint"],
)
def test_an_export_for_which_the_disk_has_no_room_leaves_nothing(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], size: int, says: str
) -> None:
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    out = Path(arguments[-1])
    if out.suffix:
        out.write_text("of yesterday")
    with StudyStore("sqlite:///tiny.db") as store:
        store.trials("tiny")  # SQLite's own files beside the database are there from here on
        before = sorted(tmp_path.iterdir())
        with disk_full_at(size):
            result = rank_search(*arguments)
        assert sorted(tmp_path.iterdir()) == before
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("rank-search: error: ")
    assert result.err.count("\n") == 1
    assert "cannot be written: " in result.err
    assert "File too large" in result.err
    assert says in result.err
    if out.suffix:
        assert out.read_text() == "of yesterday"
        out.unlink()
    assert rank_search(*arguments).code == 0
    assert out.exists()
