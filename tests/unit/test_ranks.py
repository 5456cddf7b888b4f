"""Shapes, rank maps and the space of rank maps."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_search.errors import BudgetError, RankMapError, TargetError
from rank_search.ranks import LayerShape, RankMap, RankSpace, Storage, frozen_ranks

sizes = st.integers(1, 60)
storages = st.sampled_from(["two-factor", "pivoted"])


@given(sizes, sizes, storages)
def test_the_largest_rank_is_the_last_that_pays(m: int, n: int, storage: Storage) -> None:
    shape = LayerShape("layer", m, n)
    top = shape.max_rank(storage)
    assert 0 <= top < min(m, n) or (top, m, n) == (0, 1, 1)
    assert all(shape.params(rank, storage) < m * n for rank in range(1, top + 1))
    # Pivoted storage of the full rank holds exactly the dense matrix.
    assert shape.params(top + 1, storage) >= m * n


@given(sizes, sizes)
def test_pivoted_storage_never_holds_more(m: int, n: int) -> None:
    shape = LayerShape("layer", m, n)
    for rank in range(1, min(m, n) + 1):
        assert shape.params(rank, "two-factor") - shape.params(rank, "pivoted") == rank**2
    assert shape.params(min(m, n), "pivoted") == shape.dense_params == shape.params(None, "pivoted")


def test_two_factors_hold_r_times_m_plus_n() -> None:
    shape = LayerShape("layer", 30, 20)
    assert shape.params(4) == 4 * 50
    assert shape.params(None) == 600
    assert shape.max_rank() == 11  # 11 · 50 = 550, 12 · 50 = 600
    assert shape.max_rank("pivoted") == 19


def test_an_empty_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer x: shape \(0, 4\) is empty"):
        LayerShape("x", 0, 4)


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "3", None])
def test_ranks_are_whole_numbers_from_one(rank: object) -> None:
    with pytest.raises(RankMapError, match="rank of layer must be a whole number of at least 1, not"):
        RankMap({"layer": rank})  # type: ignore[arg-type]


def test_a_rank_map_is_a_value() -> None:
    one, other = RankMap({"a": 1, "b": 2}), RankMap([("b", 2), ("a", 1)])
    assert one == other
    assert hash(one) == hash(other)
    assert one.digest == other.digest
    assert one != RankMap({"a": 1, "b": 3})
    assert one.digest != RankMap({"a": 1, "b": 3}).digest
    assert one != {"a": 1, "b": 2}
    assert pickle.loads(pickle.dumps(one)) == one
    assert "c" not in one
    assert one.get("c") is None


def _space(multiple: int = 1, storage: Storage = "two-factor") -> RankSpace:
    shapes = (LayerShape("a", 30, 20), LayerShape("b", 8, 8), LayerShape("thin", 1, 50))
    return RankSpace(shapes, 2000, storage, multiple)


def test_counts_of_a_rank_map() -> None:
    space = _space()
    rank_map = RankMap({"a": 4})
    assert space.dense_params == 600 + 64 + 50
    assert space.target_params(rank_map) == 200 + 64 + 50
    assert space.num_params(rank_map) == 2000 - 400
    assert space.kept_of_targets(rank_map) == 314 / 714
    assert space.kept_of_model(rank_map) == 0.8
    assert space.kept_of_targets(RankMap()) == space.kept_of_model(RankMap()) == 1
    assert space.with_storage("pivoted").target_params(rank_map) == 4 * 46 + 64 + 50


def test_only_multiples_are_allowed() -> None:
    space = _space(multiple=4)
    assert list(space.ranks(space["a"])) == [4, 8]
    # Below the multiple: the largest useful rank is its only one.
    assert list(space.ranks(space["b"])) == [3]
    assert list(space.ranks(space["thin"])) == []
    assert [space.max_rank(shape) for shape in space.shapes] == [8, 3, 0]
    assert space.min_params == 4 * 50 + 3 * 16 + 50


def test_a_frozen_layer_has_one_choice() -> None:
    shapes = _space().shapes
    frozen = frozen_ranks(shapes, {"*": "dense", "a": 7}, "two-factor")
    assert frozen == (("a", 7), ("b", None), ("thin", None))
    space = RankSpace(shapes, 2000, multiple=4, frozen=frozen)
    assert [list(space.ranks(shape)) for shape in shapes] == [[7], [], []]
    assert [space.may_be_dense(shape) for shape in shapes] == [False, True, True]
    assert space.min_params == space.max_params == 7 * 50 + 64 + 50
    assert space.with_storage("pivoted").frozen == frozen
    with pytest.raises(TargetError, match="pattern 'c' fits no target layer"):
        frozen_ranks(shapes, {"c": 3}, "two-factor")
    with pytest.raises(TargetError, match=r"gives b rank 4, but above 3 its \(8, 8\) matrix is smaller dense"):
        frozen_ranks(shapes, {"*": 4}, "two-factor")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), storages)
def test_allowed_ranks_are_useful_ranks(m: int, n: int, multiple: int, storage: Storage) -> None:
    shape = LayerShape("layer", m, n)
    ranks = RankSpace((shape,), m * n, storage, multiple).ranks(shape)
    top = shape.max_rank(storage)
    assert bool(ranks) == (top > 0)
    assert all(rank % min(multiple, top) == 0 and 1 <= rank <= top for rank in ranks)


@pytest.mark.parametrize("kept", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_kept_fraction_is_in_0_to_1(kept: float) -> None:
    with pytest.raises(BudgetError, match=r"kept fraction of the target layers must be in \(0, 1\], not"):
        _space().budget(kept)


def test_a_kept_fraction_below_the_smallest_ranks_says_what_they_need() -> None:
    space = _space()
    assert space.min_params == 50 + 16 + 50
    with pytest.raises(
        BudgetError, match=r"allows 71 parameters, but their smallest ranks need 116; keep at least 0.1"
    ):
        space.budget(0.1)
    assert space.budget(116 / 714) == 116


@given(st.integers(1, 714))
def test_a_budget_is_the_fraction_of_the_dense_parameters_rounded_down(params: int) -> None:
    space = _space()
    if params >= space.min_params:
        assert space.budget(params / 714) == params
    if space.min_params < params < 714:
        assert space.budget((params + 0.5) / 714) == params


def test_a_rank_map_for_another_model_names_the_first_module() -> None:
    with pytest.raises(RankMapError, match=r"^c is not a target layer of this model; make a rank map for this model$"):
        _space().validate(RankMap({"a": 1, "c": 1}))
    with pytest.raises(RankMapError, match=r"^a has rank 12, but above 11 its \(30, 20\) matrix is smaller dense"):
        _space().validate(RankMap({"a": 12}))
    _space(storage="pivoted").validate(RankMap({"a": 12}))
    _space().validate(RankMap({"a": 11, "b": 3}))


def test_two_layers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        RankSpace((LayerShape("a", 2, 2), LayerShape("a", 2, 2)), 8)
