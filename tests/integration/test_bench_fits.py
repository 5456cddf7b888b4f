"""scripts/bench_fits.py on a search whose losses are made up: fits foretell what they can know."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_search.allocation import Allocator
from rank_search.preparing import prepare
from rank_search.ranges import ranges_of
from rank_search.ranks import RankMap
from rank_search.spec import load_study_file
from tests.conftest import StudyFactory
from tests.integration.conftest import Script

Rows = list[dict[str, Any]]


@pytest.fixture
def bench(script: Script) -> Script:
    return partial(script, "bench_fits.py")


def made_up(allocator: Allocator, loss: Callable[[RankMap], float]) -> Rows:
    """Rows of a ladder and of a search about it."""
    shapes, random = allocator.space.shapes, np.random.default_rng(0)
    types = sorted({shape.group for shape in shapes})
    rows: Rows = []
    for number, kept in enumerate(random.uniform(0.3, 0.9, 140)):
        drawn = dict(zip(types, random.normal(0, 0.3, len(types)), strict=True))
        u = {shape.name: float(drawn[shape.group]) for shape in shapes}
        for competitor, rank_map in (
            ("nested-ladder", allocator.closed_form(kept)), ("study", allocator.closed_form(kept, u))
        ):  # fmt: skip
            ranks = [rank_map.get(shape.name) for shape in shapes]
            rows.append({"competitor": competitor, "seed": 0, "trial": number, "loss": loss(rank_map), "ranks": ranks})
            if competitor == "nested-ladder":  # of every seed alike, and none of the searches
                rows.append({**rows[-1], "seed": 1})
    return rows


def written(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_a_type_is_worth_is_foretold_and_what_nothing_says_is_not(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path
) -> None:
    study = tiny_study(finetune={"mode": "nested"})
    prepared = prepare(load_study_file(study), nested=False)
    allocator, random = prepared.allocator, np.random.default_rng(1)
    worth = np.array([3.0 if "attn" in shape.group else 1.0 for shape in allocator.space.shapes])
    known = {
        "of the types": made_up(allocator, lambda rank_map: float(worth @ allocator.rises(rank_map))),
        "of chance": made_up(allocator, lambda rank_map: float(random.normal())),
    }
    found: dict[str, Any] = {}
    for name, rows in known.items():
        report = tmp_path / "report.json"
        bench(study, written(tmp_path / "rows.jsonl", rows), "--depth-buckets", "0", "--json", report)
        found[name] = json.loads(report.read_text(encoding="utf-8"))
    (of_types,), (of_chance,) = (found[name]["rows"] for name in known)
    assert set(of_types) == {"depth_buckets", "terms", "after_40", "deviation_40", "after_80", "deviation_80"}
    assert of_types["after_80"] > 0.7
    assert abs(of_chance["after_80"]) < 0.4
    assert len(found["of chance"]["places"]) == len(ranges_of(prepared.spec, prepared.space))


def test_rows_without_a_ladder_are_refused(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tiny_study(finetune={"mode": "nested"})
    allocator = prepare(load_study_file(study), nested=False).allocator
    rows = [row for row in made_up(allocator, lambda rank_map: 1.0) if row["competitor"] == "study"]
    with pytest.raises(SystemExit, match=r"^2$"):
        bench(study, written(tmp_path / "rows.jsonl", rows))
    assert "lacks trials of study or of nested-ladder, seed 0" in capsys.readouterr().err
