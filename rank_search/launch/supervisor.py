"""Watches over the workers of a launch until all have ended, and ends them when it is asked to stop."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, Self

from rank_search.errors import StorageError
from rank_search.launch import exits
from rank_search.launch.job import Job, Launcher, Worker
from rank_search.study.store import StudyStore
from rank_search.study.watching import StudyView, watch

TICK_SECONDS = 0.2
LOOK_SECONDS = 2.0
"""How often the database is looked at."""
WAIT_SECONDS = 1.0
"""A look at the database that takes longer is not waited for."""
KILL_SECONDS = 15.0
"""A worker that is still there so long after its grace time is killed."""
FAILED = 1
"""Exit code of a launch all of whose workers were given up."""


@dataclass(frozen=True, slots=True)
class View:
    """A launch as it is now.

    Attributes:
        workers: all of them.
        study: what the database tells, None before the study is made.
        wanted: finished trials.
        trouble: why the database tells nothing, or empty.
        engine_trouble: why the engine tells nothing, or empty; then the workers are as they were last seen.
        stopping: whether the launch was asked to stop.
    """

    workers: tuple[Worker, ...]
    study: StudyView | None
    wanted: int
    trouble: str = ""
    stopping: bool = False
    engine_trouble: str = ""


class Board(Protocol):
    """Shows a launch to whoever watches."""

    def show(self, view: View) -> None:
        """Called a few times a second."""


class Watch:
    """Looks at a study in the database now and then; an outage is told, and looked over.

    Each look is in a thread of its own: a host that is silent would hold up the signals meant for the workers.
    """

    def __init__(self, job: Job, wanted: int) -> None:
        self._job = job
        self._wanted = wanted
        self._study: StudyView | None = None
        self._trouble = ""
        self._next = 0.0
        self._looking = threading.Thread()
        self._late = False

    def view(self, workers: list[Worker], *, stopping: bool, engine_trouble: str = "") -> View:
        """The launch as it is now, and the study as it was when the database last answered."""
        if time.monotonic() >= self._next and not self._looking.is_alive():
            self._begin()
        return View(tuple(workers), self._study, self._wanted, self._trouble, stopping, engine_trouble)

    def look(self) -> StudyView | None:
        """Look now. A look that takes longer than :data:`WAIT_SECONDS` is not waited for again until it ends; what was
        last seen counts.
        """
        self._wait()  # for one under way, which may have begun too early
        if not self._looking.is_alive():
            self._begin()
            self._wait()
        return self._study

    def measured(self, worker: str) -> int:
        """Trials that a worker has measured, as far as the database has told by now."""
        study = self.look()
        return study.worker(worker).measured if study is not None else 0

    def _begin(self) -> None:
        self._late = False
        self._looking = threading.Thread(target=self._look, name="watch", daemon=True)
        self._looking.start()

    def _wait(self) -> None:
        if self._looking.is_alive() and not self._late:
            self._looking.join(WAIT_SECONDS)
            self._late = self._looking.is_alive()

    def _look(self) -> None:
        try:
            with StudyStore(self._job.storage) as store:
                self._study = watch(store, self._job.name)
            self._trouble = ""
        except StorageError as error:
            self._trouble = str(error)
        finally:  # after a defect, too, whose traceback Python shows while the workers go on
            self._next = time.monotonic() + LOOK_SECONDS


def supervise(launcher: Launcher, job: Job, watch: Watch, board: Board, *, kill_seconds: float = KILL_SECONDS) -> int:
    """Start the workers, stay until all have ended, and leave none behind, whatever happens.

    SIGINT and SIGTERM are passed on to the workers: the first one lets them finish their trials within the job's
    grace time, the second one has them give these back at once, the third one kills them. After the grace time and
    ``kill_seconds`` they are killed anyway.

    Returns:
        Exit code: :data:`exits.DONE` where the workers found the study done, :data:`exits.PREEMPTED` after a signal,
        :data:`exits.CONFIGURATION` or :data:`FAILED` where all were given up.

    Raises:
        InputError: the engine cannot start workers.
    """
    with _Signals() as signals:
        try:
            launcher.start()
            signals.listen()  # again: Ray puts a handler of its own in the way
            workers = _until_ended(launcher, job, watch, board, signals, kill_seconds)
        finally:
            launcher.kill()
        watch.look()
        _show(board, watch, launcher, workers, signals)
    return _code(workers)


def _until_ended(
    launcher: Launcher, job: Job, watch: Watch, board: Board, signals: _Signals, kill_seconds: float
) -> list[Worker]:
    passed_on, deadline = 0, float("inf")
    while True:
        workers = launcher.workers()
        _show(board, watch, launcher, workers, signals)
        if all(worker.has_ended for worker in workers):
            return workers
        if signals.count > passed_on:
            passed_on += 1
            launcher.stop()
            deadline = min(deadline, time.monotonic() + job.grace + kill_seconds)
        if signals.count > 2 or time.monotonic() > deadline:
            launcher.kill()
        time.sleep(TICK_SECONDS)


def _show(board: Board, watch: Watch, launcher: Launcher, workers: list[Worker], signals: _Signals) -> None:
    board.show(watch.view(workers, stopping=signals.count > 0, engine_trouble=launcher.trouble))


def _code(workers: list[Worker]) -> int:
    states = [worker.state for worker in workers]
    if "stopped" in states:
        return exits.PREEMPTED
    if "done" in states:
        return exits.DONE
    codes = {worker.exit_code for worker in workers}
    return exits.CONFIGURATION if codes == {exits.CONFIGURATION} else FAILED


class _Signals:
    """Counts SIGINT and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        for number in self._before:
            signal.signal(number, self._add)

    def _add(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
