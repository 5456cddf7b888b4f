"""The worker's loop on a real study: what fails, what is interrupted, what is resumed, and applying what it found."""

from __future__ import annotations

import gc
import json
import mmap
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch

import rank_search as rs
from rank_search.api import facts_of
from rank_search.compress.checkpoint import load_checkpoint
from rank_search.errors import (
    CheckpointError,
    DeviceLostError,
    NonFiniteLossError,
    RankMapError,
    StorageError,
    TrialError,
)
from rank_search.export.rank_map_file import RankMapFile
from rank_search.front import Front
from rank_search.launch.exits import SYSTEM, exit_code
from rank_search.launch.worker import main as worker_main
from rank_search.measurement import Measurement
from rank_search.preparing import Prepared, prepare
from rank_search.progress import Progress
from rank_search.ranks import RankMap
from rank_search.score import score
from rank_search.spec import load_study_file
from rank_search.study.records import State
from rank_search.study.recovery import MAX_REQUEUES
from rank_search.study.study import Proposal, Study
from rank_search.task import CAUSAL_LM, Examples
from rank_search.trial import Evaluator
from rank_search.worker import SAME_FAILURES, Outcome, work
from tests.conftest import StudyFactory

Failing = Callable[[int, RankMap], BaseException | None]

TWO_FACTOR = {"storage": "two-factor"}
"""The form in which a model is trained and scored: its checkpoint repeats the measurement to the last digit."""


class Failure(Evaluator):
    """An evaluator whose n-th trial fails with what ``error`` returns."""

    def __init__(self, prepared: Prepared, error: Failing) -> None:
        super().__init__(prepared)
        self._error = error
        self.measured: list[RankMap] = []

    def measure(self, rank_map: RankMap, progress: Progress = Progress()) -> Measurement:  # noqa: B008
        self.measured.append(rank_map)
        error = self._error(len(self.measured), rank_map)
        if error is not None:
            raise error
        return super().measure(rank_map, progress)


