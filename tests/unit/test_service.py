"""What the service answers, to whom, and how it keeps to its limits."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rank_search.errors import InputError, StudyFileError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.export.study_file import study_toml
from rank_search.ranks import RankMap
from rank_search.service import admission
from rank_search.service.limits import Buckets
from rank_search.service.sessions import Sessions
from rank_search.service.settings import Settings, is_loopback
from rank_search.service.tar import Tar
from rank_search.spec import StudyFile, load_study_file, parse_study
from rank_search.study import jobs, tokens
from rank_search.study.engine import storage_error
from rank_search.study.requests import Action, asked_for
from rank_search.study.store import StudyStore
from tests.contract.synthetic import make_allocator, make_facts, make_spec, open_study
from tests.data.service import BASE, MEASURED, WANTED, Served, served
from tests.waiting import until

ROOT = Path(__file__).parents[2]
_FILE = {"name": "new", "model": {"source": "org/model"}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("service")) as started:
        yield started


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Served]:
    """A service that a test may change."""
    with served(tmp_path) as started:
        yield started


def _get(service: Served, path: str, **headers: str) -> Any:
    return service.client.get(path, headers={**service.reading, **headers}).raise_for_status()


# What is told


def test_health_and_readiness_ask_for_no_token(service: Served) -> None:
    assert service.client.get("/v1/health").json()["status"] == "ok"
    assert service.client.get("/v1/ready").status_code == 200


def test_a_study_is_told_as_the_database_has_it(service: Served) -> None:
    with StudyStore(service.storage) as store:
        status, front = store.status("tiny"), store.front("tiny")
    told = _get(service, "/v1/studies/tiny").json()
    assert (told["state"], told["finished"], told["wanted"]) == ("idle", MEASURED, WANTED)
    assert (told["best_loss"], told["front"]) == (status.best_loss, len(front))
    assert told["file"]["name"] == "tiny"
    assert [study["name"] for study in _get(service, "/v1/studies").json()["studies"]] == ["tiny"]


def test_a_study_that_is_being_made_is_there_already(own: Served) -> None:
    """A worker stores the study first, and Optuna's study a moment later."""
    allocator = make_allocator()
    spec = make_spec("made")
    own.client.post("/v1/studies", json=json.loads(spec.model_dump_json()), headers=own.writing).raise_for_status()
    with StudyStore(own.storage) as store:
        store.add_study(spec, make_facts(allocator))
    told = _get(own, "/v1/studies/made").json()
    assert (told["finished"], told["dashboard"]) == (0, None)
    open_study(own.storage, "made").close()
    until(lambda: (_get(own, "/v1/studies/made").json()["dashboard"] or "").startswith("/dashboard/studies/"))


