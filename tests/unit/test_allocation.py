"""Allocations keep to their budget, and the closed form is the best there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_search.allocation import Allocator, LayerCurve, lower_hull
from rank_search.errors import BudgetError
from rank_search.ranks import LayerShape, RankMap, RankSpace, Storage


def _tail(size: int, decay: float, scale: float, seed: int) -> np.ndarray:
    sigma = scale * np.sort(np.random.default_rng(seed).exponential(size=size))[::-1] * decay ** np.arange(size)
    return np.append(0.5 * np.cumsum(sigma[::-1] ** 2)[::-1], 0.0)


def _allocator(
    sizes: list[tuple[int, int]], *, storage: Storage = "two-factor", multiple: int = 1, seed: int = 0
) -> Allocator:
    shapes = tuple(LayerShape(f"layer{i}", m, n, "ab"[i % 2], i) for i, (m, n) in enumerate(sizes))
    space = RankSpace(shapes, 3 * sum(s.dense_params for s in shapes), storage, multiple)
    generator = np.random.default_rng(seed)
    tails = {
        s.name: _tail(min(s.m, s.n), generator.uniform(0.5, 1), generator.uniform(0.1, 3), seed + i)
        for i, s in enumerate(shapes)
    }
    return Allocator(space, tails)


def _all_rank_maps(space: RankSpace) -> list[RankMap]:
    choices = [[*space.ranks(shape), None] for shape in space.shapes]
    return [
        RankMap((shape.name, rank) for shape, rank in zip(space.shapes, ranks, strict=True) if rank is not None)
        for ranks in itertools.product(*choices)
    ]


SMALL = [(6, 8), (8, 6), (10, 4), (7, 7)]
layer_sizes = st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), min_size=1, max_size=6)
kept_fractions = st.floats(0.05, 1)
storages = st.sampled_from(["two-factor", "pivoted"])


def _feasible(allocator: Allocator, kept: float) -> float:
    return min(1.0, max(kept, (allocator.space.min_params + 1) / allocator.space.dense_params))


@pytest.mark.parametrize("storage", ["two-factor", "pivoted"])
@pytest.mark.parametrize("seed", range(5))
def test_at_hull_vertices_the_closed_form_equals_brute_force(seed: int, storage: Storage) -> None:
    allocator = _allocator(SMALL, storage=storage, seed=seed)
    space = allocator.space
    everything = sorted((space.target_params(r), allocator.predicted_rise(r)) for r in _all_rank_maps(space))
    params = np.array([p for p, _ in everything])
    least = np.minimum.accumulate([rise for _, rise in everything])
    # The budgets at which the walk ends on a vertex are those of the lower hull of all rank maps.
    firsts = np.unique(params, return_index=True)[1]
    vertices = lower_hull(params[firsts], np.array([everything[i][1] for i in firsts]))
    assert len(vertices) >= 5
    for budget in params[firsts][vertices]:
        rank_map = allocator.closed_form(budget / space.dense_params)
        best = least[np.searchsorted(params, budget, side="right") - 1]
        assert allocator.predicted_rise(rank_map) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_between_vertices_it_is_within_one_step_of_brute_force(seed: int) -> None:
    allocator = _allocator(SMALL, seed=seed)
    space = allocator.space
    everything = [(space.target_params(r), allocator.predicted_rise(r)) for r in _all_rank_maps(space)]
    largest_edge = max(
        float(-np.diff(curve.rises[curve.hull]).min()) for curve in allocator._curves if len(curve.hull) > 1
    )
    for budget in range(space.min_params, space.dense_params + 1, 7):
        best = min(rise for params, rise in everything if params <= budget)
        assert allocator.predicted_rise(allocator.closed_form(budget / space.dense_params)) <= best + largest_edge


@given(layer_sizes, kept_fractions, storages, st.integers(1, 4), st.integers(0, 5), st.floats(0, 1))
def test_no_allocation_exceeds_its_budget_or_leaves_a_step_unspent(
    sizes: list[tuple[int, int]], kept: float, storage: Storage, multiple: int, seed: int, uniformity: float
) -> None:
    allocator = _allocator(sizes, storage=storage, multiple=multiple, seed=seed)
    space, kept = allocator.space, _feasible(allocator, kept)
    multipliers = {shape.name: math.sin(index) for index, shape in enumerate(space.shapes)}
    for rank_map in (
        allocator.closed_form(kept),
        allocator.closed_form(kept, multipliers),
        allocator.uniform(kept),
        allocator.blend(kept, uniformity, multipliers),
    ):
        space.validate(rank_map)
        left = space.budget(kept) - space.target_params(rank_map)
        assert left >= 0
        for shape in space.shapes:
            choices = [*space.ranks(shape), None]
            chosen = rank_map.get(shape.name)
            assert chosen in choices
            if chosen is not None:
                following = choices[choices.index(chosen) + 1]
                assert shape.params(following, storage) - shape.params(chosen, storage) > left


@given(layer_sizes, st.integers(0, 5))
def test_everything_is_dense_where_everything_is_kept(sizes: list[tuple[int, int]], seed: int) -> None:
    allocator = _allocator(sizes, seed=seed)
    assert allocator.closed_form(1) == allocator.uniform(1) == RankMap()
    assert allocator.predicted_rise(RankMap()) == 0


@given(layer_sizes, kept_fractions, st.integers(0, 5))
def test_more_parameters_never_raise_the_prediction(sizes: list[tuple[int, int]], kept: float, seed: int) -> None:
    allocator = _allocator(sizes, seed=seed)
    low, high = _feasible(allocator, kept * 0.7), _feasible(allocator, kept)
    walk = [allocator._walk(allocator.space.budget(k), np.ones(len(sizes))) for k in (low, high)]
    rises = [sum(float(c.rises[i]) for c, i in zip(allocator._curves, chosen, strict=True)) for chosen in walk]
    edge = max((float(-np.diff(c.rises[c.hull]).min()) for c in allocator._curves if len(c.hull) > 1), default=0.0)
    assert rises[1] <= rises[0] + edge


def test_the_closed_form_predicts_less_than_uniform() -> None:
    allocator = _allocator([(40, 30)] * 6, seed=1)
    for kept in (0.9, 0.8, 0.6, 0.4):
        assert allocator.predicted_rise(allocator.closed_form(kept)) < allocator.predicted_rise(allocator.uniform(kept))


def test_uniform_keeps_the_same_fraction_of_every_layer() -> None:
    allocator = _allocator([(40, 30), (60, 20), (24, 64)])
    for kept in (0.3, 0.5, 0.8):
        rank_map = allocator.uniform(kept)
        for shape in allocator.space.shapes:
            assert abs(shape.params(rank_map.get(shape.name)) - kept * shape.dense_params) <= shape.m + shape.n


def test_a_multiplier_moves_parameters_to_its_layer() -> None:
    allocator = _allocator([(40, 30)] * 4, seed=2)
    plain = allocator.closed_form(0.5)
    assert allocator.closed_form(0.5, {}) == allocator.closed_form(0.5, {"layer1": 0.0}) == plain
    ranks = [allocator.closed_form(0.5, {"layer1": u}).get("layer1", 99) for u in (-4.0, -1.0, 0.0, 1.0, 4.0)]
    assert ranks == sorted(ranks)
    assert ranks[0] < plain["layer1"] < ranks[-1]


def test_one_multiplier_for_all_layers_changes_nothing() -> None:
    allocator = _allocator([(40, 30), (20, 50)], seed=2)
    assert allocator.closed_form(0.5, {"layer0": 0.7, "layer1": 0.7}) == allocator.closed_form(0.5)


def test_a_blend_lies_between_the_closed_form_and_uniform() -> None:
    allocator = _allocator([(40, 30), (60, 20), (24, 64)], seed=3)
    closed, even = allocator.closed_form(0.5), allocator.uniform(0.5)
    assert allocator.blend(0.5, 0) == closed
    assert allocator.blend(0.5, 1) == even

    def distance(a: RankMap, b: RankMap) -> int:
        return sum(abs(s.params(a.get(s.name)) - s.params(b.get(s.name))) for s in allocator.space.shapes)

    half = allocator.blend(0.5, 0.5)
    assert distance(half, closed) < distance(even, closed)
    assert distance(half, even) < distance(even, closed)


def test_a_layer_that_no_rank_makes_smaller_stays_dense() -> None:
    allocator = _allocator([(1, 40), (30, 30)])
    assert set(allocator.closed_form(0.3)) == set(allocator.uniform(0.3)) == {"layer1"}


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    allocator = _allocator([(40, 30)])
    for rule in (allocator.closed_form, allocator.uniform):
        with pytest.raises(BudgetError, match=r"keep at least 0.058"):
            rule(0.05)
    with pytest.raises(BudgetError):
        allocator.blend(0.05, 0.5)


def test_the_predicted_rise_is_the_sum_of_the_layers_tails() -> None:
    shapes = (LayerShape("a", 6, 8), LayerShape("b", 6, 8))
    tails = {"a": np.array([9.0, 5, 3, 2, 1, 0.5, 0]), "b": np.array([90.0, 50, 30, 20, 10, 5, 0])}
    allocator = Allocator(RankSpace(shapes, 96), tails)
    assert allocator.predicted_rise(RankMap({"a": 1, "b": 3})) == 5 + 20
    assert allocator.predicted_rise(RankMap({"b": 2})) == 30


points = st.lists(
    st.tuples(st.integers(1, 1000), st.integers(0, 1000)), min_size=1, max_size=25, unique_by=lambda point: point[0]
)


@given(points)
def test_the_lower_hull_is_below_all_points_and_convex(given_points: list[tuple[int, int]]) -> None:
    given_points.sort()
    params = np.array([p for p, _ in given_points])
    rises = np.array([r / 10 for _, r in given_points])
    hull = lower_hull(params, rises)
    assert hull[0] == 0
    x, y = params[hull], rises[hull]
    assert rises[hull[-1]] == rises.min()
    slopes = np.diff(y) / np.diff(x)
    assert (slopes < 0).all()
    assert (np.diff(slopes) > -1e-9).all()
    inside = params <= x[-1]
    assert (np.interp(params[inside], x, y) <= rises[inside] + 1e-9).all()


def test_points_on_one_line_are_one_edge() -> None:
    assert lower_hull(np.array([1, 2, 3, 5]), np.array([8.0, 6.0, 4.0, 3.0])).tolist() == [0, 2, 3]


def test_a_curve_ends_with_dense() -> None:
    space = RankSpace((LayerShape("a", 6, 8),), 48)
    curve = LayerCurve.of(space, space["a"], np.array([9.0, 5, 3, 2, 1, 0.5, 0]))
    assert curve.ranks.tolist() == [1, 2, 3, 0]
    assert curve.params.tolist() == [14, 28, 42, 48]
    assert curve.rises.tolist() == [5, 3, 2, 0]
    # From rank 1 straight to dense saves more per parameter than any rank between.
    assert curve.hull.tolist() == [0, 3]
