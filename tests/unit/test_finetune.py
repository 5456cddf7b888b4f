"""The short fine-tune."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rank_search.compress.low_rank import compressed
from rank_search.errors import NonFiniteLossError
from rank_search.factors.decompose import decompose
from rank_search.model.targets import find_targets, weight_matrix
from rank_search.ranks import RankMap
from rank_search.spec import FinetuneSpec, TargetSpec
from rank_search.task import Examples
from rank_search.train.finetune import FinetuneResult, batches, finetune, learning_rate_factor, rank_scale
from tests.data import models


def _text_blocks(count: int, length: int = 24) -> Tensor:
    ids = models.tokenizer()(models.text(40_000))["input_ids"][: count * length]
    return torch.tensor(ids, dtype=torch.int32).view(count, length)


BLOCKS = _text_blocks(32)


def _tune(
    family: str, spec: FinetuneSpec, *, seed: int = 0, blocks: Tensor = BLOCKS
) -> tuple[FinetuneResult, dict[str, Tensor], dict[str, Tensor]]:
    """Result, and all parameters of the compressed model before and after."""
    model = models.make(family)
    targets = find_targets(model, TargetSpec())
    bank = {t.name: decompose(t.name, weight_matrix(t.module), None, None, t.shape.max_rank()) for t in targets}
    # The first target layer stays dense.
    with compressed(targets, bank, RankMap({t.name: t.shape.max_rank() // 2 for t in targets[1:]})) as layers:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        result = finetune(model, list(layers.values()), Examples.causal(blocks), spec, seed=seed)
        after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        factors = {id(factor) for layer in layers.values() for factor in layer.factors}
        assert not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in factors)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not model.training
    return result, before, after


@pytest.mark.parametrize("train", ["factors", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_it_lowers_the_training_loss(family: str, train: str) -> None:
    spec = FinetuneSpec(steps=30, batch_blocks=8, learning_rate=1e-2, train=train)  # type: ignore[arg-type]
    result, _, _ = _tune(family, spec)
    assert len(result.losses) == 30
    assert sum(result.losses[-5:]) / 5 < result.losses[0] - 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_factors_alone_are_trained(family: str) -> None:
    _, before, after = _tune(family, FinetuneSpec(steps=2, learning_rate=1e-2))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    factors = {name for name in before if name.endswith(("inner.weight", "outer.weight"))}
    assert changed == factors
    assert len(factors) > 4


def test_everything_is_trained_where_the_study_says_so() -> None:
    _, before, after = _tune("llama", FinetuneSpec(steps=2, learning_rate=1e-2, train="all"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_seed_trains_the_same_and_another_one_does_not() -> None:
    spec = FinetuneSpec(steps=3, learning_rate=1e-2)
    first, again, other = _tune("llama", spec)[0], _tune("llama", spec)[0], _tune("llama", spec, seed=1)[0]
    assert first == again
    assert first != other


def test_no_steps_change_nothing() -> None:
    result, before, after = _tune("llama", FinetuneSpec(steps=0))
    assert result.losses == ()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_is_an_error_with_its_step() -> None:
    spec = FinetuneSpec(steps=5, learning_rate=1e30)
    with pytest.raises(NonFiniteLossError, match=r"^training loss is (nan|inf) at step [2-5] of 5$"):
        _tune("llama", spec)


def test_gradients_are_clipped() -> None:
    # Steps of AdamW do not depend on the gradient's size, until it is as small as the addend in its denominator.
    _, before, after = _tune("llama", FinetuneSpec(steps=2, learning_rate=1e-2, clip=1e-12))
    assert all(float((after[name] - before[name]).abs().max()) < 1e-4 for name in before)


def test_weight_decay_shrinks_the_factors() -> None:
    norms = []
    for decay in (0.0, 5.0):
        _, _, after = _tune("llama", FinetuneSpec(steps=5, learning_rate=1e-2, weight_decay=decay))
        norms.append(sum(float(after[name].norm()) for name in after if name.endswith("inner.weight")))
    assert norms[1] < 0.95 * norms[0]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (2, 0.5), (10, 0.0), (10, 0.1), (100, 0.1), (100, 0.99)])
def test_the_learning_rate_rises_then_falls_by_a_cosine(steps: int, warmup: float) -> None:
    rates = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    rising = max(1, round(warmup * steps)) if warmup else 0
    assert max(rates) == pytest.approx(1.0)
    assert all(rate > 0 for rate in rates)
    assert rates[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    falling = rates[rising:]
    assert all(a > b for a, b in pairwise(falling))
    if len(falling) >= 50:
        assert falling[len(falling) // 2] == pytest.approx(0.5, abs=0.02)
        assert falling[-1] < 0.01


def test_every_block_is_seen_once_an_epoch() -> None:
    blocks = torch.arange(10).view(10, 1).repeat(1, 3)
    seen = torch.cat([batch["input_ids"][:, 0] for batch in batches(Examples.causal(blocks), 4, 5, seed=0)])
    assert seen[:10].sort().values.tolist() == list(range(10))
    assert seen[10:].sort().values.tolist() == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_fewer_blocks_than_a_batch_are_repeated() -> None:
    blocks = torch.arange(3).view(3, 1)
    drawn = [batch["input_ids"] for batch in batches(Examples.causal(blocks), 7, 2, seed=0)]
    assert [len(batch) for batch in drawn] == [7, 7]
    assert torch.bincount(torch.cat(drawn).flatten()).tolist() in ([5, 5, 4], [5, 4, 5], [4, 5, 5])


def test_the_order_depends_on_the_seed_alone() -> None:
    blocks = Examples.causal(torch.arange(10).view(10, 1))
    orders = [
        torch.cat([batch["input_ids"] for batch in batches(blocks, 5, 2, seed=seed)]).flatten().tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (FinetuneSpec(), 100),
        (FinetuneSpec(steps=7), 7),
        (FinetuneSpec(steps=0), 0),
        (FinetuneSpec(tokens=8 * 24), 1),
        (FinetuneSpec(tokens=8 * 24 + 1), 2),
        (FinetuneSpec(tokens=1), 1),
        (FinetuneSpec(tokens=1000, batch_blocks=2), 21),
    ],
)
def test_a_budget_in_tokens_is_met_with_whole_steps(spec: FinetuneSpec, steps: int) -> None:
    assert spec.steps_for(24) == steps
    if spec.tokens is not None:
        assert math.ceil(spec.tokens / (spec.batch_blocks * 24)) == steps


def test_in_pivoted_storage_the_learning_rate_falls_with_what_is_kept_down_to_a_floor() -> None:
    spec = FinetuneSpec(learning_rate=1e-3)
    assert spec.at(0.4, "pivoted").learning_rate == pytest.approx(6e-4)
    assert spec.at(0.99, "pivoted").learning_rate == spec.at(1.0, "pivoted").learning_rate == pytest.approx(1.25e-4)
    assert spec.at(0.4, "pivoted").at(0.9, "pivoted") == spec.at(0.4, "pivoted")
    assert FinetuneSpec().at(0.5, "pivoted").learning_rate == pytest.approx(4e-4)


def test_in_two_factor_storage_it_is_one_for_all_rank_maps_unless_it_is_told_otherwise() -> None:
    assert {FinetuneSpec().at(kept, "two-factor").learning_rate for kept in (0.3, 0.9)} == {4e-4}
    told = FinetuneSpec(learning_rate_scale="removed")
    assert told.at(0.5, "two-factor").learning_rate == pytest.approx(4e-4)
    assert told.at(0.75, "two-factor").learning_rate == pytest.approx(2e-4)
    by_rank = FinetuneSpec(learning_rate_scale="rank").at(0.5, "pivoted")
    assert (by_rank.learning_rate, by_rank.learning_rate_scale) == (8e-4, "rank")


def test_scaled_by_ranks_each_layer_moves_by_its_own_rate() -> None:
    assert [rank_scale(rank, 64) for rank in (1, 32, 61, 64)] == [1.0, 0.5, 1 / 16, 1 / 16]
    spec = FinetuneSpec(steps=1, learning_rate=1e-2, learning_rate_scale="rank", warmup=0.0, clip=1e9)
    _, before, after = _tune("llama", spec)
    moved = {
        round(float((after[name] - before[name]).abs().max()), 6)
        for name in before
        if name.endswith("inner.weight") and not torch.equal(after[name], before[name])
    }
    # AdamW's first step is the learning rate itself, whatever the gradient.
    assert len(moved) > 1
    assert all(step <= 1e-2 for step in moved)
