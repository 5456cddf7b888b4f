"""What the service is sent with ill intent: each is refused in one clear line, changes nothing, and learns nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rank_search.service.guard import Guard
from rank_search.service.sessions import COOKIE
from tests.data.service import Served, served

SECRET = "what nobody outside may read"
_A43 = "A" * 43
JSON, TOML = {"content-type": "application/json"}, {"content-type": "application/toml"}
STUDIES, JOBS, MAPS = "/v1/studies", "/v1/jobs", "/v1/studies/tiny/rank-maps"


class Sent(NamedTuple):
    """A request, by whom, and which statuses refuse it. ``{...}`` in a body stands for what the fixture knows."""

    what: str
    method: str
    path: str
    status: int
    body: bytes | str | None = None
    headers: dict[str, str | bytes] = {}  # noqa: RUF012
    who: str | None = "writer"


def _study(**changes: Any) -> str:
    tables: dict[str, Any] = {"name": "new", "model": {"source": "org/model"}}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        if name:
            tables.setdefault(table, {})[name] = value
        else:
            tables[table] = value
    return json.dumps(tables)


def _submit(what: str, status: int, body: bytes | str, headers: dict[str, str | bytes] = JSON) -> Sent:  # type: ignore[assignment]
    return Sent(what, "POST", STUDIES, status, body, headers)


def _toml(what: str, status: int, body: bytes | str) -> Sent:
    return _submit(what, status, body, TOML)  # type: ignore[arg-type]


def _get(what: str, status: int, path: str) -> Sent:
    return Sent(what, "GET", path, status, who="reader")


def _post(what: str, status: int, path: str, body: Any) -> Sent:
    return Sent(what, "POST", path, status, body if isinstance(body, str) else json.dumps(body), JSON)  # type: ignore[arg-type]


def _nobody(what: str, status: int, headers: dict[str, str | bytes], path: str = STUDIES, method: str = "GET") -> Sent:
    return Sent(what, method, path, status, None, headers, None)


WHO = [
    _nobody("no token", 401, {}),
    _nobody("no token to write", 401, {}, "/v1/studies/tiny/stop", "POST"),
    _nobody("another scheme", 401, {"authorization": "Basic cm9vdDpyb290"}),
    _nobody("an empty token", 401, {"authorization": "Bearer "}),
    _nobody("garbage for a token", 401, {"authorization": "Bearer ../../etc/passwd"}),
    _nobody("a made-up token", 401, {"authorization": f"Bearer rs_1_{_A43}"}),
    _nobody("a token of a number that is not there", 401, {"authorization": f"Bearer rs_999999_{_A43}"}),
    _nobody("a token of a number beyond the database's", 401, {"authorization": f"Bearer rs_{'9' * 30}_{_A43}"}),
    _nobody("SQL for a token", 401, {"authorization": "Bearer rs_1_' OR '1'='1"}),
    _nobody("a token that is not ASCII", 401, {"authorization": "Bearer rs_1_ü".encode()}),
    _nobody("a long token", 401, {"authorization": f"Bearer rs_1_{'A' * 5000}"}),
    _nobody("a token that was revoked", 401, {"authorization": "Bearer {revoked}"}),
    _nobody("a token with more behind it", 401, {"authorization": "Bearer {write}x"}),
    _nobody("two tokens in one header", 401, {"authorization": "Bearer {write}, Bearer {write}"}),
    _nobody("a token as a cookie", 401, {"cookie": f"{COOKIE}={{write}}"}),
    _nobody("garbage for a session", 401, {"cookie": f"{COOKIE}=;;;==\"\\'"}),
    _nobody("a made-up session", 401, {"cookie": f"{COOKIE}=2.9999999999.{'A' * 16}.{'0' * 64}"}),
    _nobody("a session whose token was changed", 401, {"cookie": f"{COOKIE}={{session_of_other}}"}),
    _nobody("a session that never ends", 401, {"cookie": f"{COOKIE}={{session_for_ever}}"}),
    _nobody("a session without CSRF token", 403, {"cookie": f"{COOKIE}={{session}}"}, "/v1/studies/tiny/stop", "POST"),
    _nobody("a wrong CSRF token", 403, {"cookie": f"{COOKIE}={{session}}", "x-csrf-token": "0" * 64},
            "/v1/studies/tiny/stop", "POST"),
    _nobody("a CSRF token that is not ASCII", 403, {"cookie": f"{COOKIE}={{session}}", "x-csrf-token": "ü".encode()},
            "/v1/studies/tiny/stop", "POST"),
    _nobody("a right session sent by a page elsewhere", 403,
            {"cookie": f"{COOKIE}={{session}}", "x-csrf-token": "{csrf}", "origin": "https://evil.example"},
            "/v1/studies/tiny/stop", "POST"),
    _nobody("a right session from a null origin", 403,
            {"cookie": f"{COOKIE}={{session}}", "x-csrf-token": "{csrf}", "origin": "null"},
            "/v1/studies/tiny/stop", "POST"),
    _nobody("a right session sent across sites", 403,
            {"cookie": f"{COOKIE}={{session}}", "x-csrf-token": "{csrf}", "sec-fetch-site": "cross-site"},
            "/v1/studies/tiny/stop", "POST"),
    Sent("a login with a wrong token", "POST", "/v1/session", 401, json.dumps({"token": f"rs_1_{_A43}"}), JSON, None),  # type: ignore[arg-type]
    Sent("a login with a number", "POST", "/v1/session", 422, '{"token": 5}', JSON, None),  # type: ignore[arg-type]
    Sent("a login with more than a token", "POST", "/v1/session", 422, '{"token": "x", "role": "write"}', JSON, None),  # type: ignore[arg-type]
    Sent("a login that is no JSON", "POST", "/v1/session", 422, "token=x", JSON, None),  # type: ignore[arg-type]
    Sent("a login from a page elsewhere", "POST", "/v1/session", 403, '{"token": "{write}"}',
         {**JSON, "origin": "https://evil.example"}, None),
    *(
        Sent(f"a reader who would {method} {path}", method, path, 403, body, JSON, "reader")  # type: ignore[arg-type]
        for method, path, body in (
            ("POST", STUDIES, _study()), ("POST", "/v1/studies/tiny/pause", None),
            ("POST", "/v1/studies/tiny/resume", None), ("POST", "/v1/studies/tiny/stop", None),
            ("POST", MAPS, '{"ranks": {}}'), ("POST", JOBS, '{"kind": "apply", "study": "tiny", "trial": 0}'),
            ("DELETE", "/v1/jobs/1", None),
        )
    ),
]  # fmt: skip

DASHBOARD = [
    _nobody("the dashboard without a login", 401, {}, "/api/studies"),
    _nobody("an artifact without a login", 401, {}, "/artifacts/1/1/1-0-0"),
    Sent("deleting a study in the dashboard", "DELETE", "/api/studies/1", 405),
    Sent(
        "making a study in the dashboard", "POST", "/api/studies", 405, '{"study_name": "x", "directions": [0]}', JSON
    ),  # type: ignore[arg-type]
    Sent("renaming a study in the dashboard", "POST", "/api/studies/1/rename", 405, '{"study_name": "x"}', JSON),  # type: ignore[arg-type]
    Sent("writing a note in the dashboard", "PUT", "/api/studies/1/note", 405, '{"body": "x", "version": 9}', JSON),  # type: ignore[arg-type]
    Sent("telling a trial in the dashboard", "POST", "/api/trials/1/tell", 405, '{"state": "complete"}', JSON),  # type: ignore[arg-type]
    Sent("deleting below the API's prefix", "DELETE", "/v1/../api/studies/1", 405),
    Sent("a method of its own", "PURGE", "/api/studies/1", 405),
    _get("an artifact by a path", 404, "/artifacts/1/1/..%2f..%2f..%2fetc%2fpasswd"),
    _get("a static file by a path", 404, "/static/..%2f..%2f..%2f..%2fetc%2fpasswd"),
]

PATHS = [
    _get("a study by a path", 404, "/v1/studies/..%2f..%2fetc%2fpasswd"),
    _get("a study of dots", 422, "/v1/studies/%2e%2e%2e"),
    _get("SQL for a study", 422, "/v1/studies/tiny'%20OR%201=1--"),
    _get("a zero byte in a study", 422, "/v1/studies/tiny%00"),
    _get("a header in a study", 422, "/v1/studies/tiny%0d%0aSet-Cookie:x=1/front.csv"),
    _get("a study's name of a line and a newline", 422, "/v1/studies/tiny%0a"),
    _get("a long study", 422, f"/v1/studies/{'x' * 5000}"),
    _get("a study that is not there", 404, "/v1/studies/nothing/front"),
    _get("job zero", 422, "/v1/jobs/0"),
    _get("a job beyond the database's numbers", 422, f"/v1/jobs/{2**70}"),
    _get("a job by a word", 422, "/v1/jobs/1e3"),
    _get("a checkpoint of no job", 404, "/v1/jobs/77/checkpoint"),
    _get("a file beside the page", 404, "/service/..%2f..%2fapp.py"),
    _get("a file above the page", 404, "/service/%2e%2e/app.py"),
    _get("a page of ours that is not there", 404, "/v1/admin"),
]

QUERIES = [
    *(_get(f"a rank map by {query}", 422, f"/v1/studies/tiny/rank-map?{query}") for query in (
        "kept=nan", "kept=inf", "kept=-1", "kept=0", "kept=1.5", "kept=1e999", "kept=;DROP TABLE studies",
        "max_loss=nan", "max_loss=inf", "max_loss=-2", "max_params=0", f"max_params={10**30}", "max_params=1.5",
        "trial=-1", f"trial={10**20}", "trial=nan", "knee=maybe", "", "knee=true&trial=0", "kept=0.5&max_loss=3",
    )),
    _get("a budget that nothing meets", 404, "/v1/studies/tiny/rank-map?max_params=1"),
    _get("a trial that is not there", 404, "/v1/studies/tiny/rank-map?trial=4000"),
    _get("a page of no trials", 422, "/v1/studies/tiny/trials?limit=0"),
    _get("a page of all trials", 422, "/v1/studies/tiny/trials?limit=1000000000"),
    _get("trials after less than nothing", 422, "/v1/studies/tiny/trials?after=-9"),
    _get("trials after infinity", 422, "/v1/studies/tiny/trials?after=Infinity"),
]  # fmt: skip

FILES = [
    _toml("no TOML", 422, "name = = 'x'"),
    _toml("TOML that is not UTF-8", 422, b"name = '\xff\xfe'"),
    _toml("TOML arrays as deep as they go", 422, "a = " + "[" * 30_000),
    _toml("TOML tables as deep as they go", 422, "a = " + "{a=" * 10_000),
    _toml("a TOML key of many parts", 422, ".".join(["a"] * 20_000) + " = 1"),
    _toml("many TOML tables of many parts", 422, "\n".join(f"[{'.'.join(['a'] * 60)}.b{i}]" for i in range(400))),
    _toml("a whole number of thousands of digits in TOML", 422, f"name = 'x'\n[search]\ntrials = {'9' * 6000}"),
    _toml("a date in TOML", 422, "name = 2026-11-25\n[model]\nsource = 'a/b'"),
    _toml("infinity in TOML", 422, "name = 'x'\n[model]\nsource = 'a/b'\n[finetune]\nlearning_rate = inf"),
    _toml("a larger file than study files are", 413, "#" * 70_000),
    _submit("a body larger than any may be", 413, "x" * (2**20 + 1)),
    _submit("no JSON", 422, "{"),
    _submit("an empty body", 422, ""),
    _submit("a JSON array", 422, "[]"),
    _submit("JSON that is a word", 422, '"x"'),
    _submit("JSON objects as deep as they go", 422, '{"a":' * 10_000),
    _submit("JSON arrays as deep as they go", 422, "[" * 60_000),
    _submit("JSON's NaN", 422, _study().replace('"new"', "NaN")),
    _submit("a number beyond all floats", 422, _study(finetune__clip="N").replace('"N"', "1e999")),
    _submit("a whole number of thousands of digits", 422, _study(search__trials="N").replace('"N"', "9" * 6000)),
    _submit("half a character", 422, _study(name="\ud800")),
    _submit("no content type", 415, _study(), {}),
    _submit("a form", 415, "name=x", {"content-type": "application/x-www-form-urlencoded"}),
    _submit("plain text, which pages elsewhere may send", 415, _study(), {"content-type": "text/plain"}),
    _submit("a length that is none", 413, _study(), {**JSON, "content-length": "1e3"}),
    *(_submit(f"a study called {name!r}", 422, _study(name=name)) for name in (
        "../x", "a/b", "a\\b", ".hidden", "", "x" * 101, "a b", "a\nb", "a\r\nSet-Cookie: x=1", "a\0b",
        "x'; DROP TABLE t;--", "naïve", "<script>alert(1)</script>", "{{7*7}}", "$(id)",
    )),
    _submit("a study that is there", 409, _study(name="tiny")),
    _submit("no model", 422, '{"name": "new"}'),
    _submit("an unknown table", 422, _study(storage__url="sqlite:////etc/passwd")),
    _submit("a database", 422, _study(storage="postgresql://root:secret@db/x")),
    _submit("a database among the run's keys", 422, _study(run__storage="sqlite:////tmp/x.db")),
    _submit("a working folder", 422, _study(run__work_dir="/tmp")),
    _submit("a working folder above", 422, _study(run__work_dir="../../..")),
    _submit("a place for factor banks", 422, _study(run__bank_url="s3://bucket/folder")),
    _submit("a place for factor banks on the disk", 422, _study(run__bank_url="file:///tmp")),
    _submit("a model's own code", 422, _study(model__trust_remote_code=True)),
    _submit("a metric's own code", 422, _study(validation__metrics=["org/x"], validation__trust_remote_code=True)),
    _submit("a metric by a path", 422, _study(validation__metrics=["../../evil"])),
    *(_submit(f"{key} = {place!r}", 422, _study(**{key: place}))
      for key in ("model__source", "data__train", "data__validation", "data__test")
      for place in (
          "/etc/passwd", "../../../etc/passwd", "~/.ssh/id_rsa", "file:///etc/passwd", "http://169.254.169.254/latest",
          "{root}/../secret.txt", "{root}/link", "a\0b",
      )),
    _submit("the whole disk for a text", 422, _study(data__train="/")),
    _submit("a budget below nothing", 422, _study(search__min_kept=-0.5)),
    _submit("a text for a number", 422, _study(search__trials="40")),
    _submit("a number for a text", 422, _study(model__source=5)),
    _submit("less than no trials", 422, _study(search__trials=-1)),
    _submit("more trials than there are numbers", 422, _study(search__trials=2**60)),
    _submit("a device by a path", 422, _study(run__device="cuda:0;rm -rf /")),
]  # fmt: skip

MAPS_AND_JOBS = [
    _post("a rank map of a layer that is not there", 422, MAPS, {"ranks": {"../../x": 1}}),
    _post("rank zero", 422, MAPS, {"ranks": {"block.0.attn": 0}}),
    _post("a rank above all", 422, MAPS, {"ranks": {"block.0.attn": 10**12}}),
    _post("a rank above what pays", 422, MAPS, {"ranks": {"block.0.attn": 12}}),
    _post("half a rank", 422, MAPS, {"ranks": {"block.0.attn": 1.5}}),
    _post("a rank that is true", 422, MAPS, {"ranks": {"block.0.attn": True}}),
    _post("a rank that is a word", 422, MAPS, {"ranks": {"block.0.attn": "3"}}),
    _post("a rank that is no number", 422, MAPS, '{"ranks": {"block.0.attn": NaN}}'),
    _post("ranks that are a list", 422, MAPS, {"ranks": [1, 2]}),
    _post("a rank map that says who measured it", 422, MAPS, {"ranks": {}, "loss": 0.0}),
    _post("a rank map deeper than it goes", 400, MAPS, '{"ranks":' * 5000),
    _post("a rank map for no study", 404, "/v1/studies/nothing/rank-maps", {"ranks": {}}),
    _post("a job of no kind", 422, JOBS, {"kind": "shell", "study": "tiny", "trial": 0}),
    _post("a job without a kind", 422, JOBS, {"study": "tiny", "trial": 0}),
    _post("a job for no study", 404, JOBS, {"kind": "apply", "study": "nothing", "trial": 0}),
    _post("a job for a path", 422, JOBS, {"kind": "apply", "study": "../../etc", "trial": 0}),
    _post("a job for no trial", 404, JOBS, {"kind": "apply", "study": "tiny", "trial": 4000}),
    _post("a job for less than no trial", 422, JOBS, {"kind": "apply", "study": "tiny", "trial": -1}),
    _post("a job that names a folder", 422, JOBS, {"kind": "apply", "study": "tiny", "trial": 0, "out": "/etc"}),
    _post("a job of a type that is none", 422, JOBS, {"kind": "apply", "study": "tiny", "trial": 0, "dtype": "int4"}),
    _post("a job of no steps", 422, JOBS, {"kind": "confirm", "study": "tiny", "trial": 0, "steps": 0}),
    _post("a job of endless steps", 422, JOBS, {"kind": "confirm", "study": "tiny", "trial": 0, "steps": 10**12}),
    _post("a job that trusts a model", 422, JOBS,
          {"kind": "apply", "study": "tiny", "trial": 0, "trust_remote_code": True}),
    Sent("cancelling a job that is not there", "DELETE", "/v1/jobs/77", 404),
]  # fmt: skip

ALL = [*WHO, *DASHBOARD, *PATHS, *QUERIES, *FILES, *MAPS_AND_JOBS]


class Target(NamedTuple):
    """A service, and what stands for ``{...}``."""

    service: Served
    known: dict[str, str]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret.txt").write_text(SECRET, encoding="utf-8")
    with served(folder) as service:
        (service.root / "link").symlink_to(folder / "secret.txt")
        opened = service.client.post("/v1/session", json={"token": service.write})
        session = opened.cookies[COOKIE]
        service.client.cookies.clear()
        number, end, nonce, seal = session.split(".")
        known = {
            "root": str(service.root), "write": service.write, "revoked": service.revoked, "session": session,
            "csrf": opened.json()["csrf"], "session_of_other": f"1.{end}.{nonce}.{seal}",
            "session_for_ever": f"{number}.999999999999.{nonce}.{seal}",
        }  # fmt: skip
        yield Target(service, known)


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 60
    assert len({sent.what for sent in ALL}) == len(ALL)


@pytest.mark.parametrize("sent", ALL, ids=[sent.what[:60].encode("ascii", "replace").decode() for sent in ALL])
def test_a_hostile_request_is_refused_changes_nothing_and_learns_nothing(sent: Sent, target: Target) -> None:
    service = target.service
    _forgive(service.client.app)
    before = _state(service)
    headers = {name: _filled(value, target.known) for name, value in sent.headers.items()}
    if sent.who is not None:
        headers["authorization"] = f"Bearer {service.read if sent.who == 'reader' else service.write}"
    body = _filled(sent.body, target.known) if isinstance(sent.body, str | bytes) else None
    answer = service.client.request(sent.method, sent.path, content=body, headers=headers, follow_redirects=False)
    assert answer.status_code == sent.status, answer.text
    told = answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert error
    assert "\n" not in error
    assert len(error) <= 300
    assert not [leak for leak in (SECRET, "root:x:0", "Traceback", "sqlite:", "s.db", service.write) if leak in told]
    assert "set-cookie" not in answer.headers
    assert _state(service) == before


def _filled(value: str | bytes, known: dict[str, str]) -> str | bytes:
    if isinstance(value, str):
        for name, text in known.items():
            value = value.replace(f"{{{name}}}", text)
        return value.encode("utf-8", "surrogatepass") if not value.isascii() else value
    return value


def _forgive(app: Any) -> None:
    """Forget the wrong tokens of other cases."""
    assert isinstance(app.app, Guard)
    app.app._failures._left.clear()


def _state(service: Served) -> tuple[list[str], list[Path]]:
    with sqlite3.connect(service.storage.removeprefix("sqlite:///")) as connection:
        rows = list(connection.iterdump())
    connection.close()
    return rows, sorted(service.folder.rglob("*"))
