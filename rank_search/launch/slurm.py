"""Workers as an array job of Slurm, through submitit: requeued when they are preempted or run out of time.

The working folder, and so the logs, must be on a file system that all nodes share. Slurm passes the environment of
``rank-search launch`` on to the workers, the database's URL with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from pydantic import Field

from rank_search.api import STORAGE_VARIABLE
from rank_search.errors import InputError
from rank_search.launch import exits
from rank_search.launch.job import Job, Worker
from rank_search.launch.log_streams import drop_unwritable
from rank_search.launch.options import Options, parse_options
from rank_search.launch.restarts import Restarts, described

SPARE_SECONDS = 30
"""Slurm warns a job so long before its worker's grace time begins."""
_LONG_SECONDS = 300.0
"""A worker that lived so long has measured something, as far as restarts go."""
_POLL_SECONDS = 0.2
_ASK_SECONDS = 10.0
_WAITING = {"PENDING", "REQUEUED", "PREEMPTED", "SUSPENDED", "CONFIGURING", "UNKNOWN", "unknown"}


class SlurmOptions(Options):
    """``--option`` of ``--on slurm``."""

    minutes: int = Field(240, ge=1)
    """Time limit of a worker; one that runs into it is requeued."""
    requeues: int = Field(100, ge=0)
    """How often a worker that runs into its time limit is requeued."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    cpus: int = Field(8, ge=1)
    """CPUs of a worker."""
    memory_gb: int = Field(64, ge=1)
    """Memory of a worker, GB."""
    setup: str | None = None
    """A shell line that runs before the worker, such as the loading of a module."""
    cluster: str = Field("slurm", pattern=r"^(slurm|local)$")
    """``local`` runs the same workers on this host, without Slurm."""


@dataclass
class SlurmWorker:
    """What one task of the array does: keep one worker alive, and have it stop when the job is about to be taken away.

    submitit pickles it, calls it on the node, and calls :meth:`checkpoint` when Slurm announces preemption or the end
    of the time limit. Where Slurm ends it without that (``scancel``), SIGTERM goes to it and to the worker.
    """

    command: tuple[str, ...]
    grace: float
    patience: float = 0.0
    """Seconds that the worker is started again for while the database is away."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    leaving: bool = field(default=False, repr=False)
    """Whether Slurm has said that it takes the job away, or takes it away now."""

    def __call__(self) -> int:
        """Run the worker, start it again where that helps, and return its last exit code."""
        drop_unwritable("stdout", "stderr")
        before = signal.signal(signal.SIGTERM, self._leave)
        try:
            return self._keep_running()
        finally:
            signal.signal(signal.SIGTERM, before)

    def _keep_running(self) -> int:
        history = Restarts(self.patience)
        while True:
            started = time.monotonic()
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
            code = self._wait()
            # Unannounced, PREEMPTED means that its patience is over: another may go on.
            if code == exits.DONE or (code == exits.PREEMPTED and self.leaving):
                return code
            lived = time.monotonic() - started > _LONG_SECONDS
            if not history.ended(code, measured=lived, last_words=""):
                print(f"worker given up: {history.given_up}", file=sys.stderr)
                return code
            print(f"worker ended, {described(code)}; starts again in {history.delay:g} s", file=sys.stderr)
            due = time.monotonic() + history.delay
            while not self.leaving and time.monotonic() < due:
                time.sleep(_POLL_SECONDS)
            if self.leaving:
                return exits.PREEMPTED

    def checkpoint(self, *arguments: Any, **keywords: Any) -> Any:
        """Stop the worker, within its grace time, and say how the requeued job goes on: in the same way."""
        self.leaving = True
        submission = _submitit().helpers.DelayedSubmission(SlurmWorker(self.command, self.grace, self.patience))
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + self.grace + SPARE_SECONDS / 2
            while self.process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        return submission

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self.leaving = True  # the worker has had the signal, too: a second one would cut its grace time off

    def _wait(self) -> int:
        assert self.process is not None
        # Not Popen.wait, whose lock the signal handler that calls checkpoint would find taken.
        while (code := self.process.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return code


class SlurmLauncher:
    """Submits the array and watches it.

    Args:
        job: what to run; its number of workers must be given.
        options: where and how.
        gpus: of each worker.
    """

    trouble = ""

    def __init__(self, job: Job, options: SlurmOptions, gpus: int) -> None:
        self._job = job
        self._options = options
        self._gpus = gpus
        self._tasks: list[Any] = []
        self._stopping = False
        self._seen: list[Worker] = []
        self._next = 0.0

    @classmethod
    def of(cls, job: Job, options: Mapping[str, str], *, on_cpu: bool) -> SlurmLauncher:
        """With ``--option`` as given.

        Raises:
            InputError: an option that is wrong, no number of workers, an SQLite database, or submitit is missing.
        """
        from rank_search.study.hosts import require_server

        parsed = parse_options(SlurmOptions, "slurm", options)
        if parsed.cluster == "slurm":
            require_server(job.storage, "slurm")
        if job.workers is None:
            raise InputError("--on slurm cannot tell how many GPUs there are; give --workers N")
        _submitit()
        gpus = 0 if on_cpu else 1 if job.gpus_per_worker is None else job.gpus_per_worker
        return cls(job, parsed, gpus)

    def start(self) -> None:
        """Submit the array.

        Raises:
            InputError: Slurm is not there or refuses the job.
        """
        os.environ[STORAGE_VARIABLE] = self._job.storage
        try:
            executor = self._executor()
            worker = SlurmWorker(self._job.command(), self._job.grace, self._job.patience)
            with executor.batch():
                self._tasks = [executor.submit(worker) for _ in range(self._job.workers or 1)]
        except (RuntimeError, OSError) as error:  # submitit's own errors are RuntimeErrors
            raise InputError(f"Slurm: {' '.join(str(error).split())}; launch where `sbatch` works") from None

    def workers(self) -> list[Worker]:
        """All workers as Slurm last told them."""
        if time.monotonic() >= self._next:
            self._seen = [self._shown(index, task) for index, task in enumerate(self._tasks)]
            ended = all(worker.has_ended for worker in self._seen)
            self._next = time.monotonic() + (0 if ended or self._options.cluster == "local" else _ASK_SECONDS)
        return self._seen

    def stop(self) -> None:
        """Cancel the array; Slurm sends the workers SIGTERM first."""
        self._stopping = True
        self._next = 0.0
        for task in self._tasks:
            task.cancel(check=False)

    def kill(self) -> None:
        """Cancel what has not ended."""
        if any(not worker.has_ended for worker in self.workers()):
            self.stop()

    def _executor(self) -> Any:
        options = self._options
        executor = _submitit().AutoExecutor(
            folder=self._job.logs / "slurm", cluster=options.cluster, slurm_max_num_timeout=options.requeues
        )
        executor.update_parameters(
            name=f"rank-search-{self._job.name}",
            timeout_min=options.minutes,
            gpus_per_node=self._gpus,
            cpus_per_task=options.cpus,
            mem_gb=options.memory_gb,
        )
        given = {
            "slurm_partition": options.partition,
            "slurm_account": options.account,
            "slurm_qos": options.qos,
            "slurm_constraint": options.constraint,
            "slurm_setup": None if options.setup is None else [options.setup],
            "slurm_array_parallelism": self._job.workers,
            "slurm_signal_delay_s": int(self._job.grace) + SPARE_SECONDS,
            "slurm_additional_parameters": {"requeue": True, "open_mode": "append"},
        }
        executor.update_parameters(**{name: value for name, value in given.items() if value is not None})
        return executor

    def _shown(self, index: int, task: Any) -> Worker:
        state, node = str(task.state).split(" ")[0], str(task.get_info().get("NodeList", ""))
        if not task.done():
            told = "waiting" if state in _WAITING else "running"
            return Worker(str(index), node or state.lower(), told, note="" if told == "running" else state.lower())
        if self._stopping:
            return Worker(str(index), node, "stopped")
        code = self._code(task)
        ended = "done" if code == exits.DONE else "given up"
        note = "" if ended == "done" else f"{state.lower()}, exit code {code}; its log: {task.paths.stderr}"
        return Worker(str(index), node, ended, note=note, exit_code=code)

    def _code(self, task: Any) -> int | None:
        """What the worker returned, None of a job that Slurm ended itself."""
        errors = _submitit().core.utils
        try:
            return int(task.result())
        except (errors.UncompletedJobError, errors.FailedJobError, errors.FailedSubmissionError):
            return None


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise InputError("--on slurm needs submitit; pip install 'rank-search[slurm]'") from None
    return submitit
