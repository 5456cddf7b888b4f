"""scripts/bench_methods.py end to end on a tiny model, and studies that published allocations seed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rank_search import api
from rank_search.errors import StudyMismatchError
from rank_search.study.study import Study
from tests.conftest import StudyFactory
from tests.integration.conftest import Script


@pytest.fixture
def bench(script: Script) -> Script:
    return partial(script, "bench_methods.py")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_kept_skipped_and_merged(bench: Script, tiny_study: StudyFactory, tmp_path: Path) -> None:
    study = tiny_study(finetune={"steps": 1}, search={"ladder": [0.7]})
    rows = tmp_path / "rows.jsonl"
    quick = ("--seeds", "0", "--rows", rows, "--evaluations", "3", "--search-blocks", "1")
    first = ["dense", "svd", "asvd", "svd-llm-v2", "zs-svd", "bolaco"]
    bench(study, *quick, "--methods", ",".join(first))
    bench(study, *quick, "--json", tmp_path / "one.json", "--second-text", tmp_path / "text.txt")
    head, *found = lines(rows)
    assert head["environment"]["torch"]
    # Eight published methods and three of the default, without and with a fine-tune, and the dense model.
    assert len(found) == 24
    keys = {(r["method"], r["allocation"], r["storage"], r["kept"], r["finetune"], r["seed"]) for r in found}
    assert len(keys) == 24
    assert ("kfac", "closed-form", "pivoted", 0.7, "1 steps", 0) in keys
    dense = next(row["num_params"] for row in found if row["method"] == "dense")
    for row in found:
        assert row["val_loss"] > 0
        assert row["num_params"] < dense or row["method"] == "dense"
        assert (row["second_text_perplexity"] is None) == (row["method"] in first)
    before = rows.read_text(encoding="utf-8")
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"study": "cut o')  # the process died as it wrote
    bench(study, *quick)
    assert rows.read_text(encoding="utf-8") == before

    other = tmp_path / "other.jsonl"
    bench(study, "--seeds", "1", "--methods", "svd-llm,kfac", "--rows", other)
    report, picture = tmp_path / "all.json", tmp_path / "all.png"
    table = bench("--merge", rows, other, "--json", report, "--plot", picture)
    assert "±" in table
    merged = json.loads(report.read_text(encoding="utf-8"))
    assert len(merged["rows"]) == 24 + 8
    assert merged["environment"] == head["environment"]
    assert picture.stat().st_size > 10_000
    losses = {row["seed"]: row["val_loss"] for row in merged["rows"] if row["method"] == "svd-llm"}
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("space", "sampler"), [("multipliers", "fitted"), ("direct", "mutation")])
def test_published_allocations_seed_a_study_once(
    tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch, space: str, sampler: str
) -> None:
    seeds = ["closed-form", "zs-svd", "svd-llm-v2"]
    search = {"ladder": [0.7, 0.5], "seeds": seeds, "space": space, "sampler": sampler, "trials": 4}
    file = tiny_study(finetune={"steps": 0}, search=search)
    api.run(file)
    given: list[int] = []
    plain = Study.open

    def spied(*arguments: Any, **named: Any) -> Study:
        given.append(len(arguments[4]))
        return plain(*arguments, **named)

    monkeypatch.setattr(Study, "open", spied)
    api.run(file, trials=7)
    assert given == [0]
    trials = api.view(file).trials
    names = ("closed form", "zs-svd", "svd-llm-v2")
    assert [trial.source for trial in trials[:6]] == [f"{name} {kept}" for name in names for kept in (0.7, 0.5)]
    assert len({trial.rank_map for trial in trials[:6]}) == 6
    record = api.view(file).record
    facts, storage = record.facts, record.spec.targets.storage
    dense = sum(shape.dense_params for shape in facts.shapes)
    for trial in trials[:6]:
        kept = float(trial.source.rsplit(" ", 1)[1])
        held = sum(shape.params(trial.rank_map.get(shape.name), storage) for shape in facts.shapes)
        assert kept * dense - 100 < held <= kept * dense
    changed = tiny_study(finetune={"steps": 0}, search={**search, "seeds": seeds[:2]})
    with pytest.raises(StudyMismatchError, match=r"search\.seeds"):
        api.run(changed)
