"""The service on its port."""

from __future__ import annotations

import gc
import socket
import sys

import uvicorn

from rank_search.errors import InputError
from rank_search.service.asgi import App

_HEADER_BYTES = 2**16
_GRACE_SECONDS = 5
_KEEP_ALIVE_SECONDS = 30
_SWITCH_SECONDS = 0.0002
"""Python's threads take turns so often: who reads the database must not keep the one that answers waiting."""


def take_port(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any free one.

    Raises:
        InputError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise InputError(
            f"port {port} of {host} cannot be had: {error.strerror or error}; choose another with --port"
        ) from None


def serve(app: App, listening: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
        h11_max_incomplete_event_size=_HEADER_BYTES, timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS, lifespan="on",
    )  # fmt: skip
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # what is there stays; looking through it would keep everyone waiting for 50 ms now and then
    uvicorn.Server(config).run(sockets=[listening])
