"""Fine-tunes that are interrupted go on from their checkpoints, and end as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import rank_search as rs
from rank_search.launch import exits
from rank_search.measurement import Measurement
from rank_search.preparing import Prepared, prepare
from rank_search.progress import Preempted, Progress, Step
from rank_search.spec import load_study_file
from rank_search.study.records import State
from rank_search.train import checkpoints
from rank_search.train.checkpoints import STALE_SECONDS, Checkpoints
from rank_search.trial import Evaluator
from tests.conftest import StudyFactory
from tests.data.disks import disk_full_at
from tests.waiting import until

STEPS = 12
ROOT = Path(__file__).parents[2]


class Interrupting(Progress):
    """Has the process asked to stop in the ``at``-th step of a fine-tune, with no time left; keeps what was said."""

    def __init__(self, at: int | None = None, title: str = "fine-tune", left: float = 0.0) -> None:
        self._at = at
        self._title = title
        self._left = left
        self._asked = False
        self.steps: list[str] = []
        self.said: list[str] = []

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        yield _Counting(self, title)

    def count(self, title: str, amount: int) -> None:
        self.steps += [title] * amount
        self._asked = self._asked or self.steps.count(self._title) == self._at

    def say(self, message: str) -> None:
        self.said.append(message)

    def seconds_left(self) -> float | None:
        return self._left if self._asked else None


class _Counting:
    def __init__(self, owner: Interrupting, title: str) -> None:
        self._owner = owner
        self._title = title

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._owner.count(self._title, amount)


def facts(measurement: Measurement) -> tuple[object, ...]:
    """All but seconds and bytes."""
    return (
        measurement.loss, measurement.standard_error, measurement.num_params, measurement.fold_losses,
        measurement.block_losses, measurement.train_losses,
    )  # fmt: skip


def kept_files(prepared: Prepared) -> list[Path]:
    return sorted((prepared.study.work_dir / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("train", "folds"), [("factors", None), ("all", None), ("factors", 2)], ids=["factors", "all", "folds"]
)
def test_an_interrupted_trial_ends_with_the_loss_of_an_uninterrupted_one(
    tiny_study: StudyFactory, train: str, folds: int | None
) -> None:
    tables: dict[str, dict[str, object]] = {"finetune": {"steps": STEPS, "train": train, "learning_rate": 1e-2}}
    path = tiny_study(**tables)
    if folds is not None:
        text = (
            path.read_text(encoding="utf-8").replace("train_blocks = 24\n", "").replace("validation_blocks = 8\n", "")
        )
        path.write_text(text.replace("[validation]\n", f"[validation]\nfolds = {folds}\n"), encoding="utf-8")
    prepared = prepare(load_study_file(path))
    rank_map = prepared.allocator.closed_form(0.5)
    whole = Evaluator(prepared).measure(rank_map)
    for at in (3, 8):  # interrupted, and once more
        with pytest.raises(Preempted):
            Evaluator(prepared).measure(rank_map, Interrupting(at))
        assert len(kept_files(prepared)) == 1
    other, progress = Evaluator(prepare(load_study_file(path))), Interrupting()
    resumed = other.measure(rank_map, progress)
    assert progress.said == [f"going on from step 8 of {STEPS}, where this fine-tune was interrupted"]
    assert facts(resumed) == facts(whole)
    assert len(kept_files(prepared)) == 1  # until the measurement is stored
    other.forget(rank_map)
    assert kept_files(prepared) == []


def test_state_is_kept_every_so_many_seconds(tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARE", 1e9)
    prepared = prepare(load_study_file(tiny_study(finetune={"steps": STEPS}, run={"checkpoint_seconds": 1e-9})))
    rank_map = prepared.allocator.closed_form(0.5)
    written: list[int] = []
    save = checkpoints._save
    monkeypatch.setattr(checkpoints, "_save", lambda c, step, state: (written.append(step), save(c, step, state)))
    Evaluator(prepared).measure(rank_map)
    assert written == list(range(1, STEPS))  # not after the last one
    progress = Interrupting()
    Evaluator(prepared).measure(rank_map, progress)  # as after kill -9
    assert progress.steps.count("fine-tune") == STEPS
    assert progress.said == [f"going on from step {STEPS - 1} of {STEPS}, where this fine-tune was interrupted"]


def test_writing_takes_a_twentieth_of_the_time_at_most(
    tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(load_study_file(tiny_study(finetune={"steps": STEPS}, run={"checkpoint_seconds": 1e-9})))
    written: list[int] = []
    monkeypatch.setattr(checkpoints, "_save", lambda _c, step, _state: (written.append(step), time.sleep(0.2)))
    Evaluator(prepared).measure(prepared.allocator.closed_form(0.5))
    assert written == [1]


def test_a_study_may_do_without(tiny_study: StudyFactory) -> None:
    prepared = prepare(load_study_file(tiny_study(finetune={"steps": STEPS}, run={"checkpoint_seconds": 0})))
    Evaluator(prepared).measure(prepared.allocator.closed_form(0.5), Interrupting(3))  # it ends by itself, or is ended
    assert not (prepared.study.work_dir / "checkpoints").exists()


def test_a_fine_tune_that_ends_in_time_goes_on(tiny_study: StudyFactory) -> None:
    prepared = prepare(load_study_file(tiny_study(finetune={"steps": STEPS})))
    progress = Interrupting(3, left=600.0)
    Evaluator(prepared).measure(prepared.allocator.closed_form(0.5), progress)
    assert progress.steps.count("fine-tune") == STEPS
    assert kept_files(prepared) == []


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def interrupted_at(step: int, tiny_study: StudyFactory) -> tuple[Prepared, Measurement, Path]:
    """A study, what the closed form at 0.5 measures, and the checkpoint of that trial after so many steps."""
    prepared = prepare(load_study_file(tiny_study(finetune={"steps": STEPS})))
    rank_map, evaluator = prepared.allocator.closed_form(0.5), Evaluator(prepared)
    whole = evaluator.measure(rank_map)
    with pytest.raises(Preempted):
        evaluator.measure(rank_map, Interrupting(step))
    (file,) = kept_files(prepared)
    return prepared, whole, file


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, empty])
def test_a_damaged_checkpoint_is_told_and_the_fine_tune_starts_again(
    tiny_study: StudyFactory, damage: Callable[[Path], None]
) -> None:
    prepared, whole, file = interrupted_at(5, tiny_study)
    rank_map, evaluator = prepared.allocator.closed_form(0.5), Evaluator(prepared)
    damage(file)
    progress = Interrupting()
    assert facts(evaluator.measure(rank_map, progress)) == facts(whole)
    (said,) = progress.said
    assert "is damaged" in said
    assert said.endswith("starting again")
    assert "\n" not in said
    assert kept_files(prepared) == []


def test_other_rank_maps_settings_and_seeds_have_checkpoints_of_their_own(tiny_study: StudyFactory) -> None:
    base = {"steps": STEPS}
    prepared = prepare(load_study_file(tiny_study(finetune=base)))
    rank_map = prepared.allocator.closed_form(0.5)
    with pytest.raises(Preempted):
        Evaluator(prepared).measure(rank_map, Interrupting(5))
    tables: list[dict[str, dict[str, object]]] = [
        {"finetune": base | {"learning_rate": 1e-3}}, {"finetune": base, "search": {"seed": 1}},
        {"finetune": base, "factors": {"damping": 0.5}},
    ]  # fmt: skip
    for changed in tables:
        other, progress = prepare(load_study_file(tiny_study(**changed))), Interrupting()
        Evaluator(other).measure(rank_map, progress)
        assert progress.said == []
    progress = Interrupting()
    Evaluator(prepared).measure(prepared.allocator.uniform(0.5), progress)
    assert progress.said == []


def test_where_it_cannot_be_written_the_fine_tune_goes_on(
    tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(load_study_file(tiny_study(finetune={"steps": STEPS}, run={"checkpoint_seconds": 1e-9})))
    (prepared.study.work_dir / "checkpoints").write_text("no folder", encoding="utf-8")
    progress = Interrupting()
    Evaluator(prepared).measure(prepared.allocator.closed_form(0.5), progress)
    assert progress.said[0].endswith("going on without")


def test_on_a_full_disk_the_checkpoint_before_stays_and_no_half_one_is_left(tiny_study: StudyFactory) -> None:
    prepared, whole, kept = interrupted_at(3, tiny_study)
    rank_map, evaluator = prepared.allocator.closed_form(0.5), Evaluator(prepared)
    before = kept.read_bytes()
    progress = Interrupting(5)
    with disk_full_at(len(before) - 1), pytest.raises(Preempted):
        evaluator.measure(rank_map, progress)
    assert len(progress.said) == 2  # from where it went on, and this
    assert re.fullmatch(
        r"the checkpoint \S+ cannot be written \([^\n]*File too large[^\n]*\); going on without", progress.said[1]
    )
    assert kept_files(prepared) == [kept]
    assert kept.read_bytes() == before
    progress = Interrupting()
    assert facts(evaluator.measure(rank_map, progress)) == facts(whole)
    assert progress.said == [f"going on from step 3 of {STEPS}, where this fine-tune was interrupted"]


def test_stale_checkpoints_are_removed_when_a_study_is_prepared(tiny_study: StudyFactory) -> None:
    path = tiny_study(finetune={"steps": STEPS})
    prepared = prepare(load_study_file(path))
    folder = prepared.study.work_dir / "checkpoints"
    folder.mkdir()
    now = time.time()
    for name, age in (("new.safetensors", 60.0), ("old.safetensors", STALE_SECONDS + 60), (".old.host.1", 2e7)):
        (folder / name).touch()
        os.utime(folder / name, (now - age, now - age))
    prepare(load_study_file(path))
    assert [file.name for file in folder.iterdir()] == ["new.safetensors"]


def test_an_interrupted_nested_fine_tune_makes_the_same_bank(
    tiny_study: StudyFactory, tmp_path_factory: pytest.TempPathFactory, write_study: StudyFactory
) -> None:
    finetune = {"mode": "nested", "nested_steps": STEPS, "nested_ranges": 2}
    study = load_study_file(tiny_study(finetune=finetune))
    with pytest.raises(Preempted):
        prepare(study, progress=Interrupting(STEPS + 5, "nested fine-tune"))
    assert len(list((study.work_dir / "checkpoints").iterdir())) == 1
    resumed = prepare(study)
    assert kept_files(resumed) == []
    whole = prepare(load_study_file(write_study(tmp_path_factory.mktemp("whole"), finetune=finetune)))
    assert resumed.trial_banks.digest == whole.trial_banks.digest
    for ours, theirs in zip(resumed.trial_banks.banks, whole.trial_banks.banks, strict=True):
        assert ours.path.name == theirs.path.name
        for target in whole.targets:
            assert torch.equal(ours[target.name].inn, theirs[target.name].inn)
            assert torch.equal(ours[target.name].out, theirs[target.name].out)


def test_a_trial_interrupted_in_the_nested_fine_tune_of_its_range_comes_again(
    tiny_study: StudyFactory, tmp_path_factory: pytest.TempPathFactory, write_study: StudyFactory
) -> None:
    tables: dict[str, dict[str, object]] = {
        "finetune": {"mode": "nested", "nested_steps": STEPS, "nested_ranges": 2},
        "search": {"ladder": [0.4, 0.9], "seeds": ["closed-form"]},
    }
    path = tiny_study(**tables)
    with pytest.raises(Preempted):
        rs.run(path, trials=2, progress=Interrupting(STEPS + 5, "nested fine-tune"))  # in the second range
    before = rs.status(path)
    assert (before.complete, before.requeued, before.failed, before.running) == (1, 1, 0, 0)
    again = Interrupting()
    rs.run(path, trials=2, progress=again)
    after = rs.status(path)
    assert (after.complete, after.requeued, after.failed) == (2, 1, 0)
    assert any(line.startswith("going on from step") for line in again.said)
    whole = write_study(tmp_path_factory.mktemp("whole"), **tables)
    rs.run(whole, trials=2)
    assert [point.loss for point in rs.front(path)] == [point.loss for point in rs.front(whole)]


def test_after_kill_9_and_after_sigterm_the_next_process_goes_on_from_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_study: StudyFactory
) -> None:
    tables: dict[str, dict[str, object]] = {
        "finetune": {"steps": 80, "batch_blocks": 24}, "run": {"checkpoint_seconds": 0.1},
        "search": {"trials": 1, "ladder": [0.5], "seeds": ["closed-form"]},
    }  # fmt: skip
    file = write_study(tmp_path_factory.mktemp("interrupted"), **tables)
    with a_worker_on(file) as killed:
        until(lambda: list(kept_in(file)) != [])
        killed.kill()
        told = killed.communicate(timeout=30)[1]
    assert "trial 0" not in told  # it died over its first one
    (kept,) = kept_in(file)
    with a_worker_on(file) as stopped:
        assert stopped.stderr is not None
        assert any("going on from step" in line for line in stopped.stderr)
        stopped.send_signal(signal.SIGTERM)
        assert any(line.startswith("stopped;") for line in stopped.stderr)
        stopped.communicate(timeout=30)
    assert stopped.returncode == exits.PREEMPTED
    assert list(kept_in(file)) == [kept]
    progress = Interrupting()
    rs.run(file, progress=progress)
    assert any(line.startswith("going on from step") for line in progress.said)
    assert list(kept_in(file)) == []
    whole = write_study(tmp_path_factory.mktemp("whole"), **tables)
    rs.run(whole)
    assert losses(rs.view(file)) == losses(rs.view(whole))


@contextmanager
def a_worker_on(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, which is not left behind."""
    command = [sys.executable, "-m", "rank_search.launch.worker", str(file), "--grace", "0.2"]
    worker = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield worker
    finally:
        worker.kill()
        worker.communicate()


def kept_in(file: Path) -> Iterator[Path]:
    return (file.parent / "work" / "checkpoints").glob("*.safetensors")


def losses(view: rs.StudyView) -> dict[str, float]:
    """Of what was measured, by rank map."""
    measured = [t for t in view.trials if t.state is State.COMPLETE and t.measurement is not None]
    assert len(measured) == 1
    return {trial.rank_map.digest: trial.measurement.loss for trial in measured if trial.measurement is not None}


def test_a_folder_of_checkpoints_may_be_missing(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "none", 60.0).remove_stale()
    checkpoint = Checkpoints(tmp_path / "none", 60.0).of(rank_map="x")
    assert checkpoint is not None
    checkpoint.remove()
