"""Database engines from URLs: the one place that knows how each database must be set up. No Optuna."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects import plugins
from sqlalchemy.engine import URL, CreateEnginePlugin, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from rank_search.errors import CrowdedError, StorageError, UnavailableError

BUSY_SECONDS = 60
"""How long a process waits for the write lock of an SQLite file."""

CONNECT_SECONDS = 15
"""How long a process waits for a server that does not answer; ``connect_timeout`` in the URL overrides it."""

IDLE_SECONDS = 1.0
"""A pooled connection that was idle for longer is asked whether it still works. With one that was in use just now, that
would be a good part of what a worker asks of a database."""

WRITING = {"rank_search_begin": "BEGIN IMMEDIATE"}
"""Execution options of a transaction that may write, the default."""

READ_ONLY = {"rank_search_begin": "BEGIN"}
"""Execution options of a transaction that only reads: on SQLite it takes no write lock."""

NO_TRANSACTION = {"rank_search_begin": ""}
"""Execution options of statements that SQLite refuses inside a transaction."""

_ADVICE = "check --storage or RANK_SEARCH_STORAGE"

_ROOM = "a worker holds two connections; raise the server's max_connections, or run fewer workers"
_CROWDED_WORDS = ("too many clients", "too many connections", "connection slots are reserved", "max_user_connections")
"""PostgreSQL's of the server, of a database and of a role, and MySQL's."""

_PASSING_CODES = re.compile(r"08...|40001|40P01|53...|57014|57P0[1-5]|55P03|25006|25P0[34]|58030")
"""SQLSTATEs of PostgreSQL: connection, deadlocks, resources (a full disk, too many connections), shutdown and crash,
timeouts of statements, locks and idle sessions, a server that is not the primary now, and its disk."""
_PASSING_NUMBERS = {
    1020, 1021, 1040, 1053, 1077, 1079, 1158, 1159, 1160, 1161, 1203, 1205, 1213, 1290, 1317, 1836, 1927, 1969,
    2002, 2003, 2006, 2013, 2055, 3024,
}  # fmt: skip
"""Errors of MySQL and MariaDB: disk full, too many connections, shutdown, lock waits, deadlocks and changed records,
statements that were stopped or took too long, a server that only reads now, connection lost or killed."""
_PASSING_WORDS = (
    "database or disk is full", "database is locked", "database table is locked", "disk i/o error",
    "locking protocol", "connection refused", "timeout expired",
    "connection timeout", "could not connect", "no such file or directory", "server closed the connection",
    "failed to resolve host", "is starting up", "is shutting down", "in recovery mode", "connection is lost",
    "the connection is closed", "connection failed", "network is unreachable", "no route to host",
    "connection reset", "not yet accepting",
)  # fmt: skip
"""Of messages that come without a code: SQLite's, and those of connections that were never made."""
_LASTING_WORDS = (
    "no pg_hba.conf entry",
    "authentication failed",
    "no password supplied",
    "does not exist",
    "access denied",
)
"""Of connections that the server itself refused; nothing but a change by a person helps."""


class _Setup(CreateEnginePlugin):
    """Sets up every engine, Optuna's too, from its first connection on.

    SQLite: the driver's own transactions begin as readers and turn into writers at their first write, where two of
    them can deadlock, and Optuna's claims of waiting trials, which rely on row locks, are handed out twice. Here a
    transaction takes the write lock when it begins, unless it is marked :data:`READ_ONLY`.

    PostgreSQL, MySQL: sessions in UTC, for in another time zone Optuna takes fresh trials of other workers for stale
    ones. A statement sets it, because ``PGTZ`` in a worker's environment overrides the connection's options. And pooled
    connections that the server may have ended since are replaced.
    """

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        """Takes a list that the engine is put into, for those who cannot get at an engine that others make."""
        self._made: list[Engine] = kwargs.pop("rank_search_made", [])

    def update_url(self, url: URL) -> URL:
        return url

    def engine_created(self, engine: Engine) -> None:
        self._made.append(engine)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _set_pragmas)
            event.listen(engine, "begin", _begin)
        else:
            unfinished = _Unfinished()
            event.listen(engine, "do_connect", unfinished.connect)
            event.listen(engine, "connect", unfinished.finish)
            event.listen(engine, "engine_disposed", unfinished.close)
            zone = "SET TIME ZONE 'UTC'" if engine.dialect.name == "postgresql" else "SET time_zone = '+00:00'"
            event.listen(engine, "connect", _set_time_zone(zone))
            event.listen(engine, "checkin", _note_idle)
            event.listen(engine, "checkout", lambda connection, record, _: _replace_dead(engine, connection, record))


