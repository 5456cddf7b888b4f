"""Workers as processes of this host: one a GPU, or as many as asked for with the cores shared out."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rank_search.api import STORAGE_VARIABLE
from rank_search.errors import InputError
from rank_search.launch import exits
from rank_search.launch.devices import Slot
from rank_search.launch.job import Job, Worker
from rank_search.launch.restarts import Restarts
from rank_search.launch.stopping import SUPERVISOR_VARIABLE
from rank_search.study.liveness import WorkerId

_LAST_WORDS = 4096
"""Bytes of a log's end that its last line is looked for in."""


@dataclass
class _Process:
    """One worker over all its restarts."""

    name: str
    slot: Slot
    log: Path
    history: Restarts
    process: subprocess.Popen[bytes] | None = None
    identity: str | None = None
    state: str = "waiting"
    due: float = 0.0
    """When it is to be started, on the monotonic clock."""
    log_start: int = 0
    """Where in its log the present run begins."""
    exit_code: int | None = None
    obstacle: str = ""
    """Why it could not be started the last time, or empty."""


class LocalLauncher:
    """Starts workers on this host, and starts those again that end before their time.

    Args:
        job: what to run.
        slots: where, one a worker.
        measured: how many trials a worker has measured, by its identity.
        command: of a worker; None takes the job's.
    """

    trouble = ""

    def __init__(
        self, job: Job, slots: Sequence[Slot], measured: Callable[[str], int], command: Sequence[str] | None = None
    ) -> None:
        self._job = job
        self._measured = measured
        self._command = list(command or job.command())
        self._stopping = False
        self._all = [
            _Process(f"{index}", slot, job.logs / f"{job.name}.worker-{index}.log", Restarts(job.patience))
            for index, slot in enumerate(slots)
        ]

    def start(self) -> None:
        """Start all workers.

        Raises:
            InputError: their logs cannot be written, or a process cannot be started.
        """
        try:
            self._job.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"logs cannot be written to {self._job.logs}: {error.strerror or error}; choose another run.work_dir"
            ) from None
        for worker in self._all:
            try:
                self._spawn(worker)
            except OSError as error:
                raise InputError(f"worker {worker.name} cannot be started: {error}") from None

    def workers(self) -> list[Worker]:
        """All workers as they are now; those whose time has come are started again."""
        now = time.monotonic()
        for worker in self._all:
            if worker.process is not None and worker.process.poll() is not None:
                self._reap(worker, worker.process.returncode, now)
            if worker.state == "waiting" and worker.due <= now and not self._stopping:
                self._spawn_again(worker, now)
        return [self._shown(worker, now) for worker in self._all]

    def stop(self) -> None:
        """Ask all workers to stop; the second time, to stop at once."""
        self._stopping = True
        for worker in self._all:
            if worker.process is not None:
                _signal(worker.process, signal.SIGTERM)
            elif worker.state == "waiting":
                worker.state = "stopped"

    def kill(self) -> None:
        """End all workers that are still there, and whatever they have started."""
        self._stopping = True
        for worker in self._all:
            if worker.process is not None:
                _signal(worker.process, signal.SIGKILL, group=True)
                self._reap(worker, worker.process.wait(), time.monotonic())
            elif worker.state == "waiting":
                worker.state = "stopped"

    def log_of(self, name: str) -> Path:
        """The log of a worker."""
        return self._all[int(name)].log

    def _spawn_again(self, worker: _Process, now: float) -> None:
        try:
            self._spawn(worker)
        except OSError as error:  # a full disk, no process or file left: the other workers go on, and it may pass
            worker.obstacle = f"it cannot be started: {error}"
            self._after(worker, exits.UNAVAILABLE, now, measured=False, last_words=worker.obstacle)

    def _spawn(self, worker: _Process) -> None:
        environment = {
            **os.environ,
            **worker.slot.environment,
            STORAGE_VARIABLE: self._job.storage,
            SUPERVISOR_VARIABLE: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        worker.log.parent.mkdir(parents=True, exist_ok=True)  # somebody may have moved it away
        with worker.log.open("ab") as log:
            heading = f"--- {datetime.now():%Y-%m-%d %H:%M:%S} worker {worker.name} on {worker.slot.device}\n"
            log.write(heading.encode())
            log.flush()
            worker.log_start = log.tell()
            # A session of its own: Ctrl-C on the terminal reaches the supervisor alone, which passes it on once.
            worker.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        worker.obstacle = ""
        worker.identity = str(WorkerId.of(worker.process.pid))
        worker.state = "running"

    def _reap(self, worker: _Process, code: int, now: float) -> None:
        assert worker.process is not None
        _signal(worker.process, signal.SIGKILL, group=True)  # what it may have left behind
        worker.process, worker.exit_code = None, code
        if code == exits.DONE:
            worker.state = "done"
        elif self._stopping:
            worker.state = "stopped"
        else:
            measured = self._measured(worker.identity or "") > 0
            self._after(worker, code, now, measured=measured, last_words=_last_words(worker))

    def _after(self, worker: _Process, code: int, now: float, *, measured: bool, last_words: str) -> None:
        """What becomes of a worker that has ended before its time."""
        if worker.history.ended(code, measured=measured, last_words=last_words):
            worker.state, worker.due = "waiting", now + worker.history.delay
        else:
            worker.state = "given up"

    def _shown(self, worker: _Process, now: float) -> Worker:
        note = worker.history.given_up
        if worker.state == "waiting":
            ended = worker.obstacle or f"ended with {worker.exit_code}"
            note = f"{ended}, starts again in {max(0.0, worker.due - now):.0f} s"
        return Worker(
            worker.name, worker.slot.device, worker.state, worker.history.total, worker.identity, note,
            worker.process.pid if worker.process is not None else None, worker.exit_code,
        )  # fmt: skip


def _signal(process: subprocess.Popen[bytes], number: signal.Signals, *, group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def _last_words(worker: _Process) -> str:
    """The last line of the log of the run that has ended; empty where the log is gone."""
    try:
        with worker.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(worker.log_start, size - _LAST_WORDS))
            lines = log.read(_LAST_WORDS).decode("utf-8", errors="replace").split("\n")
    except OSError:  # moved away or not readable: no reason to end the other workers
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
