"""Factor banks at a URL: built by one, downloaded by all others, believed by their digest alone."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rank_search.errors import BankError
from rank_search.factors.bank import FactorBank, bank_path, open_bank, open_or_build
from rank_search.factors.remote import RemoteBanks
from rank_search.progress import Progress, Step
from tests.unit.test_bank import KEY, MADE, _factors, _never

NAME = bank_path(Path(), KEY).name


class Told(Progress):
    """Keeps what is said, and by how much steps advanced."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.advanced: dict[str, int] = {}

    def say(self, message: str) -> None:
        self.lines.append(message)

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        told = self

        class Counted:
            def advance(self, amount: int = 1, note: str = "") -> None:
                told.advanced[title] = told.advanced.get(title, 0) + amount

        yield Counted()


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of the test's own that does not exist yet."""
    return f"file://{tmp_path}/shared/banks" if request.param == "file" else f"memory://{uuid.uuid4().hex}/banks"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def _contents(url: str) -> dict[str, bytes]:
    files, root = fsspec.url_to_fs(url)
    return {path.rpartition("/")[2]: files.cat_file(path) for path in files.find(root)}


def _host(folder: Path, url: str, build: object = _factors, progress: Progress | None = None) -> FactorBank:
    remote = RemoteBanks(url, progress or Progress())
    return open_or_build(folder, KEY, build, MADE, remote=remote)  # type: ignore[arg-type]


def _assert_refused(folder: Path, url: str, message: str) -> None:
    with pytest.raises(BankError) as caught:
        _host(folder, url, _never)
    told = str(caught.value)
    assert message in told
    assert "\n" not in told
    assert [path for path in folder.rglob("*.*") if path.name not in {f"{Path(NAME).stem}.lock"}] == []


def test_one_host_builds_and_the_other_downloads_the_same_bytes(tmp_path: Path, url: str) -> None:
    first, second = Told(), Told()
    built = _host(tmp_path / "a", url, progress=first)
    found = _host(tmp_path / "b", f"{url}/", _never, second)
    assert found.path == bank_path(tmp_path / "b", KEY)
    assert found.path.read_bytes() == built.path.read_bytes()
    assert first.lines == ["uploading the factor bank (0 MiB)"]
    assert second.lines == ["downloading the factor bank (0 MiB)"]
    digest = hashlib.sha256(built.path.read_bytes()).hexdigest()
    content = f"{Path(NAME).stem}.{digest[:16]}.safetensors"
    there = _contents(url)
    assert there.keys() == {content, f"{NAME}.sha256", ".rank-search"}
    assert there[content] == built.path.read_bytes()
    assert there[f"{NAME}.sha256"] == f"{digest}  {content}\n".encode()
    third = Told()
    _host(tmp_path / "b", url, _never, third)  # which has it by now
    assert third.lines == []


def test_progress_is_told_in_mebibytes(tmp_path: Path, memory: str) -> None:
    told = Told()
    path = tmp_path / NAME
    path.write_bytes(bytes(11 * 2**20 + 5))
    remote = RemoteBanks(memory, told)
    remote.upload(path)
    assert remote.download(NAME, tmp_path / "again")
    assert told.lines == ["uploading the factor bank (11 MiB)", "downloading the factor bank (11 MiB)"]
    assert told.advanced == {"bank upload": 11, "bank download": 11}


