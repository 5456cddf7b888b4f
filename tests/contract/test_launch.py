"""Supervisors over stand-in workers and real ones: who dies, what is started again, and that nobody is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rank_search.launch import exits, supervisor
from rank_search.launch.devices import Slot
from rank_search.launch.job import Job, Worker
from rank_search.launch.local import LocalLauncher
from rank_search.launch.supervisor import FAILED, View, Watch, supervise
from rank_search.study.consistency import check_database
from rank_search.study.records import FINISHED, State
from rank_search.study.store import StudyStore
from tests.conftest import StudyFactory
from tests.contract.conftest import BACKENDS
from tests.waiting import LONG, until

ROOT = Path(__file__).parents[2]


class Launch:
    """A launch of stand-in workers in this process, with everything it showed."""

    def __init__(
        self, storage: str, folder: Path, *, workers: int = 2, trials: int = 6, seconds: float = 0.05, ill: str = "",
        grace: float = 10.0,
    ) -> None:  # fmt: skip
        self.storage = storage
        self.job = Job(folder / "study.toml", "tiny", storage, folder / "logs", grace=grace)
        self.watch = Watch(self.job, trials)
        command = [sys.executable, "-m", "tests.contract.stand_in", str(trials), str(seconds), *([ill] if ill else [])]
        environment = {"PYTHONPATH": str(ROOT), "RANK_SEARCH_TEST_GRACE": str(grace)}
        slots = [Slot("1 core", (), environment)] * workers
        self.launcher = LocalLauncher(self.job, slots, self.watch.measured, command)
        self.views: list[View] = []
        self.on_show: Callable[[View], None] = lambda view: None

    def show(self, view: View) -> None:
        self.views.append(view)
        self.on_show(view)

    def run(self, kill_seconds: float = 15.0) -> int:
        return supervise(self.launcher, self.job, self.watch, self, kill_seconds=kill_seconds)

    def run_of_reconcile(self) -> int:
        """A worker that opens the study once more, which gives back what the last killed one held."""
        return Launch(self.storage, self.job.logs.parent, workers=1, trials=1).run()

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self.views[-1].workers

    def pids(self) -> set[int]:
        return {worker.pid for view in self.views for worker in view.workers if worker.pid is not None}

    def states(self) -> list[State]:
        with StudyStore(self.storage) as store:
            return [trial.state for trial in store.trials("tiny")]


def gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture(params=BACKENDS[:1])
def backend(request: pytest.FixtureRequest) -> str:
    """Processes are what most of these tests are about; one kind of database will do."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "TICK_SECONDS", 0.05)
    monkeypatch.setattr("rank_search.launch.restarts.FIRST_DELAY", 0.1)


def test_workers_share_the_trials_of_a_study(storage: str, tmp_path: Path) -> None:
    launch = Launch(storage, tmp_path, trials=8, ill=f"in pairs:{tmp_path / 'pairs'}")
    assert launch.run() == exits.DONE
    assert [worker.state for worker in launch.workers] == ["done", "done"]
    assert launch.states().count(State.COMPLETE) in {8, 9}
    with StudyStore(storage) as store:
        assert len({trial.worker for trial in store.trials("tiny")}) == 2
    study = launch.views[-1].study
    assert study is not None
    assert study.finished >= 8
    assert {view.measured for view in study.workers.values()} <= set(range(1, 9))
    assert gone(launch.pids())


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_a_killed_worker_is_started_again_and_its_trial_proposed_again(storage: str, tmp_path: Path) -> None:
    # So long that the other worker has not done all by itself before this one is back.
    launch = Launch(storage, tmp_path, trials=24, seconds=0.4, ill=f"killed once:{tmp_path / 'killed'}")
    assert launch.run() == exits.DONE
    assert sum(worker.restarts for worker in launch.workers) == 1
    states = launch.states()
    assert states.count(State.REQUEUED) == 1
    assert State.RUNNING not in states
    with StudyStore(storage) as store:
        trials = store.trials("tiny")
    (requeued,) = (trial for trial in trials if trial.state is State.REQUEUED)
    assert [t.rank_map for t in trials if t.state is State.COMPLETE].count(requeued.rank_map) == 1
    assert check_database(storage) == ()


