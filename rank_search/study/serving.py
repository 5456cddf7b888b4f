"""optuna-dashboard over the project's database: read-only but for notes, and with files that are made as asked for."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import get_storage
from sqlalchemy.engine import URL

from rank_search.errors import InputError
from rank_search.study.engine import READ_ONLY, parse_url
from rank_search.study.optuna_study import close_storage, open_storage, quiet

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_FIGURES = b'"plotly_graph_objects": '
_STUDY = re.compile(r"/api/studies/\d+")
_NOTE = re.compile(r"/api/studies/\d+(/\d+)?/note")
_REFUSAL = b'{"reason": "this dashboard is read-only but for notes; rank-search itself changes studies"}'


class Reader(Protocol):
    """Makes the content of an artifact by its id; None where there is none."""

    def read(self, artifact: str) -> bytes | None: ...


@contextmanager
def dashboard_app(storage: str | URL, artifacts: Reader) -> Iterator[WSGIApplication]:
    """The dashboard as a WSGI application, on the cached storage object: with a URL it would read all trials anew
    every few seconds.

    Raises:
        InputError: optuna-dashboard is not installed.
        StorageError: the database cannot be reached.
    """
    try:
        from optuna_dashboard import wsgi
    except ModuleNotFoundError as error:
        raise InputError(f"the dashboard needs {error.name}; pip install 'rank-search[dashboard]'") from None
    rdb = open_storage(parse_url(storage))
    rdb.engine.update_execution_options(**READ_ONLY)
    try:
        with quiet():
            yield in_order(wsgi(get_storage(rdb), artifact_store=_Store(artifacts)))
    finally:
        close_storage(rdb)


def in_order(app: WSGIApplication) -> WSGIApplication:
    """List a study's figures by their ids: optuna-dashboard takes them from a set, whose order is anyone's guess."""

    def ordered(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or not _STUDY.fullmatch(environ.get("PATH_INFO", "")):
            return app(environ, start_response)
        begun: list[tuple[str, list[tuple[str, str]]]] = []

        def begin(status: str, headers: list[tuple[str, str]], _error: object = None) -> Callable[[bytes], object]:
            begun.append((status, headers))
            return lambda _content: None  # only applications older than WSGI's second version write by it

        body = b"".join(app(environ, begin))
        status, headers = begun[-1]
        if status.startswith("200"):
            before, key, rest = body.partition(_FIGURES)  # no text holds it: quotes in texts have a backslash before
            told = rest.decode()
            found, end = json.JSONDecoder().raw_decode(told)
            found.sort(key=lambda figure: figure["id"])
            body = b"".join([before, key, json.dumps(found).encode(), told[end:].encode()])
        kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*kept, ("Content-Length", str(len(body)))])
        return [body]

    return ordered


def read_only(app: WSGIApplication, hosts: Iterable[str]) -> WSGIApplication:
    """Refuse what would change a study, which anyone could do who reaches the port, and any other name of the host.

    Names are checked because a page elsewhere could have its own name point here; notes may be written.
    """
    known = frozenset(hosts)

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        if environ.get("HTTP_HOST", "") not in known:
            return _refuse(start_response, b'{"reason": "unknown name of the host"}')
        if method not in {"GET", "HEAD"} and not (method == "PUT" and _NOTE.fullmatch(path)):
            return _refuse(start_response, _REFUSAL)
        return app(environ, start_response)

    return guarded


def _refuse(start_response: StartResponse, reason: bytes) -> Iterable[bytes]:
    start_response("403 Forbidden", [("Content-Type", "application/json"), ("Content-Length", str(len(reason)))])
    return [reason]


class DashboardServer:
    """Serves an application on this host alone; :meth:`serve` blocks until an interrupt.

    Args:
        port: 0 takes any free one.

    Raises:
        InputError: an address that others can reach, or a port that cannot be had.
    """

    def __init__(self, app: WSGIApplication, host: str, port: int) -> None:
        check_host(host)
        server = _Server6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, _unset, server_class=server, handler_class=_Silent)
        except OSError as error:
            raise InputError(
                f"port {port} of {host} cannot be had: {error.strerror}; choose another with --port"
            ) from None
        self.port = self._server.server_port
        names = {f"[{host}]" if ":" in host else host, "localhost", "127.0.0.1", "[::1]"}
        self._server.set_app(read_only(app, [f"{name}:{self.port}" for name in names]))
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def serve(self) -> None:
        """Answer until :meth:`stop` or an interrupt."""
        self._server.serve_forever()

    def stop(self) -> None:
        """End :meth:`serve` from another thread."""
        self._server.shutdown()

    def close(self) -> None:
        """Give the port back."""
        self._server.server_close()


def check_host(host: str) -> None:
    """Refuse an address that others can reach.

    Raises:
        InputError: it is one.
    """
    if host not in LOOPBACK:
        raise InputError(
            f"--host {host} can be reached from elsewhere, and the dashboard has no login; leave it at 127.0.0.1 and "
            "reach it through an SSH tunnel (ssh -L)"
        )


def _unset(_environ: WSGIEnvironment, _start_response: StartResponse) -> Iterable[bytes]:
    raise AssertionError  # replaced before anything is served


class _Server(ThreadingMixIn, WSGIServer):
    """One thread a request: a page asks for several things at once, and some take seconds."""

    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No line for every request."""


class _Store:
    """Optuna's interface of artifact stores."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def open_reader(self, artifact_id: str) -> BinaryIO:
        content = self._reader.read(artifact_id)
        if content is None:
            raise ArtifactNotFound(artifact_id)
        return io.BytesIO(content)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise NotImplementedError(_REFUSAL.decode())

    def remove(self, artifact_id: str) -> None:
        raise NotImplementedError(_REFUSAL.decode())
