"""``rank-search db``: what it prints, what it returns, and the hosts that a file is shared between."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text

from rank_search.cli import run_command
from rank_search.errors import StorageError
from rank_search.study.engine import make_engine
from rank_search.study.hosts import refuse_other_hosts, require_server
from rank_search.study.liveness import UNKNOWN
from rank_search.study.schema import alembic_config, head
from rank_search.study.store import StudyStore
from rank_search.study.upgrading import upgrade
from tests.contract.other_hosts import elsewhere
from tests.contract.synthetic import open_study, run_trials


def execute(storage: str, statement: str) -> None:
    engine = make_engine(storage)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_upgrade_tells_what_was_done(empty_storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["db", "upgrade", "--storage", empty_storage]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0001  Studies, trials and the front"
    assert lines[-1] == f"schema version {head()}"
    engine = make_engine(empty_storage)
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0001")
    engine.dispose()
    assert run_command(["db", "upgrade", "--storage", empty_storage]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("0002  ")
    assert run_command(["db", "upgrade", "--storage", empty_storage]) == 0
    assert capsys.readouterr().out == f"schema version {head()}, up to date already\n"


def test_optuna_tables_of_an_older_version_are_upgraded(storage: str) -> None:
    execute(storage, "UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    assert upgrade(storage).optuna == ("v3.0.0.d", "v3.2.0.a")
    assert upgrade(storage).optuna is None
    open_study(storage).close()


def test_check_returns_1_when_there_is_a_fault(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    study = open_study(storage, ladder=[0.5])
    run_trials(study, 2)
    study.close()
    assert run_command(["db", "check", "--storage", storage]) == 0
    assert capsys.readouterr().out == "no faults\n"
    execute(storage, "DELETE FROM rank_search_front")
    assert run_command(["db", "check", "--storage", storage]) == 1
    assert capsys.readouterr().out.startswith("study tiny: its front holds trials none, that of all its trials ")


def test_export_and_import_by_command(storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = open_study(storage, ladder=[0.5])
    run_trials(study, 2)
    study.close()
    file, other = tmp_path / "tiny.jsonl.gz", f"sqlite:///{tmp_path}/other.db"
    assert run_command(["db", "export", "tiny", "-o", str(file), "--storage", storage]) == 0
    assert run_command(["db", "import", str(file), "--storage", other]) == 0
    with StudyStore(storage) as here, StudyStore(other) as there:
        assert [(t.number, t.measurement) for t in here.trials("tiny")] == [
            (t.number, t.measurement) for t in there.trials("tiny")
        ]
    capsys.readouterr()
    assert run_command(["db", "export", "nostudy", "-o", str(file), "--storage", storage]) == 2
    assert capsys.readouterr().err.endswith("has no study 'nostudy'; known studies are tiny\n")
    assert run_command(["db", "import", str(file), "--storage", other]) == 2
    assert "has a study 'tiny' already" in capsys.readouterr().err
    assert run_command(["db", "import", str(tmp_path / "none"), "--storage", other]) == 2


def test_a_file_that_another_host_works_on_is_refused(storage: str, backend: str) -> None:
    study = open_study(storage, ladder=[0.5])
    run_trials(study, 1)
    study.ask()
    study.close()
    refuse_other_hosts(storage, "tiny")
    execute(storage, "UPDATE rank_search_trials SET worker = 'elsewhere:12:345.6'")
    execute(storage, "UPDATE rank_search_leases SET holder = 'elsewhere:12:345.6'")
    if backend == "sqlite":
        told = r"a worker on host elsewhere, last heard of \d s ago, and an SQLite database is for one; use PostgreSQL"
        with pytest.raises(StorageError, match=told):
            refuse_other_hosts(storage, "tiny")
        # That host is gone, as a container is; the trial that it left running is proposed again.
        execute(storage, "UPDATE rank_search_leases SET expires = '2000-01-01 00:00:00.000000'")
        with pytest.raises(StorageError, match="--on ray puts workers on other hosts"):
            require_server(storage, "ray")
    else:
        require_server(storage, "ray")
    refuse_other_hosts(storage, "tiny")


def test_of_two_hosts_that_start_at_once_a_file_takes_one(storage: str, backend: str) -> None:
    for host in ("first", "second"):
        with elsewhere(host):
            refuse_other_hosts(storage, "tiny")  # before either has opened the study
    with elsewhere("first"):
        first = open_study(storage, ladder=[0.5])
    with elsewhere("second"):
        if backend == "sqlite":
            with pytest.raises(StorageError, match="a worker on host first, last heard of 0 s ago"):
                open_study(storage, ladder=[0.5])
        else:
            open_study(storage, ladder=[0.5]).close()
    with StudyStore(storage) as store:  # the second one has left nothing that would keep the first one out
        assert [beat.worker.partition(":")[0] for beat in store.status("tiny").workers] == ["first"]
    first.close()


def test_a_claim_of_nobody_knows_whom_is_no_other_host(storage: str) -> None:
    study = open_study(storage, ladder=[0.5])
    study.ask()
    study.close()
    execute(storage, f"UPDATE rank_search_leases SET holder = '{UNKNOWN}'")
    with StudyStore(storage) as store:
        assert [beat.worker for beat in store.status("tiny").workers] == [UNKNOWN]
    open_study(storage, ladder=[0.5]).close()


def test_a_database_that_is_not_there_yet_is_nobodys(tmp_path: Path) -> None:
    refuse_other_hosts(f"sqlite:///{tmp_path}/study.db", "tiny")
    assert list(tmp_path.iterdir()) == []
