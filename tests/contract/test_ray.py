"""Ray on a local cluster of several nodes: workers share a study, one's node is lost, and nothing with it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rank_search.errors import InputError
from rank_search.launch import exits, supervisor
from rank_search.launch.job import Job
from rank_search.launch.ray_cluster import RayLauncher, RayOptions
from rank_search.launch.supervisor import View, Watch, supervise
from rank_search.study.consistency import check_database
from rank_search.study.records import State
from rank_search.study.store import StudyStore
from tests.contract.conftest import Postgres
from tests.waiting import until

ROOT = Path(__file__).parents[2]

NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
SOON = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""Ray's own patience is half a minute."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # Ray leaves sockets to the garbage collector
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one worker each, with a GPU in name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "include_dashboard": False, "_system_config": SOON},
        )
        made.add_node(**NODE)
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def storage(postgres: Postgres) -> Iterator[str]:
    """Once is enough, on the database that clusters use."""
    with postgres.database(with_schema=True) as url:
        yield url


def make_launcher(job: Job, watch: Watch, trials: int, seconds: float, *ill: str) -> RayLauncher:
    command = [sys.executable, "-m", "tests.contract.stand_in", str(trials), str(seconds), *ill]
    return RayLauncher(
        job, watch.measured, RayOptions(), on_cpu=False, command=command, environment={"PYTHONPATH": str(ROOT)}
    )


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


class Shown:
    def __init__(self) -> None:
        self.views: list[View] = []
        self.on_show: Any = lambda view: None

    def show(self, view: View) -> None:
        self.views.append(view)
        self.on_show(view)


def test_the_workers_of_a_lost_node_go_on_elsewhere(
    cluster: Any, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.2)
    job = Job(tmp_path / "study.toml", "tiny", storage, tmp_path / "logs")
    watch, shown = Watch(job, 40), Shown()
    lost: list[Any] = []
    launcher = make_launcher(job, watch, 40, 0.5)

    def lose_a_node(view: View) -> None:
        workers = view.study.workers.values() if view.study is not None else []
        if lost or sum(worker.measured > 0 for worker in workers) < 2:
            return
        lost.append(cluster.worker_nodes.copy().pop())
        mine = {int(w.identity.split(":")[1]) for w in view.workers if w.identity is not None}
        raylet = lost[0].all_processes["raylet"][0].process.pid
        actor, worker = next((parent_of(pid), pid) for pid in mine if parent_of(parent_of(pid)) == raylet)
        cluster.remove_node(lost[0], allow_graceful=False)
        for pid in (actor, worker):  # the host is gone, and all that ran on it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.add_node(**NODE)

    shown.on_show = lose_a_node
    assert supervise(launcher, job, watch, shown) == exits.DONE
    assert lost
    assert [worker.state for worker in shown.views[-1].workers] == ["done", "done"]
    assert {worker.device.split()[-1] for view in shown.views for worker in view.workers if worker.device} == {"0"}
    with StudyStore(storage) as store:
        trials = store.trials("tiny")
        assert store.front("tiny") == store.recompute_front("tiny")
    assert len({trial.worker for trial in trials}) >= 3
    assert State.RUNNING not in {trial.state for trial in trials}
    assert check_database(storage) == ()


def test_stopping_gives_the_trials_back(cluster: Any, storage: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "study.toml", "tiny", storage, tmp_path / "logs")
    watch, shown = Watch(job, 500), Shown()
    launcher = make_launcher(job, watch, 500, 30.0)
    launcher.start()
    try:
        until(lambda: running(storage) == 2)
        launcher.stop()
        launcher.stop()
        until(lambda: all(worker.has_ended for worker in launcher.workers()))
    finally:
        launcher.kill()
    assert {worker.exit_code for worker in launcher.workers()} == {exits.PREEMPTED}
    with StudyStore(storage) as store:
        assert [trial.state for trial in store.trials("tiny")] == [State.REQUEUED] * 2
    assert not shown.views


def test_more_gpus_than_the_cluster_has_are_refused(cluster: Any, storage: str, tmp_path: Path) -> None:
    job = Job(tmp_path / "study.toml", "tiny", storage, tmp_path / "logs", gpus_per_worker=8)
    launcher = make_launcher(job, Watch(job, 1), 1, 0.1)
    with pytest.raises(InputError, match="--gpus-per-worker 8 was asked for, but the Ray cluster has 2 GPUs"):
        launcher.start()


def test_an_actor_that_fails_tells_why(
    cluster: Any, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rank_search.launch.restarts.FIRST_DELAY", 0.1)
    (tmp_path / "logs").touch()  # a file in the place of the folder
    job = Job(tmp_path / "study.toml", "tiny", storage, tmp_path / "logs", workers=1)
    launcher = make_launcher(job, Watch(job, 1), 1, 0.1)
    launcher.start()
    try:
        until(lambda: launcher.workers()[0].has_ended)
    finally:
        launcher.kill()
    (worker,) = launcher.workers()
    assert (worker.state, worker.restarts) == ("given up", 2)
    assert worker.note == (
        f"died 3 times in a row, last without an exit code; its last words: [Errno 17] File exists: '{job.logs}'"
    )


def running(storage: str) -> int:
    with StudyStore(storage) as store:
        trials = store.trials("tiny") if "tiny" in store.studies() else ()
    return sum(trial.state is State.RUNNING for trial in trials)
