"""Workers as Ray actors, on a cluster that exists or on one of this host alone.

Ray gives every actor its GPUs, and starts it on another node when its own is lost. The study's folder must be on a file
system that all nodes share, and rank_search installed on each of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from rank_search.api import STORAGE_VARIABLE
from rank_search.errors import InputError, one_line
from rank_search.launch import exits
from rank_search.launch.job import Job, Worker
from rank_search.launch.options import Options, parse_options
from rank_search.launch.restarts import Restarts
from rank_search.launch.stopping import SUPERVISOR_VARIABLE
from rank_search.study.liveness import WorkerId

_WAIT_SECONDS = 10.0
_THREADS = 4
"""Of an actor: one runs the worker, others answer beside it."""
_PYTHON = "python"
"""Stands for the interpreter of an actor's node: it has loaded this package, which one on the PATH there may lack."""


class RayOptions(Options):
    """``--option`` of ``--on ray``."""

    address: str = Field("auto", min_length=1)
    """Of the cluster: ``auto`` finds one that this host belongs to, ``local`` starts one of this host alone."""
    cpus: float = Field(1.0, ge=0)
    """CPUs that a worker reserves."""
    study: str | None = None
    """The study file's path on the nodes. Default: its path here."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor's worker runs: host, GPUs, and the identity of its process."""

    host: str
    gpus: tuple[str, ...]
    identity: str


class WorkerActor:
    """Keeps one worker process on the node that Ray has chosen. Ray runs it; it knows nothing of Ray."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: str) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._log = Path(log)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """Run the worker to its end and return its exit code."""
        if self._stopping:
            return exits.PREEMPTED
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable if self._command[0] == _PYTHON else self._command[0], *self._command[1:]]
        environment = {**os.environ, **self._environment, SUPERVISOR_VARIABLE: str(os.getpid())}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        return self._process.wait()

    def place(self) -> Place | None:
        """Where the worker runs, None before it is started."""
        if self._process is None:
            return None
        worker = WorkerId.of(self._process.pid)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Place(worker.host, tuple(filter(None, visible.split(","))), str(worker))

    def stop(self, number: int) -> None:
        """Send the worker a signal, and start none from now on."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


@dataclass
class _Actor:
    name: str
    log: Path
    """Where its worker writes on the node it runs on."""
    history: Restarts
    handle: Any = None
    running: Any = None
    """What Ray will return of the run under way."""
    asked: Any = None
    """What Ray will return of the question where it runs."""
    place: Place | None = None
    state: str = "waiting"
    due: float = 0.0
    exit_code: int | None = None


