"""Stopping a worker in good order: its trial is finished if there is time, else given back."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from rank_search.progress import Preempted, Progress, Step

SUPERVISOR_VARIABLE = "RANK_SEARCH_SUPERVISOR"
"""Process id of a worker's supervisor, without which it must not live on."""

_OF_A_TRIAL = frozenset({"fine-tune", "nested fine-tune", "scoring"})
_PR_SET_PDEATHSIG = 1


class Stopping:
    """Answers SIGTERM and SIGINT while it is entered; usable in the main thread only.

    The first signal lets the trial under way end within ``grace`` seconds, and stops at once where there is none. A
    fine-tune that cannot end in time writes a checkpoint and stops by itself. The second one stops at once in any case.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._asked = False
        self._measuring = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number, handler in ((signal.SIGTERM, self._ask), (signal.SIGINT, self._ask), (signal.SIGALRM, self._stop)):
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def after_trial(self) -> None:
        """To be called between two trials.

        Raises:
            Preempted: a signal has come.
        """
        if self._asked:
            raise Preempted

    def watching(self, progress: Progress) -> Progress:
        """``progress``, through which the steps of the first trial are noticed."""
        return _Watching(progress, self)

    def measuring(self) -> None:
        """A trial is under way, and from now on there is always one but in pauses, which heed the signal themselves."""
        self._measuring = True

    def seconds_left(self) -> float | None:
        """Of the grace time; None before the first signal."""
        return signal.getitimer(signal.ITIMER_REAL)[0] if self._asked else None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._measuring or self._grace <= 0:
            self._asked = True
            raise Preempted
        self._asked = True
        signal.setitimer(signal.ITIMER_REAL, self._grace)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise Preempted


class _Watching(Progress):
    def __init__(self, shown: Progress, stopping: Stopping) -> None:
        self._shown = shown
        self._stopping = stopping

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        if title in _OF_A_TRIAL:
            self._stopping.measuring()
        with self._shown.step(title, total) as step:
            yield step

    def say(self, message: str) -> None:
        self._shown.say(message)

    def seconds_left(self) -> float | None:
        return self._stopping.seconds_left()


def end_with_supervisor() -> None:
    """Have this process sent SIGTERM when its supervisor is gone, however that one ended. Linux only.

    Raises:
        Preempted: it is gone already.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(supervisor):
        raise Preempted
