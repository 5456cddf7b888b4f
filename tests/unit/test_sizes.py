"""Sizes are drawn where a measurement is expected to add most hypervolume to the front."""

from __future__ import annotations

import numpy as np
import pytest

from rank_search.study.sizes import LossCurve, draw_size, expected_gains, size_grid

SIZES = size_grid(0.3, 0.9)
EXACT = np.full(len(SIZES), 1e-6)


def falling(kept: object) -> np.ndarray:
    """Losses that fall, most steeply for small models."""
    return 2.5 + 0.5 / np.asarray(kept, float)


def best(known: list[tuple[float, float]], spread: np.ndarray = EXACT) -> float:
    """The size of the largest gain where measurements are as expected, or scatter."""
    return float(SIZES[np.argmax(expected_gains(known, SIZES, falling(SIZES), spread))])


def at(*kept: float) -> list[tuple[float, float]]:
    return [(one, float(falling(one))) for one in kept]


def test_the_gain_is_the_area_that_a_measurement_takes_from_the_front() -> None:
    gains = expected_gains(at(0.3, 0.6), SIZES, falling(SIZES), EXACT)
    k = int(np.argmin(np.abs(SIZES - 0.45)))
    assert gains[k] == pytest.approx((0.6 - 0.45) * (falling(0.3) - falling(0.45)), rel=0.03)


def test_wide_and_steep_gaps_come_first() -> None:
    assert 0.45 < best(at(0.3, 0.4, 0.8, 0.9)) < 0.65
    assert 0.3 < best(at(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)) < 0.4


def test_a_poor_measurement_beside_a_good_one_hides_no_gap() -> None:
    # Such as a uniform rank map a hair smaller than the closed form: on the front, and in nobody's way.
    known = [*at(0.3, 0.33, 0.36, 0.4, 0.43, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9), (0.4999, float(falling(0.44)))]
    assert 0.44 < best(known) < 0.5


