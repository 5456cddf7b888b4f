"""Allocation rules of published methods, on cases whose answer is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from rank_search.allocation import Allocator, Floats, proportional
from rank_search.baselines import rules
from rank_search.baselines.measured import component_changes, sensitivities, untrained_loss
from rank_search.baselines.methods import METHODS
from rank_search.factors.decompose import Factors, decompose
from rank_search.factors.gradients import mean_gradients
from rank_search.model.targets import find_targets
from rank_search.ranks import LayerShape, RankMap, RankSpace, Storage
from rank_search.score import score
from rank_search.spec import Allocation, TargetSpec
from rank_search.study.five_types import five_types, joined_types
from rank_search.task import Examples
from tests.data import models

STORAGES: tuple[Storage, ...] = ("two-factor", "pivoted")
SIZES = ((40, 30), (30, 50), (24, 24), (40, 30), (30, 50), (24, 24))


def make_space(storage: Storage = "two-factor", multiple: int = 1) -> RankSpace:
    """Six layers of three types."""
    shapes = tuple(LayerShape(f"layer{i}", m, n, "abc"[i % 3], i // 3) for i, (m, n) in enumerate(SIZES))
    return RankSpace(shapes, 20_000, storage, multiple)


def make_tails(space: RankSpace, scale: Callable[[int], float] = lambda _i: 1.0) -> dict[str, Floats]:
    """Spectra that fall alike, each times ``scale`` of the layer's number."""
    return {
        shape.name: scale(i) * np.append(np.cumsum((0.9 ** np.arange(min(shape.m, shape.n)))[::-1])[::-1], 0.0)
        for i, shape in enumerate(space.shapes)
    }


def make_changes(space: RankSpace) -> dict[str, Floats]:
    random = np.random.default_rng(0)
    return {shape.name: random.normal(size=min(shape.m, shape.n)) * 1e-3 for shape in space.shapes}


def losses_of(space: RankSpace) -> dict[str, dict[float, float]]:
    return {
        shape.name: {f: 3 + (i + 1) * (1 - f) ** 2 for f in rules.FRACTIONS} for i, shape in enumerate(space.shapes)
    }


def squares(space: RankSpace, best: dict[str, float]) -> Callable[[RankMap], float]:
    """A loss that is least where every layer type keeps its fraction of ``best``."""

    def loss(rank_map: RankMap) -> float:
        kept = {s.name: s.params(rank_map.get(s.name), space.storage) / s.dense_params for s in space.shapes}
        return sum((kept[s.name] - best[s.group]) ** 2 for s in space.shapes)

    return loss


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("kept", [0.9, 0.6, 0.35])
def test_every_rule_spends_its_budget_to_the_last_step(storage: Storage, multiple: int, kept: float) -> None:
    space = make_space(storage, multiple)
    tails = make_tails(space, lambda i: 0.1 + i)
    allocator, changes = Allocator(space, tails), make_changes(space)
    for rank_map in (
        rules.asvd(allocator, losses_of(space), kept),
        rules.svd_llm_v2(allocator, tails, kept, 1000),
        rules.first_order(allocator, changes, kept, zero_sum=True),
        rules.first_order(allocator, changes, kept, zero_sum=False),
        five_types(allocator, kept, squares(space, {"a": 0.3, "b": 0.6, "c": 0.9}), evaluations=4),
    ):
        space.validate(rank_map)
        left = space.budget(kept) - space.target_params(rank_map)
        assert left >= 0
        for shape in space.shapes:
            choices = [*space.ranks(shape), None]
            at = choices.index(rank_map.get(shape.name))
            if at + 1 < len(choices):
                assert shape.params(choices[at + 1], storage) - shape.params(choices[at], storage) > left


def test_numbers_in_proportion_stay_within_their_bounds() -> None:
    low, high = np.zeros(3), np.array([5.0, 100.0, 100.0])
    assert proportional(np.array([1.0, 1.0, 3.0]), low, high, 10.0) == pytest.approx([2, 2, 6])
    assert proportional(np.array([10.0, 1.0, 3.0]), low, high, 13.0) == pytest.approx([5, 2, 6])
    assert proportional(np.ones(3), low, high, 1e9) == pytest.approx(high)
    assert proportional(np.ones(3), np.ones(3), high, 0.0) == pytest.approx(np.ones(3))


