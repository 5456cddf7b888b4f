"""The pure parts of a launch: sharing a host out, restarting, stopping, what the table and the messages say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rank_search.api import STORAGE_FILE_VARIABLE, STORAGE_VARIABLE, storage_url
from rank_search.cli import run_command
from rank_search.cli.launch_table import LaunchBoard, summary
from rank_search.errors import (
    CrowdedError,
    DeviceError,
    DeviceLostError,
    HostMemoryError,
    OutOfPatienceError,
    StorageError,
    StudyFileError,
    TrialError,
    UnavailableError,
)
from rank_search.front import Front, FrontPoint
from rank_search.launch import exits
from rank_search.launch.devices import gpus, slots
from rank_search.launch.job import Worker
from rank_search.launch.restarts import FIRST_DELAY, LONGEST_DELAY, MOST_IN_A_ROW, Restarts
from rank_search.launch.stopping import Stopping
from rank_search.launch.supervisor import View
from rank_search.measurement import Fidelity, Measurement
from rank_search.progress import Preempted, Progress
from rank_search.ranks import RankMap
from rank_search.study.watching import WORST_LOSS, StudyView, WorkerView, area
from tests.waiting import LONG


def test_every_worker_has_gpus_of_its_own() -> None:
    shared = slots(None, 2, on_cpu=False, available=("0", "1", "2", "3", "4"), cores=16)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["0,1", "2,3"]
    assert [slot.device for slot in slots(None, None, on_cpu=False, available=("0", "1"))] == ["GPU 0", "GPU 1"]
    taken = slots(3, None, on_cpu=False, available=("0", "1"))
    assert [slot.gpus for slot in taken] == [("0",), ("1",), ("0",)]  # more workers than GPUs take turns


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shared = slots(3, None, on_cpu=False, available=(), cores=16)
    assert [slot.environment["OMP_NUM_THREADS"] for slot in shared] == ["5"] * 3
    assert len(slots(None, None, on_cpu=False, available=(), cores=16)) == 4
    assert len(slots(None, None, on_cpu=False, available=(), cores=1)) == 1
    hidden = slots(2, None, on_cpu=True, available=("0",), cores=2)
    assert {slot.environment["CUDA_VISIBLE_DEVICES"] for slot in hidden} == {""}


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(DeviceError, match="--gpus-per-worker 4 was asked for, but this host has 2 usable GPUs"):
        slots(None, 4, on_cpu=False, available=("0", "1"))
    with pytest.raises(DeviceError, match="this host has no GPU; leave it out"):
        slots(None, 1, on_cpu=False, available=())
    with pytest.raises(DeviceError, match="the study runs on the CPU"):
        slots(None, 1, on_cpu=True, available=("0",))


def test_a_shell_that_hides_gpus_is_heeded() -> None:
    assert gpus({"CUDA_VISIBLE_DEVICES": "3, 1"}) == ("3", "1")
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}) == gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == ()


def test_restarts_wait_twice_as_long_each_time_and_end() -> None:
    history = Restarts()
    delays = []
    while history.ended(-9, measured=False, last_words="bus error"):
        delays.append(history.delay)
    assert delays == [FIRST_DELAY * 2**i for i in range(MOST_IN_A_ROW - 1)]
    assert history.given_up == f"died {MOST_IN_A_ROW} times in a row, last by signal 9; its last words: bus error"


def test_a_worker_that_measured_something_is_always_started_again() -> None:
    history = Restarts()
    for _ in range(20):
        assert history.ended(1, measured=True, last_words="")
    assert (history.total, history.delay) == (20, FIRST_DELAY)
    assert history.delay <= LONGEST_DELAY


def test_errors_have_the_exit_code_that_says_whether_to_try_again() -> None:
    assert exits.exit_code(UnavailableError("x")) == exits.exit_code(CrowdedError("x")) == exits.UNAVAILABLE == 69
    assert exits.exit_code(StudyFileError("x")) == exits.exit_code(StorageError("x")) == exits.CONFIGURATION == 78
    assert exits.exit_code(OutOfPatienceError("x")) == exits.PREEMPTED == 75
    assert exits.exit_code(DeviceLostError("x")) == exits.exit_code(HostMemoryError("x")) == exits.SYSTEM == 71
    assert exits.exit_code(TrialError("x")) == 2


@pytest.mark.parametrize("code", [exits.UNAVAILABLE, exits.PREEMPTED])
def test_a_database_that_is_away_is_waited_for_as_long_as_the_study_says(code: int) -> None:
    history = Restarts(patience=200.0)
    delays = []
    while history.ended(code, measured=False, last_words="connection refused"):
        delays.append(history.delay)
    assert delays == [1, 2, 4, 8, 16, 32, LONGEST_DELAY, LONGEST_DELAY, 17]  # 200 s
    assert history.given_up == (
        f"waited 200 s in vain (run.database_patience_seconds), last with exit code {code}; "
        "its last words: connection refused"
    )
    without = Restarts(patience=0.0)
    assert [without.ended(code, measured=False, last_words="") for _ in range(MOST_IN_A_ROW)] == [True, True, False]


def test_waiting_for_the_database_is_not_counted_among_deaths() -> None:
    history = Restarts(patience=1e9)
    ends = [exits.UNAVAILABLE] * 2000 + [-9] * MOST_IN_A_ROW
    started = [history.ended(code, measured=False, last_words="") for code in ends]
    assert started == [True] * (len(ends) - 1) + [False]
    assert history.given_up == "died 3 times in a row, last by signal 9"
    history = Restarts(patience=3.0)
    for _ in range(5):  # each outage has the whole patience anew
        assert history.ended(exits.UNAVAILABLE, measured=True, last_words="")
        assert history.ended(exits.UNAVAILABLE, measured=False, last_words="")
    assert history.waited == 3.0


@contextmanager
def bounded() -> Iterator[None]:
    """Fails instead of waiting for ever."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < LONG


