"""How often callers may ask. Pure."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_CALLERS = 10_000
"""So many are remembered; who asked longest ago is forgotten first."""


class Buckets:
    """A bucket of so many requests for every caller, which fills again at a rate.

    Args:
        rate: requests a second.
        burst: requests that a full bucket holds.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> float:
        """Take one request out; 0, or the seconds until the next one may be made."""
        left = self._now(caller)
        self._keep(caller, left - 1 if left >= 1 else left)
        return 0.0 if left >= 1 else (1 - left) / self._rate

    def wait(self, caller: str) -> float:
        """Seconds until a request may be made, 0 where it may be now; nothing is taken out."""
        left = self._now(caller)
        return 0.0 if left >= 1 else (1 - left) / self._rate

    def _now(self, caller: str) -> float:
        left, since = self._left.get(caller, (self._burst, self._clock()))
        return min(self._burst, left + (self._clock() - since) * self._rate)

    def _keep(self, caller: str, left: float) -> None:
        self._left[caller] = left, self._clock()
        self._left.move_to_end(caller)
        while len(self._left) > _MOST_CALLERS:
            self._left.popitem(last=False)
