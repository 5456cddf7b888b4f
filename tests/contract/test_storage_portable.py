"""A study as one file: everything of it comes back, in any other database, or nothing does."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Engine, text

from rank_search.errors import StorageError
from rank_search.study import schema
from rank_search.study.consistency import check_database
from rank_search.study.engine import make_engine
from rank_search.study.portable import dump_study, load_study
from rank_search.study.records import State
from rank_search.study.rows import STUDIES, reflected, rows_of, snapshot, study_tables
from rank_search.study.store import StudyStore
from tests.contract.conftest import ON_ONE, ON_TWO
from tests.contract.synthetic import measure, open_study, run_trials, worker_measures_until
from tests.waiting import until


@pytest.fixture
def other(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database of the other kind."""
    if backend == "postgresql":
        yield f"sqlite:///{tmp_path}/other.db"
        return
    with request.getfixturevalue("postgres").database(with_schema=False) as url:
        yield url


def fill(storage: str, name: str = "tiny", sampler: str = "fitted") -> None:
    """A study with measurements, a failure, a requeued trial that waits, and one that runs."""
    study = open_study(storage, name, sampler=sampler, ladder=[0.5])
    run_trials(study, 3)
    study.fail(study.ask(), "validation loss is nan")
    study.ask()
    study.requeue(study.ask())
    study.set_dense_loss(2.5, {"accuracy": 0.5})
    study.close()


def rows(engine: Engine, name: str) -> list[tuple[str, dict[str, object]]]:
    with snapshot(engine) as connection:
        return list(rows_of(connection, name))


@pytest.mark.parametrize("sampler", ["fitted", "tpe"])
def test_a_study_goes_to_another_kind_of_database_and_goes_on_there(storage: str, other: str, sampler: str) -> None:
    open_study(storage, "first").close()  # so that ids differ
    fill(storage, sampler=sampler)
    assert load_study(other, dump_study(storage, "tiny"), "the file") == "tiny"
    with StudyStore(storage) as here, StudyStore(other) as there:
        assert there.study("tiny") == here.study("tiny")
        assert there.trials("tiny") == here.trials("tiny")
        assert there.front("tiny") == here.front("tiny") == here.recompute_front("tiny")
        states = {trial.state for trial in there.trials("tiny")}
    assert states == {State.COMPLETE, State.FAILED, State.RUNNING, State.REQUEUED}
    assert check_database(other) == ()
    proposals = []
    for url in (storage, other):
        study = open_study(url, sampler=sampler, ladder=[0.5])
        proposals.append([(p.number, p.source, p.rank_map) for p in run_trials(study, 3)])
        study.close()
    assert proposals[0] == proposals[1]


@ON_TWO
def test_a_file_that_is_written_while_workers_measure_is_the_study_at_one_moment(
    storage: str, other: str, tmp_path: Path, processes: ForkServerContext
) -> None:
    open_study(storage).close()
    enough = tmp_path / "enough"
    with processes.Pool(2) as pool, StudyStore(storage) as store:
        workers = [pool.apply_async(worker_measures_until, (storage, enough)) for _ in range(2)]
        until(lambda: store.finished("tiny") >= 4)
        load_study(other, dump_study(storage, "tiny"), "the file")
        seen = store.finished("tiny")
        until(lambda: store.finished("tiny") >= seen + 4)
        enough.touch()
        for worker in workers:
            worker.get()
    assert check_database(other) == ()
    with StudyStore(storage) as store:
        at_last = {t.number: t.measurement for t in store.trials("tiny") if t.state is State.COMPLETE}
    with StudyStore(other) as store:
        trials = store.trials("tiny")
        assert store.front("tiny") == store.recompute_front("tiny")
    numbers = [trial.number for trial in trials]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] <= len(numbers)  # but for one that the other worker has claimed and not begun
    measured = {t.number: t.measurement for t in trials if t.state is State.COMPLETE}
    assert measured.items() <= at_last.items()
    assert 0 < len(measured) < len(at_last)  # they were at work


def test_the_file_of_an_imported_study_is_the_same_but_for_ids(storage: str, other: str) -> None:
    open_study(storage, "first").close()
    fill(storage)
    load_study(other, dump_study(storage, "tiny"), "the file")
    kept = []
    for url in (storage, other):
        engine = make_engine(url)
        kept.append([(t, {k: v for k, v in row.items() if not k.endswith("id")}) for t, row in rows(engine, "tiny")])
        engine.dispose()
    assert kept[0] == kept[1]
    assert len(kept[0]) > 60


