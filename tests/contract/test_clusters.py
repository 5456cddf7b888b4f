"""Slurm through submitit, its local executor and the script it would submit; Kubernetes by its manifest's schema."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rank_search.cli import run_command
from rank_search.errors import InputError, StorageError
from rank_search.launch import exits
from rank_search.launch.fleet import Crew, ServiceFleet
from rank_search.launch.job import Job
from rank_search.launch.kubernetes import KubernetesLauncher, KubernetesOptions, manifest, workers_of
from rank_search.launch.launching import launch
from rank_search.launch.slurm import SlurmLauncher, SlurmWorker
from rank_search.launch.supervisor import View, Watch, supervise
from rank_search.spec import StudySpec, load_study_file
from rank_search.study.records import State
from rank_search.study.store import StudyStore
from rank_search.study.submissions import resume, submissions, submit
from tests.conftest import StudyFactory
from tests.contract.conftest import Postgres
from tests.contract.synthetic import make_spec
from tests.waiting import until

ROOT = Path(__file__).parents[2]
SERVER = "postgresql://search@database/search"


class Board:
    """Keeps what was shown."""

    def __init__(self) -> None:
        self.views: list[View] = []

    def show(self, view: View) -> None:
        self.views.append(view)


@pytest.fixture
def storage(postgres: Postgres) -> Iterator[str]:
    """Once is enough, on the database that clusters use."""
    with postgres.database(with_schema=True) as url:
        yield url


def make_job(folder: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "study": folder / "demo" / "study.toml", "name": "Demo_1", "storage": SERVER, "logs": folder / "logs",
        "workers": 3,
    }  # fmt: skip
    return Job(**{**values, **changes})


@pytest.mark.slow
def test_submitit_runs_the_workers_of_a_real_study(
    storage: str, tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK_SEARCH_STORAGE", storage)
    board = Board()
    options = {"cluster": "local", "cpus": "1"}
    assert launch(tiny_study(), board, workers=2, on="slurm", options=options, storage=storage) == exits.DONE
    assert [worker.state for worker in board.views[-1].workers] == ["done", "done"]
    with StudyStore(storage) as store:
        trials = store.trials("tiny")
    assert sum(trial.state is State.COMPLETE for trial in trials) >= 4


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs with the names of Slurm's put what they are to submit; each time with a number more."""
    programs, script = tmp_path / "bin", tmp_path / "script.sh"
    programs.mkdir()
    submits = f'#!/bin/sh\ncp --backup=numbered "$1" {script}\necho Submitted batch job 17\n'
    (programs / "sbatch").write_text(submits, encoding="utf-8")
    for name in ("srun", "scancel", "sacct"):
        (programs / name).write_text("#!/bin/sh\n", encoding="utf-8")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RANK_SEARCH_STORAGE", "unset")
    return script


def test_the_script_for_slurm_asks_for_what_was_asked(tmp_path: Path, script: Path) -> None:
    options = {"partition": "gpu", "account": "me", "minutes": "90", "cpus": "6", "setup": "module load cuda"}
    launcher = SlurmLauncher.of(make_job(tmp_path, gpus_per_worker=2), options, on_cpu=False)
    launcher.start()
    text = script.read_text(encoding="utf-8")
    asked = set(re.findall(r"^#SBATCH --(\S+)", text, re.MULTILINE))
    assert {
        "array=0-2%3", "gpus-per-node=2", "partition=gpu", "account=me", "time=90", "cpus-per-task=6", "requeue",
        "open-mode=append", "signal=USR2@60", "job-name=rank-search-Demo_1", "mem=64GB",
    } <= asked  # fmt: skip
    assert "\nmodule load cuda\n" in text
    assert SERVER not in text
    assert all(SERVER.encode() not in path.read_bytes() for path in (tmp_path / "logs").rglob("*") if path.is_file())
    assert os.environ["RANK_SEARCH_STORAGE"] == SERVER  # which sbatch passes on


