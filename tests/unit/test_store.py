"""Databases that cannot be used, each refused in one line; stored facts; which workers are dead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pymysql
import pytest

from rank_search.errors import StorageError, StudyMismatchError, UnavailableError
from rank_search.spec import parse_study
from rank_search.study.engine import make_engine, parse_url, shown, storage_error
from rank_search.study.facts import StudyFacts
from rank_search.study.liveness import WorkerId
from rank_search.study.schema import ensure_schema
from rank_search.study.store import StudyStore
from tests.contract.synthetic import make_allocator, make_facts, open_study


def one_line(error: pytest.ExceptionInfo[StorageError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_reading_a_missing_database_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no database") as error:
        StudyStore(f"sqlite:///{tmp_path}/none.db")
    assert "none.db" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="its folder does not exist"):
        open_study(f"sqlite:///{tmp_path}/no/s.db")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("these are notes, long enough to be no database header\n" * 20)
    before = file.read_bytes()
    for attempt in (StudyStore, open_study):
        with pytest.raises(StorageError, match="file is not a database") as error:
            attempt(f"sqlite:///{file}")
        one_line(error)
    assert file.read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused() -> None:
    # Not even the superuser makes files in /proc.
    with pytest.raises(StorageError, match=r"/proc/s\.db") as error:
        open_study("sqlite:////proc/s.db")
    one_line(error)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true"])
def test_an_sqlite_database_of_one_connection_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="not an SQLite file"):
        parse_url(url)


def test_a_text_that_is_no_url_is_not_repeated() -> None:
    with pytest.raises(StorageError, match="not a database URL") as error:
        parse_url("postgres//me:s3cret@host/db")
    assert "s3cret" not in one_line(error)


def test_an_unreachable_database_hides_the_password() -> None:
    url = "postgresql://me:s3cret%2Fpass@127.0.0.1:1/db?connect_timeout=2"
    for attempt in (StudyStore, open_study):
        with pytest.raises(StorageError, match=r"me:\*\*\*@127\.0\.0\.1:1/db") as error:
            attempt(url)
        text = one_line(error)
        assert "s3cret" not in text
        assert "refused" in text


def test_a_password_among_the_options_is_hidden_too() -> None:
    url = parse_url("postgresql://host/db?user=me&password=s3cret")
    assert "s3cret" not in shown(url)


def test_postgresql_means_psycopg() -> None:
    engine = make_engine("postgresql://me@host/db")
    assert engine.url.drivername == "postgresql+psycopg"


def test_a_missing_driver_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"pip install 'rank-search\[postgresql\]'"):
        make_engine("postgresql://me@host/db")


@pytest.mark.parametrize("state", ["08006", "25006", "40P01", "53300", "55P03", "57014", "57P01", "58030"])
def test_what_a_postgresql_server_gets_over_may_pass(state: str) -> None:
    error = psycopg.errors.lookup(state)("cannot execute INSERT in a read-only transaction")
    assert isinstance(storage_error(parse_url("postgresql://host/db"), error), UnavailableError)


@pytest.mark.parametrize("state", ["28P01", "3D000", "42501", "42P01"])
def test_what_only_a_person_can_mend_does_not_pass(state: str) -> None:
    error = psycopg.errors.lookup(state)("permission denied for table studies")
    assert not isinstance(storage_error(parse_url("postgresql://host/db"), error), UnavailableError)


@pytest.mark.parametrize("number", [1020, 1158, 1213, 1290, 1317, 1836, 1927, 1969, 2013])
def test_what_a_mysql_server_gets_over_may_pass(number: int) -> None:
    error = pymysql.err.OperationalError(number, "The server is running with the --read-only option")
    assert isinstance(storage_error(parse_url("mysql://host/db"), error), UnavailableError)
    lasting = pymysql.err.OperationalError(1142, "INSERT command denied to user")
    assert not isinstance(storage_error(parse_url("mysql://host/db"), lasting), UnavailableError)


@pytest.mark.parametrize("kind", ["nosuch", "oracle", "mssql+pyodbc"])
def test_an_unknown_kind_of_database_is_refused(kind: str) -> None:
    told = f"'{kind.partition('+')[0]}' is not supported; give sqlite:///FILE, postgresql:// or mysql://"
    with pytest.raises(StorageError, match=told) as error:
        make_engine(f"{kind}://me:s3cret@host/db")
    assert "s3cret" not in one_line(error)


def test_an_unknown_driver_is_refused() -> None:
    with pytest.raises(StorageError, match="no known kind"):
        make_engine("postgresql+nosuch://host/db")


def test_sqlite_readers_are_not_blocked_by_a_writer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    engine = make_engine(url)
    ensure_schema(engine)
    with engine.begin() as writer, StudyStore(url) as store:
        assert writer.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert writer.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert store.studies() == []  # while a transaction holds the write lock
    engine.dispose()


def test_a_study_whose_budget_is_in_tokens_is_stored(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/s.db")
    ensure_schema(engine)
    engine.dispose()
    tables = {"name": "tiny", "model": {"source": "m"}, "finetune": {"tokens": 5000}}
    spec = parse_study(tables, where="test")
    with StudyStore(f"sqlite:///{tmp_path}/s.db") as store:
        store.add_study(spec, make_facts(make_allocator()))
        stored = store.study("tiny").spec
    spec.check_same_meaning(stored)
    assert stored.digest == spec.digest


@pytest.mark.parametrize(
    ("change", "read", "message"),
    [
        ("UPDATE rank_search_studies SET spec = '{'", StudyStore.study, "the file of study 'tiny' in the database is"),
        ("UPDATE rank_search_trials SET rank_map = '['", StudyStore.trials, "a rank map in the database is damaged"),
    ],
)
def test_what_is_damaged_in_a_database_is_said_in_one_line(
    tmp_path: Path, change: str, read: Callable[[StudyStore, str], object], message: str
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = open_study(url)
    study.ask()
    study.close()
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(change)
    engine.dispose()
    with StudyStore(url) as store, pytest.raises(StorageError, match=message):
        read(store, "tiny")


def test_facts_round_trip() -> None:
    facts = make_facts(make_allocator(), revision="abc")
    assert StudyFacts.from_json(facts.to_json()) == facts


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shapes": [{"name": "a"}]}'])
def test_damaged_facts_are_refused(text: str) -> None:
    with pytest.raises(StorageError, match="damaged"):
        StudyFacts.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("revision", "abc"),
        ("model_params", 7),
        ("calibration_digest", "x"),
        ("train_digest", "x"),
        ("validation_digest", "x"),
        ("bank", "x"),
    ],
)
def test_changed_facts_are_named(field: str, value: object) -> None:
    allocator = make_allocator()
    facts = make_facts(allocator)
    with pytest.raises(StudyMismatchError, match=f"study 'tiny' was made with {field} = "):
        make_facts(allocator, **{field: value}).check_same(facts, "tiny")


def test_this_process_is_alive_and_its_id_reads_back() -> None:
    worker = WorkerId.current()
    assert WorkerId.parse(str(worker)) == worker
    assert not worker.is_dead()


def test_a_process_that_ended_is_dead() -> None:
    here = WorkerId.current()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        worker = WorkerId(here.host, process.pid, here.token)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert worker.is_dead()  # ended, but not yet waited for
    assert worker.is_dead()


def test_a_process_id_that_was_used_again_is_dead() -> None:
    here = WorkerId.current()
    namespace, _, start = here.token.partition(".")
    assert WorkerId(here.host, here.pid, f"{namespace}.{int(start) - 1}").is_dead()


def test_processes_that_cannot_be_seen_are_not_called_dead() -> None:
    here = WorkerId.current()
    no_process = 2**22 + 1
    assert not WorkerId("another-host", no_process, here.token).is_dead()
    assert not WorkerId(here.host, no_process, "1.5").is_dead()  # another container of this host name
