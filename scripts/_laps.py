"""GPU-seconds of :mod:`bench_search`, lap by lap."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds, of which differences count."""


class PieceEndedError(Exception):
    """A run has spent its GPU-seconds, or the piece its time."""


class Piece:
    """What one call may take. It ends after a trial: one call after the other comes to the end, however short."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._has_measured = False

    def count(self) -> None:
        """A trial is measured."""
        self._has_measured = True

    def is_over(self) -> bool:
        """Its time has passed, and something was measured."""
        return self._has_measured and time.monotonic() >= self._deadline


class Laps:
    """GPU-seconds of a study's run, lap by lap."""

    def __init__(self, clock: Clock, spent: float, limit: float, piece: Piece) -> None:
        self._clock = clock
        self._spent = spent
        self._limit = limit
        self._piece = piece
        self._started = 0.0

    def start(self) -> None:
        """Count from now on."""
        self._started = self._clock()

    def lap(self) -> float:
        """All GPU-seconds until now."""
        now = self._clock()
        self._spent += now - self._started
        self._started = now
        return self._spent

    def add(self, seconds: float) -> None:
        """Count what was spent before; less than 0: what passed in this lap, but does not count."""
        self._spent += seconds

    def is_over(self) -> bool:
        """Nothing is left of the run or of the piece."""
        return self._spent >= self._limit or self._piece.is_over()

    def check(self) -> None:
        """After a trial, leave the study's loop when it is over; what the keeping took is not counted."""
        self._piece.count()
        if self.is_over():
            raise PieceEndedError
        self._started = self._clock()
