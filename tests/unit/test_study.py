"""Studies on an SQLite file: samplers, determinism, what Optuna is told, and refusals that make nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import Engine, event

from rank_search.allocation import Allocator
from rank_search.errors import BudgetError, StudyFileError
from rank_search.ranks import RankMap
from rank_search.study.mutation import told_rank_map
from rank_search.study.space import Seed
from rank_search.study.study import Study, given_seeds
from tests.contract.synthetic import make_allocator, make_facts, make_spec, measure, open_study, run_trials


def rank_maps(storage: str, count: int, **search: Any) -> list[RankMap]:
    study = open_study(storage, **search)
    proposals = run_trials(study, count)
    study.close()
    return [proposal.rank_map for proposal in proposals]


@pytest.mark.parametrize(
    ("sampler", "space", "count"),
    # Enough trials for the sampler to build on earlier ones.
    [
        ("tpe", "multipliers", 14),
        ("tpe", "direct", 14),
        ("nsga2", "multipliers", 19),
        ("nsga3", "groups", 19),
        ("random", "multipliers", 5),
    ],
)
def test_the_seed_decides_the_sequence_of_rank_maps(tmp_path: Path, sampler: str, space: str, count: int) -> None:
    search: dict[str, Any] = {"sampler": sampler, "space": space, "ladder": [0.7]}
    first = rank_maps(f"sqlite:///{tmp_path}/first.db", count, seed=5, **search)
    second = rank_maps(f"sqlite:///{tmp_path}/second.db", count, seed=5, **search)
    other = rank_maps(f"sqlite:///{tmp_path}/other.db", 5, seed=-6, **search)
    assert first == second
    assert first[:2] == other[:2]
    assert first[2:5] != other[2:5]


def test_the_gaussian_process_proposes(tmp_path: Path) -> None:
    maps = rank_maps(f"sqlite:///{tmp_path}/s.db", 12, sampler="gp", ladder=[0.7])
    assert len(set(maps)) > 8


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_genetic_samplers_breed_from_the_seeds(tmp_path: Path, sampler: str) -> None:
    rank_maps(f"sqlite:///{tmp_path}/s.db", 4, sampler=sampler, ladder=[0.7])
    trials = stored_trials(tmp_path / "s.db")
    generations = [[v for k, v in t.system_attrs.items() if "generation" in k] for t in trials]
    assert generations == [[0]] * 4


def test_optuna_holds_readable_trials_and_no_intermediate_values(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/s.db", ladder=[0.7])
    study.set_dense_loss(2.5)
    proposals = run_trials(study, 3)
    assert study.dense_loss == 2.5
    study.close()
    trials = stored_trials(tmp_path / "s.db")
    for proposal, trial in zip(proposals, trials[:3], strict=True):
        measurement = measure(proposal.rank_map)
        assert trial.values == [measurement.loss, float(measurement.num_params)]
        assert trial.intermediate_values == {}
        assert RankMap(json.loads(told_rank_map(trial) or "")) == proposal.rank_map
        assert "rank_map" not in trial.user_attrs  # a dashboard would show it
        assert trial.user_attrs["source"] == proposal.source
        assert trial.user_attrs["fidelity"] == "tuned"
        assert trial.user_attrs["seconds"] == 2.625
        assert trial.user_attrs["perplexity"] == pytest.approx(math.exp(measurement.loss), rel=1e-5)


def test_a_proposal_predicts_its_rise(tmp_path: Path) -> None:
    allocator = make_allocator()
    study = open_study(f"sqlite:///{tmp_path}/s.db", ladder=[0.7])
    proposal = study.ask()
    study.close()
    assert proposal.predicted_rise == allocator.predicted_rise(allocator.closed_form(0.7)) > 0


def test_telling_twice_keeps_the_first_measurement(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/s.db", ladder=[0.7])
    proposal = study.ask()
    study.tell(proposal, measure(proposal.rank_map, loss=3.0))
    study.tell(proposal, measure(proposal.rank_map, loss=2.0))
    study.fail(proposal, "too late")
    assert [point.loss for point in study.front()] == [3.0]
    assert study.finished() == 1
    study.close()


def test_a_trial_takes_few_statements_and_commits(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/s.db", ladder=[0.7])
    run_trials(study, 8)
    statements: list[str] = []

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    def count_commit(_connection: object) -> None:
        statements.append("COMMIT")

    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "commit", count_commit)
    try:
        run_trials(study, 1)
    finally:
        event.remove(Engine, "before_cursor_execute", count)
        event.remove(Engine, "commit", count_commit)
    study.close()
    # Begun and sampled in three commits, stored and told to Optuna in two; Optuna's own calls would make 13 of them.
    assert statements.count("COMMIT") == 5
    assert len(statements) <= 42, statements


def test_a_failure_counts_and_the_study_goes_on(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/s.db", ladder=[0.7])
    study.fail(study.ask(), "validation loss is nan")
    run_trials(study, 14)
    assert study.finished() == 15
    study.close()
    assert stored_trials(tmp_path / "s.db")[0].user_attrs["reason"] == "validation loss is nan"


@pytest.mark.parametrize(
    ("search", "error", "message"),
    [
        ({"sampler": "gp", "space": "direct"}, StudyFileError, "take space = 'multipliers'"),
        ({"ladder": [0.8, 0.05]}, StudyFileError, r"search\.ladder holds 0\.05, outside search\.min_kept to"),
        ({"ladder": [0.8, 0.05], "space": "direct", "sampler": "tpe"}, BudgetError, "kept fraction 0.05"),
        ({"ladder": [0.98]}, StudyFileError, "ladder holds 0.98"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    tmp_path: Path, search: dict[str, Any], error: type[Exception], message: str
) -> None:
    allocator: Allocator = make_allocator(multiple=4)
    with pytest.raises(error, match=message):
        Study.open(make_spec(**search), f"sqlite:///{tmp_path}/s.db", allocator, make_facts(allocator))
    assert list(tmp_path.iterdir()) == []


def open_seeded(storage: str, given: dict[Seed, RankMap] | None, **search: Any) -> Study:
    allocator = make_allocator()
    spec = make_spec(ladder=[0.7], seeds=["closed-form", "svd-llm-v2", "zs-svd"], **search)
    return Study.open(spec, storage, allocator, make_facts(allocator), given)


@pytest.mark.parametrize(("space", "sampler"), [("multipliers", "fitted"), ("multipliers", "tpe"), ("direct", "tpe")])
def test_given_seeds_are_proposed_as_they_are_and_again_after_an_interrupt(
    tmp_path: Path, space: str, sampler: str
) -> None:
    storage, allocator = f"sqlite:///{tmp_path}/s.db", make_allocator()
    foreign = RankMap({"block.0.attn": 1, "block.2.mlp": 3})
    given = {Seed(0.7, "svd-llm-v2"): foreign, Seed(0.7, "zs-svd"): allocator.closed_form(0.7)}
    spec = make_spec(ladder=[0.7], seeds=["closed-form", "svd-llm-v2", "zs-svd"], space=space, sampler=sampler)
    assert given_seeds(spec, storage, allocator) == tuple(given)
    study = open_seeded(storage, given, space=space, sampler=sampler)
    run_trials(study, 1)
    study.requeue(study.ask())
    study.close()
    assert given_seeds(spec, storage, allocator) == ()
    study = open_seeded(storage, None, space=space, sampler=sampler)
    proposals = run_trials(study, 2)
    study.close()
    assert (proposals[0].source, proposals[0].rank_map) == ("svd-llm-v2 0.7", foreign)
    # Equal to the closed form, the other is not measured again.
    assert proposals[1].source == sampler


def test_a_seed_that_nobody_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match="names 'svd-llm-v2', whose rank maps were not made"):
        open_seeded(f"sqlite:///{tmp_path}/s.db", None)


@pytest.mark.parametrize(("module", "absent"), [("study.study", ["torch"]), ("study.store", ["torch", "optuna"])])
def test_heavy_packages_are_not_loaded(module: str, absent: list[str]) -> None:
    program = f"import sys, rank_search.{module}; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def stored_trials(file: Path) -> list[optuna.trial.FrozenTrial]:
    rdb = optuna.storages.RDBStorage(f"sqlite:///{file}")
    trials = optuna.load_study(study_name="tiny", storage=rdb).get_trials()
    rdb.remove_session()
    rdb.engine.dispose()
    return trials
