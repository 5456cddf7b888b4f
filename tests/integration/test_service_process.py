"""`rank-search serve` as a process of its own, with workers that really search."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rank_search.export.rank_map_file import RankMapFile
from rank_search.spec import load_study_file
from tests import waiting
from tests.integration.conftest import MakeStudy, rank_search

TRIALS = 4


@contextmanager
def service(folder: Path, *options: str) -> Iterator[tuple[httpx2.Client, subprocess.Popen[str]]]:
    """The command on any free port, in a folder."""
    command = [sys.executable, "-m", "rank_search", "serve", "--port", "0", "--folder", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder.parent
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("service at http://127.0.0.1:"), process.stderr.read()
        with httpx2.Client(base_url=line.split()[-1].removesuffix("/service/"), timeout=30) as client:
            yield client, process
    finally:
        process.terminate()
        print(process.communicate(timeout=60)[1])  # pytest shows it where a test fails


def until(client: httpx2.Client, path: str, is_so: Callable[[Any], bool], pause: float = 0.3) -> Any:
    """What is answered once it is so."""
    told: list[Any] = []

    def look() -> bool:
        told.append(client.get(path).raise_for_status().json())
        return is_so(told[-1])

    waiting.until(look, pause)
    return told[-1]


@pytest.fixture(scope="module")
def submitted(make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that the service is open to, and a study file with its paths in it."""
    root = tmp_path_factory.mktemp("root")
    path = make_study(root, search__trials=TRIALS, data__test=None)
    file = load_study_file(path).spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    file["data"]["train"] = str(root / "text.txt")
    return root, file


