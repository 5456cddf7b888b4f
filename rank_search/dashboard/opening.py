"""`rank-search dashboard`: optuna-dashboard over a database, with all that the project knows in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rank_search.dashboard.artifacts import ArtifactReader
from rank_search.dashboard.content import show
from rank_search.study.board import optuna_id
from rank_search.study.serving import DashboardServer, check_host, dashboard_app
from rank_search.study.store import StudyStore


@dataclass(frozen=True, slots=True)
class OpenDashboard:
    """A dashboard that :meth:`DashboardServer.serve` serves; ``url`` is the page of the study, or of all studies."""

    server: DashboardServer
    url: str


@contextmanager
def open_dashboard(storage: str, name: str | None, *, host: str, port: int) -> Iterator[OpenDashboard]:
    """Bring what is shown of a study (None: of all in the database) up to date, and take the port.

    Args:
        port: 0 takes any free one.

    Raises:
        InputError: an address that others can reach, a port that cannot be had, or optuna-dashboard is missing.
        StorageError: the database cannot be reached, or lacks the study.
    """
    check_host(host)
    with StudyStore(storage) as store, dashboard_app(storage, ArtifactReader(store)) as app:
        for each in store.studies() if name is None else [name]:
            show(store, each)
        page = "/dashboard" if name is None else f"/dashboard/studies/{optuna_id(store.engine, name)}"
        server = DashboardServer(app, host, port)
        try:
            yield OpenDashboard(server, f"{server.url}{page}")
        finally:
            server.close()
