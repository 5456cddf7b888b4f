"""What must hold on a GPU: one seed, one result; untouched base weights; statistics close to a CPU's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from rank_search.compress.low_rank import compressed
from rank_search.factors.statistics import collect_statistics
from rank_search.model.targets import find_targets
from rank_search.preparing import Prepared, prepare
from rank_search.progress import Preempted, Step
from rank_search.spec import FinetuneSpec, TargetSpec, load_study_file
from rank_search.task import Batch, Examples
from rank_search.train.capture import CapturedStep
from rank_search.train.checkpoints import Checkpoint, Checkpoints
from rank_search.train.finetune import finetune
from rank_search.trial import Evaluator
from tests.conftest import StudyFactory
from tests.data import families, models
from tests.data.heard import Heard

pytestmark = pytest.mark.gpu


def _prepare(path: Path) -> Prepared:
    return prepare(load_study_file(path))


@pytest.mark.parametrize("train", ["factors", "all"])
def test_the_same_rank_map_gives_the_identical_loss(tiny_study: StudyFactory, train: str) -> None:
    prepared = _prepare(tiny_study(run={"device": "cuda"}, finetune={"steps": 10, "train": train}))
    assert prepared.device.type == "cuda"
    evaluator = Evaluator(prepared)
    rank_map = prepared.allocator.closed_form(0.5)
    first = evaluator.measure(rank_map)
    evaluator.measure(prepared.allocator.uniform(0.4))
    second = evaluator.measure(rank_map)
    other = Evaluator(_prepare(prepared.study.folder / "study.toml")).measure(rank_map)
    assert first.loss == second.loss == other.loss
    assert first.standard_error == second.standard_error
    assert first.peak_memory > 0


@pytest.mark.parametrize("train", ["factors", "all"])
def test_base_weights_are_bit_identical_after_a_trial(tiny_study: StudyFactory, train: str) -> None:
    prepared = _prepare(tiny_study(run={"device": "cuda"}, finetune={"learning_rate": 1e-2, "train": train}))
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    Evaluator(prepared).measure(prepared.allocator.closed_form(0.5))
    assert all(torch.equal(before[name], tensor) for name, tensor in prepared.model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_statistics_under_autocast_are_close_to_those_of_a_cpu(family: str) -> None:
    model = models.make(family)
    targets = find_targets(model, TargetSpec())
    # Many tokens, because labels are drawn by each device's own generator.
    blocks = torch.randint(models.VOCABULARY, (1024, 32), generator=torch.Generator().manual_seed(0)).int()
    on_cpu = collect_statistics(model, targets, Examples.causal(blocks), batch_blocks=128, seed=0)
    nn.Module.to(model, "cuda")
    on_gpu = collect_statistics(model, targets, Examples.causal(blocks), batch_blocks=128, seed=0)
    for name, layer in on_cpu.items():
        for expected, found, tolerance in ((layer.A, on_gpu[name].A, 0.02), (layer.G, on_gpu[name].G, 0.25)):
            assert expected is not None
            assert found is not None
            assert found.dtype == torch.float64
            assert float((found.cpu() - expected).norm() / expected.norm()) < tolerance, name


def test_a_bank_is_copied_to_the_gpu_once(tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study(run={"device": "cuda"}))
    factors = prepared.bank.on(prepared.device)
    assert all(factors[target.name].out.device.type == "cuda" for target in prepared.targets)


def test_labels_do_not_depend_on_how_many_blocks_make_a_batch() -> None:
    model = models.make("llama")
    nn.Module.to(model, "cuda")
    targets = find_targets(model, TargetSpec())
    blocks = torch.randint(models.VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0)).int()
    one = collect_statistics(model, targets, Examples.causal(blocks), batch_blocks=1, seed=0)
    all_at_once = collect_statistics(model, targets, Examples.causal(blocks), batch_blocks=12, seed=0)
    for name, layer in one.items():
        assert layer.G is not None
        other = all_at_once[name].G
        assert other is not None
        # Other labels would differ by far more than bf16's rounding.
        assert float((layer.G - other).norm() / layer.G.norm()) < 0.05, name


@pytest.mark.parametrize("train", ["factors", "all"])
def test_recorded_steps_train_as_steps_run_one_by_one(tiny_study: StudyFactory, train: str) -> None:
    prepared = _prepare(tiny_study(run={"device": "cuda"}, finetune={"steps": 12, "train": train}))
    examples = Examples.of(prepared.loaded.task, prepared.splits.train.columns)
    spec = prepared.spec.finetune
    found = []
    for capture in (False, True):
        model = copy.deepcopy(prepared.model)
        targets = find_targets(model, TargetSpec())
        heard = Heard()
        with compressed(targets, prepared.bank.on(prepared.device), prepared.allocator.closed_form(0.5)) as layers:
            before = [layer.inner.weight.clone() for layer in layers.values()]
            result = finetune(model, list(layers.values()), examples, spec, seed=0, capture=capture, progress=heard)
            moved = [
                not torch.equal(old, layer.inner.weight) for old, layer in zip(before, layers.values(), strict=True)
            ]
        assert heard.lines == []
        assert all(moved)
        found.append(torch.tensor(result.losses))
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("storage", ["two-factor", "pivoted"])  # the first leaves layers dense
def test_compiled_steps_train_as_others_do(tiny_study: StudyFactory, storage: str) -> None:
    prepared = _prepare(tiny_study(run={"device": "cuda"}, targets={"storage": storage}, finetune={"steps": 12}))
    examples = Examples.of(prepared.loaded.task, prepared.splits.train.columns)
    found = []
    for compiled in (False, True):
        spec = prepared.spec.finetune.model_copy(update={"compiled": compiled})
        factors, rank_map = prepared.bank.on(prepared.device), prepared.allocator.closed_form(0.7)
        heard = Heard()
        with compressed(prepared.targets, factors, rank_map) as layers:
            result = finetune(
                prepared.model, list(layers.values()), examples, spec,
                seed=0, targets=prepared.targets, progress=heard,
            )  # fmt: skip
        assert not any("recorded" in line for line in heard.lines)
        found.append(torch.tensor(result.losses))
    torch.testing.assert_close(found[0], found[1], rtol=5e-3, atol=0)


def test_a_compiled_nested_fine_tune_lowers_sliced_losses_as_others_do(tiny_study: StudyFactory) -> None:
    losses = []
    for compiled in (False, True):
        nested = {"mode": "nested", "nested_steps": 30, "nested_ranges": 1, "learning_rate": 1e-2, "compiled": compiled}
        prepared = _prepare(tiny_study(run={"device": "cuda"}, finetune=nested))
        losses.append(Evaluator(prepared).measure(prepared.allocator.closed_form(0.5)).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_step_that_cannot_be_recorded_is_run_as_usual() -> None:
    weight = torch.ones(3, device="cuda")

    def waits(batch: Batch) -> torch.Tensor:
        weight.mul_(0.5)
        return weight.sum() * float(batch["x"].sum())  # float() waits for the device

    reasons: list[str] = []
    step = CapturedStep(nn.Identity(), waits, on_refusal=reasons.append)
    losses = [float(step({"x": torch.ones(1, device="cuda")})) for _ in range(6)]
    assert len(reasons) == 1
    assert losses == [3 * 0.5**k for k in range(1, 7)]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_recorded_steps_of_other_tasks_train_as_steps_run_one_by_one(family: str) -> None:
    given = families.examples(family, 32)
    mask = torch.ones_like(given.tensors["attention_mask"])
    mask[::2, -4:] = 0  # padding, which a step must not look at
    examples = Examples(given.task, {**given.tensors, "attention_mask": mask})
    spec = FinetuneSpec(steps=12, batch_blocks=8, train="all")
    losses = []
    for capture in (False, True):
        model = families.trained(family)
        nn.Module.to(model, "cuda")
        losses.append(torch.tensor(finetune(model, [], examples, spec, seed=0, capture=capture).losses))
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)


class Asked(Heard):
    """Has the process asked to stop after so many steps of a fine-tune."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after
        self._done = 0

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount

    def seconds_left(self) -> float | None:
        return 0.0 if self._done >= self._after else None


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("parts", [1, 2])
def test_recorded_steps_go_on_from_a_checkpoint(
    tiny_study: StudyFactory, tmp_path: Path, compiled: bool, parts: int
) -> None:
    prepared = _prepare(tiny_study(run={"device": "cuda"}, finetune={"steps": 16, "compiled": compiled}))
    examples = Examples.of(prepared.loaded.task, prepared.splits.train.columns)
    checkpoint = Checkpoints(tmp_path / "kept", 60.0).of(test=True)

    def tune(progress: Heard, given: Checkpoint | None = checkpoint) -> torch.Tensor:
        model = copy.deepcopy(prepared.model)
        targets = find_targets(model, TargetSpec())
        with compressed(targets, prepared.bank.on(prepared.device), prepared.allocator.closed_form(0.5)) as layers:
            result = finetune(
                model, list(layers.values()), examples, prepared.spec.finetune, seed=0, targets=targets,
                progress=progress, parts=parts, checkpoint=given,
            )  # fmt: skip
        return torch.tensor(result.losses)

    whole = tune(Heard(), None)
    with pytest.raises(Preempted):
        tune(Asked(8))  # in the middle of what was recorded
    heard = Heard()
    resumed = tune(heard)
    assert heard.lines == ["going on from step 8 of 16, where this fine-tune was interrupted"]
    torch.testing.assert_close(resumed, whole, rtol=2e-3, atol=0)
