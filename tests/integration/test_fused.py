"""A model compiled around its target layers computes what it computes uncompiled, and is compiled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from rank_search.compress.low_rank import compressed, place, restore
from rank_search.compress.nested_linear import NestedLinear
from rank_search.preparing import Prepared, prepare
from rank_search.ranks import RankMap
from rank_search.spec import load_study_file
from rank_search.task import Examples
from rank_search.train.fused import blocks_of, can_fuse, fused
from tests.conftest import StudyFactory

# The compiler looks at .grad of all it traces; outside of tests it keeps the warning to itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(params=["pivoted", "two-factor"])
def prepared(tiny_study: StudyFactory, request: pytest.FixtureRequest) -> Prepared:
    return prepare(load_study_file(tiny_study(targets={"storage": request.param})))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _loss_and_gradients(prepared: Prepared, factors: Sequence[Tensor], *, fuse: bool) -> tuple[float, list[Tensor]]:
    for factor in factors:
        factor.grad = None
        factor.requires_grad_()
    examples = Examples.of(prepared.loaded.task, prepared.splits.train.columns)[torch.arange(4)]
    if fuse:
        with fused(prepared.model, prepared.targets, backend="aot_eager", dtype=torch.float32) as copies:
            loss = examples.task.loss(prepared.model, examples.tensors)
            loss.backward()
            copies.hand_gradients_over()
    else:
        loss = examples.task.loss(prepared.model, examples.tensors)
        loss.backward()
    gradients = [torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in factors]
    return loss.item(), gradients


def _assert_same(prepared: Prepared, factors: Sequence[Tensor]) -> None:
    loss, gradients = _loss_and_gradients(prepared, factors, fuse=False)
    fused_loss, fused_gradients = _loss_and_gradients(prepared, factors, fuse=True)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert any(gradient.any() for gradient in gradients)
    for one, other in zip(gradients, fused_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_losses_and_gradients_stay_and_all_rank_maps_share_one_compilation(prepared: Prepared) -> None:
    factors = prepared.bank.on(prepared.device)
    compilations = []
    for kept in (0.9, 0.8, 0.7):  # in two-factor storage the first leaves several layers dense
        # On a GPU ranks are padded, so that none is 1, which is a constant to the compiler.
        rank_map = RankMap({name: max(2, rank) for name, rank in prepared.allocator.closed_form(kept).items()})
        with compressed(prepared.targets, factors, rank_map) as layers:
            _assert_same(prepared, [factor for layer in layers.values() for factor in layer.factors])
        compilations.append(counters["stats"]["unique_graphs"])
    assert compilations == [1, 1, 1]
    assert not counters["graph_break"]


def test_nested_layers_at_any_of_their_ranks(prepared: Prepared) -> None:
    rank = torch.tensor(0)
    layers = {
        target.name: NestedLinear(
            target, prepared.bank[target.name], rank, masked=True, largest=6 + index % 3, ever_dense=index % 2 == 0
        )
        for index, target in enumerate(prepared.targets)
    }
    place(prepared.targets, layers)
    for at in (4, 6):
        rank.fill_(at)
        _assert_same(prepared, [factor for layer in layers.values() for factor in layer.factors])
    restore(prepared.targets)


def test_the_model_is_as_before_even_after_an_error(prepared: Prepared) -> None:
    before = [(name, type(module), module.forward.__func__) for name, module in prepared.model.named_modules()]
    with suppress(ZeroDivisionError), fused(prepared.model, prepared.targets, backend="aot_eager"):
        assert all("forward" in vars(block) for block in blocks_of(prepared.model))
        raise ZeroDivisionError
    assert [(name, type(m), m.forward.__func__) for name, m in prepared.model.named_modules()] == before


def test_the_copies_follow_the_factors(prepared: Prepared) -> None:
    factors, rank_map = prepared.bank.on(prepared.device), prepared.allocator.closed_form(0.5)
    with (
        compressed(prepared.targets, factors, rank_map),
        fused(prepared.model, prepared.targets, backend="aot_eager") as copies,
    ):
        with torch.no_grad():
            for factor in copies.factors:
                factor.add_(1.0)
        copies.refresh()
        for factor, copy in zip(copies.factors, copies.copies, strict=True):
            torch.testing.assert_close(copy, factor.to(torch.bfloat16))


def test_parts_of_matrices_are_not_fused(tiny_study: StudyFactory) -> None:
    whole = prepare(load_study_file(tiny_study()))
    heads = prepare(load_study_file(tiny_study(targets={"granularity": "head"})))
    assert can_fuse(whole.targets)
    assert not can_fuse(heads.targets)
    assert not can_fuse([])
    assert isinstance(whole.model, nn.Module)
