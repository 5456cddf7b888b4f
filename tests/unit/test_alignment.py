"""Ranks rounded up for a GPU change nothing but the shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rank_search.compress import alignment
from rank_search.compress.alignment import aligned
from rank_search.compress.low_rank import LowRankLinear, aligned_rank, padded


def _layer(rank: int) -> LowRankLinear:
    random = torch.Generator().manual_seed(rank)
    inner, outer = torch.randn(rank, 12, generator=random), torch.randn(9, rank, generator=random)
    return LowRankLinear(inner, outer, nn.Parameter(torch.ones(9)))


@pytest.fixture
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "aligned_rank", lambda rank, _device: -(-rank // 4) * 4)


def test_only_a_gpu_wants_aligned_ranks() -> None:
    assert aligned_rank(5, torch.device("cpu")) == 5
    assert [aligned_rank(rank, torch.device("cuda")) for rank in (0, 1, 16, 17)] == [0, 16, 16, 32]


def test_padding_adds_rows_of_zeros() -> None:
    rows = torch.ones(3, 2)
    assert torch.equal(padded(rows, 5), torch.cat([rows, torch.zeros(2, 2)]))


@pytest.mark.usefixtures("_on_any_device")
def test_an_aligned_layer_is_the_same_function_and_comes_back_unchanged() -> None:
    model = nn.Sequential(_layer(5))
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    before, weight = model(x), model[0].inner.weight.clone()
    with aligned(model):
        assert model[0].inner.weight.shape == (8, 12)
        assert model[0].outer.weight.shape == (9, 8)
        torch.testing.assert_close(model(x), before)
    assert torch.equal(model[0].inner.weight, weight)
    assert torch.equal(model(x), before)


@pytest.mark.usefixtures("_on_any_device")
def test_training_an_aligned_layer_trains_the_layer_and_leaves_the_zeros() -> None:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(5):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    plain, other = nn.Sequential(_layer(5)), nn.Sequential(_layer(5))
    train(plain)
    with aligned(other):
        train(other)
        assert not other[0].inner.weight[5:].any()
        assert not other[0].outer.weight[:, 5:].any()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