def test_a_preempted_task_stops_its_worker_and_is_submitted_again(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = (
        "import pathlib, signal, sys, time\n"
        f"told = pathlib.Path({str(told)!r})\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (told.write_text('stopped'), sys.exit({exits.PREEMPTED})))\n"
        "told.write_text('ready')\ntime.sleep(60)"
    )
    task = SlurmWorker((sys.executable, "-c", code), grace=5.0)
    submitted: list[Any] = []

    def preempt() -> None:
        while not told.exists() or told.read_text(encoding="utf-8") != "ready":
            time.sleep(0.05)
        submitted.append(task.checkpoint())

    thread = threading.Thread(target=preempt)
    thread.start()
    assert task() == exits.PREEMPTED
    thread.join()
    assert told.read_text(encoding="utf-8") == "stopped"
    again = submitted[0].function
    assert again == SlurmWorker(task.command, task.grace, task.patience)


def test_a_task_starts_its_worker_again_that_nobody_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rank_search.launch.slurm._POLL_SECONDS", 0.01)
    monkeypatch.setattr("rank_search.launch.restarts.FIRST_DELAY", 0.01)
    runs = tmp_path / "runs"
    # Five times the database was away for longer than it waits.
    script = f"echo >> {runs}; test $(wc -l < {runs}) -gt 5 && exit {exits.DONE}; exit {exits.PREEMPTED}"
    assert SlurmWorker(("sh", "-c", script), grace=5.0, patience=60.0)() == exits.DONE
    assert len(runs.read_text(encoding="utf-8").splitlines()) == 6
    assert SlurmWorker(("sh", "-c", "exit 69"), grace=5.0, patience=0.05)() == exits.UNAVAILABLE


def test_a_task_that_slurm_ends_starts_no_worker_again(tmp_path: Path) -> None:
    """As by ``scancel``: SIGTERM goes to the task and to its worker at once, and SIGKILL follows."""
    runs, before = tmp_path / "runs", signal.getsignal(signal.SIGTERM)
    script = f"echo >> {runs}; kill -TERM $PPID; exit {exits.PREEMPTED}"
    assert SlurmWorker(("sh", "-c", script), grace=5.0)() == exits.PREEMPTED
    assert len(runs.read_text(encoding="utf-8").splitlines()) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_slurm_needs_a_server_and_a_number(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="an SQLite database is for one; use PostgreSQL"):
        SlurmLauncher.of(make_job(tmp_path, storage="sqlite:///study.db"), {}, on_cpu=True)
    with pytest.raises(InputError, match="give --workers N"):
        SlurmLauncher.of(make_job(tmp_path, workers=None), {}, on_cpu=True)
    with pytest.raises(InputError, match="no option 'partitoin'; did you mean 'partition'"):
        SlurmLauncher.of(make_job(tmp_path), {"partitoin": "gpu"}, on_cpu=True)
    with pytest.raises(InputError, match=r"option minutes: Input should be a valid integer.*not 'soon'"):
        SlurmLauncher.of(make_job(tmp_path), {"minutes": "soon"}, on_cpu=True)


INSTANCE = "app.kubernetes.io/instance"
OPTIONS = {"image": "registry.example/rank-search:1", "volume": "studies"}


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_manifest_keeps_to_the_official_schema(tmp_path: Path, gpus: int) -> None:
    import kubernetes_validate as validate

    made = manifest(make_job(tmp_path), KubernetesOptions(**OPTIONS), gpus)
    for version in ("1.33", "1.37"):
        validate.validate(yaml.safe_load(yaml.safe_dump(made)), version, strict=True)
    made["spec"]["completion"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(made, "1.37", strict=True)


def test_the_manifest_says_what_was_asked(tmp_path: Path) -> None:
    made = manifest(make_job(tmp_path, trials=40), KubernetesOptions(**OPTIONS, cpu="8"), 2)
    assert made["metadata"]["name"] == "rank-search-demo-1-6c5e2e"
    spec, pod = made["spec"], made["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    rules = spec["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules] == [
        ("FailIndex", [exits.CONFIGURATION]), ("Ignore", [exits.PREEMPTED]), ("Ignore", None),
    ]  # fmt: skip
    (container,) = pod["containers"]
    command = "python -m rank_search.launch.worker /studies/demo/study.toml --trials 40 --grace 30"
    assert container["command"] == command.split()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["terminationGracePeriodSeconds"] == 60
    assert pod["securityContext"]["runAsNonRoot"]
    assert SERVER not in json.dumps(made)
    assert {"name": "RANK_SEARCH_STORAGE_FILE", "value": "/run/secrets/rank-search/url"} in container["env"]
    assert "nvidia.com/gpu" not in json.dumps(manifest(make_job(tmp_path), KubernetesOptions(**OPTIONS), 0))


def test_jobs_of_different_studies_have_different_names_that_fit(tmp_path: Path) -> None:
    def name(study: str, workers: int = 3) -> str:
        made = manifest(make_job(tmp_path, name=study, workers=workers), KubernetesOptions(**OPTIONS), 0)
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{,61}[a-z0-9])?", made["metadata"]["labels"][INSTANCE])
        return str(made["metadata"]["name"])

    assert name("tiny") == "rank-search-tiny"
    studies = ["A_b", "a.b", "a-b", "a_b", "x" * 80, "x" * 81, "x" * 49 + "-yy", "\N{GREEK SMALL LETTER ALPHA}"]
    names = [name(study, workers=101) for study in studies]
    assert len(set(names)) == len(studies)
    assert max(len(f"{made}-100") for made in names) == 63  # a pod's host name
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*[a-z0-9]", made) for made in names)


def pod(index: int, made: str, phase: str, code: int | None = None) -> dict[str, Any]:
    ended = [] if code is None else [{"state": {"terminated": {"exitCode": code}}}]
    return {
        "metadata": {
            "creationTimestamp": made, "annotations": {"batch.kubernetes.io/job-completion-index": str(index)}
        },
        "spec": {"nodeName": f"node-{index}", "hostname": f"rank-search-demo-1-{index}"},
        "status": {"phase": phase, "containerStatuses": ended},
    }  # fmt: skip


def test_workers_are_read_from_the_pods() -> None:
    pods = [
        pod(0, "2026-01-01T00:00:02Z", "Running"), pod(0, "2026-01-01T00:00:00Z", "Failed", 75),
        pod(1, "2026-01-01T00:00:00Z", "Succeeded", 0), pod(2, "2026-01-01T00:00:00Z", "Failed", 78),
        pod(3, "2026-01-01T00:00:00Z", "Pending"),
    ]  # fmt: skip
    workers = workers_of({"status": {"failedIndexes": "2,5-6"}}, pods, 5)
    assert [(w.state, w.restarts, w.exit_code) for w in workers] == [
        ("running", 1, None), ("done", 0, 0), ("given up", 0, 78), ("waiting", 0, None), ("waiting", 0, None)
    ]  # fmt: skip
    assert workers[0].identity == "rank-search-demo-1-0"


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that notes how it is called, and knows of two pods that are done."""
    calls, answers = tmp_path / "calls", tmp_path / "answers"
    answers.mkdir()
    pods = {"items": [pod(index, "2026-01-01T00:00:00Z", "Succeeded", 0) for index in range(2)]}
    (answers / "pods").write_text(json.dumps(pods), encoding="utf-8")
    (answers / "job").write_text(json.dumps({"status": {}}), encoding="utf-8")
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n'
        f'[ -e {tmp_path}/away ] && {{ echo "Unable to connect: TLS handshake timeout" >&2; exit 1; }}\n'
        f'[ "$3" = get ] && cat "{answers}/$4"\n'
        '[ "$4" = refuse ] && { echo "error: no such thing" >&2; exit 1; }\nexit 0\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return calls


def test_the_manifest_is_applied_and_the_job_deleted_when_it_is_to_stop(kubectl: Path, tmp_path: Path) -> None:
    launcher = KubernetesLauncher.of(make_job(tmp_path, workers=2), {**OPTIONS, "namespace": "ml"}, on_cpu=True)
    launcher.start()
    written = tmp_path / "logs" / "Demo_1.job.yaml"
    assert yaml.safe_load(written.read_text(encoding="utf-8"))["kind"] == "Job"
    assert [worker.state for worker in launcher.workers()] == ["done", "done"]
    launcher.kill()  # of workers that have ended nothing is deleted
    launcher.stop()
    calls = kubectl.read_text(encoding="utf-8").splitlines()
    assert calls[1] == f"--namespace ml apply -f {written}"
    assert [call.split()[2] for call in calls] == ["get", "apply", "get", "get", "delete"]


def test_a_job_that_has_ended_is_removed_before_it_is_applied_again(kubectl: Path, tmp_path: Path) -> None:
    ended = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    (tmp_path / "answers" / "job").write_text(json.dumps(ended), encoding="utf-8")
    KubernetesLauncher.of(make_job(tmp_path, workers=2), OPTIONS, on_cpu=True).start()
    calls = [call.split()[2:5] for call in kubectl.read_text(encoding="utf-8").splitlines()]
    assert calls[:2] == [[verb, "job", "rank-search-demo-1-6c5e2e"] for verb in ("get", "delete")]
    assert calls[2][0] == "apply"


def test_a_job_whose_application_is_not_answered_is_deleted(
    kubectl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = subprocess.run

    def slow(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = asked(command, **options)
        if "apply" in command:  # the cluster has it, and the answer is lost
            raise subprocess.TimeoutExpired(command, 60)
        return done

    monkeypatch.setattr("rank_search.launch.kubernetes.subprocess.run", slow)
    launcher = KubernetesLauncher.of(make_job(tmp_path, workers=2), OPTIONS, on_cpu=True)
    with pytest.raises(InputError, match=r"^kubectl apply did not answer within 60 s; check the cluster$"):
        launcher.start()
    assert verbs(kubectl) == ["get", "apply", "delete"]
    launcher.kill()
    assert verbs(kubectl)[3:] == []


def verbs(calls: Path) -> list[str]:
    return [call.split()[2] for call in calls.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def running(kubectl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubernetesLauncher:
    """A launch of one pod that runs, and as often asked about as it is looked at."""
    monkeypatch.setattr("rank_search.launch.kubernetes.POLL_SECONDS", 0.0)
    pods = {"items": [pod(0, "2026-01-01T00:00:00Z", "Running")]}
    (tmp_path / "answers" / "pods").write_text(json.dumps(pods), encoding="utf-8")
    launcher = KubernetesLauncher.of(make_job(tmp_path, workers=1), OPTIONS, on_cpu=True)
    launcher.start()
    return launcher


def test_workers_go_on_while_the_cluster_does_not_answer(
    running: KubernetesLauncher, kubectl: Path, tmp_path: Path
) -> None:
    away, job = tmp_path / "away", make_job(tmp_path, storage=f"sqlite:///{tmp_path}/none.db")
    board = Board()

    def show(view: View) -> None:
        board.views.append(view)
        match len(board.views):
            case 1:
                away.touch()
            case 4:
                assert [worker.state for worker in view.workers] == ["running"]
                assert view.engine_trouble == "kubectl get: Unable to connect: TLS handshake timeout"
                away.unlink()
                done = {"items": [pod(0, "2026-01-01T00:00:00Z", "Succeeded", 0)]}
                (tmp_path / "answers" / "pods").write_text(json.dumps(done), encoding="utf-8")

    shown = type("Shown", (), {"show": staticmethod(show)})()
    running.start = lambda: None  # type: ignore[method-assign]  # it has
    assert supervise(running, job, Watch(job, 1), shown) == exits.DONE
    assert board.views[-1].engine_trouble == ""
    assert "delete" not in verbs(kubectl)


def test_a_job_is_deleted_as_soon_as_the_cluster_answers_again(
    running: KubernetesLauncher, kubectl: Path, tmp_path: Path
) -> None:
    assert [worker.state for worker in running.workers()] == ["running"]
    (tmp_path / "away").touch()
    running.stop()
    assert [worker.state for worker in running.workers()] == ["running"]
    (tmp_path / "away").unlink()
    assert [worker.state for worker in running.workers()] == ["stopped"]
    assert (running.trouble, verbs(kubectl).count("delete")) == ("", 3)
    running.stop()
    assert verbs(kubectl).count("delete") == 3


def test_a_job_that_cannot_be_deleted_is_told(running: KubernetesLauncher, tmp_path: Path) -> None:
    (tmp_path / "away").touch()
    running.kill()
    assert [worker.state for worker in running.workers()] == ["stopped"]
    assert running.trouble.endswith(
        "TLS handshake timeout; the job may still be there, delete it with "
        "`kubectl --namespace default delete job rank-search-demo-1-6c5e2e`"
    )


def test_workers_of_a_job_that_somebody_has_deleted_are_given_up(running: KubernetesLauncher, tmp_path: Path) -> None:
    (tmp_path / "answers" / "job").write_text("", encoding="utf-8")
    (worker,) = running.workers()
    assert (worker.state, worker.note) == ("given up", "somebody has deleted the job")


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_manifest_may_be_written_without_a_cluster_or_a_database(
    tiny_study: StudyFactory, kubectl: Path, capsys: pytest.CaptureFixture[str], detach: list[str]
) -> None:
    study = tiny_study()
    given = [f"--option={name}={value}" for name, value in {**OPTIONS, "apply": "false"}.items()]
    command = ["launch", str(study), "--on", "kubernetes", "--workers", "2", "--storage", SERVER, *given, *detach]
    assert run_command(command) == 0
    written = study.parent / "work" / "logs" / "tiny.job.yaml"
    assert capsys.readouterr().out == f"wrote {written}; apply it with `kubectl apply -f {written}`\n"
    assert yaml.safe_load(written.read_text(encoding="utf-8"))["kind"] == "Job"
    assert not kubectl.exists()


def test_kubernetes_asks_for_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--on kubernetes needs --option image=\.\.\.: The worker image"):
        KubernetesLauncher.of(make_job(tmp_path), {"volume": "studies"}, on_cpu=True)
    with pytest.raises(InputError, match="give --workers N"):
        KubernetesLauncher.of(make_job(tmp_path, workers=None), OPTIONS, on_cpu=True)


def test_the_launcher_loads_no_torch_and_no_engine() -> None:
    code = (
        "import importlib, json, pkgutil, sys\nimport rank_search.launch as package\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "import rank_search.study.upgrading\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & {"torch", "transformers", "datasets", "ray", "submitit", "yaml"}


def handed_over(storage: str, folder: Path, crew: Crew) -> StudySpec:
    """A study that the service took on, once a fleet has given it to the crew's engine; ended, as by a restart."""
    spec = make_spec("taken", trials=7)
    with StudyStore(storage) as store:
        submit(store.engine, spec, "ana", most=9)
        fleet = ServiceFleet(storage, folder, crew)
        fleet.start()
        until(lambda: submissions(store.engine)[0].engine == crew.on)
        fleet.stop()  # once it has done what it began
    return spec


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """A list that grows with every call that has ended."""
    calls, method = [], getattr(owner, name)

    def counted(*arguments: object) -> object:
        result = method(*arguments)
        calls.append(1)
        return result

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_the_service_hands_a_study_to_slurm_once_and_anew_when_it_is_resumed(
    storage: str, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, crew = tmp_path / "service", Crew("slurm", {"partition": "gpu"}, workers=2)
    spec = handed_over(storage, folder, crew)
    asked = set(re.findall(r"^#SBATCH --(\S+)", script.read_text(encoding="utf-8"), re.MULTILINE))
    assert {"array=0-1%2", "partition=gpu", "job-name=rank-search-taken", "requeue"} <= asked
    assert os.environ["RANK_SEARCH_STORAGE"] == storage  # which sbatch passes on
    study = folder / "studies" / "1" / "study.toml"
    assert load_study_file(study).spec == spec
    tasks = [pickle.loads(path.read_bytes()).function for path in folder.rglob("*submitted.pkl")]
    command = (sys.executable, "-m", "rank_search.launch.worker", str(study), "--grace", "30")
    assert [task.command for task in tasks] == [command] * 2
    files = [script, *(path for path in folder.rglob("*") if path.is_file())]
    assert all(storage.encode() not in path.read_bytes() for path in files)
    again = ServiceFleet(storage, folder, crew)  # of a service that was started again
    again.start()
    looks = count_calls(monkeypatch, ServiceFleet, "_tick")
    until(lambda: len(looks) >= 2)
    assert [path.name for path in tmp_path.glob("script*")] == ["script.sh"]
    with StudyStore(storage) as store:
        resume(store.engine, "taken", "ana")
        again.poke()
        until(lambda: (tmp_path / "script.sh.~1~").exists())
    again.stop()


def test_the_service_hands_a_study_to_kubernetes(storage: str, kubectl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "service"
    spec = handed_over(storage, folder, Crew("kubernetes", OPTIONS, workers=2))
    assert load_study_file(folder / "studies" / "1" / "study.toml").spec == spec
    (written,) = folder.rglob("taken.job.yaml")
    assert f"--namespace default apply -f {written}" in kubectl.read_text(encoding="utf-8").splitlines()
    made = yaml.safe_load(written.read_text(encoding="utf-8"))
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = "python -m rank_search.launch.worker /studies/1/study.toml --grace 30"
    assert container["command"] == command.split()
    assert {"name": "RANK_SEARCH_STORAGE_FILE", "value": "/run/secrets/rank-search/url"} in container["env"]
    assert {"secretName": "rank-search-database", "items": [{"key": "url", "path": "url"}]} in [
        volume.get("secret") for volume in pod["volumes"]
    ]
    assert storage not in written.read_text(encoding="utf-8")
