"""What people ask of a worker between two of its trials. No Optuna."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from rank_search.progress import Preempted, Progress
from rank_search.study.requests import Action

STOPPED = "stopped on request; `rank-search resume` lets it go on"
PAUSED = "paused on request; `rank-search resume` lets it go on"
PATIENCE_SECONDS = 60.0
"""A paused worker waits so long with its model at hand; then it ends and leaves its device to others."""
_LOOK_SECONDS = 1.0


class _Study(Protocol):
    def take_requests(self) -> Action: ...


class Heeding:
    """Looks at what a study's workers are asked to do, and waits while that is to pause."""

    def __init__(
        self, study: _Study, progress: Progress, *, patience: float = PATIENCE_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._study = study
        self._progress = progress
        self._patience = patience
        self._sleep = sleep
        self._waited = 0.0

    def stop_reason(self) -> str | None:
        """Why the worker is to end here; None: it goes on, perhaps after a pause.

        Raises:
            Preempted: the process was asked to end in a pause, where no trial needs its grace time.
        """
        waited = 0.0
        while (action := self._study.take_requests()) is Action.PAUSE and waited < self._patience:
            if self._progress.seconds_left() is not None:
                raise Preempted
            if waited == 0.0:
                self._progress.say("paused on request")
            self._sleep(_LOOK_SECONDS)
            waited += _LOOK_SECONDS
        self._waited += waited
        return {Action.PAUSE: PAUSED, Action.STOP: STOPPED}.get(action)

    def now(self) -> float:
        """Seconds of a clock that stands still in pauses."""
        return time.monotonic() - self._waited
