"""scripts/bench_search.py end to end on a tiny model: every competitor proposes, pieces add up, files merge."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rank_search.spec import load_study_file
from tests.conftest import StudyFactory
from tests.integration.conftest import SCRIPTS, Script

QUICK = (
    "--steps", "1", "--score-blocks", "4", "--confirm-blocks", "4", "--budgets", "3", "--evaluations", "11",
    "--search-blocks", "2", "--generations", "1", "--offspring", "4",
)  # fmt: skip


@pytest.fixture
def bench(script: Script) -> Script:
    return partial(script, "bench_search.py")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def unbeaten(trials: list[dict[str, Any]]) -> list[int]:
    """Numbers of those that no earlier trial matches in both loss and size."""
    return [
        trial["trial"]
        for number, trial in enumerate(trials)
        if not any(t["loss"] <= trial["loss"] and t["num_params"] <= trial["num_params"] for t in trials[:number])
    ]


def test_pieces_add_up_to_runs_and_files_merge(bench: Script, tiny_study: StudyFactory, tmp_path: Path) -> None:
    study = tiny_study(search={"ladder": [0.8, 0.5], "trials": 4})
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    names = "svd-nsga2,bank-tpe,ladder,study:sampler=mutation:space=direct"
    run = (study, *QUICK, "--rows", one, "--gpu-seconds", "1")
    for number, name in enumerate(names.split(",") * 2):
        told = bench(*run, "--runs", f"{name}@0", "--piece-seconds", "0")
        assert f"not done yet: {name} 0; run again" in told
        # However short a piece is, one trial of it is measured.
        assert sum("trial" in record for record in records(one)) == number + 1
    assert "all runs are done" in bench(*run, "--competitors", names, "--seeds", "0")
    head, preparation, *found = records(one)
    assert head["protocol"]["steps"] == 1
    assert preparation["preparation"]["bank"] > 0
    assert "nested" not in preparation["preparation"]
    for name in names.split(","):
        trials = [r for r in found if r["competitor"] == name and "trial" in r]
        numbers = [t["trial"] for t in trials]
        assert numbers == sorted(set(numbers))
        spent = [t["gpu_seconds"] for t in trials]
        assert spent == sorted(spent)
        assert spent[-2] < 1.001 <= spent[-1] + 0.001
        # While the fine-tuned model stood, at no cost of its own.
        assert [t["trial"] for t in trials if t.get("confirmed", 0) > 0] == unbeaten(trials)
        assert {len(t["ranks"]) for t in trials} == {14}
    before = one.read_bytes()
    bench(*run, "--competitors", names, "--seeds", "0")
    assert one.read_bytes() == before
    bench(study, *QUICK, "--rows", two, "--seeds", "1", "--competitors", "ladder", "--gpu-seconds", "1")
    out = bench("--merge", one, two, "--json", tmp_path / "all.json", "--plot", tmp_path / "all.png")
    assert "svd-nsga2" in out
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert set(rows[0]) == {"competitor", "seed", "gpu_seconds", "hypervolume", "trials"}
    assert {(row["competitor"], row["seed"]) for row in rows} >= {("ladder", 0), ("ladder", 1), ("bank-tpe", 0)}
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_searches_without_a_fine_tune_propose_at_all_budgets(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path
) -> None:
    study, folder = tiny_study(search={"ladder": [0.8, 0.5], "trials": 4}), tmp_path / "rows"
    bench(study, *QUICK, "--rows", folder, "--seeds", "0", "--competitors", "bolaco,evolution", "--gpu-seconds", "5")
    (rows,) = folder.glob("seeds-0-*.jsonl")
    assert "bolaco" in bench("--merge", folder)
    for name in ("bolaco", "evolution"):
        sizes = {r["num_params"] for r in records(rows) if r.get("competitor") == name}
        assert len(sizes) >= 2


def test_what_is_sliced_pays_for_the_nested_fine_tune_of_a_range_with_its_first_trial(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path
) -> None:
    tiny = {"nested_steps": 3, "nested_ranges": 2}
    study, rows = tiny_study(search={"ladder": [0.8, 0.5]}, finetune=tiny), tmp_path / "rows.jsonl"
    names = ("nested-ladder", "study:finetune.mode=nested", "ladder")
    run = (study, *QUICK, "--rows", rows, "--gpu-seconds", "3", "--competitors")
    assert "all runs are done" in bench(*run, ",".join(names), "--seeds", "0")
    seconds: dict[str, Any] = {}
    for record in records(rows):
        seconds |= record.get("preparation", {})
    first, second = seconds["nested"].values()  # as the ladder comes to them
    assert min(first, second) > 0
    for name in names:
        trials = [r for r in records(rows) if r.get("competitor") == name and "trial" in r]
        assert {t["fidelity"] for t in trials} == {"tuned" if name == "ladder" else "sliced"}
        assert [t["trial"] for t in trials if t.get("confirmed", 0) > 0] == unbeaten(trials)
        if name != "ladder":
            assert trials[0]["gpu_seconds"] > seconds["bank"] + first
            assert trials[1]["gpu_seconds"] - trials[0]["gpu_seconds"] > second
    nested = rows.with_suffix(".nested")
    made = {path.name for path in nested.rglob("*")}
    shutil.rmtree(nested)  # as on another machine
    for seed in (1, 2):
        bench(*run[:-1], "--runs", f"{names[0]}@{seed}", "--piece-seconds", "0")
        # With one trial all ranges are made again, so before the clock; a later call finds them. They count as before.
        assert {path.name for path in nested.rglob("*")} == made
    assert sum("preparation" in record for record in records(rows)) == 2


def test_own_fine_tunes_beside_a_nested_study_pay_for_none_of_its_ranges(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path
) -> None:
    nested = {"mode": "nested", "nested_steps": 1, "nested_ranges": 2}
    study, rows = tiny_study(search={"ladder": [0.8, 0.5]}, finetune=nested), tmp_path / "rows.jsonl"
    run = (study, *QUICK, "--rows", rows, "--gpu-seconds", "2", "--runs")
    assert "all runs are done" in bench(*run, "ladder@0")  # before anybody has made one
    assert "all runs are done" in bench(*run, "study@0")
    ranges = next(r["preparation"]["nested"] for r in records(rows) if "nested" in r.get("preparation", {}))
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"preparation": {"nested": dict.fromkeys(ranges, 1000.0)}}) + "\n")
    assert "all runs are done" in bench(*run, "ladder@1,study:finetune.mode=own@0")
    spent: dict[str, list[float]] = {}
    for record in records(rows):
        if "trial" in record:
            spent.setdefault(f"{record['competitor']}@{record['seed']}", []).append(record["gpu_seconds"])
    assert max(map(max, spent.values())) < 1000
    assert {len(seconds) > 1 for seconds in spent.values()} == {True}


def test_a_study_that_knows_more_than_the_rows_is_refused(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    run = (tiny_study(), *QUICK, "--rows", rows, "--gpu-seconds", "1", "--runs", "study@0", "--piece-seconds", "0")
    bench(*run)
    rows.unlink()
    with pytest.raises(SystemExit, match=r"^2$"):
        bench(*run)
    assert "rows.study-0.db has a trial 0 that the rows lack; remove" in capsys.readouterr().err


def test_pruned_trials_are_none_of_those_that_are_compared(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rank_search.climbing.Climbs.goes_on", lambda *_arguments, **_more: False)
    nested = {"mode": "nested", "steps": 0, "nested_steps": 1, "nested_ranges": 2}
    search = {"ladder": [0.8, 0.5], "seeds": ["closed-form"], "fidelities": ["sliced"], "sliced_tokens": [64]}
    study, rows = tiny_study(search=search, finetune=nested), tmp_path / "rows.jsonl"
    bench(study, *QUICK, "--rows", rows, "--gpu-seconds", "3", "--runs", "study@0")
    losses = {record["trial"]: record["loss"] for record in records(rows) if "trial" in record}
    assert [losses[seed] is not None for seed in (0, 1)] == [True, True]
    assert {loss for trial, loss in losses.items() if trial > 1} == {None}


def test_another_protocol_is_refused(
    bench: Script, tiny_study: StudyFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, rows = tiny_study(), tmp_path / "rows.jsonl"
    run = (study, *QUICK, "--rows", rows, "--seeds", "0", "--competitors", "ladder")
    bench(*run, "--gpu-seconds", "0.1")
    with pytest.raises(SystemExit, match=r"^2$"):
        bench(*run, "--gpu-seconds", "0.2")
    assert f"error: {rows} was made with gpu_seconds = 0.1, not 0.2; give" in capsys.readouterr().err


def test_hypervolume_is_the_share_of_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from _search_rows import Protocol, hypervolume  # type: ignore[import-not-found]

    protocol = Protocol(
        study="", steps=0, score_blocks=1, confirm_blocks=1, gpu_seconds=1.0, budgets=3, dense_loss=3.0,
        reference_rise=2.0, dense_params=1000, least_params=500, most_params=1000,
    )  # fmt: skip
    assert hypervolume([], protocol) == 0
    assert hypervolume([(750, 4.0)], protocol) == pytest.approx(0.5 * 0.5)
    # A point behind another adds nothing, one below the range counts as its start.
    assert hypervolume([(750, 4.0), (800, 4.5), (100, 4.5)], protocol) == pytest.approx(0.25 + 0.25 * 0.5)
    assert hypervolume([(750, 5.5), (1000, 3.0)], protocol) == 0


def test_a_search_is_told_by_when_it_had_what_others_end_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from _search_rows import overtakings

    def rows(name: str, *volumes: float) -> list[dict[str, Any]]:
        return [
            {"competitor": name, "seed": seed, "gpu_seconds": at, "hypervolume": volume + 0.1 * seed, "trials": 1}
            for at, volume in zip((5.0, 20.0, 100.0), volumes, strict=False)
            for seed in (0, 1)
        ]

    told = overtakings(
        [*rows("svd-tpe", 0.1, 0.2, 0.4), *rows("study", 0.4, 0.6, 0.7), *rows("best", 0, 0, 0.9)], "study"
    )
    assert told == [
        "study has what svd-tpe has at the end (0.4500) by 5 of 100 s (1/20); it ends +0.3000",
        "study has what best has at the end (0.9500) never; it ends -0.2000",
    ]
    nothing = [row | {"hypervolume": 0.0} for row in rows("svd-tpe", 0, 0, 0)]
    (line,) = overtakings([*nothing, *rows("study", 0.4, 0.6, 0.7)], "study")
    assert line == "svd-tpe has nothing at the end: no point that counts; study ends +0.7500"
    late = [row for row in rows("study", 0.9, 0.9, 0.9) if (row["seed"], row["gpu_seconds"]) != (1, 5.0)]
    (line,) = overtakings([*rows("svd-tpe", 0.1, 0.2, 0.4), *late], "study")
    assert "by 20 of 100 s" in line, "a checkpoint that one seed has not reached is none of the mean"


def test_those_that_end_nearly_alike_are_drawn_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from _search_rows import search_figure

    def rows(name: str, end: float) -> list[dict[str, Any]]:
        return [{"competitor": name, "seed": 0, "gpu_seconds": at, "hypervolume": end * at / 100} for at in (50, 100)]

    (whole,) = search_figure([*rows("svd-tpe", 0.4), *rows("study", 0.97)]).axes
    assert [line.get_label() for line in whole.lines] == ["svd-tpe", "study"]
    whole, late = search_figure([*rows("svd-tpe", 0.4), *rows("study", 0.97), *rows("ladder", 0.96)]).axes
    assert len(whole.lines) == 3
    assert [line.get_label() for line in late.lines] == ["study", "ladder"]
    assert [line.get_color() for line in late.lines] == [line.get_color() for line in whole.lines[1:]]


def test_kept_rows_can_be_gone_on_from() -> None:
    study = Path(__file__).resolve().parents[2] / "studies" / "smollm2-135m-wikitext2"
    digest = load_study_file(study / "search.toml").spec.digest[:12]
    kept = sorted((study / "experiments" / "search").glob("*.jsonl"))
    assert kept
    assert {records(path)[0]["protocol"]["study"] for path in kept} == {digest}