def sleep_after(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(2 * LONG)


def test_a_worker_without_a_trial_stops_at_once() -> None:
    with bounded(), Stopping(60.0), pytest.raises(Preempted):
        sleep_after(signal.SIGTERM)


def test_a_trial_that_ends_within_the_grace_time_is_finished() -> None:
    with bounded(), Stopping(60.0) as stopping:
        with stopping.watching(Progress()).step("fine-tune"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            stopping.after_trial()


def test_a_trial_that_takes_longer_is_given_up() -> None:
    with bounded(), Stopping(0.2) as stopping:
        stopping.measuring()
        with pytest.raises(Preempted):
            sleep_after(signal.SIGTERM)


def test_a_second_signal_is_not_made_to_wait() -> None:
    with bounded(), Stopping(60.0) as stopping:
        stopping.measuring()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            sleep_after(signal.SIGINT)


def test_signals_are_the_callers_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    with Stopping(0.05) as stopping:
        stopping.measuring()
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before
    time.sleep(0.1)  # the timer is off


def study_view() -> StudyView:
    worker = WorkerView(trial=7, measured=3, loss=3.25, fidelity="tuned", peak_memory=2**30, seconds=12.5)
    return StudyView(20, 40, {"node:1:0.5": worker}, 0.1234, 4.0)


def test_the_table_tells_of_every_worker() -> None:
    workers = (Worker("0", "node", "running", 2, "node:1:0.5"), Worker("1", "node", "waiting"))
    view = View(workers, study_view(), 40)
    table = LaunchBoard("demo").table(view)
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows == [
        ("0", "node", "7", "tuned", "3.2500", "12.5", "", "", "2"),
        ("1", "node", "waiting", "", "", "", "", "", ""),
    ]
    assert summary("demo", view) == ("study demo: 20 of 40 trials, hypervolume 0.1234, 4.0 trials/min, 5 min 00 s left")
    assert summary("demo", View(workers, None, 40)) == "study demo: being prepared"


def test_a_worker_known_by_its_host_is_found() -> None:
    assert study_view().worker("node").trial == 7
    assert study_view().worker("elsewhere") == study_view().worker("node:2:0.5") == WorkerView()


def test_the_hypervolume_is_in_nats() -> None:
    measured = Measurement(3.0, 0.01, 50, 25, 0.5, 0.5, Fidelity.TUNED, 100)
    front = Front((FrontPoint(0, RankMap({}), measured),))
    assert area(front, 2.5, 100) == pytest.approx((2.5 + WORST_LOSS - 3.0) * 0.5)
    assert area(Front(), 2.5, 100) == 0
    assert area(front, None, 100) is None


def test_the_database_may_be_named_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "url"
    secret.write_text("sqlite:///a.db\n", encoding="utf-8")
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    monkeypatch.setenv(STORAGE_FILE_VARIABLE, str(secret))
    assert storage_url(None, None) == "sqlite:///a.db"
    assert storage_url("sqlite:///b.db", None) == "sqlite:///b.db"
    secret.unlink()
    with pytest.raises(StorageError, match=r"RANK_SEARCH_STORAGE_FILE names .*url, which cannot be read: No such file"):
        storage_url(None, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "two"], "--workers must be auto or a number, not 'two'"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
        (["--trials", "0"], "--trials must be at least 1, not 0"),
        (["--on", "moon"], "--on must be one of local, ray, slurm, kubernetes, not 'moon'"),
        (["--option", "partition"], "--option must be KEY=VALUE, not 'partition'"),
        (["--option", "a=b"], "--on local takes no --option, not 'a'"),
        (["--grace", "-1"], "--grace must be from 0 to 86400 seconds, not -1"),
        (["--grace", "nan"], "--grace must be from 0 to 86400 seconds, not nan"),
        (["--grace", "inf"], "--grace must be from 0 to 86400 seconds, not inf"),
        (["--grace", "1e300"], "--grace must be from 0 to 86400 seconds, not 1e+300"),
        (["--detach"], "--detach leaves workers to a cluster (slurm or kubernetes), not to --on local"),
    ],
)
def test_a_wrong_launch_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    study = tmp_path / "study.toml"
    study.write_text('name = "tiny"\n[model]\nsource = "nowhere"\n', encoding="utf-8")
    assert run_command(["launch", str(study), *arguments]) == 2
    assert capsys.readouterr().err == f"rank-search: error: {says}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_a_worker_of_a_wrong_study_ends_with_the_code_of_wrong_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["worker", str(tmp_path / "none.toml")]) == exits.CONFIGURATION
    assert "No such file or directory" in capsys.readouterr().err
    assert run_command(["worker", "tiny", "--storage", f"sqlite:///{tmp_path}/none.db"]) == exits.CONFIGURATION
    study = tmp_path / "study.toml"
    study.write_text('name = "tiny"\n[model]\nsource = "nowhere"\n', encoding="utf-8")
    capsys.readouterr()
    assert run_command(["worker", str(study), "--grace", "nan"]) == exits.CONFIGURATION
    assert capsys.readouterr().err == "rank-search: error: --grace must be from 0 to 86400 seconds, not nan\n"


def test_what_a_worker_prints_to_a_full_disk_is_dropped() -> None:
    code = (
        "import sys\nfrom rank_search.launch.log_streams import drop_unwritable\ndrop_unwritable('stdout', 'stderr')\n"
        "print('x' * 100_000)\nprint('a line', file=sys.stderr)\nsys.exit(75)"
    )
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full, check=False)
    assert done.returncode == 75  # Python's own is 1, or 120 for what it cannot write as it ends
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (len(seen.stdout), seen.stderr) == (100_001, "a line\n")


def test_a_worker_on_a_full_disk_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rank_search.launch.worker", str(tmp_path / "none.toml")]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == exits.CONFIGURATION


def test_the_table_tells_once_that_the_engine_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    board = LaunchBoard("demo")
    for trouble in ("", "kubectl get: timeout", "kubectl get: timeout", ""):
        board.show(View((), None, 40, engine_trouble=trouble))
    assert capsys.readouterr().err == "kubectl get: timeout; the workers go on\nthe engine answers again\n"
