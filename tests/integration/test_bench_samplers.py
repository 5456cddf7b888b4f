"""scripts/bench_samplers.py on the stand-in for the quickstart's model: eight workers find what one finds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_samplers.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("bench") / "rows.json"
    for samplers, workers in (("ladder,fitted", "1"), ("fitted", "8")):
        options = ["--samplers", samplers, "--workers", workers, "--trials", "40", "--seeds", "2", "--json", str(out)]
        subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True, timeout=120)
    found: list[dict[str, object]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return found


def mean(rows: list[dict[str, object]], sampler: str, workers: int) -> float:
    mine = [row for row in rows if (row["sampler"], row["workers"]) == (sampler, workers)]
    assert mine
    return statistics.fmean(float(str(row["hypervolume"])) for row in mine)


def test_the_default_finds_more_than_the_closed_form_alone(rows: list[dict[str, object]]) -> None:
    assert mean(rows, "fitted", 1) > mean(rows, "ladder", 1)


def test_eight_workers_find_what_one_finds(rows: list[dict[str, object]]) -> None:
    assert mean(rows, "fitted", 8) > 0.98 * mean(rows, "fitted", 1)


def test_no_rank_map_is_measured_twice_and_seeds_once(rows: list[dict[str, object]]) -> None:
    assert all(row["repeated"] == 0 for row in rows)
    assert all(row["seeds"] == 1 for row in rows if row["sampler"] != "ladder")
