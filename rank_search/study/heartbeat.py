"""Renews a worker's leases while it measures. No Optuna."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import Engine

from rank_search.errors import StorageError
from rank_search.study.leases import Leases

RENEWALS = 3
"""So often in the time of a lease it is renewed."""
_RETRY_SECONDS = 1.0


class Heartbeat:
    """A thread that renews leases until it is stopped, whatever the database does.

    While the others of its process measure, their connection is idle, and it renews with that: it neither takes one
    more of those that a server allows, nor needs one at a moment when there is none.

    It also knows for how long the database has been there without a break: after an outage everybody's leases have
    run out, and nobody may conclude from that that the others are gone.

    Args:
        engine: of the process; its owner disposes of it once this is stopped.
        seconds: how long a lease lasts that is not renewed.
        renew: renews once; raises :class:`StorageError` where that fails.
    """

    def __init__(self, engine: Engine, holder: str, seconds: float, renew: Callable[[Leases], object]) -> None:
        self._engine = engine
        self._leases = Leases(engine, holder, seconds)
        self._renew = renew
        self._interval = seconds / RENEWALS
        self._stop = threading.Event()
        self._since = self._last = time.monotonic()
        self._is_broken = False
        self._thread = threading.Thread(target=self._renew_until_stopped, name="rank-search leases", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _RETRY_SECONDS)  # one that waits for a server ends later, or with the process

    def steady_seconds(self) -> float:
        """For how long every renewal has come in time; 0 while they fail."""
        now = time.monotonic()
        if self._is_broken or now - self._last > 2 * self._interval:
            return 0.0
        return now - self._since

    def _renew_until_stopped(self) -> None:
        wait = self._interval
        while not self._stop.wait(wait):
            pool = self._engine.pool
            try:
                self._renew(self._leases)
            except StorageError:
                self._is_broken = True
                wait = min(_RETRY_SECONDS, self._interval)
                continue
            finally:
                if pool is not self._engine.pool:
                    pool.dispose()  # the engine's owner, who did not wait, has left this one connection open
            now = time.monotonic()
            if self._is_broken or now - self._last > 2 * self._interval:
                self._since = now
            self._last, self._is_broken, wait = now, False, self._interval
