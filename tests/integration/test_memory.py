"""Memory that runs out under a trial: once more with every batch in two parts, and the same result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rank_search as rs
from rank_search.model.memory import in_halves_if_needed, is_out_of_memory
from rank_search.preparing import Prepared, prepare
from rank_search.progress import Progress
from rank_search.spec import load_study_file
from rank_search.study.records import State
from rank_search.task import IGNORED, MASKED_LM, Task
from rank_search.train.finetune import _parts
from rank_search.trial import Evaluator
from rank_search.worker import Outcome, work
from tests.conftest import StudyFactory
from tests.integration.test_worker import _open

ON_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


class Lines(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


class Memory:
    """Of a device that has room for so many examples at once in a fine-tune, and in scoring."""

    def __init__(self, patch: pytest.MonkeyPatch, *, loss: int = 1000, predictions: int = 1000, after: int = 0) -> None:
        self.sizes: list[int] = []
        self._room = {"loss": loss, "predictions": predictions}
        self._after = after
        for name in self._room:
            patch.setattr(Task, name, self._limited(name, getattr(Task, name)))

    def _limited(self, name: str, function: Any) -> Any:
        def limited(task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> object:
            size = len(batch["input_ids"])
            self.sizes.append(size)
            if size > self._room[name] and len(self.sizes) > self._after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return function(task, model, batch)

        return limited


@pytest.fixture
def prepared(tiny_study: StudyFactory) -> Prepared:
    """A study of six steps, five blocks in each: an odd number."""
    finetune = {"steps": 6, "batch_blocks": 5, "learning_rate": 1e-3}
    return prepare(load_study_file(tiny_study(finetune=finetune, run={"score_batch_blocks": 4})))


@pytest.mark.parametrize("train", ["factors", "all"])
@pytest.mark.parametrize("after", [0, 3], ids=["at once", "in mid-run"])
def test_a_fine_tune_in_two_parts_gives_the_same_result(
    tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch, train: str, after: int
) -> None:
    finetune = {"steps": 6, "batch_blocks": 5, "learning_rate": 1e-3, "train": train}
    prepared = prepare(load_study_file(tiny_study(finetune=finetune)))
    rank_map, evaluator, lines = prepared.allocator.closed_form(0.5), Evaluator(prepared), Lines()
    weights = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    whole = evaluator.measure(rank_map)
    with monkeypatch.context() as patch:
        memory = Memory(patch, loss=3, after=after)
        halved = evaluator.measure(rank_map, lines)
    assert memory.sizes[after:] == [5, *[2, 3] * 6, 8]
    assert halved.loss == pytest.approx(whole.loss, abs=1e-5)
    assert halved.train_losses == pytest.approx(whole.train_losses, abs=1e-5)
    assert (whole.parts, halved.parts) == (1, 2)
    assert lines.said == ["out of memory in the fine-tune; once more with every batch in two parts"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in prepared.model.state_dict().items())
    again = evaluator.measure(rank_map)  # the next trial has whole batches
    assert (again.loss, again.parts) == (whole.loss, 1)


def test_scoring_in_two_parts_gives_the_same_result(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_map, evaluator, lines = prepared.allocator.closed_form(0.5), Evaluator(prepared), Lines()
    whole = evaluator.measure(rank_map)
    with monkeypatch.context() as patch:
        memory = Memory(patch, predictions=2, after=7)
        halved = evaluator.measure(rank_map, lines)
    assert memory.sizes == [5] * 6 + [4, 4] + [2, 2, 2, 2]  # and no second fine-tune
    assert halved.loss == pytest.approx(whole.loss, abs=1e-5)
    assert halved.tokens == whole.tokens
    assert halved.parts == 2
    assert lines.said == ["out of memory in scoring; once more with every batch in two parts"]


def test_where_half_is_too_much_the_trial_fails_with_a_way_out_and_the_study_goes_on(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Outcome] = []
    with _open(prepared, tmp_path) as study:
        with monkeypatch.context() as patch:
            Memory(patch, loss=1)
            work(study, Evaluator(prepared), 1, on_outcome=outcomes.append)
        with monkeypatch.context() as patch:
            Memory(patch, loss=3)
            work(study, Evaluator(prepared), 2, on_outcome=outcomes.append)
    assert [outcome.state for outcome in outcomes] == [State.FAILED, State.COMPLETE]
    assert outcomes[0].reason == "out of GPU memory; lower finetune.batch_blocks or run.score_batch_blocks"
    stored = rs.view("tiny", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert [None if trial.measurement is None else trial.measurement.parts for trial in stored] == [None, 2]


def test_a_batch_of_one_is_not_halved(tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(load_study_file(tiny_study(finetune={"steps": 2, "batch_blocks": 1})))
    memory = Memory(monkeypatch, loss=0)
    with pytest.raises(torch.OutOfMemoryError):
        Evaluator(prepared).measure(prepared.allocator.closed_form(0.5))
    assert memory.sizes == [1]


def test_a_nested_fine_tune_is_halved_too(tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune = {"mode": "nested", "nested_steps": 3, "nested_ranges": 1, "batch_blocks": 4}
    study = load_study_file(tiny_study(finetune=finetune))
    prepare(study, nested=False)
    lines, memory = Lines(), Memory(monkeypatch, loss=2)
    prepare(study, progress=lines)
    assert memory.sizes == [4, 2, 2, 2, 2, 2, 2]
    assert "out of memory in the nested fine-tune; once more with every batch in two parts" in lines.said


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError(f"{ON_CPU} allocate 4503599627370496 bytes"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError(ON_CPU), False),
    ],
)
def test_only_memory_is_tried_again(error: Exception, is_one: bool) -> None:
    tried: list[int] = []

    def work_once(parts: int) -> int:
        tried.append(parts)
        if parts == 1:
            raise error
        return parts

    assert is_out_of_memory(error) == is_one
    if is_one:
        assert in_halves_if_needed(work_once, 8) == 2
        assert tried == [1, 2]
    else:
        with pytest.raises(type(error)):
            in_halves_if_needed(work_once, 8)
        assert tried == [1]


def test_the_hosts_own_memory_fails_a_trial_with_its_name(prepared: Prepared, tmp_path: Path) -> None:
    class Full(Evaluator):
        def measure(self, *_: object, **__: object) -> Any:
            raise RuntimeError(f"{ON_CPU} allocate 1 byte")

    outcomes: list[Outcome] = []
    with _open(prepared, tmp_path) as study:
        work(study, Full(prepared), 1, on_outcome=outcomes.append)
    assert outcomes[0].reason == "out of memory; lower finetune.batch_blocks or run.score_batch_blocks"


def test_parts_weigh_as_many_predictions_as_they_have() -> None:
    labels = torch.tensor([[1, IGNORED, IGNORED], [1, 2, 3], [4, IGNORED, 5]])
    batch = {"input_ids": torch.zeros(3, 3), "labels": labels}
    shares = [share for _, share in _parts(MASKED_LM, batch, 2)]
    assert [float(share) for share in shares if share is not None] == pytest.approx([1 / 6, 5 / 6])
    assert list(_parts(MASKED_LM, batch, 1)) == [(batch, None)]