@pytest.fixture(scope="module")
def prepared(write_study: StudyFactory, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """One tiny study, prepared once; every test opens it in a database of its own."""
    return prepare(load_study_file(write_study(tmp_path_factory.mktemp("study"), finetune={"steps": 1})))


@contextmanager
def _open(prepared: Prepared, folder: Path) -> Iterator[Study]:
    study = Study.open(prepared.spec, f"sqlite:///{folder}/study.db", prepared.allocator, facts_of(prepared))
    try:
        yield study
    finally:
        study.close()


def _view(folder: Path) -> rs.StudyView:
    return rs.view("tiny", storage=f"sqlite:///{folder}/study.db")


def test_it_measures_until_the_study_has_its_trials(prepared: Prepared, tmp_path: Path) -> None:
    outcomes: list[Outcome] = []
    with _open(prepared, tmp_path) as study:
        work(study, Evaluator(prepared), 5, on_outcome=outcomes.append)
        front = study.front()
    assert len(outcomes) == 5
    # The ladder first: the closed form at each of its kept fractions, then uniform ranks.
    allocator = prepared.allocator
    expected = [rule(kept) for rule in (allocator.closed_form, allocator.uniform) for kept in (0.8, 0.5)]
    assert [outcome.proposal.rank_map for outcome in outcomes[:4]] == expected
    shown = _view(tmp_path)
    assert [trial.state for trial in shown.trials] == [State.COMPLETE] * 5
    assert [trial.rank_map for trial in shown.trials] == [outcome.proposal.rank_map for outcome in outcomes]
    assert [trial.measurement for trial in shown.trials] == [outcome.measurement for outcome in outcomes]
    assert front == shown.front == Front.of(shown.points)


def test_after_its_first_trial_collections_of_garbage_leave_the_model_alone(prepared: Prepared, tmp_path: Path) -> None:
    frozen: list[int] = []
    with _open(prepared, tmp_path) as study:
        work(study, Evaluator(prepared), 3, on_outcome=lambda _outcome: frozen.append(gc.get_freeze_count()))
    assert [count > 1000 for count in frozen] == [False, True, True]
    assert gc.get_freeze_count() == 0


def test_a_failing_rank_map_fails_its_trial_with_the_reason_and_the_study_goes_on(
    prepared: Prepared, tmp_path: Path
) -> None:
    reason = "validation loss is nan (3 of 8 blocks are not finite)"
    evaluator = Failure(prepared, lambda n, _: NonFiniteLossError(reason) if n == 2 else None)
    outcomes: list[Outcome] = []
    with _open(prepared, tmp_path) as study:
        work(study, evaluator, 4, on_outcome=outcomes.append)
    assert [outcome.reason for outcome in outcomes] == [None, reason, None, None]
    shown = _view(tmp_path)
    failed = [trial for trial in shown.trials if trial.state is State.FAILED]
    assert [(trial.number, trial.reason, trial.measurement) for trial in failed] == [(1, reason, None)]
    assert len(shown.points) == 3


def test_a_full_gpu_fails_the_trial_with_a_way_out(prepared: Prepared, tmp_path: Path) -> None:
    evaluator = Failure(prepared, lambda n, _: torch.OutOfMemoryError("CUDA\nout of memory") if n == 1 else None)
    outcomes: list[Outcome] = []
    with _open(prepared, tmp_path) as study:
        work(study, evaluator, 2, on_outcome=outcomes.append)
    assert outcomes[0].reason == "out of GPU memory; lower finetune.batch_blocks or run.score_batch_blocks"


def test_a_host_without_memory_fails_the_trial_and_a_worker_without_any_says_so_in_a_line(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: list[BaseException] = []
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for take in (lambda: torch.empty(2**34, dtype=torch.uint8), lambda: bytearray(2**34), lambda: mmap.mmap(-1, 2**34)):
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, limits[1]))  # ulimit -v
        try:
            take()
        except (MemoryError, RuntimeError, OSError) as error:
            refused.append(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    assert [type(error) for error in refused] == [RuntimeError, MemoryError, OSError]
    outcomes: list[Outcome] = []
    with _open(prepared, tmp_path) as study:
        work(study, Failure(prepared, lambda n, _: refused[0] if n == 1 else None), 2, on_outcome=outcomes.append)
    assert outcomes[0].reason == "out of memory; lower finetune.batch_blocks or run.score_batch_blocks"
    for error in refused:
        with monkeypatch.context() as patch:
            patch.setattr("rank_search.api.run", Mock(side_effect=error))
            patch.setattr("rank_search.launch.worker.QUIET", {})
            assert worker_main([str(prepared.study.folder / "study.toml")]) == SYSTEM
        assert re.fullmatch(r"rank-search: error: out of memory .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might"),
              RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")]
)  # fmt: skip
def test_a_lost_gpu_ends_the_process_and_its_trial_is_proposed_again(
    prepared: Prepared, tmp_path: Path, error: RuntimeError
) -> None:
    evaluator = Failure(prepared, lambda n, _: error if n == 2 else None)
    with (
        _open(prepared, tmp_path) as study,
        pytest.raises(DeviceLostError, match=r"^trial 1: the GPU failed under it \(CUDA error: .*another process"),
    ):
        work(study, evaluator, 4)
    assert len(evaluator.measured) == 2  # not once more in this process
    assert exit_code(DeviceLostError("x")) == SYSTEM
    assert [trial.state for trial in _view(tmp_path).trials] == [State.COMPLETE, State.REQUEUED]
    healthy = Failure(prepared, lambda n, _: None)
    with _open(prepared, tmp_path) as study:
        work(study, healthy, 4)
    assert evaluator.measured[1] in healthy.measured


def test_a_trial_under_which_gpus_fail_again_and_again_fails(prepared: Prepared, tmp_path: Path) -> None:
    bad: list[RankMap] = []

    def error(_: int, rank_map: RankMap) -> BaseException | None:
        bad.append(rank_map)
        return torch.AcceleratorError("CUDA error: an illegal memory access") if rank_map == bad[0] else None

    for _ in range(MAX_REQUEUES + 1):
        with _open(prepared, tmp_path) as study, pytest.raises(DeviceLostError):
            work(study, Failure(prepared, error), 20)
    with _open(prepared, tmp_path) as study:
        study.reconcile()
    tried = [trial for trial in _view(tmp_path).trials if trial.rank_map == bad[0]]
    assert [trial.state for trial in tried] == [State.REQUEUED] * MAX_REQUEUES + [State.FAILED]
    assert "GPU failed under it" in (tried[-1].reason or "")