def test_a_worker_that_keeps_dying_at_start_is_given_up_with_its_last_words(storage: str, tmp_path: Path) -> None:
    launch = Launch(storage, tmp_path, workers=1, ill="dies at start")
    assert launch.run() == FAILED
    (worker,) = launch.workers
    assert (worker.state, worker.restarts, worker.exit_code) == ("given up", 2, 1)
    assert worker.note == (
        "died 3 times in a row, last with exit code 1; its last words: libcuda.so.1: cannot open shared object file"
    )
    assert launch.launcher.log_of("0").read_text(encoding="utf-8").count("some library") == 3


def test_a_wrong_configuration_is_not_tried_twice(storage: str, tmp_path: Path) -> None:
    launch = Launch(storage, tmp_path, ill="misconfigured")
    assert launch.run() == exits.CONFIGURATION
    assert [(worker.state, worker.restarts) for worker in launch.workers] == [("given up", 0)] * 2
    assert launch.workers[0].note == "wrong configuration; its last words: study file x.toml: no such file"


def test_sigterm_lets_workers_finish_their_trials(storage: str, tmp_path: Path) -> None:
    launch = Launch(storage, tmp_path, trials=500, seconds=0.3)
    stop_when_measured(launch, 2)
    assert launch.run() == exits.PREEMPTED
    assert {worker.state for worker in launch.workers} == {"stopped"}
    assert {worker.exit_code for worker in launch.workers} == {exits.PREEMPTED}
    assert set(launch.states()) == {State.COMPLETE}
    assert gone(launch.pids())


def test_a_second_signal_gives_the_trials_back_at_once(storage: str, tmp_path: Path) -> None:
    launch = Launch(storage, tmp_path, trials=500, seconds=4 * LONG, grace=2 * LONG)
    stop_when_running(launch, 2, times=2)
    started = time.monotonic()
    assert launch.run() == exits.PREEMPTED
    assert time.monotonic() - started < LONG
    assert launch.states() == [State.REQUEUED] * 2
    assert gone(launch.pids())


def test_a_worker_that_does_not_stop_is_killed(storage: str, tmp_path: Path) -> None:
    launch = Launch(storage, tmp_path, workers=1, trials=500, seconds=30.0, ill="deaf", grace=0.2)
    stop_when_running(launch, 1, times=1)
    assert launch.run(kill_seconds=0.3) == exits.PREEMPTED
    assert launch.workers[0].exit_code == -signal.SIGKILL
    assert gone(launch.pids())
    again = Launch(storage, tmp_path, workers=1, trials=3)
    assert again.run() == exits.DONE  # what the dead one held is proposed again
    assert again.states().count(State.REQUEUED) == 1


