"""The front: what no other measurement beats in both loss and parameters."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_search.errors import BudgetError, NonFiniteLossError
from rank_search.front import Front, FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap


def _point(trial: int, loss: float, params: int, fidelity: Fidelity = Fidelity.TUNED) -> FrontPoint:
    return FrontPoint(
        trial, RankMap({"a": trial + 1}),
        Measurement(loss, 0.01, params, params // 2, params / 1000, params / 2000, fidelity, 100),
    )  # fmt: skip


outcomes = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), max_size=30)


def _points(pairs: list[tuple[int, int]]) -> list[FrontPoint]:
    return [_point(trial, loss / 4, 100 * params) for trial, (loss, params) in enumerate(pairs)]


@given(outcomes)
def test_it_is_what_no_point_dominates(pairs: list[tuple[int, int]]) -> None:
    points = _points(pairs)
    expected = {p.trial for p in points if not any(q is not p and q.dominates(p) for q in points)}
    assert {p.trial for p in Front.of(points)} == expected


@given(outcomes, st.randoms(use_true_random=False))
def test_it_does_not_depend_on_the_order_of_arrival(pairs: list[tuple[int, int]], rng: random.Random) -> None:
    points = _points(pairs)
    front = Front.of(points)
    rng.shuffle(points)
    assert Front.of(points) == front
    assert Front.of(front) == front


@given(outcomes)
def test_loss_falls_as_parameters_rise(pairs: list[tuple[int, int]]) -> None:
    front = Front.of(_points(pairs))
    assert all(a.num_params < b.num_params and a.loss > b.loss for a, b in pairwise(front))


def test_only_the_highest_fidelity_counts() -> None:
    points = [_point(0, 1.0, 500, Fidelity.SLICED), _point(1, 2.0, 500), _point(2, 3.0, 400)]
    assert [p.trial for p in Front.of(points)] == [2, 1]
    assert [p.trial for p in Front.of([*points, _point(3, 9.0, 900, Fidelity.CONFIRMED)])] == [3]


def test_of_two_equal_outcomes_the_earlier_trial_stands() -> None:
    assert [p.trial for p in Front.of([_point(7, 1.0, 500), _point(3, 1.0, 500)])] == [3]


FRONT = Front.of([_point(0, 4.0, 200), _point(1, 2.0, 400), _point(2, 1.5, 600), _point(3, 1.4, 900)])


def test_points_are_chosen_by_what_they_keep() -> None:
    assert FRONT.at_most_kept(0.9).trial == 3
    assert FRONT.at_most_kept(0.6).trial == 2
    assert FRONT.at_most_kept(0.59).trial == 1
    with pytest.raises(
        BudgetError, match=r"no point of the front keeps at most 0.1 of the target layers; the smallest"
    ):
        FRONT.at_most_kept(0.1)
    for kept in (0, 1.2):
        with pytest.raises(BudgetError, match=r"must be in \(0, 1\]"):
            FRONT.at_most_kept(kept)


def test_points_are_chosen_by_their_parameters() -> None:
    assert FRONT.at_most_params(10**9).trial == 3
    assert FRONT.at_most_params(899).trial == 2
    with pytest.raises(BudgetError, match="at most 199 parameters; the smallest has 200"):
        FRONT.at_most_params(199)


def test_points_are_chosen_by_their_loss() -> None:
    assert FRONT.at_most_loss(2.0).trial == 1
    assert FRONT.at_most_loss(1.99).trial == 2
    with pytest.raises(BudgetError, match=r"at most 1; the lowest is 1\.4000"):
        FRONT.at_most_loss(1.0)


def test_asking_for_what_a_refusal_names_gets_a_point() -> None:
    front = Front.of(
        [
            replace(
                _point(0, 1.40004, 200),
                measurement=replace(_point(0, 1.40004, 200).measurement, kept_of_targets=0.30004),
            )
        ]
    )
    for choose in (front.at_most_loss, front.at_most_kept):
        with pytest.raises(BudgetError, match="ask for that or more, or run more trials") as refusal:
            choose(0.01)
        (named,) = re.findall(r"(\d\.\d{4}): ask", str(refusal.value))
        assert choose(float(named)).trial == 0
    with pytest.raises(BudgetError, match="has 200: ask for that or more"):
        front.at_most_params(199)


def test_a_slice_of_the_front_is_its_points() -> None:
    assert FRONT[0].trial == 0
    assert [point.trial for point in FRONT[1:3]] == [1, 2]


def test_the_knee_is_farthest_below_the_line_between_the_ends() -> None:
    assert FRONT.knee().trial == 1
    assert Front.of([_point(5, 1.0, 100)]).knee().trial == 5
    with pytest.raises(BudgetError, match="the front is empty: no trial has ended that meets"):
        Front().knee()


def test_an_empty_front_has_no_points_to_choose() -> None:
    choices = (
        lambda: Front().at_most_kept(0.5), lambda: Front().at_most_params(5), lambda: Front().at_most_loss(5),
        lambda: Front().knee(),
    )  # fmt: skip
    for choose in choices:
        with pytest.raises(BudgetError, match="the front is empty: no trial has ended that meets"):
            choose()


@given(outcomes)
def test_the_hypervolume_is_the_area_that_is_dominated(pairs: list[tuple[int, int]]) -> None:
    points = _points(pairs)
    # Unit squares of (loss / 4, 100 parameters) below the reference point.
    squares = sum(
        any(4 * p.loss <= loss and p.num_params <= 100 * params for p in points)
        for loss in range(10)
        for params in range(10)
    )
    assert Front.of(points).hypervolume(10 / 4, 1000) == pytest.approx(squares * 100 / 4)


def test_a_loss_that_is_not_finite_is_no_measurement() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteLossError):
            _point(0, loss, 100)


def test_fidelities_are_ordered_and_have_names() -> None:
    assert [f.label for f in sorted(Fidelity)] == ["predicted", "sliced", "tuned", "confirmed"]
    assert all(Fidelity.from_label(f.label) is f for f in Fidelity)


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert _point(0, 2.0, 100).measurement.perplexity == math.exp(2)
    assert _point(0, 1e5, 100).measurement.perplexity == math.inf
