"""The search spaces: what they decode to, and that seeds are exact in all of them."""

from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from rank_search.allocation import Allocator
from rank_search.errors import BudgetError, RankMapError, StudyFileError
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.study.space import (
    DirectSpace,
    MultiplierSpace,
    Params,
    SearchSpace,
    ladder,
    make_space,
    random_params,
)
from tests.contract.synthetic import make_allocator, make_spec


def draw(space: SearchSpace, rng: np.random.Generator) -> Params:
    """A random choice within the distributions, their ends included now and then."""
    params = {}
    for name, allowed in space.distributions.items():
        assert isinstance(allowed, FloatDistribution | IntDistribution)
        share = rng.choice([0.0, 1.0, rng.random()])
        value = allowed.low + share * (allowed.high - allowed.low)
        params[name] = round(value) if isinstance(allowed, IntDistribution) else value
    return params


@pytest.mark.parametrize("name", ["multipliers", "groups", "direct"])
def test_seeds_decode_to_the_allocations_themselves(name: str) -> None:
    allocator, search = make_allocator(), make_spec(space=name).search
    space = make_space(search, allocator)
    seeds = ladder(search, allocator)
    assert [seed.source for seed in seeds[3:6]] == ["closed form 0.4", "uniform 0.9", "uniform 0.8"]
    for seed in seeds:
        expected = allocator.uniform(seed.kept) if seed.allocation == "uniform" else allocator.closed_form(seed.kept)
        params = space.encode(seed)
        assert params.keys() == space.distributions.keys()
        assert space.decode(params) == expected


def test_multipliers_stay_within_the_budget_they_name() -> None:
    allocator = make_allocator()
    space, rng = make_space(make_spec().search, allocator), np.random.default_rng(0)
    for _ in range(100):
        params = draw(space, rng)
        rank_map = space.decode(params)
        allocator.space.validate(rank_map)
        assert allocator.space.target_params(rank_map) <= allocator.space.budget(params["kept"])


def test_a_larger_multiplier_gives_its_layer_type_more_parameters() -> None:
    allocator = make_allocator()
    space = MultiplierSpace(make_spec(multiplier_range=3.0).search, allocator)
    neutral = space.encode(ladder(make_spec(ladder=[0.5]).search, allocator)[0])

    def kept_by(group: str, **changes: float) -> int:
        rank_map = space.decode({**neutral, **changes})
        layers = [shape for shape in allocator.space.shapes if shape.group == group]
        return sum(shape.params(rank_map.get(shape.name)) for shape in layers)

    assert kept_by("attn", **{"u.attn": 3.0}) > kept_by("attn") > kept_by("attn", **{"u.attn": -3.0})
    assert kept_by("mlp", **{"u.attn": 3.0}) < kept_by("mlp")


def test_the_depth_term_moves_parameters_along_the_model() -> None:
    allocator = make_allocator()
    space = MultiplierSpace(make_spec(multiplier_range=3.0).search, allocator)
    neutral = space.encode(ladder(make_spec(ladder=[0.5]).search, allocator)[0])

    def kept_at(depth: int, **changes: float) -> int:
        rank_map = space.decode({**neutral, **changes})
        layers = [shape for shape in allocator.space.shapes if shape.depth == depth]
        return sum(shape.params(rank_map.get(shape.name)) for shape in layers)

    assert kept_at(2, **{"u.depth.linear": 3.0}) > kept_at(2) > kept_at(2, **{"u.depth.linear": -3.0})
    # P2 is 1 at both ends and -1/2 in the middle.
    assert kept_at(1, **{"u.depth.quadratic": 3.0}) < kept_at(1) < kept_at(1, **{"u.depth.quadratic": -3.0})


@pytest.mark.parametrize(
    ("layers", "groups", "expected"),
    [
        (3, 2, ["u.attn", "u.mlp", "u.depth.linear", "u.depth.quadratic"]),
        (3, 1, ["u.depth.linear", "u.depth.quadratic"]),
        (2, 2, ["u.attn", "u.mlp", "u.depth.linear"]),
        (1, 2, ["u.attn", "u.mlp"]),
        (1, 1, []),
    ],
)
def test_terms_that_scale_all_layers_alike_are_left_out(layers: int, groups: int, expected: list[str]) -> None:
    allocator = make_allocator(layers, (("attn", 12, 12), ("mlp", 12, 20))[:groups])
    space, rng = make_space(make_spec().search, allocator), np.random.default_rng(1)
    assert list(space.distributions) == ["kept", "uniformity", *expected]
    allocator.space.validate(space.decode(draw(space, rng)))


def test_groups_are_layer_types_in_stretches_of_blocks() -> None:
    allocator = make_allocator(layers=5)
    search = make_spec(space="groups", depth_buckets=2, multiplier_range=3.0, ladder=[0.5]).search
    space = make_space(search, allocator)
    names = [name for name in space.distributions if name.startswith("u.")]
    assert names == ["u.attn.0", "u.attn.1", "u.mlp.0", "u.mlp.1"]
    neutral = space.encode(ladder(search, allocator)[0])

    def held(params: Params) -> dict[tuple[str, int], int]:
        rank_map, found = space.decode(params), dict[tuple[str, int], int]()
        for shape in allocator.space.shapes:
            place = (shape.group, int(shape.depth > 2))
            found[place] = found.get(place, 0) + shape.params(rank_map.get(shape.name))
        return found

    before, after = held(neutral), held({**neutral, "u.mlp.1": 2.0})
    assert after["mlp", 1] > before["mlp", 1]
    assert all(after[place] <= before[place] for place in before if place != ("mlp", 1))


