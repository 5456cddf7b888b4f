"""Samplers see a bounded part of a long study: the newest trials, the first fronts, and all that is not finished."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from rank_search.study import bounded, evidence
from rank_search.study.bounded import BoundedStorage, first_fronts, thinned
from rank_search.study.evidence import Evidence
from rank_search.study.store import StudyStore
from tests.contract.synthetic import open_study, run_trials

DIRECTIONS = ["minimize", "minimize"]


@pytest.fixture
def rdb(tmp_path: Path) -> Iterator[RDBStorage]:
    storage = RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    yield storage
    storage.remove_session()
    storage.engine.dispose()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bounded, evidence):
        monkeypatch.setattr(module, "NEWEST", 4)
        monkeypatch.setattr(module, "BEST", 3)
    monkeypatch.setattr(evidence, "OLDEST", 2)


def test_what_is_thinned_keeps_its_ends() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned(range(3), 3) == [0, 1, 2]
    assert thinned(range(3), 1) == [0]


def test_fronts_are_taken_one_after_the_other() -> None:
    points = sorted([(10, 3.0, 0), (20, 2.0, 1), (30, 1.0, 2), (12, 3.5, 3), (25, 2.5, 4), (40, 0.5, 5)])
    assert first_fronts(points, 2) == {0, 5}  # of four on the first front, its ends
    assert first_fronts(points, 4) == {0, 1, 2, 5}
    assert first_fronts(points, 5) == {0, 1, 2, 5, 3}


def test_a_sampler_sees_newest_best_and_unfinished(rdb: RDBStorage, narrow: None) -> None:
    study = optuna.create_study(storage=BoundedStorage(rdb), directions=DIRECTIONS)
    best = {2, 5, 7}  # the others lie ever farther off
    for number in range(20):
        values = [3.0 - number / 10, float(number)] if number in best else [10.0 + number, 10.0 + number]
        study.add_trial(create_trial(values=values))
    study.add_trial(create_trial(state=TrialState.WAITING))
    running = study.ask()
    study.ask()
    numbers = [trial.number for trial in study.get_trials(deepcopy=False)]
    assert numbers == [2, 5, 7, 16, 17, 18, 19, 20, 21]
    study.tell(running, [0.1, 0.1])
    shown = study.get_trials(states=(TrialState.COMPLETE,))
    assert [trial.number for trial in shown] == [2, 7, 17, 18, 19, 20]  # the new front, and the ends of the next one
    assert len(rdb.get_all_trials(study._study_id)) == 22


def test_a_short_study_is_seen_whole(rdb: RDBStorage) -> None:
    study = optuna.create_study(storage=BoundedStorage(rdb), directions=DIRECTIONS)
    for number in range(6):
        study.add_trial(create_trial(values=[1.0, float(number)]))
    assert len(study.trials) == 6


def test_waiting_trials_are_claimed_without_reading_finished_ones(
    rdb: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=BoundedStorage(rdb), directions=DIRECTIONS)
    study.add_trial(create_trial(values=[1.0, 1.0]))
    study.enqueue_trial({"x": 0.5})
    asked: list[object] = []
    plain = RDBStorage.get_all_trials

    def spied(self: RDBStorage, study_id: int, deepcopy: bool = True, states: object = None) -> object:
        asked.append(states)
        return plain(self, study_id, deepcopy, states)  # type: ignore[arg-type]

    monkeypatch.setattr(RDBStorage, "get_all_trials", spied)
    trial = study.ask()
    assert trial.suggest_float("x", 0, 1) == 0.5
    study.tell(trial, [1.0, 2.0])
    assert asked == [(TrialState.WAITING,)]
    assert rdb.get_all_trials(study._study_id)[1].params == {"x": 0.5}


def test_evidence_is_the_oldest_the_newest_the_front_and_what_runs(
    tmp_path: Path, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    study = open_study(storage, ladder=[0.8, 0.6, 0.5, 0.4])
    run_trials(study, 14)
    running = study.ask()
    read: list[str] = []
    plain = evidence.rank_map_of
    monkeypatch.setattr(evidence, "rank_map_of", lambda text: read.append(text) or plain(text))
    with StudyStore(storage) as store:
        source = Evidence(store.engine, "tiny")
        tried = source.read()
        trials = {trial.number: trial for trial in store.trials("tiny")}
        complete = [number for number, trial in trials.items() if trial.measurement is not None]
        front = [point.trial for point in study.front()]
        wanted = {*complete[:2], *complete[-4:], *thinned(front, 3), running.number}
        assert [one.number for one in tried] == sorted(wanted)
        assert all(one.rank_map == trials[one.number].rank_map for one in tried)
        assert [one.number for one in tried if one.loss is None] == [running.number]
        assert source.read() == tried
        assert len(read) == len(tried)  # each rank map once
        monkeypatch.setattr(evidence, "RUNNING", 1)
        newest = study.ask()
        assert [one.number for one in Evidence(store.engine, "tiny").read() if one.loss is None] == [newest.number]
    study.close()
