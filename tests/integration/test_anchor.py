"""Statistics taken once more on a compressed model."""

from __future__ import annotations

import torch

from rank_search.factors.statistics import LayerStatistics, collect_statistics, mean_statistics
from rank_search.preparing import prepare
from rank_search.spec import load_study_file
from rank_search.task import Examples
from tests.conftest import StudyFactory


def test_the_model_comes_back_bit_identical_and_the_factors_differ(tiny_study: StudyFactory) -> None:
    plain = prepare(load_study_file(tiny_study(factors={"anchor": 1.0})))
    weights = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    anchored = prepare(load_study_file(tiny_study(factors={"anchor": 0.5})))
    assert all(torch.equal(weights[name], tensor) for name, tensor in anchored.model.state_dict().items())
    assert anchored.bank.path != plain.bank.path
    assert any((anchored.bank[t.name].sigma != plain.bank[t.name].sigma).any() for t in plain.targets)


def test_two_draws_of_one_model_have_the_same_inputs_and_other_gradients(tiny_study: StudyFactory) -> None:
    made = prepare(load_study_file(tiny_study(factors={"method": "svd"})))
    examples = Examples.of(made.loaded.task, made.splits.calibration.columns)
    first, second = (
        collect_statistics(made.model, made.targets, examples, batch_blocks=8, seed=seed) for seed in (0, 1)
    )
    for target in made.targets:
        one, other = first[target.name], second[target.name]
        assert one.A is not None
        assert one.G is not None
        assert other.A is not None
        assert other.G is not None
        torch.testing.assert_close(one.A, other.A)
        assert not torch.allclose(one.G, other.G)


def test_a_plain_svd_takes_no_statistics_and_shares_its_bank(tiny_study: StudyFactory) -> None:
    plain = prepare(load_study_file(tiny_study(factors={"method": "svd"})))
    anchored = prepare(load_study_file(tiny_study(factors={"method": "svd", "anchor": 0.5})))
    assert anchored.bank.path == plain.bank.path


def test_what_layers_share_stays_shared() -> None:
    A, other = torch.eye(2, dtype=torch.float64), 3 * torch.eye(2, dtype=torch.float64)
    first = {name: LayerStatistics(A=A) for name in "qk"}
    second = {name: LayerStatistics(A=other) for name in "qk"}
    mean = mean_statistics(first, second)
    assert mean["q"].A is mean["k"].A
    assert torch.equal(mean["q"].A, 2 * torch.eye(2, dtype=torch.float64))
    assert not first
