"""The low-rank layer, and putting rank maps into models and taking them out again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rank_search.compress.low_rank import LowRankLinear, compressed, insert, restore
from rank_search.errors import RankMapError
from rank_search.factors.decompose import Factors, decompose
from rank_search.model.targets import Target, find_targets, rank_space, weight_matrix
from rank_search.ranks import LayerShape, RankMap
from rank_search.spec import TargetSpec
from tests.data import models


def _bank(targets: tuple[Target, ...], *, full: bool = False) -> dict[str, Factors]:
    return {
        target.name: decompose(
            target.name, weight_matrix(target.module), None, None,
            min(target.shape.m, target.shape.n) if full else target.shape.max_rank(),
        )
        for target in targets
    }  # fmt: skip


def _full(targets: tuple[Target, ...]) -> RankMap:
    return RankMap({target.name: min(target.shape.m, target.shape.n) for target in targets})


def _logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20) * 7 % models.VOCABULARY
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.fixture(params=["linear", "linear without bias", "conv1d"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    """A dense layer from 6 inputs to 9 outputs."""
    torch.manual_seed(0)
    if request.param == "conv1d":
        made: nn.Module = Conv1D(9, 6)  # type: ignore[no-untyped-call]
        for parameter in made.parameters():
            nn.init.normal_(parameter)
    else:
        made = nn.Linear(6, 9, bias=request.param == "linear")
    return made.requires_grad_(False)


def _target(layer: nn.Module) -> Target:
    return Target(LayerShape("layer", 9, 6), layer, ())


def test_at_full_rank_it_computes_what_the_dense_layer_does(layer: nn.Module) -> None:
    target = _target(layer)
    low_rank = LowRankLinear.of(_bank((target,), full=True)[target.name], 6, target)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(low_rank(x), layer(x), rtol=1e-4, atol=1e-5)


def test_it_computes_its_dense_matrix_and_the_bias(layer: nn.Module) -> None:
    target = _target(layer)
    low_rank = LowRankLinear.of(_bank((target,), full=True)[target.name], 2, target)
    x = torch.randn(2, 3, 6)
    assert low_rank.rank == 2
    assert torch.linalg.matrix_rank(low_rank.dense()) == 2
    bias = layer.bias if isinstance(layer.bias, torch.Tensor) else torch.zeros(9)
    torch.testing.assert_close(low_rank(x), x @ low_rank.dense().T + bias)


def test_it_holds_its_two_factors_and_the_dense_layers_own_bias(layer: nn.Module) -> None:
    target = _target(layer)
    low_rank = LowRankLinear.of(_bank((target,), full=True)[target.name], 2, target)
    biases = 0 if layer.bias is None else 9
    assert sum(parameter.numel() for parameter in low_rank.parameters()) == 2 * (6 + 9) + biases
    assert low_rank.outer.bias is layer.bias


def test_training_its_factors_leaves_the_bank_alone() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    bank = _bank(targets)
    before = {name: (factors.out.clone(), factors.inn.clone()) for name, factors in bank.items()}
    with compressed(targets, bank, RankMap({target.name: 2 for target in targets})) as layers, torch.no_grad():
        for layer in layers.values():
            for factor in layer.factors:
                factor.add_(1.0)
    assert all(
        torch.equal(before[name][0], bank[name].out) and torch.equal(before[name][1], bank[name].inn) for name in bank
    )


@pytest.mark.parametrize("width", [2, 4, 8])  # of the bank's six ranks: two as they are, two beside zeros, all
def test_a_layer_that_reads_the_bank_is_the_same_function(
    layer: nn.Module, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rank_search.compress.low_rank.aligned_rank", lambda _rank, _device: width)
    target = _target(layer)
    factors = _bank((target,), full=True)[target.name]
    reading, copied = LowRankLinear.reading(factors, 2, target), LowRankLinear.of(factors, 2, target)
    x = torch.randn(2, 3, 6)
    assert reading.rank == width
    assert reading.bias is layer.bias
    assert not any(factor.requires_grad for factor in reading.factors)
    torch.testing.assert_close(reading(x), copied(x))


def test_where_nothing_is_to_be_padded_a_layer_reads_the_banks_own_memory(layer: nn.Module) -> None:
    target = _target(layer)
    factors = _bank((target,))[target.name]
    reading = LowRankLinear.reading(factors, 2, target)
    assert reading.inner.weight.data_ptr() == factors.inn.data_ptr()
    assert reading.outer.weight.data_ptr() == factors.out.data_ptr()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_full_rank_reproduces_the_dense_model(family: str) -> None:
    model = models.make(family)
    targets = find_targets(model, TargetSpec())
    dense = _logits(model)
    with compressed(targets, _bank(targets, full=True), _full(targets)) as layers:
        assert layers.keys() == {target.name for target in targets}
        torch.testing.assert_close(_logits(model), dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_counted_parameters_are_those_of_the_compressed_model(family: str) -> None:
    model = models.make(family)
    spec = TargetSpec(storage="two-factor")
    targets = find_targets(model, spec)
    space = rank_space(model, targets, spec)
    # Every third layer stays dense.
    rank_map = RankMap({t.name: 1 + i % t.shape.max_rank() for i, t in enumerate(targets) if i % 3})
    assert space.num_params(RankMap()) == sum(parameter.numel() for parameter in model.parameters())
    with compressed(targets, _bank(targets), rank_map):
        counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == space.num_params(rank_map)
    assert space.kept_of_model(rank_map) == counted / space.model_params
    assert space.kept_of_targets(rank_map) == space.target_params(rank_map) / space.dense_params


def test_the_same_modules_are_back_afterwards_with_the_same_bits() -> None:
    model = models.make("gpt2")
    targets = find_targets(model, TargetSpec())
    modules = dict(model.named_modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with compressed(targets, _bank(targets), RankMap({target.name: 3 for target in targets})):
        assert all(isinstance(model.get_submodule(target.name), LowRankLinear) for target in targets)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_dense_model_is_back_after_an_error() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        compressed(targets, _bank(targets), RankMap({targets[0].name: 1})),
    ):
        raise RuntimeError("in the middle")
    assert model.get_submodule(targets[0].name) is targets[0].module


def test_a_shared_module_is_replaced_in_all_its_places() -> None:
    torch.manual_seed(0)
    model = models.SharedBlocks()
    targets = find_targets(model, TargetSpec())
    assert [target.name for target in targets] == ["layers.0.up", "layers.0.down"]
    dense = model(torch.ones(1, 8))
    down = model.get_submodule("layers.0.down")
    with compressed(targets, _bank(targets, full=True), _full(targets)) as layers:
        for block in ("layers.0", "layers.1"):
            assert model.get_submodule(f"{block}.up") is layers["layers.0.up"]
            assert model.get_submodule(f"{block}.down") is layers["layers.0.down"]
            assert model.get_submodule(f"{block}.again") is layers["layers.0.down"]
        torch.testing.assert_close(model(torch.ones(1, 8)), dense, rtol=1e-4, atol=1e-5)
    for place in ("layers.0.down", "layers.0.again", "layers.1.down", "layers.1.again"):
        assert model.get_submodule(place) is down


def test_a_shared_module_counts_once() -> None:
    model = models.SharedBlocks()
    targets = find_targets(model, TargetSpec())
    space = rank_space(model, targets, TargetSpec(storage="two-factor"))
    rank_map = RankMap({target.name: 2 for target in targets})
    insert(targets, _bank(targets), rank_map)
    assert sum(parameter.numel() for parameter in model.parameters()) == space.num_params(rank_map)
    restore(targets)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"model.layers.0.mlp.up_proj": 1, "model.layers.9.mlp.up_proj": 1}, "9.mlp.up_proj is not a target layer"),
        ({"model.layers.0.mlp.up_proj": 1, "model.layers.1.mlp.up_proj": 31}, "up_proj has rank 31, but its factor ba"),
    ],
)
def test_a_rank_map_that_does_not_fit_changes_nothing(ranks: dict[str, int], message: str) -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    with pytest.raises(RankMapError, match=message):
        insert(targets, _bank(targets), RankMap(ranks))
    assert all(model.get_submodule(target.name) is target.module for target in targets)


def test_an_empty_rank_map_is_the_dense_model() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    dense = _logits(model)
    with compressed(targets, _bank(targets), RankMap()) as layers:
        assert layers == {}
        assert torch.equal(_logits(model), dense)


def test_factors_take_the_dense_layers_dtype() -> None:
    model = models.make("llama").bfloat16()
    targets = find_targets(model, TargetSpec())
    with compressed(targets, _bank(targets), RankMap({targets[0].name: 2})) as layers:
        inner, outer = layers[targets[0].name].factors
        assert inner.dtype == outer.dtype == torch.bfloat16