def test_a_trial_that_is_lost_is_no_failure_and_the_worker_goes_on(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Outcome] = []
    tell = Study.tell

    def lose(study: Study, proposal: Proposal, measurement: Measurement, rung: int = 0) -> State:
        if not outcomes:
            study.requeue(proposal)  # as another worker would that finds its lease run out
        return tell(study, proposal, measurement, rung)

    monkeypatch.setattr(Study, "tell", lose)
    with _open(prepared, tmp_path) as study:
        work(study, Evaluator(prepared), 4, on_outcome=outcomes.append)
    assert [outcome.state for outcome in outcomes] == [State.REQUEUED] + [State.COMPLETE] * 4
    assert [trial.state for trial in _view(tmp_path).trials] == [State.REQUEUED] + [State.COMPLETE] * 4


def test_a_database_that_refuses_is_no_failure_of_the_trial(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> State:
        raise StorageError("permission denied")

    with _open(prepared, tmp_path) as study, monkeypatch.context() as patch:
        patch.setattr(Study, "tell", refuse)
        with pytest.raises(StorageError, match="permission denied"):
            work(study, Evaluator(prepared), 4)
    assert [trial.state for trial in _view(tmp_path).trials] == [State.RUNNING]


def test_equal_failures_in_a_row_stop_it(prepared: Prepared, tmp_path: Path) -> None:
    evaluator = Failure(prepared, lambda n, _: NonFiniteLossError("always") if n > 1 else None)
    with (
        _open(prepared, tmp_path) as study,
        pytest.raises(TrialError, match=r"^3 trials in a row failed for the same reason \(always\); mend it and run"),
    ):
        work(study, evaluator, 20)
    assert len(evaluator.measured) == 1 + SAME_FAILURES
    assert [trial.state for trial in _view(tmp_path).trials] == [State.COMPLETE] + [State.FAILED] * SAME_FAILURES


def test_different_failures_and_failures_apart_do_not(prepared: Prepared, tmp_path: Path) -> None:
    def error(n: int, _rank_map: RankMap) -> BaseException | None:
        return NonFiniteLossError(f"reason {n % 2}") if n % 4 else None

    with _open(prepared, tmp_path) as study:
        work(study, Failure(prepared, error), 8)
        assert study.finished() == 8


def test_a_defect_fails_its_trial_for_good(prepared: Prepared, tmp_path: Path) -> None:
    evaluator = Failure(prepared, lambda n, _: ZeroDivisionError("a defect") if n == 2 else None)
    with _open(prepared, tmp_path) as study, pytest.raises(ZeroDivisionError):
        work(study, evaluator, 4)
    again = Failure(prepared, lambda *_: None)
    with _open(prepared, tmp_path) as study:
        work(study, again, 4)
    assert evaluator.measured[1] not in again.measured
    assert _view(tmp_path).trials[1].reason == "ZeroDivisionError: a defect"


def test_an_interrupted_trial_is_proposed_again(prepared: Prepared, tmp_path: Path) -> None:
    evaluator = Failure(prepared, lambda n, _: KeyboardInterrupt() if n == 2 else None)
    with _open(prepared, tmp_path) as study, pytest.raises(KeyboardInterrupt):
        work(study, evaluator, 4)
    with _open(prepared, tmp_path) as study:
        assert study.finished() == 1
        again = Failure(prepared, lambda *_: None)
        work(study, again, 4)
        assert study.finished() == 4
    assert evaluator.measured[1] in again.measured
    assert len(again.measured) == 3
    assert {point.rank_map for point in _view(tmp_path).points} == {evaluator.measured[0], *again.measured}


def test_resuming_does_only_what_is_left(prepared: Prepared, tmp_path: Path) -> None:
    with _open(prepared, tmp_path) as study:
        work(study, Evaluator(prepared), 2)
    first = _view(tmp_path).points
    evaluator = Failure(prepared, lambda *_: None)
    with _open(prepared, tmp_path) as study:
        work(study, evaluator, 3)
        work(study, evaluator, 3)
    assert len(evaluator.measured) == 1
    assert _view(tmp_path).points[:2] == first


@pytest.fixture(scope="module")
def searched(write_study: StudyFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run from its file."""
    path = write_study(tmp_path_factory.mktemp("searched"))
    rs.run(path)
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_applying_a_rank_map_file_repeats_its_measurement_exactly(
    family: str, write_study: StudyFactory, tmp_path: Path
) -> None:
    path = write_study(tmp_path, family, targets=TWO_FACTOR)
    rs.run(path, trials=2)
    file = rs.export(path, trial=1)
    file.write(tmp_path / "rank_map.json", folder=tmp_path)
    assert file.measurement is not None
    applied = rs.apply(tmp_path / "rank_map.json", tmp_path / "out")
    assert applied.loss == file.measurement.loss
    assert applied.num_params == file.measurement.num_params


@pytest.mark.parametrize("mode", ["own", "nested"])
def test_a_rank_map_file_of_other_factors_is_told(mode: str, write_study: StudyFactory, tmp_path: Path) -> None:
    path = write_study(tmp_path, finetune={"mode": mode, "steps": 0, "nested_steps": 1, "nested_ranges": 2})
    rs.run(path, trials=1)
    rs.export(path, trial=0).write(tmp_path / "own.json", folder=tmp_path)
    tables = json.loads((tmp_path / "own.json").read_text())
    tables["digests"]["bank"] = "ab" * 32
    (tmp_path / "other.json").write_text(json.dumps(tables))
    rs.allocate(path, 0.6).write(tmp_path / "allocated.json", folder=tmp_path)
    for name, told in (("own", 0), ("other", 1), ("allocated", 0)):
        progress = Told()
        rs.apply(tmp_path / f"{name}.json", tmp_path / name, progress=progress)
        assert sum("makes another one" in line for line in progress.said) == told


class Told(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("train", ["factors", "all"])
def test_the_checkpoint_is_the_model_that_was_measured(train: str, write_study: StudyFactory, tmp_path: Path) -> None:
    path = write_study(tmp_path, targets=TWO_FACTOR, finetune={"train": train, "learning_rate": 1e-2})
    rs.run(path, trials=1)
    file = rs.export(path, trial=0)
    file.write(tmp_path / "rank_map.json", folder=tmp_path)
    rs.apply(tmp_path / "rank_map.json", tmp_path / "out")
    validation = Examples.of(CAUSAL_LM, rs.prepare(path).splits.validation.columns)
    model = load_checkpoint(tmp_path / "out", torch.device("cpu")).model
    assert file.measurement is not None
    assert score(model, validation, batch_blocks=8).loss == file.measurement.loss


def test_a_checkpoint_can_be_evaluated_like_any_model(searched: Path, tmp_path: Path) -> None:
    file = rs.export(searched, kept=0.6)
    file.write(searched.parent / "kept.json", folder=searched.parent)
    applied = rs.apply(searched.parent / "kept.json", tmp_path / "out")
    data = load_study_file(searched).spec.data
    text = searched.parent / "text.txt"
    again, dense = (
        rs.evaluate(str(folder), data.model_copy(update={"train": str(text)}), blocks=4)
        for folder in (tmp_path / "out", load_study_file(searched).spec.model.source)
    )
    assert again.num_params == applied.num_params == file.measurement.num_params  # type: ignore[union-attr]
    assert again.num_params < dense.num_params
    assert RankMapFile.read(tmp_path / "out" / "rank_map.json") == file


def test_applying_without_fine_tune_is_the_sliced_model(searched: Path, tmp_path: Path) -> None:
    file = rs.allocate(searched, 0.5)
    file.write(searched.parent / "allocated.json", folder=searched.parent)
    sliced = rs.apply(searched.parent / "allocated.json", tmp_path / "sliced", finetune=False)
    tuned = rs.apply(searched.parent / "allocated.json", tmp_path / "tuned")
    dense = rs.apply(searched.parent / "allocated.json", tmp_path / "dense", finetune=False, form="dense")
    assert sliced.loss != tuned.loss
    assert dense.loss == pytest.approx(sliced.loss, rel=1e-6)


def test_applying_refuses_before_it_writes(
    searched: Path, tmp_path: Path, model_folders: Callable[[str], Path]
) -> None:
    rank_map = searched.parent / "refused.json"
    rs.allocate(searched, 0.5).write(rank_map, folder=searched.parent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        rs.apply(rank_map, tmp_path / "full", model="nowhere/at-all")  # before the model is looked for
    with pytest.raises(RankMapError, match="dtype must be one of float32, bfloat16, float16, not 'int8'"):
        rs.apply(rank_map, tmp_path / "out", dtype="int8")
    with pytest.raises(RankMapError):
        rs.apply(rank_map, tmp_path / "out", model=str(model_folders("gpt2")))
    assert not (tmp_path / "out").exists()


def test_the_dense_loss_is_stored_once(searched: Path) -> None:
    view = rs.view(searched)
    prepared = rs.prepare(searched)
    assert view.record.dense_loss == Evaluator(prepared).score().loss