def test_v2_gives_more_to_the_layer_with_the_larger_loss_of_its_type() -> None:
    space = make_space()
    tails = make_tails(space, lambda i: 10.0 if i == 0 else 1.0)
    rank_map = rules.svd_llm_v2(Allocator(space, tails), tails, 0.6, 1000)
    assert rank_map["layer0"] > rank_map["layer3"]
    uniform = Allocator(space, tails).uniform(0.6)
    # A type is not paid for by the others.
    for name in ("layer1", "layer2", "layer4", "layer5"):
        assert abs(rank_map[name] - uniform[name]) <= 1


def test_v2_is_uniform_where_all_losses_are_equal() -> None:
    shapes = tuple(LayerShape(f"layer{i}", 40, 30, "a", i) for i in range(4))
    space = RankSpace(shapes, 9000)
    tails = make_tails(space)
    allocator = Allocator(space, tails)
    assert rules.svd_llm_v2(allocator, tails, 0.6, 1000) == allocator.uniform(0.6)


def test_v2_gives_up_fractions_in_the_proportion_of_inverse_logarithms() -> None:
    shapes = tuple(LayerShape(f"layer{i}", 400, 300, "a", i) for i in range(2))
    space = RankSpace(shapes, 10**6)
    tails = {"layer0": np.full(301, math.exp(10) / 2), "layer1": np.full(301, math.exp(20) / 2)}
    rank_map = rules.svd_llm_v2(Allocator(space, tails), tails, 0.7, 1)
    given = [1 - s.params(rank_map[s.name]) / s.dense_params for s in shapes]
    assert given[0] / given[1] == pytest.approx(2, rel=0.03)
    assert sum(given) == pytest.approx(0.6, abs=0.01)


def test_asvd_leaves_the_insensitive_layer_at_the_lowest_fraction() -> None:
    space = make_space()
    losses = {s.name: {f: 3.0 + (0.0 if s.name == "layer1" else 1 - f) for f in rules.FRACTIONS} for s in space.shapes}
    rank_map = rules.asvd(Allocator(space, make_tails(space)), losses, 0.7)
    lowest = rules.rank_at(space, space["layer1"], 0.1)
    assert lowest is not None
    # What the grid leaves over is spent in single steps on all layers alike.
    assert lowest <= rank_map["layer1"] <= lowest + 4
    assert all(rank_map.get(s.name, 99) > rules.rank_at(space, s, 0.5) for s in space.shapes if s.name != "layer1")


def test_asvd_holds_all_layers_to_one_threshold() -> None:
    space = make_space("pivoted")
    losses = losses_of(space)
    rank_map = rules.asvd(Allocator(space, make_tails(space)), losses, 0.5)
    kept = [s.params(rank_map.get(s.name), "pivoted") / s.dense_params for s in space.shapes]
    # The same loss costs the less sensitive layers less: they keep less.
    assert all(a <= b + 0.1 for a, b in itertools.pairwise(kept))
    assert kept[0] < kept[-1] - 0.2


def test_the_component_without_a_gradient_goes_first() -> None:
    space = make_space("pivoted")
    changes = {s.name: np.full(min(s.m, s.n), 1.0) for s in space.shapes}
    changes["layer4"][20:] = 0.0
    for zero_sum in (False, True):
        dropped = space["layer4"].dense_params - space["layer4"].params(25, "pivoted")
        kept = 1 - dropped / space.dense_params
        rank_map = rules.first_order(Allocator(space, make_tails(space)), changes, kept, zero_sum=zero_sum)
        assert rank_map == RankMap({"layer4": 25})


def test_the_zero_sum_rule_balances_rises_with_falls() -> None:
    shapes = tuple(LayerShape(f"layer{i}", 20, 20, "a", i) for i in range(3))
    space = RankSpace(shapes, 2000, "pivoted")
    changes = {"layer0": np.full(20, 1.0), "layer1": np.full(20, -1.5), "layer2": np.full(20, 1.2)}
    allocator = Allocator(space, make_tails(space))
    smallest = rules.first_order(allocator, changes, 0.8, zero_sum=False)
    balanced = rules.first_order(allocator, changes, 0.8, zero_sum=True)
    assert set(smallest) == {"layer0"}
    assert set(balanced) == {"layer0", "layer1"}
    total = sum((20 - balanced[name]) * changes[name][0] for name in balanced)
    assert abs(total) <= 1.5 + 1.5  # one change each way, and one step given back