class _Unfinished:
    """Connections whose server went away while SQLAlchemy asks its version: nobody else closes them."""

    def __init__(self) -> None:
        self._of_threads: dict[int, DBAPIConnection] = {}

    def connect(self, dialect: Dialect, _record: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._close(threading.get_ident())
        made = self._of_threads[threading.get_ident()] = dialect.connect(*args, **kwargs)
        return made

    def finish(self, _connection: DBAPIConnection, _record: object) -> None:
        self._of_threads.pop(threading.get_ident(), None)

    def close(self, _engine: Engine) -> None:
        for thread in list(self._of_threads):
            self._close(thread)

    def _close(self, thread: int) -> None:
        left = self._of_threads.pop(thread, None)
        if left is not None:
            left.close()


def _note_idle(_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
    record.info["rank_search_idle"] = time.monotonic()


def _replace_dead(engine: Engine, connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    """Have the pool connect anew where its connections have ended."""
    idle = record.info.get("rank_search_idle")
    if idle is None or time.monotonic() - idle <= IDLE_SECONDS:
        return
    try:
        is_alive = engine.dialect.do_ping(connection)
    except engine.dialect.loaded_dbapi.Error:
        is_alive = False
    if not is_alive:
        raise InvalidatePoolError


def _set_time_zone(statement: str) -> Callable[[DBAPIConnection, object], None]:
    return lambda connection, _record: _set(connection, statement)


def _set(connection: DBAPIConnection, statement: str) -> None:
    """Run a statement on a connection that was just made."""
    with ExitStack() as undo:
        undo.callback(connection.close)  # nobody else does where the server is gone by now
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()  # else the next rollback would undo it
        undo.pop_all()


def commit_without_waiting(engine: Engine) -> None:
    """Let commits of this engine's PostgreSQL sessions return before they are on disk; nothing on other databases.

    After a crash of the server, the last fractions of a second of them may be missing, as after a power failure on
    SQLite, but nothing is ever half there. PostgreSQL writes commits to disk in their order, so that one which waits
    takes all before it along.
    """
    if engine.dialect.name == "postgresql":
        event.listen(engine, "connect", _set_asynchronous)
        engine.dispose()  # connections made before


def _set_asynchronous(connection: DBAPIConnection, _record: object) -> None:
    _set(connection, "SET synchronous_commit = off")


def _set_pragmas(connection: DBAPIConnection, _record: object) -> None:
    connection.isolation_level = None  # the driver starts no transactions of its own; _begin does
    cursor = connection.cursor()
    # With the write-ahead log, NORMAL may lose the last transactions at a power failure but never corrupts.
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options().get("rank_search_begin", WRITING["rank_search_begin"])
    if statement:
        connection.exec_driver_sql(statement)


def _enforce_foreign_keys(connection: DBAPIConnection, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


plugins.register("rank_search_setup", __name__, "_Setup")


_BACKENDS = ("sqlite", "postgresql", "mysql", "mariadb")
"""What SQLAlchemy calls the kinds of database that are supported; MariaDB counts as MySQL."""


def parse_url(text: str | URL) -> URL:
    """A database URL in the form that the engines use; ``postgresql://`` means psycopg, ``mysql://`` pymysql.

    Raises:
        StorageError: not a database URL, one of an unsupported kind, or an SQLite database that two connections cannot
            share.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # The text may hold a password, so it is not repeated.
        raise StorageError(f"the storage is not a database URL such as sqlite:///study.db; {_ADVICE}") from None
    if url.drivername in {"postgresql", "postgres"}:
        return url.set(drivername="postgresql+psycopg")
    if url.drivername in {"mysql", "mariadb"}:
        return url.set(drivername="mysql+pymysql")
    if (kind := url.get_backend_name()) not in _BACKENDS:
        raise StorageError(
            f"a database of kind {kind!r} is not supported; give sqlite:///FILE, postgresql:// or mysql:// ({_ADVICE})"
        )
    if kind == "sqlite" and (url.database or "").partition(":")[0] in {"", "file"}:
        raise StorageError(f"storage {url} is not an SQLite file; give one as sqlite:///study.db")
    return url


def shown(url: URL) -> str:
    """The URL without its password."""
    return _scrub(url.render_as_string(hide_password=True), url)


def sqlite_file(url: URL) -> Path | None:
    """The file of an SQLite database, None for other databases."""
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def engine_kwargs(url: URL) -> dict[str, Any]:
    """Arguments for ``create_engine``, the same for the project's engine and for Optuna's."""
    setup = {"plugins": ["rank_search_setup"]}
    if url.get_backend_name() == "sqlite":
        return {**setup, "connect_args": {"timeout": BUSY_SECONDS}}
    if url.get_backend_name() == "postgresql" and "connect_timeout" not in url.query:
        return {**setup, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
    return setup


def make_engine(storage: str | URL, *, must_exist: bool = False, keeps: int = 5) -> Engine:
    """An engine for the project's own tables. Nothing is connected to yet.

    Args:
        must_exist: refuse an SQLite file that is not there instead of leaving it to be made.
        keeps: so many connections stay open when nobody uses them.

    Raises:
        StorageError: not a database URL, a missing driver, file or folder.
    """
    url = parse_url(storage)
    file = sqlite_file(url)
    if file is not None:
        if must_exist and not file.is_file():
            raise StorageError(f"there is no database {file}; {_ADVICE}, or run the study first")
        if not file.absolute().parent.is_dir():
            raise StorageError(f"database {file}: its folder does not exist; make the folder or {_ADVICE}")
    try:
        engine = create_engine(url, pool_size=keeps, **engine_kwargs(url))
    except ModuleNotFoundError as error:
        # Other drivers' packages have the name of their module.
        packages = {"psycopg": "rank-search[postgresql]", "pymysql": "rank-search[mysql]"}
        wanted = packages.get(error.name or "", error.name)
        raise StorageError(f"database {shown(url)} needs a driver; pip install '{wanted}'") from None
    except NoSuchModuleError:
        raise StorageError(f"database {shown(url)} is of no known kind; {_ADVICE}") from None
    if file is not None:
        event.listen(engine, "connect", _enforce_foreign_keys)
    return engine


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn the errors of SQLAlchemy and its drivers into one line without the password.

    Raises:
        StorageError: for every SQLAlchemy error inside the block; an :class:`UnavailableError` if it may pass.
    """
    try:
        yield
    except SQLAlchemyError as error:
        raise storage_error(url, error) from None


def storage_error(url: URL, error: BaseException | None) -> StorageError:
    """One line for an error of the database, without the password."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    if any(crowded in str(cause).lower() for crowded in _CROWDED_WORDS):
        return CrowdedError(f"database {shown(url)}: {_scrub(reason, url)}; {_ROOM}")
    kind = UnavailableError if _may_pass(error, cause) else StorageError
    return kind(f"database {shown(url)}: {_scrub(reason, url)}; {_ADVICE}")


def _may_pass(error: BaseException | None, cause: BaseException | None) -> bool:
    """Whether the same statement may succeed later without anybody's doing."""
    words = str(cause).lower()
    if any(lasting in words for lasting in _LASTING_WORDS):
        return False
    if isinstance(error, PoolTimeoutError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return True
    state = getattr(cause, "sqlstate", None)
    if isinstance(state, str):
        return _PASSING_CODES.fullmatch(state) is not None
    arguments = getattr(cause, "args", ())
    if arguments and arguments[0] in _PASSING_NUMBERS:
        return True
    return any(passing in words for passing in _PASSING_WORDS)


def _scrub(text: str, url: URL) -> str:
    secrets = [url.password] if url.password else []
    for key, value in url.query.items():
        if "passw" in key.lower():
            secrets += [value] if isinstance(value, str) else value
    for secret in secrets:
        for form in {secret, quote(secret, safe=""), quote_plus(secret)}:
            text = text.replace(form, "***") if form else text
    return text