def test_multipliers_have_one_for_every_stretch_of_blocks_where_that_is_asked_for() -> None:
    space = make_space(make_spec(depth_buckets=12).search, make_allocator(24))
    assert isinstance(space, MultiplierSpace)
    stretches = [f"u.depth.{bucket}" for bucket in range(12)]
    assert list(space.terms) == ["u.attn", "u.mlp", "u.depth.linear", "u.depth.quadratic", *stretches]
    assert (sum(space.terms[name] for name in stretches) == 1).all()
    assert [space.terms[name].sum() for name in stretches] == [4.0] * 12  # two types in two blocks
    alone = make_space(make_spec(depth_buckets=1).search, make_allocator(24))
    assert "u.depth.0" not in alone.distributions


@pytest.mark.parametrize(("layers", "buckets", "count"), [(3, None, 6), (8, None, 8), (8, 3, 6), (1, 4, 2)])
def test_there_are_no_more_buckets_than_blocks(layers: int, buckets: int | None, count: int) -> None:
    space = make_space(make_spec(space="groups", depth_buckets=buckets).search, make_allocator(layers))
    assert sum(name.startswith("u.") for name in space.distributions) == count


def test_multipliers_of_a_model_with_seven_layer_types_are_few() -> None:
    types = tuple((name, 12, 12) for name in ("q", "k", "v", "o", "gate", "up", "down"))
    space = make_space(make_spec().search, make_allocator(30, types))
    assert 8 <= len(space.distributions) - 1 <= 20


def test_the_kept_range_starts_where_the_smallest_ranks_are_met() -> None:
    allocator = make_allocator(multiple=3)
    space = make_space(make_spec(min_kept=0.01, ladder=[0.8]).search, allocator)
    kept = space.distributions["kept"]
    assert isinstance(kept, FloatDistribution)
    zeros = dict.fromkeys(space.distributions, 0.0)
    smallest = space.decode({**zeros, "kept": kept.low})
    assert set(smallest.values()) == {3}
    with pytest.raises(BudgetError):
        allocator.space.budget(kept.low - 1e-3)


def test_a_range_that_no_rank_map_meets_is_refused() -> None:
    allocator = make_allocator(multiple=3)
    with pytest.raises(BudgetError, match=r"max_kept is 0\.2"):
        make_space(make_spec(min_kept=0.1, max_kept=0.2, ladder=[]).search, allocator)
    with pytest.raises(BudgetError, match="keep at least"):
        ladder(make_spec(ladder=[0.8, 0.1], space="direct").search, allocator)


def test_a_ladder_outside_the_range_is_refused() -> None:
    with pytest.raises(StudyFileError, match=r"ladder holds 0\.4, outside"):
        make_space(make_spec(min_kept=0.6).search, make_allocator())


def test_direct_round_trips_every_rank_map() -> None:
    allocator = make_allocator(multiple=2)
    space, rng = DirectSpace(allocator), np.random.default_rng(2)
    for _ in range(50):
        params = draw(space, rng)
        rank_map = space.decode(params)
        allocator.space.validate(rank_map)
        assert space.encode_map(rank_map) == params
    dense = RankMap()
    assert space.decode(space.encode_map(dense)) == dense


def test_direct_refuses_a_rank_outside_the_space() -> None:
    with pytest.raises(RankMapError, match=r"block\.0\.attn may not have rank 3"):
        DirectSpace(make_allocator(multiple=2)).encode_map(RankMap({"block.0.attn": 3}))


def test_a_layer_that_can_only_be_dense_has_no_direct_parameter() -> None:
    shapes = (LayerShape("thin", 1, 8), LayerShape("wide", 8, 8))
    tails = {"thin": np.array([1.0, 0.0]), "wide": np.linspace(1.0, 0.0, 9)}
    space = DirectSpace(Allocator(RankSpace(shapes, 100), tails))
    assert list(space.distributions) == ["wide"]
    assert space.decode({"wide": 3}) == RankMap()


def test_every_rank_map_of_a_space_keeps_frozen_layers_as_they_are() -> None:
    free = make_allocator()
    frozen = (("block.0.attn", 2), ("block.1.mlp", None))
    space = RankSpace(free.space.shapes, free.space.model_params, frozen=frozen)
    allocator = Allocator(space, {curve.shape.name: np.linspace(1.0, 0.0, 13) for curve in free.curves})
    direct = DirectSpace(allocator)
    assert sorted(set(curve.shape.name for curve in free.curves) - direct.distributions.keys()) == [
        n for n, _ in frozen
    ]
    drawn = [direct.decode(random_params(direct.distributions, str(seed))) for seed in range(5)]
    maps = [*drawn, allocator.closed_form(0.6), allocator.uniform(0.6), allocator.blend(0.6, 0.5)]
    assert {(rank_map.get("block.0.attn"), rank_map.get("block.1.mlp")) for rank_map in maps} == {(2, None)}
    assert all(allocator.predicted_rise(rank_map) > 0 for rank_map in maps)
    assert direct.decode(direct.encode_map(drawn[0])) == drawn[0]
    with pytest.raises(RankMapError, match=r"block\.0\.attn may not have rank 3"):
        direct.encode_map(RankMap({"block.0.attn": 3}))
