"""Workers for the studies and jobs that the service took on: started, watched over, and ended with it.

What is to run, the database tells; nothing is remembered here that a restart would lose. So many studies are worked on
at a time, the first that came first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rank_search.api import STORAGE_VARIABLE
from rank_search.atomic import write_atomically
from rank_search.errors import InputError, StorageError
from rank_search.export.study_file import study_toml
from rank_search.launch.job import Launcher
from rank_search.launch.launching import DETACHABLE, make_job, make_launcher
from rank_search.launch.stopping import SUPERVISOR_VARIABLE
from rank_search.launch.supervisor import KILL_SECONDS, Watch
from rank_search.spec import load_study_file
from rank_search.study.heeding import PAUSED, STOPPED
from rank_search.study.jobs import waiting_jobs
from rank_search.study.requests import Action, all_asked_for
from rank_search.study.store import StudyStore
from rank_search.study.submissions import Fate, Submission, set_engine, set_fate, submissions
from rank_search.study.watching import watch

TICK_SECONDS = 1.0
STUDIES_FOLDER = "studies"
_JOBS_PAUSE = 30.0
"""Seconds before a worker of jobs that has failed is started again."""


@dataclass(frozen=True, slots=True)
class Crew:
    """What the fleet starts, and where.

    Attributes:
        on: the engine, with its options.
        workers: of a study, None: as many as the engine has room for.
        at_once: studies that are worked on at a time.
        grace: seconds that a worker which is asked to stop may take to finish its trial.
    """

    on: str = "local"
    options: Mapping[str, str] | None = None
    workers: int | None = None
    at_once: int = 1
    grace: float = 30.0


class ServiceFleet:
    """Keeps workers on what was submitted, in a thread of its own.

    Args:
        storage: URL of the database, which is there.
        folder: the service's, where study files and working folders go.
    """

    def __init__(self, storage: str, folder: Path, crew: Crew) -> None:
        self._storage = storage
        self._folder = folder.resolve()
        self._crew = crew
        self._running: dict[int, tuple[Submission, Launcher]] = {}
        self._jobs: subprocess.Popen[bytes] | None = None
        self._jobs_due = 0.0
        self._trouble = ""
        self._ending = False
        self._wake = threading.Event()
        # Its workers are sent SIGTERM when this thread ends, however that comes.
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def poke(self) -> None:
        """Look now: something was changed."""
        self._wake.set()

    def stop(self) -> None:
        """End the workers in good order, and leave none behind; those of a cluster go on."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ending:
                try:
                    self._tick()
                    trouble = next((launcher.trouble for _, launcher in self._running.values() if launcher.trouble), "")
                except InputError as error:  # of the database or the engine: workers that are there go on
                    trouble = str(error)
                self._tell(trouble)
                self._wake.wait(TICK_SECONDS)
                self._wake.clear()
        finally:
            self._end()

    def _tell(self, trouble: str) -> None:
        """Say once what is amiss."""
        if trouble and trouble != self._trouble:
            print(f"rank-search: {trouble}", file=sys.stderr, flush=True)
        self._trouble = trouble

    def _tick(self) -> None:
        with StudyStore(self._storage) as store:
            actions = all_asked_for(store.engine)
            for submission, launcher in list(self._running.values()):
                self._look_after(store, submission, launcher, actions.get(submission.name, Action.RUN))
            for submission in submissions(store.engine):
                if self._may_start(store, submission, actions.get(submission.name, Action.RUN)):
                    self._start_workers(store, submission)
            self._look_after_jobs(store)

    def _look_after(self, store: StudyStore, submission: Submission, launcher: Launcher, action: Action) -> None:
        workers = launcher.workers()
        if not all(worker.has_ended for worker in workers):
            if action is Action.STOP and not _is_measuring(store, submission.name):
                launcher.stop()  # they are preparing, which they would otherwise bring to its end
            return
        launcher.kill()
        del self._running[submission.number]
        if any(worker.state == "done" for worker in workers):
            # One that was paused or stopped has ended, too, and may have been resumed since.
            if action is Action.RUN and store.status(submission.name).stop_reason not in {PAUSED, STOPPED}:
                set_fate(store.engine, submission.number, Fate.ENDED)
        elif all(worker.state == "given up" for worker in workers):
            note = next((worker.note for worker in workers if worker.note), "its workers were given up")
            set_fate(store.engine, submission.number, Fate.GIVEN_UP, note)

    def _may_start(self, store: StudyStore, submission: Submission, action: Action) -> bool:
        if submission.fate is not Fate.OPEN or action is not Action.RUN or submission.engine is not None:
            return False
        if submission.number in self._running or len(self._running) >= self._crew.at_once:
            return False
        told = watch(store, submission.name)
        if told is not None and told.finished >= told.wanted:
            set_fate(store.engine, submission.number, Fate.ENDED)
            return False
        return True

    def _start_workers(self, store: StudyStore, submission: Submission) -> None:
        crew, launcher = self._crew, None
        try:
            path = write_study(self._folder, submission)
            file = load_study_file(path)
            job = make_job(file, path, storage=self._storage, workers=crew.workers, grace=crew.grace)
            launcher = make_launcher(crew.on, job, file, Watch(job, file.spec.search.trials), crew.options or {})
            if crew.on in DETACHABLE:  # first: rather no workers than twice as many, if the service dies in between
                set_engine(store.engine, submission.number, crew.on)
            launcher.start()
        except InputError as error:
            if launcher is not None:
                launcher.kill()  # the workers that it had started before it failed
            if isinstance(error, StorageError):
                raise
            set_fate(store.engine, submission.number, Fate.GIVEN_UP, str(error))
            return
        self._running[submission.number] = submission, launcher

    def _look_after_jobs(self, store: StudyStore) -> None:
        if self._jobs is not None:
            code = self._jobs.poll()
            if code is None:
                return
            self._jobs, self._jobs_due = None, time.monotonic() + (_JOBS_PAUSE if code else 0.0)
        if self._crew.on == "local" and time.monotonic() >= self._jobs_due and waiting_jobs(store.engine):
            self._jobs = self._start_jobs()

    def _start_jobs(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, STORAGE_VARIABLE: self._storage, SUPERVISOR_VARIABLE: str(os.getpid())}
        try:
            with (self._folder / "jobs.log").open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "rank_search.launch.job_worker"], stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise StorageError(f"workers of jobs cannot be started: {error}") from None

    def _end(self) -> None:
        launchers = [] if self._crew.on in DETACHABLE else [launcher for _, launcher in self._running.values()]
        for launcher in launchers:
            launcher.stop()
        if self._jobs is not None and self._jobs.poll() is None:
            self._jobs.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._crew.grace + KILL_SECONDS
        while time.monotonic() < deadline and not self._all_ended(launchers):
            time.sleep(0.1)
        for launcher in launchers:
            launcher.kill()
        if self._jobs is not None and self._jobs.poll() is None:
            self._jobs.kill()
            self._jobs.wait()

    def _all_ended(self, launchers: list[Launcher]) -> bool:
        jobs_ended = self._jobs is None or self._jobs.poll() is not None
        return jobs_ended and all(worker.has_ended for launcher in launchers for worker in launcher.workers())


def write_study(folder: Path, submission: Submission) -> Path:
    """Write the study file of a submission, whole or not at all; one that is there stays.

    Raises:
        InputError: it cannot be written.
    """
    path = folder / STUDIES_FOLDER / str(submission.number) / "study.toml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_atomically(path, study_toml(submission.spec).encode())
    except OSError as error:
        raise InputError(f"study file {path} cannot be written: {error.strerror or error}") from None
    return path


def _is_measuring(store: StudyStore, name: str) -> bool:
    return name in store.studies() and store.effort(name).running > 0
