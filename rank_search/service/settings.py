"""How the service runs. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from rank_search.errors import InputError


@dataclass(frozen=True, slots=True)
class Settings:
    """How the service runs.

    Attributes:
        storage: URL of the database.
        folder: the service's own: study files, working folders, checkpoints.
        roots: folders in which submitted studies may name models and texts, beside their own folders.
        host, port: the address.
        auth: whether every request needs a token or a session; without it, only names of this host are answered.
        https: whether a proxy in front speaks HTTPS, so that cookies may be limited to it.
        most_studies: more are not taken on.
        body_bytes, study_bytes: most bytes of a request's body, and of a submitted study file.
        rate, burst: requests a second that one caller may make, on average and at once.
        most_streams, caller_streams: event streams that may be open, and of one caller.
        poll_seconds: how often the database is looked at for a study that someone watches.
        dashboard: whether optuna-dashboard is mounted at ``/``.
    """

    storage: str
    folder: Path
    roots: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    auth: bool = False
    https: bool = False
    most_studies: int = 200
    body_bytes: int = 2**20
    study_bytes: int = 2**16
    rate: float = 50.0
    burst: int = 200
    most_streams: int = 500
    caller_streams: int = 250
    poll_seconds: float = 1.0
    dashboard: bool = True

    def __post_init__(self) -> None:
        if not self.auth and not is_loopback(self.host):
            raise InputError(
                f"--host {self.host} can be reached from elsewhere, so requests need tokens: make one with "
                "`rank-search token create NAME` and give --auth"
            )

    @property
    def names(self) -> frozenset[str]:
        """What a request may call the host, where there is no login: a page elsewhere could have its own name point
        here."""
        given = f"[{self.host}]" if ":" in self.host else self.host
        hosts = {given, "localhost", "127.0.0.1", "[::1]"}
        return frozenset({f"{host}:{self.port}" for host in hosts} | (hosts if self.port == 80 else set()))

    @property
    def url(self) -> str:
        """Where the service is."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether an address reaches this host alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