def test_workers_do_not_outlive_a_killed_supervisor(storage: str, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom tests.contract.test_launch import Launch\n"
        f"launch = Launch({storage!r}, pathlib.Path({str(tmp_path)!r}), trials=500, seconds=0.2)\n"
        "launch.on_show = lambda view: print(*launch.pids(), flush=True)\nlaunch.run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        until(lambda: State.COMPLETE in states_of(storage))
        process.kill()
        pids = {int(pid) for line in process.stdout for pid in line.split()}
        assert len(pids) == 2
        until(lambda: gone(pids))
    finally:
        process.kill()
        process.communicate()
    assert State.RUNNING not in states_of(storage)


def test_the_database_is_made_before_any_worker_starts(
    empty_storage: str, tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rank_search.launch import launching
    from rank_search.study.engine import make_engine
    from rank_search.study.schema import head, version_of

    found: list[str | None] = []

    class Looking(LocalLauncher):
        def start(self) -> None:
            engine = make_engine(empty_storage)
            found.append(version_of(engine))
            engine.dispose()
            self.stop()

    monkeypatch.setattr("rank_search.launch.local.LocalLauncher", Looking)
    shown: list[View] = []
    board = type("Board", (), {"show": lambda self, view: shown.append(view)})()
    assert launching.launch(tiny_study(), board, storage=empty_storage, workers=2) == exits.PREEMPTED
    assert found == [head()]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_two_workers_run_a_real_study_to_its_end(empty_storage: str, tiny_study: StudyFactory) -> None:
    study = tiny_study(search={"trials": 6})
    command = [sys.executable, "-m", "rank_search", "launch", str(study), "--workers", "2"]
    environment = {**os.environ, "RANK_SEARCH_STORAGE": empty_storage, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "dense model" in done.stdout
    assert "worker 1 on 1 core: done" in done.stderr
    with StudyStore(empty_storage) as store:
        trials = store.trials("tiny")
        assert store.front("tiny") == store.recompute_front("tiny")
    assert {trial.state for trial in trials} <= {State.COMPLETE, State.SKIPPED}
    sources = [trial.source for trial in trials]
    assert [sources.count(seed) for seed in ("closed form 0.8", "uniform 0.8", "closed form 0.5", "uniform 0.5")] == [
        1
    ] * 4
    assert check_database(empty_storage) == ()
    assert len(list((study.parent / "work" / "banks").glob("*.safetensors"))) == 1
    logs = [(study.parent / "work" / "logs" / f"tiny.worker-{n}.log").read_text(encoding="utf-8") for n in range(2)]
    assert sum(log.count("trial ") for log in logs) >= 6


KILLS = int(os.environ.get("RANK_SEARCH_TEST_KILLS", "3"))
"""More of them for a soak."""


# On PostgreSQL a test of test_kills kills workers, too.
@pytest.mark.parametrize("backend", BACKENDS if KILLS > 4 else BACKENDS[:1], indirect=True)
def test_workers_killed_at_random_lose_nothing(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_search.launch.restarts.MOST_IN_A_ROW", 1000)  # it is not the workers' fault
    monkeypatch.setattr("rank_search.launch.restarts.LONGEST_DELAY", 0.5)
    monkeypatch.setenv("RANK_SEARCH_TEST_LARGER", "40")  # else long runs would propose the same rank maps again
    rng = random.Random(0)
    trials = 100 + 25 * KILLS  # so many that the last kill comes before the last trial
    launch = Launch(storage, tmp_path, workers=3, trials=trials, seconds=0.1)
    killed: list[int] = []
    due = [time.monotonic() + 3.0]

    def kill_one(view: View) -> None:
        pids = [worker.pid for worker in view.workers if worker.pid is not None and worker.pid not in killed]
        if len(killed) < KILLS and pids and time.monotonic() >= due[0]:
            killed.append(rng.choice(pids))
            due[0] = time.monotonic() + rng.uniform(0.2, 1.5)
            os.kill(killed[-1], signal.SIGKILL)

    launch.on_show = kill_one
    assert launch.run() == exits.DONE
    assert launch.run_of_reconcile() == exits.DONE
    assert len(killed) == KILLS
    with StudyStore(storage) as store:
        found = store.trials("tiny")
        assert store.front("tiny") == store.recompute_front("tiny")
    ends = [trial.state for trial in found]
    assert set(ends) <= {State.COMPLETE, State.REQUEUED, State.SKIPPED, State.FAILED}
    assert trials <= sum(state in FINISHED for state in ends) < trials + 3
    sources = [trial.source for trial in found if trial.state in FINISHED]
    assert [sources.count(seed) for seed in ("closed form 0.5", "uniform 0.5")] == [1, 1]
    assert check_database(storage) == ()


def stop_when_measured(launch: Launch, count: int) -> None:
    sent: list[int] = []

    def look(view: View) -> None:
        study = view.study
        if not sent and study is not None and study.finished >= count and len(study.workers) == len(view.workers):
            sent.append(1)  # one that has not begun yet would end by the signal itself
            os.kill(os.getpid(), signal.SIGTERM)

    launch.on_show = look


def stop_when_running(launch: Launch, count: int, *, times: int) -> None:
    sent: list[threading.Timer] = []

    def look(view: View) -> None:
        running = [w for w in view.study.workers.values() if w.trial is not None] if view.study is not None else []
        if not sent and len(running) == count:
            for index in range(times):  # apart, as a person presses Ctrl-C
                sent.append(threading.Timer(0.1 + 0.5 * index, os.kill, (os.getpid(), signal.SIGTERM)))
                sent[-1].start()

    launch.on_show = look


def states_of(storage: str) -> list[State]:
    with StudyStore(storage) as store:
        return [trial.state for trial in store.trials("tiny")] if "tiny" in store.studies() else []
