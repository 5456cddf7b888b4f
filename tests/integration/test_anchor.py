"""Statistics taken once more on a compressed model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rank_search.data.examples import ExampleTable
from rank_search.data.splits import Splits
from rank_search.factors.decompose import Factors
from rank_search.factors.slopes import MOST_GAIN, Slope, gain, measured_slopes, own_slope, rise_factors
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


def test_slopes_are_the_derivatives_of_the_loss_along_what_is_lost(tiny_study: StudyFactory) -> None:
    made = prepare(load_study_file(tiny_study()))
    examples = Examples.of(made.loaded.task, made.splits.train.columns)[torch.arange(6)]
    lost = {t.name: 0.1 * torch.randn(t.shape.m, t.shape.n, generator=torch.Generator().manual_seed(i))
            for i, t in enumerate(made.targets[:4])}  # fmt: skip
    found = measured_slopes(made.model, made.targets, lost, examples, batch_blocks=4)
    assert found.keys() == {target.name for target in made.targets}
    assert {name for name, slopes in found.items() if slopes.lost is not None} == lost.keys()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in made.model.parameters())
    for target in made.targets[:4]:
        before = target.matrix.clone()
        for slope, along in ((found[target.name].lost, lost[target.name]), (found[target.name].matrix, before)):
            losses = []
            for s in (-1e-2, 1e-2):
                target.write(before + s * along)
                with torch.no_grad():
                    losses.append(float(examples.task.loss(made.model, examples.tensors)))
            target.write(before)
            assert slope == pytest.approx((losses[1] - losses[0]) / 2e-2, rel=2e-2, abs=2e-5)


def test_own_slope_is_twice_the_predicted_rise(tiny_study: StudyFactory) -> None:
    made = prepare(load_study_file(tiny_study(factors={"anchor": 1.0, "damping": 1e-9})))
    examples = Examples.of(made.loaded.task, made.splits.calibration.columns)
    statistics = collect_statistics(made.model, made.targets, examples, batch_blocks=8, seed=0)
    for target in made.targets:
        factors, rank = made.bank[target.name], 5
        lost = factors.out[:rank].T @ factors.inn[:rank] - target.matrix
        predicted = 0.5 * float(factors.sigma[rank:].square().sum())
        assert own_slope(statistics[target.name], lost) == pytest.approx(2 * predicted, rel=1e-2)


def pairs(tiny_study: StudyFactory, key: str, value: float) -> list[tuple[Factors, Factors]]:
    """Of every target layer the factors with a key of [factors] at 0, and at a value."""
    plain, other = (prepare(load_study_file(tiny_study(factors={"anchor": 0.5, key: of}))) for of in (0.0, value))
    return [(plain.bank[target.name], other.bank[target.name]) for target in plain.targets]


def test_rises_are_multiplied_and_factors_stay(tiny_study: StudyFactory) -> None:
    quotients = set()
    for one, other in pairs(tiny_study, "slope_power", 0.5):
        assert torch.equal(one.out, other.out)
        assert torch.equal(one.inn, other.inn)
        quotient = (other.sigma / one.sigma).square()
        torch.testing.assert_close(quotient, quotient[:1].expand_as(quotient))
        assert 0.499 < quotient[0] < 2.001  # the square root of a quarter, and of four
        quotients.add(round(float(quotient[0]), 6))
    assert len(quotients) > 1


def test_gains_scale_the_factors_and_leave_their_order(tiny_study: StudyFactory) -> None:
    found = set()
    for one, other in pairs(tiny_study, "gain_step", 0.3):
        assert torch.equal(one.inn, other.inn)
        assert torch.equal(one.sigma, other.sigma)
        quotients = other.out / one.out
        torch.testing.assert_close(quotients, quotients[:1, :1].expand_as(quotients))
        assert 1 - 0.3 * MOST_GAIN - 1e-6 < quotients[0, 0] < 1 + 0.3 * MOST_GAIN + 1e-6
        found.add(round(float(quotients[0, 0]), 6))
    assert len(found) > 1


def test_a_gain_goes_down_the_slope_and_is_bounded() -> None:
    assert gain(Slope(0.2, 1.0), 0.5) == pytest.approx(0.9)
    assert gain(Slope(-0.2, 1.0), 0.5) == pytest.approx(1.1)
    assert gain(Slope(9.0, 1.0), 1.0) == 1 - MOST_GAIN
    assert gain(Slope(-9.0, 1.0), 1.0) == 1 + MOST_GAIN
    assert gain(Slope(0.2, 1.0), 0.0) == 1.0
    assert gain(Slope(0.2, 0.0), 1.0) == 1.0  # a layer without curvature


def test_layers_that_lost_nothing_count_as_their_type_does() -> None:
    slopes = {"a.q": Slope(2.0, 1.0), "b.q": Slope(4.0, 1.0), "a.o": Slope(1e3, 1.0), "b.o": Slope(-1.0, 1.0)}
    groups = {"a.q": "q", "b.q": "q", "c.q": "q", "a.o": "o", "b.o": "o", "c.up": "up"}
    assert rise_factors(slopes, groups, 1.0) == {
        "a.q": 2.0, "b.q": 4.0, "c.q": 3.0, "a.o": 4.0, "b.o": 0.25, "c.up": 4.0,
    }  # fmt: skip
    assert rise_factors(slopes, groups, 0.5)["b.q"] == 2.0
    assert set(rise_factors(slopes, groups, 0.0).values()) == {1.0}


def test_a_compressed_model_is_looked_at_on_other_text_but_never_on_what_folds_hold_out() -> None:
    column = np.arange(40, dtype=np.int32).reshape(10, 4)
    tables = [ExampleTable({"input_ids": part}) for part in (column[:3], column[3:8], column[8:])]
    apart = Splits(*tables)
    assert np.array_equal(apart.recalibration.columns["input_ids"], column[3:6])
    assert replace(apart, folds=2).recalibration is tables[0]
    assert replace(apart, train=tables[1][:2]).recalibration is tables[0]