def test_layer_types_are_joined_to_five_smallest_first() -> None:
    sizes = {"q": (8, 8), "k": (2, 8), "v": (2, 8), "o": (8, 8), "gate": (24, 8), "up": (24, 8), "down": (8, 24)}
    shapes = tuple(LayerShape(f"{d}.{g}", m, n, g, d) for d in range(2) for g, (m, n) in sizes.items())
    joined = joined_types(RankSpace(shapes, 10**4))
    assert len(set(joined.values())) == 5
    assert joined["k"] == joined["v"] == joined["q"]
    assert len({joined[g] for g in ("q", "o", "gate", "up", "down")}) == 5


def test_five_types_finds_the_best_fractions_of_a_separable_loss() -> None:
    space = make_space("pivoted")
    allocator = Allocator(space, make_tails(space))
    loss = squares(space, {"a": 0.3, "b": 0.75, "c": 0.8})
    found = five_types(allocator, 0.6, loss, evaluations=14, seed=1)
    assert loss(found) < 0.3 * loss(allocator.uniform(0.6))


def test_five_types_passes_over_losses_that_are_not_finite() -> None:
    space = make_space()
    allocator = Allocator(space, make_tails(space))
    assert five_types(allocator, 0.6, lambda _rank_map: math.inf, evaluations=3) == allocator.uniform(0.6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_predicted_changes_are_those_of_the_loss(family: str) -> None:
    model = models.make(family).double()
    targets = find_targets(model, TargetSpec())
    factors = {t.name: decompose(t.name, t.matrix, None, None, min(t.shape.m, t.shape.n)) for t in targets}
    blocks = Examples.causal(torch.randint(0, models.VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0)))
    changes = component_changes(targets, factors, mean_gradients(model, targets, blocks, batch_blocks=2))
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    for target in (targets[1], targets[-1]):
        layer, step = factors[target.name], 0.05
        for i in (0, len(layer.inn) - 1):
            component = torch.outer(layer.out[i], layer.inn[i]).double()
            losses = []
            for move in (-step, 2 * step, -step):
                target.matrix.add_(move * component)
                losses.append(score(model, blocks, batch_blocks=3).loss)
            change = (losses[0] - losses[1]) / (2 * step)
            assert change == pytest.approx(changes[target.name][i], rel=0.02, abs=1e-4)


def test_components_that_a_bank_does_not_hold_share_the_rest() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    whole = {t.name: decompose(t.name, t.matrix, None, None, min(t.shape.m, t.shape.n)) for t in targets}
    held = {name: Factors(f.out[:10], f.inn[:10], f.sigma) for name, f in whole.items()}
    blocks = Examples.causal(torch.randint(0, models.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)))
    gradients = mean_gradients(model, targets, blocks, batch_blocks=2)
    full, part = component_changes(targets, whole, gradients), component_changes(targets, held, gradients)
    for name in full:
        np.testing.assert_allclose(part[name][:10], full[name][:10], atol=1e-9)
        np.testing.assert_allclose(part[name].sum(), full[name].sum(), atol=1e-6)
        assert len(set(part[name][10:])) == 1


def test_sensitivities_truncate_one_layer_at_a_time() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec(layers="query-value"))
    factors = {t.name: decompose(t.name, t.matrix, None, None, min(t.shape.m, t.shape.n)) for t in targets}
    blocks = Examples.causal(torch.randint(0, models.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)))
    space = RankSpace(tuple(t.shape for t in targets), 10**5, "pivoted")
    loss = untrained_loss(model, targets, factors, blocks, batch_blocks=2)
    measured = sensitivities(space, loss)
    name = targets[0].name
    rank = rules.rank_at(space, space[name], 0.5)
    assert rank is not None
    assert measured[name][0.5] == loss(RankMap({name: rank}))
    assert measured.keys() == {t.name for t in targets}
    assert loss(RankMap()) == score(model, blocks, batch_blocks=2).loss


def test_every_published_method_is_there() -> None:
    assert set(METHODS) == {"svd", "fwsvd", "asvd", "svd-llm", "svd-llm-v2", "zs-svd", "io-svd", "bolaco"}
    assert {method.allocation for method in METHODS.values()} == set(get_args(Allocation)) - {"closed-form"}
