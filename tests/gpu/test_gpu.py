"""What must hold on a GPU: one seed, one result; untouched base weights; statistics close to a CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rank_search.factors.statistics import collect_statistics
from rank_search.model.targets import find_targets
from rank_search.preparing import Prepared, prepare
from rank_search.spec import TargetSpec, load_study_file
from rank_search.trial import Evaluator
from tests.conftest import StudyFactory
from tests.data import models

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
    on_cpu = collect_statistics(model, targets, blocks, batch_blocks=128, seed=0)
    nn.Module.to(model, "cuda")
    on_gpu = collect_statistics(model, targets, blocks, batch_blocks=128, seed=0)
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
    one = collect_statistics(model, targets, blocks, batch_blocks=1, seed=0)
    all_at_once = collect_statistics(model, targets, blocks, batch_blocks=12, seed=0)
    for name, layer in one.items():
        assert layer.G is not None
        other = all_at_once[name].G
        assert other is not None
        # Other labels would differ by far more than bf16's rounding.
        assert float((layer.G - other).norm() / layer.G.norm()) < 0.05, name
