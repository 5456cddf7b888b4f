"""Results that the database does not take: kept on disk, told again, and what becomes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rank_search.errors import OutOfPatienceError, StorageError, UnavailableError
from rank_search.progress import Preempted
from rank_search.study import patience as waiting
from rank_search.study.consistency import check_database
from rank_search.study.patience import Patience
from rank_search.study.records import State
from rank_search.study.store import StudyStore
from rank_search.study.telling import Telling
from tests.contract.conftest import ON_ONE, ON_TWO
from tests.contract.other_hosts import elsewhere, let_leases_run_out, silence, states
from tests.contract.synthetic import measure, open_study, run_trials

pytestmark = pytest.mark.usefixtures("hosts_may_share_a_file")
LADDER = {"ladder": [0.8, 0.5]}


def away(*_: object, **__: object) -> None:
    raise UnavailableError("connection refused")


def away_at_first(patch: pytest.MonkeyPatch, times: int, look: Callable[[], object] = lambda: None) -> None:
    """Have the database be away so often when a result is to be stored; ``look`` is called before every attempt."""
    stored, attempts = StudyStore.complete_trial, itertools.count()

    def attempt(*arguments: Any, **options: Any) -> object:
        look()
        return away() if next(attempts) < times else stored(*arguments, **options)

    patch.setattr(StudyStore, "complete_trial", attempt)


@ON_TWO
def test_a_result_that_is_not_taken_is_spooled_and_told_again(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST_PAUSE", 0.01)
    said: list[str] = []
    study = open_study(storage, spool=tmp_path / "spool", patience=Patience(600, said.append), **LADDER)
    proposal = study.ask()
    spooled: list[int] = []
    with monkeypatch.context() as patch:
        away_at_first(patch, 3, lambda: spooled.append(len(list((tmp_path / "spool").glob("*")))))
        study.tell(proposal, measure(proposal.rank_map))
    assert spooled == [0, 1, 1, 1]
    assert list((tmp_path / "spool").iterdir()) == []
    assert "waiting for the database" in said[0]
    assert "the database is back" in said[1]
    assert len(said) == 2
    study.tell(proposal, measure(proposal.rank_map))  # telling twice is no error
    study.close()
    assert states(storage) == [State.COMPLETE]
    assert check_database(storage) == ()


@ON_ONE
def test_a_file_that_cannot_be_deleted_is_told_once_and_in_nobodys_way(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the folder belongs to another user."""
    monkeypatch.setattr(waiting, "FIRST_PAUSE", 0.01)
    said: list[str] = []
    folder = tmp_path / "spool"
    study = open_study(storage, spool=folder, patience=Patience(600, said.append), **LADDER)
    proposal = study.ask()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".json":
            raise PermissionError(13, "Permission denied")
        delete(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        delete = Path.unlink
        away_at_first(patch, 1)
        patch.setattr(Path, "unlink", refuse)
        study.tell(proposal, measure(proposal.rank_map))
        study.close()
        (kept,) = folder.iterdir()
        next_study = open_study(storage, spool=folder, patience=Patience(600, said.append), **LADDER)
        next_study.reconcile()
        next_study.close()
    assert states(storage) == [State.COMPLETE]
    assert check_database(storage) == ()
    needless = f"file {kept} is not needed any more; delete it (Permission denied)"
    assert said.count(needless) == 2  # once a worker
    open_study(storage, spool=folder, patience=Patience(600, said.append), **LADDER).close()
    assert list(folder.iterdir()) == []


@ON_TWO
@pytest.mark.parametrize("error", [UnavailableError("connection refused"), StorageError("permission denied")])
def test_whoever_opens_the_study_next_tells_what_was_spooled(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: StorageError
) -> None:
    study = open_study(storage, spool=tmp_path, patience=Patience(0.05), **LADDER)
    proposal, measured = study.ask(), measure
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise error

        patch.setattr(StudyStore, "complete_trial", refuse)
        with pytest.raises((OutOfPatienceError, StorageError), match=str(error)):
            study.tell(proposal, measured(proposal.rank_map, loss=2.25))
        study.requeue(proposal)  # as after an interrupt: what is measured already is not measured again
    study.close()
    assert states(storage) == [State.RUNNING]
    (file,) = tmp_path.glob("tiny.0.*.json")
    copy = file.read_text(encoding="utf-8")
    (tmp_path / "tiny.1.other.json").write_text(copy[: len(copy) // 2], encoding="utf-8")  # half a file is left alone
    said: list[str] = []
    open_study(storage, spool=tmp_path, patience=Patience(1, said.append), **LADDER).close()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["tiny.1.other.json"]
    damaged = f"file {tmp_path}/tiny.1.other.json holds no result that could be stored: it is no JSON; delete it"
    assert sorted(said) == [damaged, "stored the result of trial 0, which was kept on disk"]
    with StudyStore(storage) as store:
        (trial,) = store.trials("tiny")
        assert trial.measurement == measure(proposal.rank_map, loss=2.25)
        assert store.front("tiny") == store.recompute_front("tiny")
    assert check_database(storage) == ()


@ON_TWO
def test_a_spooled_result_of_a_trial_that_is_with_another_worker_is_dropped(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(storage, spool=tmp_path, **LADDER)
    proposal = study.ask()

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "complete_trial", away)
        with pytest.raises(UnavailableError):
            study.tell(proposal, measure(proposal.rank_map))
    study.close()
    with StudyStore(storage) as store:
        store.requeue_trial("tiny", proposal.number, "its worker was silent")
    said: list[str] = []
    study = open_study(storage, spool=tmp_path, patience=Patience(1, said.append), **LADDER)
    study.close()
    assert list(tmp_path.glob("*.json")) == []
    assert "dropped a result that was kept on disk: trial 0 of study 'tiny' was given back" in said[0]
    assert states(storage) == [State.REQUEUED]


@pytest.mark.parametrize("backend", ["sqlite"])  # the spool is the same on every one
def test_a_worker_that_is_interrupted_when_the_database_is_back_stores_its_result(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = tmp_path / "spool"
    study = open_study(storage, spool=folder, patience=Patience(600, said.append), **LADDER)
    proposal = study.ask()
    with monkeypatch.context() as patch:

        def come_back(_seconds: float) -> None:
            patch.undo()
            raise Preempted

        patch.setattr(StudyStore, "complete_trial", away)
        patch.setattr(waiting.time, "sleep", come_back)
        with pytest.raises(Preempted):
            study.tell(proposal, measure(proposal.rank_map))
    study.requeue(proposal)
    study.close()
    assert list(tmp_path.glob("*.json")) == []
    assert said[1:] == ["stored the result of trial 0, which was kept on disk"]
    assert states(storage) == [State.COMPLETE]
    assert check_database(storage) == ()


@pytest.mark.parametrize("backend", ["sqlite"])  # the spool is the same on every one
def test_a_spooled_result_is_stored_before_its_trial_is_taken_from_a_worker_that_is_gone(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(storage, spool=tmp_path, patience=Patience(600), **LADDER)
    with elsewhere():
        gone = open_study(storage, spool=tmp_path, **LADDER)
    proposal = gone.ask()

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "complete_trial", away)
        with pytest.raises(UnavailableError):
            gone.tell(proposal, measure(proposal.rank_map))
    silence(gone)
    let_leases_run_out(storage, seconds=601)
    study.reconcile()
    assert states(storage) == [State.COMPLETE]
    study.close()
    gone.close()
    assert check_database(storage) == ()


@ON_TWO
def test_what_was_stored_before_an_interrupt_is_told_to_optuna_and_not_proposed_again(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(storage, **LADDER)
    complete, pruned = study.ask(), study.ask()

    def interrupt(*_: object, **__: object) -> None:
        raise Preempted

    with monkeypatch.context() as patch:
        patch.setattr(Telling, "complete", interrupt)
        with pytest.raises(Preempted):
            study.tell(complete, measure(complete.rank_map))
    with StudyStore(storage) as store:
        store.prune_trial("tiny", pruned.number, 0, measure(pruned.rank_map))
    for ended in (complete, pruned):
        study.requeue(ended)
    later = run_trials(study, 3)
    study.close()
    assert not {complete.rank_map, pruned.rank_map} & {proposal.rank_map for proposal in later}
    assert states(storage) == [State.COMPLETE, State.PRUNED, *[State.COMPLETE] * 3]
    assert check_database(storage) == ()


@ON_TWO
def test_a_spooled_result_of_another_database_is_left_alone(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elsewhere():
        other = open_study(f"sqlite:///{tmp_path}/other.db", spool=tmp_path / "spool", **LADDER)
    proposal = other.ask()

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "complete_trial", away)
        with pytest.raises(UnavailableError):
            other.tell(proposal, measure(proposal.rank_map))
    other.close()
    study = open_study(storage, spool=tmp_path / "spool", **LADDER)
    study.ask()
    study.close()
    open_study(storage, spool=tmp_path / "spool", **LADDER).close()
    assert len(list((tmp_path / "spool").glob("*.json"))) == 1
    assert states(storage) == [State.RUNNING]