def test_trials_come_in_pages(service: Served) -> None:
    numbers, after = [], -1
    while True:
        page = _get(service, f"/v1/studies/tiny/trials?limit=3&after={after}").json()
        assert len(page["trials"]) <= 3
        numbers += [trial["number"] for trial in page["trials"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert numbers == list(range(MEASURED))


def test_a_front_is_the_same_as_json_and_csv_and_has_a_picture(service: Served) -> None:
    with StudyStore(service.storage) as store:
        front = store.front("tiny")
    points = _get(service, "/v1/studies/tiny/front").json()["points"]
    assert [(point["trial"], point["loss"], point["num_params"]) for point in points] == [
        (point.trial, point.loss, point.num_params) for point in front
    ]
    lines = _get(service, "/v1/studies/tiny/front.csv").text.splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == [point.trial for point in front]
    assert _get(service, "/v1/studies/tiny/front.png").content.startswith(b"\x89PNG")


def test_a_front_that_is_known_is_not_sent_again(service: Served) -> None:
    tag = _get(service, "/v1/studies/tiny/front").headers["etag"]
    again = service.client.get("/v1/studies/tiny/front", headers={**service.reading, "if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")


def test_a_rank_map_is_chosen_as_the_library_chooses(service: Served) -> None:
    with StudyStore(service.storage) as store:
        front = store.front("tiny")
    choices = {
        "knee=true": front.knee(), "kept=0.6": front.at_most_kept(0.6), f"trial={front[0].trial}": front[0],
        f"max_params={front[1].num_params}": front[1], f"max_loss={front[1].loss!r}": front[1],
    }  # fmt: skip
    for query, point in choices.items():
        file = RankMapFile.model_validate_json(_get(service, f"/v1/studies/tiny/rank-map?{query}").content)
        assert (file.study and file.study.trial, file.rank_map) == (point.trial, point.rank_map)


def test_prometheus_is_told_of_trials_fronts_and_requests(service: Served) -> None:
    text = _get(service, "/v1/metrics").text
    assert f'rank_search_trials{{state="complete",study="tiny"}} {float(MEASURED)}' in text
    assert "rank_search_front_points" in text
    assert re.search(
        r'rank_search_http_requests_total\{method="GET",route="/v1/metrics".* ', _get(service, "/v1/metrics").text
    )


def test_every_route_documents_its_errors_and_needs_a_token(service: Served) -> None:
    document = _get(service, "/v1/openapi.json").json()
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) >= 24
    for path, method, operation in operations:
        errors = {code: told for code, told in operation["responses"].items() if code >= "400"}
        assert {"403", "429"} <= set(errors), (path, method)
        for told in errors.values():
            assert told["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
        is_public = path in {"/v1/health", "/v1/ready"} or (path, method) == ("/v1/session", "post")
        address = path.replace("{name}", "tiny").replace("{number}", "1")
        refused = service.client.request(method, address)
        assert (refused.status_code == 401) is not is_public, (path, method)
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert document["components"]["schemas"]["StudySpec"]["properties"]["search"]


@pytest.mark.parametrize("path", ["/v1/studies", "/service/", "/", "/api/studies", "/v1/none"])
def test_every_answer_has_the_headers_of_security(service: Served, path: str) -> None:
    headers = service.client.get(path, headers=service.reading).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert ("unsafe" in headers["content-security-policy"]) is not path.startswith(("/v1", "/service"))


def test_artifacts_are_not_for_pages_elsewhere(service: Served) -> None:
    from rank_search.dashboard.content import show

    with StudyStore(service.storage) as store:
        show(store, "tiny")
        trial = store.front("tiny")[0].trial
    answer = _get(service, f"/artifacts/1/{trial + 1}/1-{trial:x}-0")
    assert RankMapFile.model_validate_json(answer.content).study
    assert "access-control-allow-origin" not in answer.headers


# Submitting and steering


def test_a_study_is_submitted_as_toml_or_json(own: Served) -> None:
    spec = make_spec("from-toml", trials=5)
    toml = study_toml(spec).replace("models/tiny", "org/tiny")
    for content, kind in ((toml, "application/toml"), (json.dumps(_FILE), "application/json; charset=utf-8")):
        answer = own.client.post("/v1/studies", content=content, headers={**own.writing, "content-type": kind})
        assert answer.status_code == 201, answer.text
        assert (answer.json()["state"], answer.json()["asked_by"]) == ("submitted", "writer")
    names = [study["name"] for study in _get(own, "/v1/studies").json()["studies"]]
    assert names == ["from-toml", "new", "tiny"]
    assert own.client.get("/v1/studies/new/front", headers=own.reading).status_code == 409  # nothing is prepared yet


def test_a_study_may_name_what_is_in_the_services_folders(own: Served) -> None:
    (own.root / "text.txt").write_text("text", encoding="utf-8")
    file = {
        **_FILE,
        "data": {"train": str(own.root / "text.txt"), "validation": str(own.root / "sub" / ".." / "text.txt")},
    }
    assert own.client.post("/v1/studies", json=file, headers=own.writing).status_code == 201


def test_no_more_studies_than_allowed_are_taken_on(tmp_path: Path) -> None:
    with served(tmp_path, most_studies=2) as service:
        codes = [
            service.client.post("/v1/studies", json={**_FILE, "name": name}, headers=service.writing).status_code
            for name in ("one", "two")
        ]
    assert codes == [201, 409]


def test_what_is_asked_of_a_study_is_told(own: Served) -> None:
    for verb, state in (("pause", "paused"), ("stop", "stopped"), ("resume", "idle")):
        assert own.client.post(f"/v1/studies/tiny/{verb}", headers=own.writing).status_code == 200
        assert _get(own, "/v1/studies/tiny").json()["state"] == state


def test_a_rank_map_is_queued_and_counted(own: Served) -> None:
    layers = _get(own, "/v1/studies/tiny/layers").json()["layers"]
    ranks = {layer["name"]: layer["most_rank"] for layer in layers}
    answer = own.client.post("/v1/studies/tiny/rank-maps", json={"ranks": ranks}, headers=own.writing)
    source = f"by hand 1 {RankMap(ranks).digest[:8]}"
    assert (answer.status_code, answer.json()) == (201, {"number": 1, "source": source})
    assert _get(own, "/v1/studies/tiny").json()["queued"] == 1


def test_a_job_waits_is_cancelled_and_has_no_checkpoint(own: Served) -> None:
    body = {"kind": "apply", "study": "tiny", "trial": 0}
    job = own.client.post("/v1/jobs", json=body, headers=own.writing)
    assert (job.status_code, job.json()["state"], job.json()["asked_by"]) == (201, "waiting", "writer")
    assert own.client.get("/v1/jobs/1/checkpoint", headers=own.reading).status_code == 409
    assert own.client.delete("/v1/jobs/1", headers=own.writing).json()["state"] == "cancelled"
    assert own.client.delete("/v1/jobs/1", headers=own.writing).status_code == 409


def test_a_checkpoint_comes_as_a_tar_file_while_it_is_there(own: Served) -> None:
    own.client.post("/v1/jobs", json={"kind": "apply", "study": "tiny", "trial": 0}, headers=own.writing)
    with StudyStore(own.storage) as store:
        claimed = jobs.claim_job(store.engine, "host:1:x")
        assert claimed is not None
        claimed.checkpoint.mkdir(parents=True)
        (claimed.checkpoint / "model.bin").write_bytes(b"x" * 1000)
        jobs.finish_job(store.engine, claimed, {"validation": {"loss": 1.0}})
    answer = _get(own, "/v1/jobs/1/checkpoint")
    assert len(answer.content) == int(answer.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert tar.getnames() == ["tiny-trial-0/model.bin"]
    (claimed.checkpoint / "model.bin").unlink()
    assert own.client.get("/v1/jobs/1/checkpoint", headers=own.reading).status_code == 410


# Who may


def test_a_browser_logs_in_writes_and_logs_out(own: Served) -> None:
    client = own.client
    opened = client.post("/v1/session", json={"token": own.write})
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(opened.headers["set-cookie"].split("; "))
    assert own.write not in opened.headers["set-cookie"]
    csrf = client.get("/v1/session").json()["csrf"]
    assert client.get("/api/studies").status_code == 200  # the dashboard, behind the same login
    assert client.post("/v1/studies/tiny/pause").status_code == 403
    assert client.post("/v1/studies/tiny/pause", headers={"x-csrf-token": csrf}).status_code == 200
    assert client.delete("/v1/session", headers={"x-csrf-token": csrf}).status_code == 204
    assert client.get("/v1/session").status_code == 401


def test_a_session_ends_with_its_token(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_search.service.access.REMEMBERED_SECONDS", 0.0)
    own.client.post("/v1/session", json={"token": own.read})
    assert own.client.get("/v1/studies").status_code == 200
    with StudyStore(own.storage) as store:
        tokens.revoke_token(store.engine, "reader")
    assert own.client.get("/v1/studies").status_code == 401


def test_a_token_that_is_revoked_changes_nothing_from_then_on(own: Served) -> None:
    """What looks on, does so for two seconds at most; what would change something is asked about anew."""
    assert own.client.post("/v1/studies/tiny/resume", headers=own.writing).status_code == 200
    with StudyStore(own.storage) as store:
        tokens.revoke_token(store.engine, "writer")
    assert own.client.post("/v1/studies/tiny/pause", headers=own.writing).status_code == 401
    with StudyStore(own.storage) as store:
        assert asked_for(store.engine, "tiny") is Action.RUN


def test_a_browser_that_is_not_logged_in_is_sent_to_the_page(service: Served) -> None:
    answer = service.client.get("/dashboard", headers={"accept": "text/html"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/service/")


def test_sessions_outlive_a_restart_and_their_time_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cookie = Sessions.with_key_in(tmp_path).open(7)
    again = Sessions.with_key_in(tmp_path)
    session = again.check(cookie)
    assert session is not None
    assert session.token == 7
    assert (tmp_path / "session.key").stat().st_mode & 0o777 == 0o600
    assert Sessions(b"x" * 32).check(cookie) is None
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert again.check(cookie) is None


def test_wrong_tokens_are_soon_refused_unseen(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        wrong = {"authorization": f"Bearer rs_1_{'A' * 43}"}
        codes = [service.client.get("/v1/studies", headers=wrong).status_code for _ in range(12)]
    assert codes[:10] == [401] * 10
    assert codes[10:] == [429] * 2


def test_who_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    with served(tmp_path, rate=0.5, burst=3) as service:
        answers = [service.client.get("/v1/session", headers=service.reading) for _ in range(4)]
        other = service.client.get("/v1/session", headers=service.writing)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert int(answers[-1].headers["retry-after"]) in {1, 2}
    assert other.status_code == 200  # each has limits of their own


def test_a_bucket_fills_again_and_forgets_who_was_not_seen() -> None:
    now = 0.0
    buckets = Buckets(2.0, 2, lambda: now)
    assert [buckets.take("a") for _ in range(3)] == [0.0, 0.0, 0.5]
    now = 0.5
    assert buckets.take("a") == 0.0
    for number in range(20_000):
        buckets.take(f"{number}")
    assert len(buckets._left) == 10_000


def test_without_a_login_only_names_of_this_host_are_answered(tmp_path: Path) -> None:
    with served(tmp_path, auth=False) as service:
        assert service.client.get("/v1/session").json() == {
            "name": "local", "role": "write", "auth": False, "csrf": None, "dashboard": True,
        }  # fmt: skip
        rebound = service.client.get("/v1/studies", headers={"host": "evil.example:8000"})
        assert rebound.status_code == 403
        for header in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert service.client.post("/v1/studies/tiny/stop", headers=header).status_code == 403
        assert service.client.post("/v1/studies/tiny/stop", headers={"origin": BASE}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_demands_tokens(host: str) -> None:
    with pytest.raises(InputError, match="so requests need tokens"):
        Settings("sqlite:///x.db", Path("x"), host=host)
    assert Settings("sqlite:///x.db", Path("x"), host=host, auth=True).auth
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert not Settings("sqlite:///x.db", Path("x"), host=host).auth


def test_cookies_are_for_https_alone_behind_a_proxy_that_speaks_it(tmp_path: Path) -> None:
    with served(tmp_path, https=True) as service:
        opened = service.client.post("/v1/session", json={"token": service.read})
    assert "Secure" in opened.headers["set-cookie"]
    assert opened.headers["strict-transport-security"]


def test_an_outage_is_told_without_the_databases_address(
    own: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from sqlalchemy.engine import make_url

    url = make_url("postgresql://me:hush@db.example/s")

    def out(*_: object) -> None:
        raise storage_error(url, OSError("connection to db.example refused for hush"))

    monkeypatch.setattr("rank_search.service.reading.mark_of", out)
    answer = own.client.get("/v1/studies/tiny", headers=own.reading)
    assert (answer.status_code, answer.json()) == (503, {"error": "the database cannot be reached; try again later"})
    told = capsys.readouterr().err
    assert "db.example" in told
    assert "hush" not in told


def test_a_defect_is_told_to_the_operator_alone(own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("rank_search.service.studies.study_lines", broken)
    client = TestClient(own.client.app, base_url=BASE, raise_server_exceptions=False)
    answer = client.get("/v1/studies", headers=own.reading)
    assert (answer.status_code, answer.json()) == (500, {"error": "a defect of the service; its log tells more"})


def test_tokens_are_kept_as_digests(own: Served) -> None:
    raw = Path(own.storage.removeprefix("sqlite:///")).read_bytes()
    assert own.write.rpartition("_")[2].encode() not in raw


# Parts


def test_a_study_file_is_the_same_after_toml(tmp_path: Path) -> None:
    tables = {
        "name": "x", "model": {"source": 'ab"c\\d\x7f\té…𝄞'}, "targets": {"frozen": {"*.q": 3, 'a"b': "dense"}},
        "search": {"min_kept": 1e-5, "interest": [0.25, 0.5], "fidelities": ["sliced", "tuned"]},
        "finetune": {"clip": 1e22},
    }  # fmt: skip
    spec = parse_study(tables, where="test")
    path = tmp_path / "study.toml"
    path.write_text(study_toml(spec), encoding="utf-8")
    assert load_study_file(path) == StudyFile(spec=spec, folder=tmp_path)


def test_a_relative_name_that_is_a_path_where_the_service_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    admission.check_place("model.source", "org/model", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyFileError, match="give it absolute"):
        admission.check_place("model.source", "org/model", [])


def test_a_loop_of_links_is_in_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StudyFileError, match="outside of"):
        admission.check_place("model.source", str(tmp_path / "a"), [tmp_path / "other"])


def test_a_tar_file_is_made_in_pieces_and_reads_back(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    contents = {"empty": b"", "sub/one": b"1" * 512, f"{'long' * 40}-ü": b"2" * 600_000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("/etc/passwd")
    tar = Tar.of(tmp_path, "top")
    pieces = list(tar.pieces())
    assert sum(map(len, pieces)) == tar.size
    assert max(map(len, pieces)) <= 2**18
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as read:
        found = {member.name: read.extractfile(member).read() for member in read.getmembers()}  # type: ignore[union-attr]
    assert found == {f"top/{name}": content for name, content in contents.items()}


def test_a_file_that_becomes_shorter_ends_the_tar_file_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    tar = Tar.of(tmp_path, "top")
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(OSError, match="shorter"):
        list(tar.pieces())


def test_the_service_loads_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys\nimport rank_search.service as package\n"
        "import rank_search.launch.fleet\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
