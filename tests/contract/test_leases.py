"""Leases by the database's clock: whose trial is taken, whose is not, and what becomes of a result that comes too late.

A worker of another host is a study that was opened under another host's name; it is silenced by stopping its thread.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from rank_search.cli.tables import status_lines
from rank_search.errors import LeaseLostError, StorageError, UnavailableError
from rank_search.study import patience as waiting
from rank_search.study.consistency import check_database
from rank_search.study.engine import make_engine
from rank_search.study.heartbeat import Heartbeat
from rank_search.study.leases import Leases, add_lease
from rank_search.study.patience import Patience
from rank_search.study.records import State
from rank_search.study.recovery import MAX_REQUEUES
from rank_search.study.store import StudyStore
from rank_search.study.study import Study
from rank_search.study.tables import LeaseRow, StudyRow
from tests.contract.conftest import ON_TWO
from tests.contract.other_hosts import elsewhere, let_leases_run_out, silence, states
from tests.contract.synthetic import measure, open_study, run_trials
from tests.waiting import LONG, until

pytestmark = pytest.mark.usefixtures("hosts_may_share_a_file")
LADDER = {"ladder": [0.8, 0.5]}


def given_back(study: Study, storage: str) -> bool:
    """Whether a worker that looks now proposes the one trial that was lost again."""
    study.reconcile()
    return State.REQUEUED in states(storage)


def count_leases(storage: str) -> int:
    engine = make_engine(storage)
    with engine.connect() as connection:
        count = connection.execute(select(func.count()).select_from(LeaseRow)).scalar_one()
    engine.dispose()
    return count


def test_a_silent_worker_of_another_host_loses_its_trial_and_its_late_result_is_refused(storage: str) -> None:
    with elsewhere():
        stalled = open_study(storage, lease=1, **LADDER)
    held = stalled.ask()
    silence(stalled)
    study = open_study(storage, lease=1, patience=Patience(600), **LADDER)
    run_trials(study, 3)  # the other seeds
    until(lambda: given_back(study, storage))
    again = study.ask()
    assert (again.rank_map, again.source) == (held.rank_map, held.source)
    with pytest.raises(LeaseLostError, match=r"trial 0 of study 'tiny' was given back .*silent for \d+ s"):
        stalled.tell(held, measure(held.rank_map, loss=1.0))
    study.tell(again, measure(again.rank_map))
    run_trials(stalled, 1)  # it goes on
    stalled.close()
    study.close()
    found = states(storage)
    assert found[0] is State.REQUEUED
    assert set(found[1:]) == {State.COMPLETE}
    with StudyStore(storage) as store:
        digests = [trial.rank_map.digest for trial in store.trials("tiny") if trial.state is State.COMPLETE]
    assert len(set(digests)) == len(digests)
    assert check_database(storage) == ()
    assert count_leases(storage) == 0


@ON_TWO
def test_a_worker_that_gives_signs_of_life_keeps_its_trial(storage: str) -> None:
    with elsewhere():
        slow = open_study(storage, lease=2, **LADDER)
    held = slow.ask()
    study = open_study(storage, lease=2, **LADDER)
    for _ in range(5):
        time.sleep(0.6)
        run_trials(study, 1)
    slow.tell(held, measure(held.rank_map))
    slow.close()
    study.close()
    assert set(states(storage)) == {State.COMPLETE}


def test_no_clock_but_the_databases_counts(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts ten minutes apart, one in another time zone."""

    def shifted(minutes: float) -> type[datetime]:
        class Shifted(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return datetime.now(UTC) + timedelta(minutes=minutes)

        return Shifted

    studies = []
    for host, minutes, zone in (("early", -5, "Asia/Tokyo"), ("late", 5, "UTC")):
        monkeypatch.setenv("TZ", zone)
        monkeypatch.setenv("PGTZ", zone)
        time.tzset()
        monkeypatch.setattr("rank_search.study.store.datetime", shifted(minutes))
        with elsewhere(host):
            studies.append(open_study(storage, lease=5, **LADDER))
    held = [study.ask() for study in studies]
    for _ in range(3):
        time.sleep(0.7)
        for study in studies:
            study.reconcile()
    with StudyStore(storage) as store:
        beats = store.status("tiny").workers
    assert [beat.trial for beat in beats] == [0, 1]
    assert all(0 <= beat.age < 5 and not beat.is_silent for beat in beats)
    for study, proposal in zip(studies, held, strict=True):
        study.tell(proposal, measure(proposal.rank_map))
        study.close()
    monkeypatch.undo()
    time.tzset()
    assert states(storage) == [State.COMPLETE] * 2


@ON_TWO
def test_after_an_outage_nobody_is_taken_for_gone_for_a_whole_lease(storage: str) -> None:
    with elsewhere():
        gone = open_study(storage, lease=LONG, **LADDER)
    held = gone.ask()
    silence(gone)
    study = open_study(storage, lease=LONG, patience=Patience(600), **LADDER)
    let_leases_run_out(storage)
    study.reconcile()
    assert states(storage) == [State.RUNNING]  # for all that this worker knows, the database was away until now
    study._heartbeat._since -= LONG  # as if that were long ago
    assert given_back(study, storage)
    study.close()
    with pytest.raises(LeaseLostError):
        gone.tell(held, measure(held.rank_map))
    gone.close()


@ON_TWO
def test_whoever_was_silent_for_longer_than_workers_wait_is_gone(storage: str) -> None:
    with elsewhere():
        gone = open_study(storage, **LADDER)
    gone.ask()
    silence(gone)
    let_leases_run_out(storage, seconds=601)
    study = open_study(storage, patience=Patience(600), **LADDER)
    assert states(storage) == [State.REQUEUED]
    study.close()
    gone.close()


@ON_TWO
def test_a_trial_without_a_lease_gets_one_that_its_worker_may_renew(storage: str) -> None:
    with elsewhere():
        old = open_study(storage, **LADDER)
    held = old.ask()
    silence(old)
    engine = make_engine(storage)
    with engine.begin() as connection:
        connection.execute(delete(LeaseRow))
    study = open_study(storage, **LADDER)
    assert [lease.trial for lease in Leases(engine, "", 1).of_study("tiny")] == [None, held.number]
    engine.dispose()
    study.reconcile()
    assert states(storage) == [State.RUNNING]
    let_leases_run_out(storage)
    study.reconcile()
    assert states(storage) == [State.REQUEUED]
    study.close()
    old.close()


@ON_TWO
def test_a_lease_on_a_trial_that_has_ended_is_dropped(storage: str) -> None:
    """As of one that was granted to a trial without a row, which its worker then skipped."""
    study = open_study(storage, **LADDER)
    ended = run_trials(study, 1)[0].number
    engine = make_engine(storage)
    with Session(engine) as session, session.begin():
        add_lease(session, session.scalars(select(StudyRow.id)).one(), ended, "unknown:0:", 60)
    engine.dispose()
    study.reconcile()
    assert count_leases(storage) == 1  # the worker's own
    study.close()


@ON_TWO
def test_a_trial_over_which_workers_fall_silent_again_and_again_fails(storage: str) -> None:
    for number in range(MAX_REQUEUES + 1):
        with elsewhere(f"host{number}"):
            gone = open_study(storage, ladder=[0.5])
        assert "closed form 0.5" in {gone.ask().source for _ in range(3)}
        silence(gone)
        gone._optuna.close()
        gone._store.close()
        let_leases_run_out(storage)
    study = open_study(storage, ladder=[0.5])
    study.close()
    with StudyStore(storage) as store:
        tried = [trial for trial in store.trials("tiny") if trial.source == "closed form 0.5"]
    assert [trial.state for trial in tried] == [State.REQUEUED] * MAX_REQUEUES + [State.FAILED]
    assert f"died {MAX_REQUEUES + 1} times" in (tried[-1].reason or "")


def test_six_at_once_propose_four_lost_trials_again_once_each(storage: str, processes: ForkServerContext) -> None:
    with elsewhere():
        gone = open_study(storage, **LADDER)
    held = [gone.ask().rank_map for _ in range(4)]
    silence(gone)
    let_leases_run_out(storage)
    with processes.Pool(6) as pool:
        pool.map(reopen, [storage] * 6, chunksize=1)
    assert states(storage) == [State.REQUEUED] * 4
    study = open_study(storage, **LADDER)
    again = run_trials(study, 6)
    study.close()
    gone.close()
    assert [proposal.rank_map for proposal in again[:4]] == held
    assert not set(held) & {proposal.rank_map for proposal in again[4:]}


def reopen(storage: str) -> None:
    open_study(storage, **LADDER).close()


@ON_TWO
def test_status_tells_of_workers_and_of_failed_trials(storage: str) -> None:
    started = time.monotonic()
    with elsewhere():
        gone = open_study(storage, **LADDER)
    gone.ask()
    silence(gone)
    let_leases_run_out(storage, seconds=300)
    study = open_study(storage, patience=Patience(600), **LADDER)
    study.fail(study.ask(), "validation loss is nan")
    with StudyStore(storage) as store:
        status = store.status("tiny")
    assert [(beat.trial, beat.is_silent) for beat in status.workers] == [(0, True), (None, False)]
    passed = time.monotonic() - started + 1  # a database may tell whole seconds
    silent, beating = (beat.age for beat in status.workers)
    assert 300 <= silent < 300 + min(passed, 20)
    assert 0 <= beating < passed
    lines = list(status_lines(status))
    process = os.getpid()
    heard = f"last heard of {silent:.0f} s ago"
    assert any(
        re.fullmatch(rf"worker +elsewhere, process {process}: trial 0, {heard}, silent: .* proposed again", line)
        for line in lines
    )
    ending = f"process {process}: between two trials, last heard of {beating:.0f} s ago"
    assert any(line.endswith(ending) for line in lines)
    assert lines[-1] == "trial 1 failed: validation loss is nan"
    study.close()
    gone.close()


@ON_TWO
def test_workers_are_told_in_the_order_in_which_they_came(storage: str) -> None:
    studies = []
    for host in ("first", "second", "third"):
        with elsewhere(host):
            studies.append(open_study(storage, **LADDER))
    held = [studies[1].ask(), studies[0].ask()]
    with StudyStore(storage) as store:
        beats = store.status("tiny").workers
    told = [(beat.worker.partition(":")[0], beat.trial) for beat in beats]
    assert told == [("first", held[1].number), ("second", held[0].number), ("third", None)]
    for study in studies:
        study.close()


def test_a_named_lease_has_one_holder_until_it_runs_out(storage: str) -> None:
    engine = make_engine(storage)
    first, second = Leases(engine, "a:1:", 60), Leases(engine, "b:1:", 60)
    assert first.try_name("bank x") == 1
    assert second.try_name("bank x") is None
    assert second.try_name("bank y") == 1
    let_leases_run_out(storage)
    assert second.try_name("bank x") == 2
    assert not first.renew_name("bank x", 1)
    first.end_name("bank x", 1)  # it has nothing to end any more
    assert first.try_name("bank x") is None
    second.end_name("bank x", 2)
    assert first.try_name("bank x") == 3
    engine.dispose()


def test_the_thread_lives_through_every_error_of_the_database(tmp_path: Path) -> None:
    answers: Iterator[Exception | None] = iter(
        [None, None, StorageError("permission denied"), UnavailableError("away")]
    )
    calls: list[float] = []

    def renew(_leases: Leases) -> None:
        calls.append(time.monotonic())
        answer = next(answers, None)
        if answer is not None:
            raise answer

    heartbeat = Heartbeat(make_engine(f"sqlite:///{tmp_path}/none.db"), "a:1:", 0.3, renew)
    heartbeat.start()
    seen = []

    def look() -> bool:
        seen.append(heartbeat.steady_seconds())
        return len(calls) >= 8 and seen[-1] > 0

    until(look, pause=0.02)
    heartbeat.stop()
    assert 0.0 in seen[1:]  # while the errors came
    assert 0.0 < seen[-1] < calls[-1] - calls[3] + 0.1  # counted anew since


@ON_TWO
def test_a_claim_whose_answer_was_lost_is_proposed_again(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_PAUSE", 0.01)
    study = open_study(storage, patience=Patience(600), **LADDER)
    begin, calls = StudyStore.begin_trial, []

    def lose(store: StudyStore, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:  # before it is stored
            raise UnavailableError("connection refused")
        record = begin(store, *arguments, **options)  # type: ignore[arg-type]
        if len(calls) == 2:  # after it
            raise UnavailableError("server closed the connection")
        return record

    monkeypatch.setattr(StudyStore, "begin_trial", lose)
    proposals = run_trials(study, 5)
    study.close()
    assert sorted(p.source for p in proposals[:4]) == sorted(
        f"{name} {kept}" for kept in (0.8, 0.5) for name in ("closed form", "uniform")
    )
    assert sorted(states(storage)) == sorted([State.REQUEUED] + [State.COMPLETE] * 5)
    assert check_database(storage) == ()
