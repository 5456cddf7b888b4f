"""The schema: made once by any number of processes, refused when it is of an unknown version."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.context import ForkServerContext

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from rank_search.errors import StorageError, StudyMismatchError
from rank_search.study.engine import make_engine
from rank_search.study.records import State
from rank_search.study.schema import VERSION_TABLE, alembic_config, ensure_schema
from rank_search.study.store import StudyStore
from rank_search.study.tables import Base
from tests.contract.conftest import Postgres
from tests.contract.synthetic import measure, open_study, worker_measures


def test_eight_processes_on_an_empty_database_make_one_study(empty_storage: str, processes: ForkServerContext) -> None:
    with processes.Pool(8) as pool:
        results = pool.starmap(worker_measures, [(empty_storage, 2)] * 8, chunksize=1)
    done = sorted(pair for result in results for pair in result)
    with StudyStore(empty_storage) as store:
        # What two of them propose at once is measured once.
        skipped = [trial.number for trial in store.trials("tiny") if trial.state is State.SKIPPED]
    assert sorted([number for number, _ in done] + skipped) == list(range(16 + len(skipped)))
    seeds = [f"{kind} {kept}" for kind in ("closed form", "uniform") for kept in (0.9, 0.8, 0.6, 0.4)]
    assert [source for _, source in done] == seeds + ["fitted"] * 8
    with StudyStore(empty_storage) as store:
        assert store.studies() == ["tiny"]
        assert store.finished("tiny") == 16
        assert store.front("tiny") == store.recompute_front("tiny")


def test_migrations_make_the_declared_tables(storage: str) -> None:
    engine = make_engine(storage)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_name": lambda name, kind, _: kind != "table" or name in Base.metadata.tables}
        )
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_optuna_and_the_project_keep_separate_versions(storage: str) -> None:
    engine = make_engine(storage)
    tables = set(inspect(engine).get_table_names())
    engine.dispose()
    assert {"alembic_version", VERSION_TABLE, "studies", "rank_search_studies"} <= tables


def test_sessions_are_in_utc_wherever_the_worker_is(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    with postgres.database(with_schema=False) as url:
        engine = make_engine(url)
        for _ in range(2):  # the setting outlives a transaction
            with engine.connect() as connection:
                assert connection.scalar(text("SHOW timezone")) == "UTC"
        engine.dispose()


def test_a_newer_database_is_refused_and_left_alone(storage: str) -> None:
    _execute(storage, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(StorageError, match=r"schema version 9999, newer than .* upgrade rank-search"):
        StudyStore(storage)
    engine = make_engine(storage)
    with pytest.raises(StorageError, match="upgrade rank-search"):
        ensure_schema(engine)
    with engine.connect() as connection:
        assert connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}")) == "9999"
    engine.dispose()


def test_reading_a_database_without_studies_makes_no_tables(empty_storage: str) -> None:
    _execute(empty_storage, "CREATE TABLE other (id INTEGER)")
    with pytest.raises(StorageError, match="holds no rank-search study"):
        StudyStore(empty_storage)
    engine = make_engine(empty_storage)
    assert inspect(engine).get_table_names() == ["other"]
    engine.dispose()


def test_a_study_of_optuna_alone_is_not_taken_over(storage: str) -> None:
    open_study(storage, "mine").close()
    _execute(storage, "INSERT INTO studies (study_name) VALUES ('theirs')")
    with pytest.raises(StudyMismatchError, match="rank-search did not make"):
        open_study(storage, "theirs")
    with StudyStore(storage) as store:
        assert store.studies() == ["mine"]


def _execute(storage: str, statement: str) -> None:
    engine = create_engine(storage.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_a_database_of_the_version_before_metrics_is_upgraded_and_read(storage: str) -> None:
    study = open_study(storage)
    proposal = study.ask()
    study.tell(proposal, replace(measure(proposal.rank_map), metrics={"accuracy": 0.5}, fold_losses=(1.0, 2.0)))
    study.set_dense_loss(1.5, {"accuracy": 0.75})
    study.close()
    with StudyStore(storage) as store:
        assert store.study("tiny").dense_metrics == {"accuracy": 0.75}
        stored = store.trials("tiny")[0].measurement
        assert stored is not None
        assert (stored.metrics, stored.fold_losses) == ({"accuracy": 0.5}, (1.0, 2.0))
        assert store.front("tiny")[0].measurement == stored
    engine = make_engine(storage)
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0001")
    with pytest.raises(StorageError, match=r"has schema version 0001, older than \d+"):
        StudyStore(storage)
    ensure_schema(engine)
    engine.dispose()
    with StudyStore(storage) as store:
        assert store.study("tiny").dense_metrics == {}
        assert store.trials("tiny")[0].measurement == replace(stored, metrics={}, fold_losses=())
        # Every trial of that version was measured once, on the only rung.
        assert store.measurements("tiny", 0) == (replace(stored, metrics={}, fold_losses=()),)
        assert store.status("tiny").seconds == stored.seconds
