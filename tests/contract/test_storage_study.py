"""Studies over a database: resume, seeds, determinism, and the death of workers."""

from __future__ import annotations

import math
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

import optuna
import pytest
from sqlalchemy.engine import make_url

from rank_search.errors import StorageError, StudyMismatchError, TrialError
from rank_search.study.consistency import check_database
from rank_search.study.records import State
from rank_search.study.recovery import MAX_REQUEUES
from rank_search.study.store import StudyStore
from rank_search.study.study import Study
from tests.contract.synthetic import (
    make_allocator,
    make_facts,
    make_spec,
    measure,
    open_study,
    run_trials,
    worker_dies,
    worker_measures,
)

LADDER: dict[str, Any] = {"ladder": [0.8, 0.5]}
WAITING = optuna.trial.TrialState.WAITING
SEEDS = ["closed form 0.8", "closed form 0.5", "uniform 0.8", "uniform 0.5"]


def test_seeds_run_first_and_once(storage: str) -> None:
    allocator = make_allocator()
    study = open_study(storage, **LADDER)
    first = run_trials(study, 2)
    study.close()
    study = open_study(storage, **LADDER)
    proposals = first + run_trials(study, 4)
    study.close()
    assert [proposal.source for proposal in proposals] == [*SEEDS, "fitted", "fitted"]
    wanted = [allocate(kept) for allocate in (allocator.closed_form, allocator.uniform) for kept in (0.8, 0.5)]
    assert [proposal.rank_map for proposal in proposals[:4]] == wanted


def test_the_front_is_stored_with_the_trials(storage: str) -> None:
    study = open_study(storage)
    run_trials(study, 9)
    with StudyStore(storage) as store:
        assert study.front() == store.recompute_front("tiny")
        assert study.finished() == len(store.trials("tiny")) == 9
    study.close()


def test_objectives_that_are_not_finite_are_refused_and_the_trial_can_fail_with_the_reason(storage: str) -> None:
    study = open_study(storage, **LADDER)
    run_trials(study, 1)
    bad = [("loss", math.nan), ("loss", math.inf), ("loss", -math.inf), ("num_params", math.inf)]
    for name, value in bad:
        proposal = study.ask()
        measurement = measure(proposal.rank_map)
        object.__setattr__(measurement, name, value)  # its own check refuses such a loss, but may be passed by
        with pytest.raises(TrialError, match=r"^objectives must be finite numbers, not \(.*(nan|inf).*\)$") as raised:
            study.tell(proposal, measurement)
        assert study.finished() == 1 + bad.index((name, value))  # nothing was stored
        study.fail(proposal, str(raised.value))
    told = [trial.state.name for trial in study._optuna.trials()][: 1 + len(bad)]
    study.close()
    assert sorted(told) == ["COMPLETE", *["FAIL"] * len(bad)]
    with StudyStore(storage) as store:
        trials = store.trials("tiny")
        assert [trial.state for trial in trials] == [State.COMPLETE, *[State.FAILED] * len(bad)]
        assert all("must be finite" in (trial.reason or "") for trial in trials[1:])
        assert [point.trial for point in store.front("tiny").points] == [0]
    assert check_database(storage) == ()


def test_a_changed_meaning_is_refused_naming_the_field(storage: str) -> None:
    open_study(storage).close()
    with pytest.raises(StudyMismatchError, match=r"search\.multiplier_range = 0\.5, the file now says 2\.0"):
        open_study(storage, multiplier_range=2.0)
    with pytest.raises(StudyMismatchError, match="weights_digest"):
        reopen(storage, weights_digest="x" * 64)
    with pytest.raises(StudyMismatchError, match="shapes"):
        reopen(storage, shapes=make_allocator().space.shapes[1:])


def test_another_size_or_place_is_no_other_study(storage: str) -> None:
    open_study(storage).close()
    open_study(storage, trials=80).close()
    with StudyStore(storage) as store:
        assert store.status("tiny").wanted == 80
    reopen(storage, source="elsewhere/tiny").close()


def test_a_resumed_study_goes_on_as_if_it_had_not_stopped(storage: str) -> None:
    whole = open_study(storage, "whole", **LADDER)
    straight = run_trials(whole, 13)
    whole.close()
    stopped = []
    for count in (6, 5, 2):
        study = open_study(storage, "parts", **LADDER)
        stopped += run_trials(study, count)
        study.close()
    assert [p.rank_map for p in stopped] == [p.rank_map for p in straight]
    assert len({p.rank_map for p in straight[4:]}) > 6


def test_an_interrupted_proposal_is_proposed_again_and_does_not_count(storage: str) -> None:
    study = open_study(storage, **LADDER)
    interrupted = study.ask()
    study.requeue(interrupted)
    study.requeue(interrupted)
    proposals = run_trials(study, 5)
    again = proposals[3]
    assert (again.rank_map, again.source) == (interrupted.rank_map, interrupted.source)
    assert [p.source for p in proposals].count(interrupted.source) == 1
    assert study.finished() == 5
    study.close()