@ON_ONE
def test_parents_of_a_genetic_sampler_stay_the_same_trials(storage: str, other: str) -> None:
    open_study(storage, "first").close()
    study = open_study(storage, sampler="nsga2", ladder=[0.5])
    run_trials(study, 36)
    study.close()
    open_study(other, "first").close()
    study = open_study(other, "second", ladder=[0.5])
    study.requeue(study.ask())
    study.close()
    load_study(other, dump_study(storage, "tiny"), "the file")
    proposals = []
    for url in (storage, other):
        study = open_study(url, sampler="nsga2", ladder=[0.5])
        proposals.append([proposal.rank_map for proposal in run_trials(study, 2)])
        study.close()
    assert proposals[0] == proposals[1]


@ON_TWO
def test_no_table_of_studies_is_left_out(storage: str) -> None:
    engine = make_engine(storage)
    with snapshot(engine) as connection:
        metadata = reflected(connection)
        carried = {table.name for table, _ in study_tables(metadata, "tiny")}
    engine.dispose()
    versions = {"alembic_version", "version_info", schema.VERSION_TABLE}
    of_a_database = {"trial_heartbeats", "rank_search_leases", "rank_search_jobs"}
    of_a_service = {"rank_search_submissions", "rank_search_requests", "rank_search_tokens"}
    assert metadata.tables.keys() - carried == versions | of_a_database | of_a_service
    assert STUDIES.keys() <= carried


@ON_TWO
def test_a_name_that_is_taken_is_refused_and_nothing_changes(storage: str) -> None:
    fill(storage)
    content = dump_study(storage, "tiny")
    with pytest.raises(StorageError, match=r"has a study 'tiny' already; give another database"):
        load_study(storage, content, "the file")
    assert dump_study(storage, "tiny") == content


@ON_TWO
def test_an_import_that_breaks_off_leaves_nothing(storage: str, other: str) -> None:
    fill(storage)
    records = [json.loads(line) for line in gzip.decompress(dump_study(storage, "tiny")).splitlines()]
    next(r for r in reversed(records) if r.get("table") == "rank_search_trials")["row"]["state"] = None
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records[:-1])
    end = json.dumps({"sha256": hashlib.sha256(lines).hexdigest()}).encode() + b"\n"
    with pytest.raises(StorageError):
        load_study(other, gzip.compress(lines + end), "the file")
    with StudyStore(other) as store:
        assert store.studies() == []
    engine = make_engine(other)
    assert rows(engine, "tiny") == []
    engine.dispose()


@ON_ONE
@pytest.mark.parametrize("damage", ["cut", "bit", "text"])
def test_a_damaged_file_is_refused(storage: str, damage: str) -> None:
    fill(storage)
    content = dump_study(storage, "tiny")
    broken = {
        "cut": content[:-100],
        "bit": gzip.compress(gzip.decompress(content).replace(b"validation loss is nan", b"validation loss is fun")),
        "text": b"name = 'tiny'",
    }[damage]
    with pytest.raises(StorageError, match=r"the file is (damaged|no whole file)"):
        load_study(storage, broken, "the file")


@ON_TWO
def test_a_file_of_an_older_schema_is_brought_up_to_date(storage: str, other: str, tmp_path: Path) -> None:
    fill(storage)
    old = f"sqlite:///{tmp_path}/old.db"
    engine = make_engine(old)
    assert schema.make_empty(engine, schema.head())
    engine.dispose()
    load_study(old, dump_study(storage, "tiny"), "the file")
    engine = make_engine(old)
    with engine.begin() as connection:
        command.downgrade(schema.alembic_config(connection), "0001")
    engine.dispose()
    with pytest.raises(StorageError, match="`rank-search db upgrade` brings it up to date"):
        dump_study(old, "tiny")
    older = dump_at(old, "0001")
    load_study(other, older, "the file")
    with StudyStore(storage) as here, StudyStore(other) as there:
        old_ones, new_ones = (
            [(t.number, t.state, t.rank_map, t.measurement and t.measurement.loss) for t in store.trials("tiny")]
            for store in (here, there)
        )
    assert old_ones == new_ones
    newer = gzip.compress(gzip.decompress(older).replace(b'"schema":"0001"', b'"schema":"9999"'))
    with pytest.raises(StorageError, match="damaged"):
        load_study(other, newer, "the file")