def test_what_a_lucky_measurement_has_covered_already_is_worth_little() -> None:
    known = at(0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert 0.35 < best(known) < 0.45
    assert best([*known, (0.34, float(falling(0.48)))]) > 0.5


def test_where_measurements_scatter_another_one_is_worth_more() -> None:
    known, middle = at(*np.linspace(0.3, 0.9, 61)), len(SIZES) // 2
    scattered = np.where(np.arange(len(SIZES)) < middle, 1e-6, 0.05)
    assert best(known) < 0.35
    assert best(known, scattered) > 0.6


def test_the_loss_at_a_size_is_that_of_its_neighbours_on_a_line() -> None:
    kept = np.array([0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.9])
    expected, spread = LossCurve(kept, 4 - kept, np.ones(7)).at(SIZES)
    assert expected == pytest.approx(4 - SIZES, abs=5e-3)
    assert spread == pytest.approx(0, abs=5e-3)


def test_what_counts_little_moves_it_little_and_scatter_is_seen_where_it_is() -> None:
    random = np.random.default_rng(0)
    kept = np.linspace(0.3, 0.9, 80)
    losses = 4 - kept + random.normal(0, np.where(kept < 0.6, 0.02, 0.002))
    of_these = LossCurve(kept, losses, np.ones(80)).at(SIZES)
    with_poor = LossCurve(
        np.append(kept, [0.4, 0.7]), np.append(losses, [4.6, 4.3]), np.append(np.ones(80), [1e-3, 1e-3])
    ).at(SIZES)
    assert np.abs(with_poor[0] - of_these[0]).max() < 0.005
    small, large = (of_these[1][SIZES < 0.5], of_these[1][SIZES > 0.7])
    assert 0.01 < small.mean() < 0.04
    assert 0.001 < large.mean() < 0.004


def test_where_other_factors_begin_losses_may_jump() -> None:
    random = np.random.default_rng(0)
    kept = np.linspace(0.3, 0.9, 60)
    losses = 4 - kept + 0.03 * (kept > 0.6) + random.normal(0, 1e-3, 60)
    told, blind = LossCurve(kept, losses, np.ones(60), (0.6,)), LossCurve(kept, losses, np.ones(60))
    beside = np.abs(SIZES - 0.6) < 0.02
    truth = (4 - SIZES + 0.03 * (SIZES > 0.6))[beside]
    assert np.abs(told.at(SIZES)[0][beside] - truth).max() < 4e-3 < np.abs(blind.at(SIZES)[0][beside] - truth).max()
    assert told.at(SIZES)[1][beside].max() < 2e-3 < blind.at(SIZES)[1][beside].max()
    assert told.levelled == pytest.approx(4 - kept, abs=6e-3)
    assert blind.levelled == pytest.approx(losses)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_jump_that_nothing_was_measured_of_is_none(count: int) -> None:
    kept = np.linspace(0.4, 0.5, count)
    assert LossCurve(kept, 4 - kept, np.ones(count), (0.6, 0.7)).levelled == pytest.approx(4 - kept)


def test_a_loss_that_is_none_of_those_about_its_size_is_left_out() -> None:
    random = np.random.default_rng(0)
    kept = np.linspace(0.3, 0.9, 60)
    losses = falling(kept) + random.normal(0, np.where(kept < 0.6, 0.01, 0.001))
    weights = np.ones(60)
    assert LossCurve.of_undiverged(kept, losses, weights, ())[1].all(), "where others scatter, scatter is no wonder"
    assert LossCurve.of_undiverged(kept, falling(kept), weights, ())[1].all(), (
        "at its ends a bent curve leaves its lines"
    )
    wrong = losses.copy()
    wrong[[20, 22, 50]] += [1.5, 0.5, 0.1]
    curve, used = LossCurve.of_undiverged(kept, wrong, weights, ())
    assert np.flatnonzero(~used).tolist() == [20, 22, 50]
    others = LossCurve(kept[used], losses[used], weights[used])
    assert np.concatenate(curve.at(SIZES)) == pytest.approx(np.concatenate(others.at(SIZES)))
    # What is far from the closed form has a higher loss for that, and one that is better than others is welcome.
    weights[20], wrong[[22, 50]] = 0.1, losses[[22, 50]] - 0.5
    assert LossCurve.of_undiverged(kept, wrong, weights, ())[1].all()


@pytest.mark.parametrize("count", [0, 1, 5, 10])
def test_few_losses_are_all_gone_by(count: int) -> None:
    kept = np.linspace(0.4, 0.5, count)
    losses = 4 - kept
    losses[count // 2 :][:1] += 1.0
    assert LossCurve.of_undiverged(kept, losses, np.ones(count), (0.45,))[1].all()


def test_one_measurement_is_enough_to_go_on_from() -> None:
    expected, spread = LossCurve(np.array([0.5]), np.array([3.0]), np.array([1.0])).at(SIZES)
    assert expected == pytest.approx(3.0)
    gains = expected_gains([(0.5, 3.0)], SIZES, expected, spread)
    assert 0.3 <= draw_size(SIZES, gains, np.random.default_rng(0)) <= 0.9


def test_draws_go_to_the_largest_gains_and_stay_in_the_range() -> None:
    random = np.random.default_rng(0)
    gains = np.where(np.abs(SIZES - 0.4) < 0.02, 3.0, 1.0)
    sizes = np.array([draw_size(SIZES, gains, random) for _ in range(300)])
    assert (np.abs(sizes - 0.4) < 0.025).mean() > 0.7
    assert SIZES[0] <= sizes.min() < sizes.max() <= SIZES[-1]
    ends = np.where(np.arange(len(SIZES)) == 0, 1.0, 0.0)
    assert draw_size(SIZES, ends, random) >= SIZES[0]
    assert draw_size(SIZES, np.zeros(len(SIZES)), random) != draw_size(SIZES, np.zeros(len(SIZES)), random)
