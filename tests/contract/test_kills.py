"""Processes that are killed where it hurts: between two statements of a migration or of a claim, and in mid-write.

And anywhere at all, ``RANK_SEARCH_TEST_KILLS`` times, 2 by default.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import psutil
import pytest
from alembic import command
from sqlalchemy import Engine, event

from rank_search.factors import tensor_files
from rank_search.factors.bank import open_bank, open_or_build
from rank_search.launch import exits
from rank_search.study.consistency import check_database
from rank_search.study.engine import make_engine
from rank_search.study.optuna_study import OptunaStudy
from rank_search.study.records import FINISHED, State
from rank_search.study.schema import alembic_config, ensure_schema, head, version_of
from rank_search.study.store import StudyStore
from tests.contract.conftest import BACKENDS
from tests.contract.other_hosts import let_leases_run_out
from tests.contract.supervised import launched
from tests.contract.synthetic import open_study, run_trials
from tests.contract.test_launch import gone
from tests.unit.test_bank import KEY
from tests.unit.test_bank import _factors as make_factors
from tests.waiting import LONG, until

KILLS = int(os.environ.get("RANK_SEARCH_TEST_KILLS", "2"))
"""Of a supervisor or of one of its workers; more of them for a soak."""
MORE = 6
"""Trials after the last kill."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """MariaDB commits every statement that makes a table; what is half made there is mended by a person."""
    return str(request.param)


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(statements: int, storage: str) -> None:
    """A process that makes the tables, and is killed before one of its statements that write."""
    seen = [0]

    def count(_c: object, _cursor: object, statement: str, *_: object) -> None:
        seen[0] += statement.split()[0] in {"CREATE", "INSERT", "ALTER", "UPDATE"}
        if seen[0] > statements:
            die()

    event.listen(Engine, "before_cursor_execute", count)
    engine = make_engine(storage)
    ensure_schema(engine)
    engine.dispose()


def run_and_see_it_die(processes: ForkServerContext, target: Callable[..., None], *arguments: object) -> bool:
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def test_making_the_tables_may_be_killed_anywhere(empty_storage: str, processes: ForkServerContext) -> None:
    kills = 0
    for statements in (0, 9, 25):
        kills += run_and_see_it_die(processes, killed_after, statements, empty_storage)
    assert kills >= 2  # later ones find more of it made
    study = open_study(empty_storage, ladder=[0.5])
    run_trials(study, 3)
    study.close()
    assert check_database(empty_storage) == ()


def test_an_upgrade_may_be_killed_anywhere(storage: str, processes: ForkServerContext) -> None:
    study = open_study(storage, ladder=[0.5])
    run_trials(study, 3)
    study.close()
    with StudyStore(storage) as store:
        before = [(trial.rank_map, trial.measurement) for trial in store.trials("tiny")]
    engine = make_engine(storage)
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0002")
    for statements in (0, 4):
        assert run_and_see_it_die(processes, killed_after, statements, storage)
        assert version_of(engine) == "0002"  # all of it or nothing
    ensure_schema(engine)
    assert version_of(engine) == head()
    engine.dispose()
    with StudyStore(storage) as store:
        assert [(trial.rank_map, trial.measurement) for trial in store.trials("tiny")] == before
    assert check_database(storage) == ()


def dies_unsigned(storage: str) -> None:
    """A worker that is killed when it has claimed a trial and nobody knows yet that it has."""
    OptunaStudy._sign = die  # type: ignore[method-assign, assignment]
    open_study(storage, ladder=[0.5]).ask()


def test_a_trial_whose_claim_nobody_signed_is_proposed_again(storage: str, processes: ForkServerContext) -> None:
    open_study(storage, ladder=[0.5]).close()
    assert run_and_see_it_die(processes, dies_unsigned, storage)
    study = open_study(storage, ladder=[0.5])  # gives it a lease that nobody renews
    study.reconcile()
    assert [trial.number for trial in study._optuna.trials() if trial.state.name == "RUNNING"] == [0]
    let_leases_run_out(storage)
    proposals = run_trials_after_a_sweep(study)
    study.close()
    assert sorted(p.source for p in proposals[:2]) == ["closed form 0.5", "uniform 0.5"]
    with StudyStore(storage) as store:
        assert {trial.state for trial in store.trials("tiny")} == {State.COMPLETE}
        assert store.front("tiny") == store.recompute_front("tiny")
    assert check_database(storage) == ()


def run_trials_after_a_sweep(study: object) -> list[object]:
    study.reconcile()  # type: ignore[attr-defined]
    return run_trials(study, 3)  # type: ignore[arg-type, return-value]


def killed_in_write(folder: Path, where: str) -> None:
    """A process that builds a bank, and is killed in its last steps."""
    if where == "half a file":
        tensor_files.TensorStream.write = lambda *_: die()  # type: ignore[method-assign]
    else:
        os.fsync = die
    open_or_build(folder, KEY, make_factors, {})


@pytest.mark.parametrize("where", ["half a file", "a whole file, not yet in its place"])
def test_a_bank_whose_builder_is_killed_is_built_by_the_next(
    tmp_path: Path, processes: ForkServerContext, where: str
) -> None:
    for _ in range(2):
        assert run_and_see_it_die(processes, killed_in_write, tmp_path, where)
        assert open_bank(tmp_path, KEY) is None
    built: list[int] = []

    def build() -> object:
        built.append(1)
        return make_factors()

    bank = open_or_build(tmp_path, KEY, build, {})  # type: ignore[arg-type]
    assert built == [1]
    assert [file.name for file in bank.path.parent.iterdir() if file.suffix != ".lock"] == [bank.path.name]


# A short run is on one kind of database, for its time goes into starting processes.
@pytest.mark.parametrize("backend", BACKENDS if KILLS > 2 else ["postgresql"])
def test_supervisors_and_workers_killed_at_random_lose_nothing(
    empty_storage: str, tmp_path: Path, processes: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK_SEARCH_TEST_LARGER", "40")  # else long runs would propose the same rank maps again
    rng = random.Random(0)
    whom = ["supervisor", "worker", *rng.choices(["supervisor", "worker"], k=max(0, KILLS - 2))][:KILLS]
    seen: set[int] = set()
    supervisor = start(processes, empty_storage, tmp_path, 10**6)
    try:
        for one in whom:
            if not supervisor.is_alive():
                supervisor = start(processes, empty_storage, tmp_path, 10**6)
            if one == "worker":
                until(partial(workers_of, supervisor))
            time.sleep(rng.uniform(0.1, 1.6))  # in making the tables and the bank, too, where there is none yet
            assert supervisor.is_alive()
            workers = workers_of(supervisor)
            while one == "worker" and not workers:  # it may just be between two
                until(partial(workers_of, supervisor))
                workers = workers_of(supervisor)
            seen.update(workers)
            kill(supervisor.pid if one == "supervisor" else rng.choice(workers))
            supervisor.join(0 if one == "worker" else LONG)
        seen.update(workers_of(supervisor))
        supervisor.terminate()
        supervisor.join(LONG)
        assert supervisor.exitcode in {exits.PREEMPTED, -signal.SIGKILL}
        until(lambda: gone(seen))
        supervisor = start(processes, empty_storage, tmp_path, MORE)
        supervisor.join(LONG)
        assert supervisor.exitcode == exits.DONE
    finally:
        supervisor.kill()
        supervisor.join()
    assert_nothing_is_lost(empty_storage)
    bank = open_bank(tmp_path, KEY)
    assert bank is not None
    assert {name: bank[name].sigma.tolist() for name in make_factors()} == {
        name: factors.sigma.tolist() for name, factors in make_factors().items()
    }
    assert [file.name for file in bank.path.parent.iterdir() if file.suffix != ".lock"] == [bank.path.name]


def start(processes: ForkServerContext, storage: str, folder: Path, more: int) -> ForkServerProcess:
    supervisor = processes.Process(target=launched, args=(storage, folder, more))
    supervisor.start()
    return supervisor


def workers_of(supervisor: ForkServerProcess) -> list[int]:
    """Process ids; none of one that has just ended."""
    try:
        return [child.pid for child in psutil.Process(supervisor.pid).children()]
    except psutil.NoSuchProcess:
        return []


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def assert_nothing_is_lost(storage: str) -> None:
    """What must hold after any number of kills, when a launch has come to its end."""
    with StudyStore(storage) as store:
        found = store.trials("tiny")
        assert store.front("tiny") == store.recompute_front("tiny")
    assert {trial.state for trial in found} <= {State.COMPLETE, State.REQUEUED, State.SKIPPED, State.FAILED}
    assert all(trial.reason for trial in found if trial.state is State.FAILED)
    finished = [trial for trial in found if trial.state in FINISHED]
    assert len(finished) >= MORE
    measured = [trial.rank_map.digest for trial in found if trial.state is State.COMPLETE]
    assert len(set(measured)) == len(measured)
    sources = [trial.source for trial in finished]
    assert [sources.count(seed) for seed in ("closed form 0.5", "uniform 0.5")] == [1, 1]
    assert check_database(storage) == ()
