"""Which hosts work on a study. No Optuna."""

from __future__ import annotations

from sqlalchemy.engine import URL

from rank_search.errors import StorageError
from rank_search.study.engine import make_engine, parse_url, sqlite_file
from rank_search.study.liveness import UNKNOWN, WorkerId
from rank_search.study.schema import has_schema
from rank_search.study.store import StudyStore

_WAY_OUT = "use PostgreSQL: `rank-search db export` the study and `db import` it there"


def refuse_other_hosts(storage: str | URL, name: str) -> None:
    """Refuse a worker on an SQLite file that another host's workers are at: its locks do not reach over a network.

    Raises:
        StorageError: naming the other host, or the database cannot be reached.
    """
    if sqlite_file(parse_url(storage)) is None:
        return
    engine = make_engine(storage)
    try:
        if not has_schema(engine):
            return
    finally:
        engine.dispose()
    with StudyStore(storage) as store:
        if name in store.studies():
            refuse_hosts_beside(store, name)


def refuse_hosts_beside(store: StudyStore, name: str) -> None:
    """As :func:`refuse_other_hosts`, for a study that is there.

    Raises:
        StorageError: naming the other host, or the database cannot be reached.
    """
    if sqlite_file(store.engine.url) is None:
        return
    here = WorkerId.current().host
    # Not by its trials: those of a host that is gone, such as a container by its random name, run forever.
    beats = (beat for beat in store.status(name).workers if not beat.is_silent and beat.worker != UNKNOWN)
    others = {WorkerId.parse(beat.worker).host: beat.age for beat in beats}
    others.pop(here, None)
    if others:
        host = min(others)
        raise StorageError(
            f"study {name!r} has a worker on host {host}, last heard of {others[host]:.0f} s ago, and an SQLite "
            f"database is for one; {_WAY_OUT}, or, where that worker has ended, wait for run.lease_seconds"
        )


def require_server(storage: str | URL, engine: str) -> None:
    """Refuse an SQLite file for workers on several hosts.

    Raises:
        StorageError: it is one.
    """
    if sqlite_file(parse_url(storage)) is not None:
        raise StorageError(f"--on {engine} puts workers on other hosts, and an SQLite database is for one; {_WAY_OUT}")