def test_a_study_is_submitted_searched_watched_applied_and_fetched(
    submitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, file = submitted
    options = ["--root", str(root), "--root", str(Path(file["model"]["source"])), "--workers", "1"]
    with service(tmp_path / "service", *options) as (client, _):
        assert client.post("/v1/studies", json=file).raise_for_status().json()["state"] == "submitted"
        kinds: list[str] = []
        trials: set[int] = set()
        with client.stream("GET", "/v1/studies/tiny/events", timeout=120) as stream:
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    kinds.append(line.removeprefix("event: "))
                elif line.startswith("data: ") and kinds[-1] == "trials":
                    trials |= {trial["number"] for trial in json.loads(line.removeprefix("data: "))}
                if trials >= set(range(TRIALS)):  # told study, front, trials, workers, in this order
                    break
        assert kinds[:4] == ["study", "front", "trials", "workers"]
        told = until(client, "/v1/studies/tiny", lambda told: told["state"] == "ended")
        assert (told["finished"], told["wanted"]) == (TRIALS, TRIALS)
        front = client.get("/v1/studies/tiny/front").json()
        trial = front["points"][0]["trial"]
        RankMapFile.model_validate_json(client.get("/v1/studies/tiny/rank-map", params={"trial": trial}).content)
        job = client.post("/v1/jobs", json={"kind": "apply", "study": "tiny", "trial": trial}).raise_for_status().json()
        done = until(client, f"/v1/jobs/{job['number']}", lambda job: job["state"] in {"done", "failed"})
        assert done["state"] == "done", done["reason"]
        assert done["result"]["validation"]["loss"] == pytest.approx(front["points"][0]["loss"], abs=1e-4)
        content = client.get(f"/v1/jobs/{job['number']}/checkpoint").raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert {f"tiny-trial-{trial}/{name}" for name in ("config.json", "model.safetensors", "rank_map.json")} <= set(
            tar.getnames()
        )


@pytest.mark.slow
def test_workers_of_a_ray_cluster_search_what_was_submitted(
    submitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Two studies at a time: the one that ends first does not take Ray away from the other."""
    root, file = submitted
    options = [
        "--root", str(root), "--root", str(Path(file["model"]["source"])), "--workers", "1", "--at-once", "2",
        "--launcher", "ray", "--option", "address=local", "--option", "cpus=0.5",
    ]  # fmt: skip
    with service(tmp_path / "service", *options) as (client, _):
        for name, trials in (("short", 2), ("long", 6)):
            wanted = {**file, "name": name, "search": {**file["search"], "trials": trials}}
            client.post("/v1/studies", json=wanted).raise_for_status()
        for name, trials in (("short", 2), ("long", 6)):
            told = until(client, f"/v1/studies/{name}", lambda told: told["state"] in {"ended", "given up"})
            assert (told["state"], told["finished"]) == ("ended", trials), told["reason"]


def test_a_killed_service_goes_on_where_it_was(submitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, file = submitted
    options = ["--root", str(root), "--root", str(Path(file["model"]["source"])), "--workers", "1"]
    with service(tmp_path / "service", *options) as (client, process):
        client.post("/v1/studies", json={**file, "name": "again"}).raise_for_status()
        until(client, "/v1/studies/again", lambda told: told["finished"] >= 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with service(tmp_path / "service", *options) as (client, _):
        told = until(client, "/v1/studies/again", lambda told: told["state"] == "ended")
        assert told["finished"] == TRIALS
        numbers = [trial["number"] for trial in client.get("/v1/studies/again/trials").json()["trials"]]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] <= len(numbers)  # but for one that the killed worker had claimed and not begun
    checked = rank_search("db", "check", "--storage", f"sqlite:///{tmp_path}/service/studies.db")
    assert checked.code == 0, checked.out


@pytest.mark.parametrize("seconds", [0.05, 0.5])
def test_a_service_killed_in_mid_submission_has_each_study_wholly_or_not_at_all(tmp_path: Path, seconds: float) -> None:
    answered: list[str] = []

    def submit(client: httpx2.Client, worker: int) -> None:
        with contextlib.suppress(httpx2.TransportError):
            for number in range(1000):
                name = f"s{worker}-{number}"
                answer = client.post("/v1/studies", json={"name": name, "model": {"source": "org/model"}})
                if answer.status_code == 201:
                    answered.append(name)
                client.post(f"/v1/studies/{name}/stop")

    options = ["--launcher", "none", "--rate", "100000", "--studies", "5000"]
    with service(tmp_path / "service", *options) as (client, process), ThreadPoolExecutor(3) as pool:
        running = [pool.submit(submit, client, worker) for worker in range(3)]
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        for one in running:
            one.result()
    with service(tmp_path / "service", *options) as (client, _):
        studies = {study["name"]: study for study in client.get("/v1/studies").json()["studies"]}
    assert set(answered) <= set(studies)
    assert {study["state"] for study in studies.values()} <= {"submitted", "stopped"}
    with sqlite3.connect(tmp_path / "service" / "studies.db") as connection:
        columns = {"submissions": "name, state", "requests": "study, action"}
        rows = {
            table: dict(connection.execute(f"SELECT {told} FROM rank_search_{table}").fetchall())
            for table, told in columns.items()
        }
    connection.close()
    assert set(rows["submissions"]) == set(rows["requests"]) == set(studies)
    assert set(rows["requests"].values()) <= {"run", "stop"}


def test_a_service_killed_in_mid_export_does_it_anew_and_leaves_no_half_checkpoint(
    submitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, file = submitted
    options = ["--root", str(root), "--root", str(Path(file["model"]["source"])), "--workers", "1"]
    with service(tmp_path / "service", *options) as (client, process):
        client.post("/v1/studies", json={**file, "name": "killed"}).raise_for_status()
        until(client, "/v1/studies/killed", lambda told: told["state"] == "ended")
        body = {"kind": "confirm", "study": "killed", "trial": 0, "steps": 2, "form": "dense"}
        client.post("/v1/jobs", json=body).raise_for_status()
        until(client, "/v1/jobs/1", lambda job: job["state"] == "running")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with service(tmp_path / "service", *options) as (client, _):
        job = until(client, "/v1/jobs/1", lambda job: job["state"] in {"done", "failed"})
        assert job["state"] == "done", job["reason"]
        assert set(job["result"]) == {"validation"}  # the study names no test text
        assert client.get("/v1/jobs/1/checkpoint").status_code == 200
    whole = {"config.json", "model.safetensors", "rank_map.json"}
    for checkpoint in (tmp_path / "service" / "jobs" / "1").glob("attempt-*/checkpoint"):
        assert whole <= {path.name for path in checkpoint.iterdir()}


def test_an_address_for_others_needs_a_token_first(tmp_path: Path) -> None:
    folder = tmp_path / "service"
    refused = rank_search("serve", "--host", "0.0.0.0", "--folder", folder)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "rank-search token create" in refused.err
    made = rank_search("token", "create", "ci", "--role", "write", "--folder", folder)
    assert made.code == 0
    token = made.out.strip()
    with service(folder, "--auth", "--launcher", "none") as (client, _):
        assert client.get("/v1/studies").status_code == 401
        headers = {"authorization": f"Bearer {token}"}
        assert client.get("/v1/studies", headers=headers).json() == {"studies": []}
        assert rank_search("token", "revoke", "ci", "--folder", folder).code == 0
        time.sleep(2.1)  # a token that was right counts as right for two seconds
        assert client.get("/v1/studies", headers=headers).status_code == 401
    listed = rank_search("token", "list", "--folder", folder)
    assert "ci  write" in listed.out
    assert "revoked" in listed.out
    assert token not in listed.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--launcher", "mesos"], "--launcher must be one of"),
        (["--root", "/does/not/exist"], "is no folder"),
        (["--launcher", "kubernetes"], "an SQLite database is for one"),
    ],
)
def test_wrong_options_are_one_clear_line(tmp_path: Path, options: list[str], told: str) -> None:
    refused = rank_search("serve", "--folder", tmp_path / "service", *options)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert told in refused.err


def test_a_study_by_hand_is_paused_stopped_and_resumed_from_the_command_line(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study(tmp_path, search__trials=2)
    assert rank_search("run", study).code == 0
    assert rank_search("stop", study).code == 0
    more = make_study(tmp_path, search__trials=4)
    assert rank_search("run", more).code == 0
    assert json.loads(rank_search("status", more, "--json").out)["finished"] == 2
    assert rank_search("resume", more).code == 0
    assert rank_search("run", more).code == 0
    assert json.loads(rank_search("status", more, "--json").out)["finished"] == 4
    refused = rank_search("pause", "nothing", "--storage", f"sqlite:///{tmp_path}/tiny.db")
    assert (refused.code, refused.err.count("\n")) == (2, 1)


def test_a_study_pauses_resumes_and_stops_while_its_workers_search(
    submitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, file = submitted
    options = ["--root", str(root), "--root", str(Path(file["model"]["source"])), "--workers", "1"]
    with service(tmp_path / "service", *options) as (client, _):
        client.post("/v1/studies", json={**file, "search": {**file["search"], "trials": 2000}}).raise_for_status()
        until(client, "/v1/studies/tiny", lambda told: told["finished"] >= 2)
        client.post("/v1/studies/tiny/pause").raise_for_status()
        paused = until(client, "/v1/studies/tiny", lambda told: told["state"] == "paused")
        time.sleep(1.5)
        assert client.get("/v1/studies/tiny").json()["finished"] == paused["finished"]
        layers = client.get("/v1/studies/tiny/layers").json()["layers"]
        ranks = {layer["name"]: layer["least_rank"] for layer in layers}
        source = client.post("/v1/studies/tiny/rank-maps", json={"ranks": ranks}).raise_for_status().json()["source"]
        client.post("/v1/studies/tiny/resume").raise_for_status()
        until(client, "/v1/studies/tiny", lambda told: told["finished"] >= paused["finished"] + 2)
        client.post("/v1/studies/tiny/stop").raise_for_status()
        until(client, "/v1/studies/tiny", lambda told: told["state"] == "stopped")
        trials = client.get("/v1/studies/tiny/trials", params={"limit": 1000}).json()["trials"]
        (mine,) = [trial for trial in trials if trial["source"] == source]
        assert mine["state"] == "complete"
        assert mine["number"] <= paused["finished"] + 2  # before anything new was sampled


def test_a_study_that_cannot_run_says_why_and_makes_room(
    submitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, file = submitted
    with service(tmp_path / "service", "--root", str(root), "--workers", "1") as (client, _):
        missing = {**file, "name": "missing", "model": {"source": str(root / "nothing")}}
        one_gpu = {**missing, "name": "one-gpu", "run": {"device": "cuda:0"}}
        for study in (missing, one_gpu):
            client.post("/v1/studies", json=study).raise_for_status()
        for name, why in (("missing", "no such folder or file"), ("one-gpu", "would put all workers on one GPU")):
            told = until(client, f"/v1/studies/{name}", lambda told: told["state"] == "given up")
            assert why in told["reason"]
        client.post("/v1/studies/one-gpu/resume").raise_for_status()
        until(client, "/v1/studies/one-gpu", lambda told: told["state"] == "given up")  # tried anew
