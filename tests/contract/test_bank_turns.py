"""Workers of several hosts take turns at a factor bank, on a server database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rank_search.factors.bank import bank_path, open_bank, open_or_build
from rank_search.factors.remote import RemoteBanks
from rank_search.study.patience import Patience
from rank_search.study.turns import Turns
from tests.contract.conftest import BACKENDS
from tests.unit.test_bank import KEY
from tests.unit.test_bank import _factors as make_factors
from tests.waiting import LONG, until

on_a_server = pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)

_ONE_NAME = threading.Lock()
"""A host's name is the process's: of two threads that change it at once, one would put back the other's."""


def turns(storage: str, host: str, seconds: float = 60.0) -> Turns:
    with _ONE_NAME, pytest.MonkeyPatch.context() as patch:
        patch.setattr("rank_search.study.liveness.socket.gethostname", lambda: host)
        found = Turns.of(storage, seconds, Patience(60))
    assert found is not None
    return found


def at_once(host: Callable[[str], None]) -> None:
    """Three hosts do the same; each is given its name."""
    threads = [threading.Thread(target=host, args=(f"host{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)


def test_workers_of_one_host_need_no_turns() -> None:
    assert Turns.of("sqlite:///study.db", 60, Patience()) is None


@on_a_server
def test_hosts_build_a_bank_once(storage: str, tmp_path: Path) -> None:
    built: list[str] = []
    waited: list[str] = []

    def host(name: str) -> None:
        def build() -> object:
            built.append(name)
            until(lambda: len(waited) == 2)
            return make_factors()

        open_or_build(tmp_path, KEY, build, {}, lambda: waited.append(name), turns(storage, name))  # type: ignore[arg-type]

    at_once(host)
    assert len(built) == 1
    assert sorted(built + waited) == ["host0", "host1", "host2"]
    assert open_bank(tmp_path, KEY) is not None


@on_a_server
def test_hosts_without_a_shared_folder_build_a_bank_once(storage: str, tmp_path: Path) -> None:
    built: list[str] = []
    waited: list[str] = []
    begun, both_wait = threading.Barrier(3), threading.Event()

    def host(name: str) -> None:
        def build() -> object:
            built.append(name)
            assert both_wait.wait(30)
            return make_factors()

        def on_wait() -> None:
            waited.append(name)
            if len(waited) == 2:
                both_wait.set()

        remote = RemoteBanks(f"file://{tmp_path}/objects")
        begun.wait(10)
        open_or_build(tmp_path / name, KEY, build, {}, on_wait, turns(storage, name), remote)  # type: ignore[arg-type]

    at_once(host)
    assert len(built) == 1
    assert sorted(built + waited) == ["host0", "host1", "host2"]
    assert len({bank_path(tmp_path / f"host{number}", KEY).read_bytes() for number in range(3)}) == 1
    assert len(list((tmp_path / "objects").glob("*.safetensors"))) == 1


@on_a_server
def test_who_has_a_bank_does_not_wait_for_its_upload(storage: str, tmp_path: Path) -> None:
    open_or_build(tmp_path, KEY, make_factors, {})
    remote = RemoteBanks(f"file://{tmp_path}/objects")
    name = f"bank {KEY.digest[:24]} at {remote.identity}"
    with turns(storage, "uploading")(name, lambda: None, lambda: False):
        open_or_build(tmp_path, KEY, make_factors, {}, turn=turns(storage, "other"), remote=remote)
        assert not (tmp_path / "objects").exists()
    open_or_build(tmp_path, KEY, make_factors, {}, turn=turns(storage, "other"), remote=remote)
    assert len(list((tmp_path / "objects").glob("*.sha256"))) == 1


@on_a_server
def test_a_builder_that_falls_silent_loses_its_turn(storage: str, tmp_path: Path) -> None:
    silent = turns(storage, "silent", seconds=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rank_search.study.turns.Heartbeat.start", lambda _heartbeat: None)
        gone = silent(f"bank {KEY.digest[:24]} in {identity(tmp_path)}", lambda: None, lambda: False)
        gone.__enter__()
    waited: list[int] = []
    bank = open_or_build(tmp_path, KEY, make_factors, {}, lambda: waited.append(1), turns(storage, "next"))
    assert bank.path == bank_path(tmp_path, KEY)
    assert len(waited) == 1
    gone.__exit__(None, None, None)


def identity(folder: Path) -> str:
    from rank_search.factors.bank import _identity

    (folder / "banks").mkdir(exist_ok=True)
    return _identity(folder / "banks")
