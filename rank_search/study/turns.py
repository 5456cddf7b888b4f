"""Turns of workers on different hosts at what is to be made once, such as a factor bank. No Optuna."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import Engine
from sqlalchemy.engine import URL

from rank_search.errors import CrowdedError, StorageError
from rank_search.study.engine import make_engine, parse_url, sqlite_file
from rank_search.study.heartbeat import Heartbeat
from rank_search.study.leases import Leases
from rank_search.study.liveness import WorkerId
from rank_search.study.patience import Patience
from rank_search.study.schema import ensure_schema

_LOOK_SECONDS = 1.0


class Turns:
    """Gives out turns by leases in a database that several hosts reach.

    Args:
        seconds: how long a holder may be silent before the next one has its turn.
        patience: with a database that is away while a turn is waited for.
    """

    def __init__(self, storage: str | URL, seconds: float, patience: Patience) -> None:
        self._storage = storage
        self._seconds = seconds
        self._patience = patience
        self._holder = str(WorkerId.current())

    @classmethod
    def of(cls, storage: str | URL, seconds: float, patience: Patience) -> Turns | None:
        """None for an SQLite file: the workers of its one host take turns by a file's lock."""
        return None if sqlite_file(parse_url(storage)) is not None else cls(storage, seconds, patience)

    @contextmanager
    def __call__(self, name: str, on_wait: Callable[[], object], is_made: Callable[[], bool]) -> Iterator[None]:
        """Hold the turn at ``name`` inside the block, or none where it is made by then.

        ``on_wait`` is called before waiting for another worker; what it raises ends the waiting.

        Raises:
            StorageError: the database cannot be reached or written.
            OutOfPatienceError: it was away for too long.
        """
        engine = make_engine(self._storage)
        try:
            self._patience.keep_trying(lambda: ensure_schema(engine), CrowdedError)
            leases = Leases(engine, self._holder, self._seconds)
            attempt = self._wait(leases, name, on_wait, is_made)
            if attempt is None:
                yield
                return
            try:
                with self._renewed(engine, name, attempt):
                    yield
            finally:
                with suppress(StorageError):  # it runs out by itself
                    leases.end_name(name, attempt)
        finally:
            engine.dispose()

    def _wait(
        self, leases: Leases, name: str, on_wait: Callable[[], object], is_made: Callable[[], bool]
    ) -> int | None:  # fmt: skip
        has_told = False
        while (attempt := self._patience.keep_trying(lambda: leases.try_name(name))) is None and not is_made():
            if not has_told:
                on_wait()
                has_told = True
            time.sleep(_LOOK_SECONDS)
        return attempt

    @contextmanager
    def _renewed(self, engine: Engine, name: str, attempt: int) -> Iterator[None]:
        heartbeat = Heartbeat(engine, self._holder, self._seconds, lambda leases: leases.renew_name(name, attempt))
        heartbeat.start()
        try:
            yield
        finally:
            heartbeat.stop()
