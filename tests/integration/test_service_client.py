"""`rank_search.Client` against the service on a port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rank_search
from rank_search import Client
from rank_search.errors import CheckpointError, InputError, ServiceError
from rank_search.study import jobs
from rank_search.study.store import StudyStore
from tests.contract.synthetic import make_spec, open_study, run_trials
from tests.data.service import MEASURED, WANTED, Served, on_port, served
from tests.waiting import until


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("client")) as started:
        yield started


@pytest.fixture(scope="module")
def address(service: Served) -> Iterator[str]:
    with on_port(service) as url:
        yield url


@pytest.fixture
def client(service: Served, address: str) -> Iterator[Client]:
    with Client(address, service.write) as opened:
        yield opened


def test_a_study_reads_as_from_the_library(client: Client, service: Served) -> None:
    study, front = client.study("tiny"), rank_search.front("tiny", storage=service.storage)
    assert (study.status().wanted, [one.name for one in client.studies()][-1]) == (WANTED, "tiny")
    assert [(point.trial, point.loss) for point in study.front().points] == [(p.trial, p.loss) for p in front]
    assert [trial.number for trial in study.trials()][:MEASURED] == list(range(MEASURED))
    assert study.rank_map(knee=True) == rank_search.export("tiny", storage=service.storage, knee=True)
    assert study.front_csv().startswith("trial,source,")
    assert study.front_png().startswith(b"\x89PNG")
    assert "<table" in study._repr_html_()
    assert "<table" in study.front()._repr_html_()
    assert sum(worker.measured for worker in study.workers()) >= MEASURED


def test_a_refusal_is_the_services_line(client: Client, address: str) -> None:
    with pytest.raises(ServiceError, match="there is no study 'nothing'") as caught:
        client.study("nothing").status()
    assert caught.value.status == 404
    with Client(address, "rs_1_wrong") as other, pytest.raises(ServiceError, match="the token is not valid"):
        other.studies()
    with pytest.raises(ServiceError, match=r"there is a study 'tiny' already"):
        client.submit(make_spec("tiny"))
    with pytest.raises(ServiceError):
        client.study("../../etc/passwd").status()


def test_a_service_that_is_not_there_is_one_line() -> None:
    with Client("http://127.0.0.1:9", timeout=2) as client, pytest.raises(ServiceError, match="is it running"):
        client.studies()
    with pytest.raises(InputError, match="begins with http"):
        Client("127.0.0.1:8000")


def test_a_study_is_submitted_steered_and_its_rank_maps_queued(client: Client) -> None:
    study = client.submit({"name": "by-client", "model": {"source": "org/model"}, "search": {"trials": 3}})
    assert study.status().state == "submitted"
    study.pause()
    assert study.status().state == "paused"
    study.stop()
    assert study.status().state == "stopped"
    study.resume()
    assert study.status().state == "submitted"
    tiny = client.study("tiny")
    assert tiny.queue({layer.name: layer.most_rank or 1 for layer in tiny.layers()}).startswith("by hand ")


def test_events_tell_of_new_trials(client: Client, service: Served) -> None:
    def search() -> None:
        study = open_study(service.storage, ladder=[0.9, 0.5], sampler="random", trials=WANTED)
        run_trials(study, 1)
        study.close()

    thread = threading.Thread(target=search)
    seen: set[int] = set()
    for event in client.study("tiny").events():
        if event.kind == "trials":
            seen |= {trial["number"] for trial in event.data}
        if event.kind == "workers" and not thread.ident:
            thread.start()
        if MEASURED in seen:
            break
    thread.join()
    until(lambda: "rank_search_event_streams 0.0" in client._ask("GET", "/v1/metrics").text)  # it was noticed


def test_a_checkpoint_is_waited_for_and_unpacked_whole(client: Client, service: Served, tmp_path: Path) -> None:
    job = client.study("tiny").apply(trial=0)
    with pytest.raises(ServiceError, match=r"still waiting after 0 s"):
        job.wait(timeout=0)
    with StudyStore(service.storage) as store:
        claimed = jobs.claim_job(store.engine, "host:1:x")
        assert claimed is not None
        (claimed.checkpoint / "sub").mkdir(parents=True)
        (claimed.checkpoint / "config.json").write_text("{}", encoding="utf-8")
        (claimed.checkpoint / "sub" / "weights").write_bytes(bytes(range(256)) * 4000)
        jobs.finish_job(store.engine, claimed, {"validation": {"loss": 1.25}})
    assert job.wait().status().result == {"validation": {"loss": 1.25}}
    out = job.download(tmp_path / "out")
    assert (out / "sub" / "weights").read_bytes() == bytes(range(256)) * 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        job.download(out)
    assert [one.number for one in client.jobs("tiny")] == [job.number]


def test_a_job_that_fails_says_why(client: Client, service: Served) -> None:
    job = client.study("tiny").confirm(trial=0, steps=5)
    with StudyStore(service.storage) as store:
        claimed = jobs.claim_job(store.engine, "host:1:x")
        assert claimed is not None
        assert claimed.options["steps"] == 5
        jobs.fail_job(store.engine, claimed, "no GPU")
    with pytest.raises(ServiceError, match=f"job {job.number} failed: no GPU"):
        job.wait()
    cancelled: Any = client.study("tiny").apply(trial=0)
    cancelled.cancel()
    with pytest.raises(ServiceError, match="cancelled"):
        cancelled.wait()
