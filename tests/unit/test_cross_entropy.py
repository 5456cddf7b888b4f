"""Cross-entropy in pieces is cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rank_search import cross_entropy
from rank_search.cross_entropy import mean_cross_entropy


@pytest.fixture(params=[7, 1 << 24], ids=["pieces", "whole"])
def _piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_PIECE", request.param)


@pytest.mark.usefixtures("_piece")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_torch(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    values = (4 * torch.randn(11, 5, generator=random)).to(dtype)
    labels = torch.randint(5, (11,), generator=random)
    labels[[0, 4]] = -100
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    loss = mean_cross_entropy(ours, labels, ignored=-100)
    expected = F.cross_entropy(theirs.float(), labels, ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not ours.grad[[0, 4]].any()


def test_infinite_logits_do_not_pass_for_a_number() -> None:
    logits = torch.tensor([[float("inf"), 0.0]])
    assert not torch.isfinite(mean_cross_entropy(logits, torch.tensor([0]), ignored=-100))


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    loss = mean_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), ignored=-100)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, torch.tensor(3.0).log())
