"""The fleet of the service: what it does when the engine or the database is away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rank_search.errors import InputError, StorageError
from rank_search.launch.fleet import Crew, ServiceFleet
from rank_search.launch.worker import study_file
from rank_search.spec import StudyFile
from rank_search.study.store import StudyStore
from rank_search.study.submissions import Fate, submissions, submit
from rank_search.study.upgrading import upgrade
from tests.contract.synthetic import make_spec
from tests.waiting import until


@pytest.mark.parametrize("trouble", [StorageError("connection refused"), InputError("kubectl did not answer")])
def test_the_fleet_outlives_troubles_of_the_database_and_of_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: InputError
) -> None:
    ticks: list[float] = []

    def tick(_fleet: ServiceFleet) -> None:
        ticks.append(time.monotonic())
        if len(ticks) < 3:
            raise trouble

    monkeypatch.setattr("rank_search.launch.fleet.TICK_SECONDS", 0.01)
    monkeypatch.setattr(ServiceFleet, "_tick", tick)
    fleet = ServiceFleet(f"sqlite:///{tmp_path}/study.db", tmp_path, Crew())
    fleet.start()
    until(lambda: len(ticks) >= 5, pause=0.01)
    fleet.stop()
    assert capsys.readouterr().err == f"rank-search: {trouble}\n"  # told once


def test_a_start_that_fails_half_way_leaves_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    upgrade(storage)
    ended: list[str] = []

    class HalfStarted:
        trouble = ""

        def start(self) -> None:
            raise InputError("worker 1 cannot be started: [Errno 28] No space left on device")

        def kill(self) -> None:
            ended.append("killed")

    monkeypatch.setattr("rank_search.launch.fleet.make_launcher", lambda *_: HalfStarted())
    with StudyStore(storage) as store:
        submit(store.engine, make_spec("taken"), "ana", most=9)
        fleet = ServiceFleet(storage, tmp_path, Crew())
        fleet.start()
        until(lambda: submissions(store.engine)[0].fate is Fate.GIVEN_UP)
        fleet.stop()
        assert "No space left" in (submissions(store.engine)[0].reason or "")
    assert ended == ["killed"]


def test_a_worker_joins_by_hand_what_the_service_took_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    upgrade(storage)
    spec = make_spec("taken")
    monkeypatch.chdir(tmp_path)
    with StudyStore(storage) as store:
        submit(store.engine, spec, "ana", most=9)
    assert study_file("taken", storage) == StudyFile(spec=spec, folder=tmp_path)
    with pytest.raises(StorageError, match="has no study 'other'"):
        study_file("other", storage)