def dump_at(storage: str, version: str) -> bytes:
    """A file as the version of rank-search with that schema would have written it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rank_search.study.portable.check_schema", lambda engine: None)
        patch.setattr("rank_search.study.portable.head", lambda: version)
        return dump_study(storage, "tiny")


@ON_TWO
def test_an_unknown_study_is_refused(storage: str) -> None:
    with pytest.raises(StorageError, match="has no study 'tiny'; it holds none yet"):
        dump_study(storage, "tiny")


@ON_TWO
def test_the_checks_find_nothing_in_a_sound_database(storage: str) -> None:
    fill(storage)
    assert check_database(storage) == ()


FAULTS = {
    "DELETE FROM rank_search_front WHERE trial = (SELECT MIN(trial) FROM rank_search_front)": "front holds",
    "UPDATE rank_search_front SET loss = loss + 1": "has another loss than the trial",
    "UPDATE rank_search_trials SET loss = loss + 1 WHERE number = 0": "Optuna has",
    "UPDATE rank_search_trials SET rank_map = '{\"block.0.attn\": 1}' WHERE number = 3": "stored is",
    "UPDATE rank_search_trials SET rank_map = 'x' WHERE number = 3": "its rank map is damaged",
    "UPDATE rank_search_trials SET number = 99 WHERE number = 3": "trial 99 is not among Optuna's",
    "DELETE FROM rank_search_trials WHERE number = 1": "Optuna's trial 1 is complete, but there is no row for it",
    "UPDATE rank_search_trials SET state = 'running' WHERE number = 3": "trial 3 is running, but Optuna calls it FAIL",
    "UPDATE rank_search_trials SET state = 'failed' WHERE number = 0": "is failed, but Optuna calls it COMPLETE",
    "UPDATE rank_search_trials SET reason = NULL WHERE number = 3": "trial 3: it failed without a reason",
    "UPDATE rank_search_studies SET spec_digest = 'x'": "digest",
    "UPDATE studies SET study_name = 'another'": "Optuna has no study of this name",
    "UPDATE trials SET number = 99 WHERE number = 3": "Optuna's trials have no number 3",
    "INSERT INTO trials (study_id, number, state) SELECT study_id, number, state FROM trials WHERE number = 3":
        "Optuna has 2 trials of number 3",
    "DELETE FROM rank_search_measurements WHERE trial = 1": "trial 1 is complete, but none of its rungs is stored",
    "INSERT INTO rank_search_leases (study_id, trial, holder, attempt, acquired, renewed, expires) "
    "SELECT study_id, number, worker, 1, started, started, started FROM rank_search_trials WHERE number = 2":
        "trial 2 is complete, but there is a lease on it",
}  # fmt: skip


@pytest.fixture(scope="module")
def filled(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with a study, to be copied."""
    file = tmp_path_factory.mktemp("filled") / "study.db"
    shutil.copy(sqlite_template, file)
    fill(f"sqlite:///{file}")
    return file


@pytest.fixture
def copied(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a copy, whose faults are named without a second look."""
    monkeypatch.setattr("rank_search.study.consistency.PAUSE_SECONDS", 0.0)
    for file in filled.parent.glob("study.db*"):
        shutil.copy(file, tmp_path / file.name)
    return f"sqlite:///{tmp_path}/study.db"


@pytest.mark.parametrize("statement", FAULTS, ids=range(len(FAULTS)))
def test_the_checks_name_what_is_wrong(copied: str, statement: str) -> None:
    assert any(FAULTS[statement] in line for line in faults_after(copied, statement))


def test_the_checks_name_what_is_wrong_in_every_database(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_search.study.consistency.PAUSE_SECONDS", 0.0)
    fill(storage)
    statements = [*list(FAULTS)[1:4], *list(FAULTS)[-3:]]
    found = faults_after(storage, *statements)
    for statement in statements:
        assert any(FAULTS[statement] in line for line in found)


def faults_after(storage: str, *statements: str) -> list[str]:
    engine = make_engine(storage)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
    return [str(fault) for fault in check_database(storage)]


def test_rows_that_refer_to_nothing_are_found(copied: str) -> None:
    engine = make_engine(copied)
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("DELETE FROM trials WHERE number = 3")
        connection.exec_driver_sql("COMMIT")
    engine.dispose()
    found = [str(fault) for fault in check_database(copied)]
    assert any("rows of trial_user_attributes refer to a row of trials that is not there" in line for line in found)


@ON_TWO
def test_what_a_worker_left_behind_is_no_fault(storage: str) -> None:
    study = open_study(storage, ladder=[0.5])
    proposal = study.ask()
    study.close()
    with StudyStore(storage) as store:
        store.complete_trial("tiny", proposal.number, measure(proposal.rank_map))
    assert check_database(storage) == ()