def test_a_measurement_that_optuna_was_not_told_is_told_at_the_next_opening(storage: str) -> None:
    study = open_study(storage, **LADDER)
    first, second = study.ask(), study.ask()
    study.close()
    with StudyStore(storage) as store:
        store.complete_trial("tiny", first.number, measure(first.rank_map))
        store.fail_trial("tiny", second.number, "no memory")
    study = open_study(storage, **LADDER)
    study.tell(first, measure(first.rank_map))
    study.close()
    told, failed = optuna_trials(storage)[:2]
    measurement = measure(first.rank_map)
    assert told.values == [measurement.loss, float(measurement.num_params)]
    assert told.user_attrs["kept_of_targets"] == pytest.approx(measurement.kept_of_targets, abs=1e-4)
    assert failed.state == optuna.trial.TrialState.FAIL
    assert failed.user_attrs["reason"] == "no memory"


def test_eight_workers_claim_each_of_sixty_waiting_trials_once(storage: str, processes: ForkServerContext) -> None:
    study = open_study(storage, ladder=[0.5])
    params = study._space.encode(study._optuna._seeds[0])
    for number in range(60 - len(study._optuna.trials(WAITING))):
        study._optuna.enqueue(params, {"source": f"waiting {number}"})
    waiting = [trial.user_attrs["source"] for trial in study._optuna.trials(WAITING)]
    assert len(set(waiting)) == 60
    ready, claimed = processes.Barrier(8), processes.Queue()
    workers = [processes.Process(target=claim_all, args=(storage, ready, claimed)) for _ in range(8)]
    for worker in workers:
        worker.start()
    found = [claimed.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    study.close()
    assert sorted(source for sources in found for source in sources) == sorted(waiting)
    assert sum(bool(sources) for sources in found) >= 2  # else nothing was tested


def claim_all(storage: str, ready: Barrier, claimed: Queue[list[str]]) -> None:
    """A worker process that claims what waits, all at once with the others."""
    study = open_study(storage, ladder=[0.5])
    ready.wait(60)
    sources = []
    while (source := study._optuna.ask().source) is not None:
        sources.append(source)
    claimed.put(sources)
    study.close()


def test_the_trial_of_a_dead_worker_is_proposed_again_exactly_once(storage: str, processes: ForkServerContext) -> None:
    open_study(storage).close()
    kill_worker(storage, processes)
    with processes.Pool(4) as pool:
        results = pool.starmap(worker_measures, [(storage, 3)] * 4, chunksize=1)
    sources = [source for result in results for _, source in result]
    assert sources.count("closed form 0.9") == 1
    assert len(set(sources) - {"fitted"}) == 8
    with StudyStore(storage) as store:
        states = [trial.state for trial in store.trials("tiny")]
        assert states[0] is State.REQUEUED
        assert set(states[1:]) == {State.COMPLETE}
        assert store.finished("tiny") == 12


def test_a_trial_that_kills_its_workers_fails(storage: str, processes: ForkServerContext) -> None:
    study = open_study(storage, ladder=[0.5])
    held = study.ask(), study.ask()  # the other seed stays with a living worker
    study.requeue(held[0])
    for _ in range(MAX_REQUEUES + 1):
        process = processes.Process(target=die_over_ladder, args=(storage,))
        process.start()
        process.join()
    study.reconcile()
    with StudyStore(storage) as store:
        trials = store.trials("tiny")
    study.close()
    assert [t.state for t in trials if t.source == "closed form 0.5"] == [State.REQUEUED] * 4 + [State.FAILED]
    assert "died 4 times" in (trials[-1].reason or "")
    assert trials[1].state is State.RUNNING


def test_recovery_that_is_cut_off_does_not_propose_twice(
    storage: str, processes: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_worker(storage, processes)

    def cut_off(*_: object) -> None:
        raise StorageError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "requeue_trial", cut_off)
        with pytest.raises(StorageError, match="connection lost"):
            open_study(storage)
    study = open_study(storage)
    sources = [proposal.source for proposal in run_trials(study, 10)]
    study.close()
    assert sources.count("closed form 0.9") == 1


def test_the_trial_of_a_living_worker_is_left_alone(storage: str) -> None:
    study = open_study(storage, **LADDER)
    proposal = study.ask()
    other = open_study(storage, **LADDER)
    assert other.ask().source == SEEDS[1]
    other.close()
    study.tell(proposal, measure(proposal.rank_map))
    assert study.finished() == 1
    study.close()


def reopen(storage: str, **facts: object) -> Study:
    allocator = make_allocator()
    return Study.open(make_spec(), storage, allocator, make_facts(allocator, **facts))


def kill_worker(storage: str, processes: ForkServerContext) -> None:
    process = processes.Process(target=worker_dies, args=(storage,))
    process.start()
    process.join()


def die_over_ladder(storage: str) -> None:
    worker_dies(storage, ladder=[0.5])


def optuna_trials(storage: str) -> list[optuna.trial.FrozenTrial]:
    url = make_url(storage)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    rdb = optuna.storages.RDBStorage(url.render_as_string(hide_password=False))
    trials = optuna.load_study(study_name="tiny", storage=rdb).get_trials()
    rdb.remove_session()
    rdb.engine.dispose()
    return trials