@pytest.mark.parametrize("damage", ["one bit", "cut", "gone", "another's line"])
def test_a_damaged_upload_is_refused_until_it_is_deleted(tmp_path: Path, memory: str, damage: str) -> None:
    _host(tmp_path / "a", memory)
    files, root = fsspec.url_to_fs(memory)
    line = f"{root}/{NAME}.sha256"
    content = f"{root}/{files.cat_file(line).split()[1].decode()}"
    whole = files.cat_file(content)
    if damage == "one bit":
        files.pipe_file(content, whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        files.pipe_file(content, whole[:-1])
    elif damage == "gone":
        files.rm_file(content)
    else:
        files.pipe_file(line, b"0" * 64 + b"  ../../elsewhere\n")
    _assert_refused(tmp_path / "b", memory, f"; delete {NAME}.sha256 there and run again")
    files.rm_file(line)
    _host(tmp_path / "b", memory)
    _host(tmp_path / "c", memory, _never)


@pytest.mark.parametrize("left", [None, 0, 40])
def test_half_an_upload_counts_for_nothing(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    """No line, or its first ``left`` bytes: who has the bank uploads it once more, another one builds it."""
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", _raises(OSError("connection reset")))
        with pytest.raises(BankError, match=r"cannot be written: connection reset; check run.bank_url"):
            _host(tmp_path / "a", memory)
    assert open_bank(tmp_path / "a", KEY) is not None
    assert _contents(memory).keys() == {".rank-search"}
    told = Told()
    _host(tmp_path / "a", memory, _never, told)
    assert told.lines == ["uploading the factor bank (0 MiB)"]
    files, root = fsspec.url_to_fs(memory)
    line = f"{root}/{NAME}.sha256"
    if left is None:
        files.rm_file(line)
    else:
        files.pipe_file(line, files.cat_file(line)[:left])
    _host(tmp_path / "b", memory)
    _host(tmp_path / "c", memory, _never)


def test_of_two_who_upload_at_once_the_first_to_end_counts(tmp_path: Path, memory: str) -> None:
    """As when a builder that was taken for gone comes back; it built the same bank, but for rounding."""
    slow, quick = (tmp_path / host / NAME for host in ("slow", "quick"))
    for path, content in ((slow, b"a bank"), (quick, b"the bank")):
        path.parent.mkdir()
        path.write_bytes(content)
    remote = RemoteBanks(memory)

    class Overtaken(Told):
        def say(self, message: str) -> None:
            remote.upload(quick)

    RemoteBanks(memory, Overtaken()).upload(slow)
    assert remote.download(NAME, tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == b"the bank"
    assert len([name for name in _contents(memory) if name.endswith(".sha256")]) == 1


def test_workers_of_the_builders_folder_go_on_while_it_uploads(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploading, others_are_through = threading.Event(), threading.Event()
    put = MemoryFileSystem.put_file

    def slowly(*arguments: object, **options: object) -> None:
        uploading.set()
        assert others_are_through.wait(10)
        put(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", slowly)
    builder = threading.Thread(target=_host, args=(tmp_path, memory))
    builder.start()
    assert uploading.wait(10)
    _host(tmp_path, memory, _never)
    others_are_through.set()
    builder.join(10)
    assert f"{NAME}.sha256" in _contents(memory)


class DriversOwnError(Exception):
    """Of no kind that the project knows."""


def _raises(error: Exception) -> object:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Access Denied"),
            "cannot be read: [Errno 13] Access Denied; check run.bank_url, the cred",
        ),
        (DriversOwnError("no route\n to host"), "cannot be read: no route to host; check run.bank_url"),
        (TimeoutError(), "cannot be read: TimeoutError; check run.bank_url"),
        (DriversOwnError("GET https://u:secret@h/b?X-Sig=secret&k=secret: 403"), "GET https://…@h/b?… 403; check"),
    ],
)
def test_what_the_driver_raises_is_one_line_without_secrets(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", _raises(error))
    with pytest.raises(BankError) as caught:
        _host(tmp_path, memory, _never)
    assert str(caught.value).startswith(f"run.bank_url {memory} cannot be read: ")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_may_not_write_learns_it_before_anything_is_computed(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", _raises(PermissionError("Access Denied")))
    _assert_refused(tmp_path, memory, f"run.bank_url {memory} cannot be written: Access Denied; check run.bank_url")


def test_a_full_disk_is_told_as_such(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _host(tmp_path / "a", memory)
    monkeypatch.setattr(MemoryFileSystem, "get_file", _raises(OSError(28, "No space left on device")))
    _assert_refused(tmp_path / "b", memory, "No space left on device; free space")


@pytest.mark.parametrize(
    ("url", "reason"),
    [("nodriver://bucket", "pip install no-such-driver"), ("nothing://bucket", "Protocol not known: nothing")],
)
def test_a_missing_driver_is_one_line(tmp_path: Path, url: str, reason: str) -> None:
    fsspec.register_implementation(
        "nodriver", "no_such_driver.FileSystem", errtxt="pip install no-such-driver", clobber=True
    )
    _assert_refused(tmp_path, url, f"run.bank_url {url} cannot be opened: {reason}")
