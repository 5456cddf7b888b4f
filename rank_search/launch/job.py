"""What is launched, and what every engine offers. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rank_search.errors import BudgetError

LONGEST_GRACE = 86_400
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Job:
    """So many workers on one study.

    Attributes:
        study: the study file.
        name: of the study.
        storage: URL of its database.
        logs: folder for the workers' logs.
        trials: finished trials wanted, None: the file's own number.
        workers: how many, None: as many as the place has room for.
        gpus_per_worker: GPUs that each worker sees and, unless the study file says otherwise, spreads the model over;
            None: one where there are GPUs, else none.
        grace: seconds that a worker which is asked to stop may take to finish its trial.
        patience: seconds that workers are started again for while the database is away.
    """

    study: Path
    name: str
    storage: str
    logs: Path
    trials: int | None = None
    workers: int | None = None
    gpus_per_worker: int | None = None
    grace: float = 30.0
    patience: float = 1800.0

    def command(self, study: str | None = None, python: str = sys.executable) -> tuple[str, ...]:
        """The command line of a worker; its database is in the environment, for command lines are there to be read.

        Args:
            study: where the study file is on the worker's machine, None: where it is here.
        """
        trials = () if self.trials is None else ("--trials", str(self.trials))
        where = str(self.study.resolve()) if study is None else study
        several = ("--gpus-per-model", str(self.gpus_per_worker)) if (self.gpus_per_worker or 0) > 1 else ()
        return (python, "-m", "rank_search.launch.worker", where, *trials, "--grace", f"{self.grace:g}", *several)


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as its engine sees it.

    Attributes:
        name: among the workers of a launch.
        device: GPUs or cores, or the node it runs on.
        state: ``running``, ``waiting`` (to be started or started again), ``done``, ``stopped``, or ``given up``.
        restarts: how often it was started again.
        identity: of its process, as the database names it; None where that is not known.
        note: why it was given up or waits.
        pid: process id, where it runs on this host.
        exit_code: of its last end.
    """

    name: str
    device: str
    state: str
    restarts: int = 0
    identity: str | None = None
    note: str = ""
    pid: int | None = None
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in {"done", "stopped", "given up"}


def check_grace(grace: float) -> None:
    """Refuse a grace time that no timer takes.

    Raises:
        BudgetError: it is negative, longer than a day, or no number.
    """
    if not 0 <= grace <= LONGEST_GRACE:
        raise BudgetError(f"--grace must be from 0 to {LONGEST_GRACE} seconds, not {grace:g}")


class Launcher(Protocol):
    """An engine that keeps workers alive.

    Attributes:
        trouble: why the engine tells nothing just now, or empty; its workers go on.
    """

    trouble: str

    def start(self) -> None:
        """Start all workers.

        Raises:
            InputError: the engine is not there, or what was asked for does not fit it.
        """

    def workers(self) -> list[Worker]:
        """All workers as they are now, or were when the engine last told. Engines that leave restarting to their caller
        do it here.
        """

    def stop(self) -> None:
        """Ask all workers to stop; the second time, to stop at once."""

    def kill(self) -> None:
        """End all workers that are still there."""
