"""The database schema: made and upgraded under a lock, checked by readers. Optuna is imported only to make it.

The project's tables have a version table of their own, :data:`VERSION_TABLE`, because Optuna owns
``alembic_version``. Optuna's tables are made first, so that a version in ours says that both are complete.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, text

from rank_search.errors import StorageError, UnavailableError
from rank_search.study.engine import NO_TRANSACTION, READ_ONLY, shown, sqlite_file, translated

VERSION_TABLE = "rank_search_alembic_version"
LOCK_SECONDS = 300.0
"""How long a process waits for another one that makes or repairs the same database."""

_LOCK_NAME = "rank_search"
_LOCK_KEY = int.from_bytes(hashlib.sha256(_LOCK_NAME.encode()).digest()[:8], "big", signed=True)


def ensure_schema(engine: Engine) -> None:
    """Make or upgrade the project's and Optuna's tables; safe for any number of processes at once.

    Raises:
        StorageError: the database cannot be reached or written, or is of an unknown newer version.
    """
    with translated(engine.url):
        if _version(engine) == head():
            return
        with exclusive(engine):
            version = _version(engine)
            if version == head():
                return
            _refuse_unknown(engine, version)
            # Optuna is imported here because readers of the schema must not load it.
            from rank_search.study.optuna_study import create_optuna_tables

            if sqlite_file(engine.url) is not None:
                _use_write_ahead_log(engine)
            create_optuna_tables(engine.url)
            with engine.begin() as connection:
                command.upgrade(alembic_config(connection), "head")


def has_schema(engine: Engine) -> bool:
    """Whether the project's tables are there, of whatever version; writes nothing.

    Raises:
        StorageError: the database cannot be reached.
    """
    file = sqlite_file(engine.url)
    if file is not None and not file.is_file():
        return False
    with translated(engine.url):
        return _version(engine) is not None


def check_schema(engine: Engine) -> None:
    """Refuse, without writing, a database that this version of rank-search cannot read.

    Raises:
        StorageError: unreachable, without the project's tables, or of another version.
    """
    with translated(engine.url):
        version = _version(engine)
    if version is None:
        raise StorageError(f"database {shown(engine.url)} holds no rank-search study; check --storage or run one")
    _refuse_unknown(engine, version)
    if version != head():
        raise StorageError(
            f"database {shown(engine.url)} has schema version {version}, older than {head()}; "
            "`rank-search db upgrade` brings it up to date"
        )


@contextmanager
def exclusive(engine: Engine) -> Iterator[None]:
    """Hold the database's one lock for work that must not be done twice at once.

    A file lock beside an SQLite file; a session's advisory lock on PostgreSQL, a named lock on MySQL.

    Raises:
        UnavailableError: another process held it for :data:`LOCK_SECONDS`.
        StorageError: there can be no lock.
    """
    file = sqlite_file(engine.url)
    if file is not None:
        with _file_lock(file):
            yield
        return
    if engine.url.get_backend_name() == "postgresql":
        take, give = f"SELECT pg_try_advisory_lock({_LOCK_KEY})", f"SELECT pg_advisory_unlock({_LOCK_KEY})"
    else:
        take, give = f"SELECT GET_LOCK('{_LOCK_NAME}', 0)", f"SELECT RELEASE_LOCK('{_LOCK_NAME}')"
    with (
        translated(engine.url),
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
    ):
        _wait(lambda: bool(connection.execute(text(take)).scalar()), engine)
        try:
            yield
        finally:
            connection.execute(text(give))


def _wait(take: Callable[[], bool], engine: Engine) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while not take():
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"database {shown(engine.url)}: another process has held its lock for {LOCK_SECONDS:g} s; end it first"
            )
        time.sleep(0.05)


@contextmanager
def _file_lock(file: Path) -> Iterator[None]:
    lock = FileLock(f"{file}.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire(poll_interval=0.02)
    except Timeout:
        raise UnavailableError(
            f"another process has held {lock.lock_file} for {LOCK_SECONDS:g} s; end that process first"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"database {file} cannot be locked: {reason}; give a file in a folder of your own") from None
    try:
        yield
    finally:
        lock.release()


def _use_write_ahead_log(engine: Engine) -> None:
    """Let readers read while one process writes. The setting stays in the file."""
    with engine.connect().execution_options(**NO_TRANSACTION) as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")


def _version(engine: Engine) -> str | None:
    with engine.connect().execution_options(**READ_ONLY) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        return context.get_current_revision()


@cache
def head() -> str:
    """The version of the project's tables that this rank-search writes."""
    newest = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert newest is not None  # the package holds its migrations
    return newest


@cache
def _known() -> frozenset[str]:
    return frozenset(script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions())


def _refuse_unknown(engine: Engine, version: str | None) -> None:
    if version is not None and version not in _known():
        raise StorageError(
            f"database {shown(engine.url)} has schema version {version}, newer than this rank-search knows "
            f"({head()}); upgrade rank-search"
        )


def make_empty(engine: Engine, version: str) -> bool:
    """Make all tables in a database of the caller's own, the project's at ``version``; False if it is not known.

    Raises:
        StorageError: the database cannot be written.
    """
    from rank_search.study.optuna_study import create_optuna_tables

    if version not in _known():
        return False
    create_optuna_tables(engine.url)
    with translated(engine.url), engine.begin() as connection:
        command.upgrade(alembic_config(connection), version)
    return True


def migrations(before: str | None, after: str | None) -> tuple[tuple[str, str], ...]:
    """Version and purpose of every migration that leads from one version to another, the first one first."""
    if before == after:
        return ()
    script = ScriptDirectory.from_config(alembic_config())
    found = [(step.revision, step.doc) for step in script.iterate_revisions(after or "head", before or "base")]
    return tuple(reversed(found))


def version_of(engine: Engine) -> str | None:
    """The version of the project's tables, None where there are none; writes nothing.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url):
        return _version(engine)


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's settings for the project's migrations, on a connection that is in a transaction."""
    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