class RayLauncher:
    """Starts actors on a Ray cluster, and workers that end before their time again.

    Args:
        job: what to run; its number of workers must be given, but on a cluster with GPUs: then it is one a GPU.
        measured: how many trials a worker has measured, by its identity.
        options: where and how.
        on_cpu: whether the study runs without GPUs.
        command: of a worker; None takes the job's.
    """

    trouble = ""

    _on_our_connection: ClassVar[set[RayLauncher]] = set()
    """Who uses a connection that was made here; the last one closes it."""

    def __init__(
        self, job: Job, measured: Callable[[str], int], options: RayOptions, *, on_cpu: bool,
        command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._job = job
        self._measured = measured
        self._options = options
        self._on_cpu = on_cpu
        self._command = tuple(command or job.command(options.study, python=_PYTHON))
        self._environment = {STORAGE_VARIABLE: job.storage, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._actors: list[_Actor] = []
        self._stops = 0

    @classmethod
    def of(cls, job: Job, measured: Callable[[str], int], options: Mapping[str, str], *, on_cpu: bool) -> RayLauncher:
        """With ``--option`` as given.

        Raises:
            InputError: an option that is wrong, or Ray is missing.
        """
        parsed = parse_options(RayOptions, "ray", options)
        _ray()
        return cls(job, measured, parsed, on_cpu=on_cpu)

    def start(self) -> None:
        """Connect to the cluster and start all workers.

        Raises:
            InputError: no cluster is there, it has several hosts and the database is an SQLite file, or it has too few
                GPUs for one worker.
        """
        ray = _ray()
        if not ray.is_initialized():
            address = None if self._options.address == "local" else self._options.address
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"Ray at {self._options.address!r}: {one_line(error)}; `ray start` one, or give "
                    "--option address=local"
                ) from None
            self._on_our_connection.add(self)
        elif self._on_our_connection:
            self._on_our_connection.add(self)
        try:
            self._refuse_sqlite_on_many_hosts()
            gpus, count = self._share_out(int(ray.cluster_resources().get("GPU", 0)))
        except InputError:
            self.kill()
            raise
        for index in range(count):
            log = (self._job.logs / f"{self._job.name}.worker-{index}.log").resolve()
            actor = _Actor(str(index), log, Restarts(self._job.patience))
            actor.handle = (
                ray.remote(WorkerActor)
                .options(
                    num_cpus=self._options.cpus, num_gpus=gpus, max_concurrency=_THREADS,
                    # Endless: two of each were used up at once when a node went away.
                    max_restarts=-1, max_task_retries=-1,
                )
                .remote(self._command, self._environment, str(actor.log))
            )  # fmt: skip
            self._run(actor)
            self._actors.append(actor)

    def workers(self) -> list[Worker]:
        """All workers as they are now; those whose time has come are started again."""
        now = time.monotonic()
        for actor in self._actors:
            if actor.running is not None:
                self._look(actor, now)
            if actor.state == "waiting" and actor.due <= now and not self._stops:
                self._run(actor)
        return [self._shown(actor) for actor in self._actors]

    def stop(self) -> None:
        """Ask all workers to stop; the second time, to stop at once."""
        self._stops += 1
        for actor in self._actors:
            if actor.running is not None:
                actor.handle.stop.remote(int(signal.SIGTERM))
            elif not self._shown(actor).has_ended:
                actor.state = "stopped"

    def kill(self) -> None:
        """End all workers that are still there, and the connection to the cluster if it was made here."""
        ray = _ray()
        self._stops += 1
        for actor in self._actors:
            if actor.running is not None:
                actor.handle.stop.remote(int(signal.SIGKILL))
                ray.wait([actor.running], timeout=_WAIT_SECONDS)
                actor.running, actor.state, actor.exit_code = None, "stopped", -int(signal.SIGKILL)
            if actor.handle is not None:
                ray.kill(actor.handle, no_restart=True)
                actor.handle = None
        if self in self._on_our_connection:
            self._on_our_connection.remove(self)
            if not self._on_our_connection:
                ray.shutdown()

    def _run(self, actor: _Actor) -> None:
        actor.running, actor.asked, actor.place = actor.handle.run.remote(), None, None
        actor.state = "running"

    def _look(self, actor: _Actor, now: float) -> None:
        """See whether a run has ended, and where it runs: without waiting for Ray."""
        ray = _ray()
        if ray.wait([actor.running], timeout=0)[0]:
            code, last_words = None, ""
            try:
                code = int(ray.get(actor.running))
            except ray.exceptions.RayError as error:
                # Of an error in the actor Ray's own text begins with the traceback, which would be all that is shown.
                last_words = one_line(getattr(error, "cause", None) or error)
            self._ended(actor, code, now, last_words)
            return
        if actor.asked is None:
            actor.asked = actor.handle.place.remote()
        elif ray.wait([actor.asked], timeout=0)[0]:
            try:
                actor.place = ray.get(actor.asked) or actor.place
            except ray.exceptions.RayError:
                actor.place = None  # on its way to another node
            actor.asked = None

    def _ended(self, actor: _Actor, code: int | None, now: float, last_words: str) -> None:
        actor.running, actor.exit_code = None, code
        measured = actor.place is not None and self._measured(actor.place.identity) > 0
        if code == exits.DONE:
            actor.state = "done"
        elif self._stops:
            actor.state = "stopped"
        elif actor.history.ended(code, measured=measured, last_words=last_words):
            actor.state, actor.due = "waiting", now + actor.history.delay
        else:
            actor.state = "given up"

    def _shown(self, actor: _Actor) -> Worker:
        place = actor.place
        device = "" if place is None else " ".join([place.host, *(f"GPU {gpu}" for gpu in place.gpus)])
        note = actor.history.given_up
        if note and place is not None:  # else it never ran, or ran nobody knows where
            note = f"{note}; its log: {actor.log} on {place.host}"
        return Worker(
            actor.name, device, actor.state, actor.history.total, place.identity if place else None, note,
            exit_code=actor.exit_code,
        )  # fmt: skip

    def _share_out(self, there: int) -> tuple[int, int]:
        """GPUs a worker, and workers."""
        asked = self._job.gpus_per_worker
        each = 0 if self._on_cpu or asked == 0 else asked or min(1, there)
        if each > there:
            raise InputError(f"--gpus-per-worker {each} was asked for, but the Ray cluster has {there} GPUs")
        if self._job.workers is not None:
            return each, self._job.workers
        if not each:
            raise InputError("--on ray without GPUs cannot tell how many workers to start; give --workers N")
        return each, there // each

    def _refuse_sqlite_on_many_hosts(self) -> None:
        from rank_search.study.hosts import require_server

        hosts = {node["NodeManagerAddress"] for node in _ray().nodes() if node["Alive"]}
        if len(hosts) > 1:
            require_server(self._job.storage, "ray")


def _ray() -> Any:
    # Ray would otherwise take the GPUs away from actors that asked for none, and say so in a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--on ray needs Ray; pip install 'rank-search[ray]'") from None
    return ray
