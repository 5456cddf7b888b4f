"""Workers as processes of this host: their log cannot be written or is gone, or the database is silent."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rank_search.errors import InputError
from rank_search.launch.devices import Slot
from rank_search.launch.job import Job, Worker
from rank_search.launch.local import LocalLauncher
from rank_search.launch.supervisor import View, Watch, supervise
from tests.waiting import LONG, until


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_search.launch.restarts.FIRST_DELAY", 0.05)
    monkeypatch.setattr("rank_search.launch.restarts.LONGEST_DELAY", 0.05)


def make_launcher(folder: Path, script: str, **changes: float) -> LocalLauncher:
    job = Job(folder / "study.toml", "tiny", "sqlite:///nowhere.db", folder / "logs", **changes)  # type: ignore[arg-type]
    return LocalLauncher(job, [Slot("1 core", (), {})], lambda _worker: 0, ["sh", "-c", script])


def once(launcher: LocalLauncher, is_so: Callable[[Worker], bool]) -> Worker:
    """The one worker as soon as it is so."""
    seen: list[Worker] = []

    def look() -> bool:
        seen.append(launcher.workers()[0])
        return is_so(seen[-1])

    until(look, pause=0.01)
    return seen[-1]


def test_a_worker_whose_log_is_on_a_full_disk_is_started_again_when_there_is_room(tmp_path: Path) -> None:
    log, ran = tmp_path / "logs" / "tiny.worker-0.log", tmp_path / "ran"
    # The first run ends on a disk that it has filled itself.
    launcher = make_launcher(tmp_path, f"test -e {ran} && exit 0; touch {ran}; ln -sf /dev/full {log}; exit 1")
    launcher.start()
    waiting = once(launcher, lambda worker: worker.restarts >= 5)  # more often than it may die in a row
    assert waiting.state == "waiting"
    assert waiting.note.startswith("it cannot be started: [Errno 28] No space left on device, starts again in")
    log.unlink()
    assert once(launcher, lambda worker: worker.has_ended).state == "done"


def test_a_disk_that_stays_full_is_waited_for_as_long_as_a_database(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "tiny.worker-0.log"
    launcher = make_launcher(tmp_path, f"ln -sf /dev/full {log}; exit 1", patience=0.2)
    launcher.start()
    ended = once(launcher, lambda worker: worker.has_ended)
    assert ended.state == "given up"
    assert "waited 0.2 s in vain" in ended.note
    assert ended.note.endswith("it cannot be started: [Errno 28] No space left on device")


def test_a_launch_whose_first_worker_cannot_be_started_is_refused(tmp_path: Path) -> None:
    launcher = make_launcher(tmp_path, "exit 0")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tiny.worker-0.log").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"worker 0 cannot be started: \[Errno 28\] No space left"):
        launcher.start()


def test_logs_that_are_moved_away_are_begun_anew(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    launcher = make_launcher(tmp_path, f"test -d {tmp_path}/moved && exit 0; mv {logs} {tmp_path}/moved; exit 1")
    launcher.start()
    ended = once(launcher, lambda worker: worker.has_ended)
    assert (ended.state, ended.restarts) == ("done", 1)
    assert [path.name for path in logs.iterdir()] == ["tiny.worker-0.log"]


class Shown:
    """Keeps what was shown."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self.on_show: Callable[[View], None] = lambda view: None

    def show(self, view: View) -> None:
        self.views.append(view)
        self.on_show(view)


def test_a_signal_reaches_the_workers_at_once_while_the_database_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rank_search.launch.supervisor.WAIT_SECONDS", 0.1)
    ready = tmp_path / "ready"
    waits = f"trap 'touch {tmp_path}/told; exit 75' TERM; touch {ready}; while :; do sleep 0.05; done"
    script = f"test $ROLE = dies && exit 69; {waits}"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u:p@127.0.0.1:{silent.getsockname()[1]}/x?connect_timeout={2 * LONG:.0f}"
        job = Job(tmp_path / "study.toml", "tiny", url, tmp_path / "logs", grace=10.0)
        watch, shown, sent = Watch(job, 5), Shown(), []

        def stop(view: View) -> None:
            if not sent and ready.exists() and all(worker.restarts > 0 for worker in view.workers[:2]):
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)

        shown.on_show = stop
        # Of each worker that dies the database is asked what it has measured.
        slots = [Slot("1 core", (), {"ROLE": role}) for role in ("dies", "dies", "waits")]
        assert supervise(LocalLauncher(job, slots, watch.measured, ["sh", "-c", script]), job, watch, shown) == 75
    assert time.monotonic() - sent[0] < LONG  # nobody has waited for the database
    assert (tmp_path / "told").exists()
    workers = shown.views[-1].workers
    assert [worker.state for worker in workers] == ["stopped"] * 3
    assert all(worker.restarts > 0 for worker in workers[:2])
