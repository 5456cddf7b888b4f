"""Validation loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rank_search.errors import NonFiniteLossError
from rank_search.score import Score, score
from rank_search.task import CAUSAL_LM, Examples
from tests.data import models

BLOCKS = (torch.arange(5 * 10).view(5, 10) * 31 % models.VOCABULARY).int()
EXAMPLES = Examples.causal(BLOCKS)


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class _Fixed(nn.Module):
    """Gives the next token the probability ``p[previous]``, and the three others the rest in equal parts."""

    def __init__(self, p: list[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> _Output:
        follow = (input_ids + 1) % 4
        logits = ((1 - self.p[input_ids]) / 3).unsqueeze(-1).expand(*input_ids.shape, 4).clone()
        logits.scatter_(-1, follow.unsqueeze(-1), self.p[input_ids].unsqueeze(-1))
        return _Output(logits.log())


def test_it_is_the_mean_over_predicted_tokens_in_nats() -> None:
    blocks = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    result = score(_Fixed([0.5, 0.25, 0.8, 0.1]), Examples.causal(blocks), batch_blocks=8)
    first = -(math.log(0.5) + math.log(0.25) + math.log(0.8)) / 3
    second = -(math.log(0.25) + math.log(0.8) + math.log(0.1)) / 3
    assert result.tokens == 6
    assert result.loss == pytest.approx((first + second) / 2, rel=1e-6)
    # Of the mean of two: half of their distance.
    assert result.standard_error == pytest.approx(abs(first - second) / 2, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp((first + second) / 2), rel=1e-6)


def test_one_block_takes_its_standard_error_over_tokens() -> None:
    losses = torch.tensor([0.5, 0.25, 0.8]).log()
    result = score(_Fixed([0.5, 0.25, 0.8, 0.1]), Examples.causal(torch.tensor([[0, 1, 2, 3]])), batch_blocks=8)
    assert result.standard_error == pytest.approx(float(losses.std()) / math.sqrt(3), rel=1e-5)


def test_one_predicted_token_has_no_standard_error() -> None:
    result = score(_Fixed([0.5, 0.25, 0.8, 0.1]), Examples.causal(torch.tensor([[0, 1]])), batch_blocks=8)
    assert result.loss == pytest.approx(math.log(2))
    assert result.standard_error == 0
    assert result.tokens == 1


@pytest.mark.parametrize("family", models.FAMILIES)
def test_it_agrees_with_the_models_own_loss(family: str) -> None:
    model = models.make(family)
    with torch.no_grad():
        own = float(model(input_ids=BLOCKS.long(), labels=BLOCKS.long()).loss)
    assert score(model, EXAMPLES, batch_blocks=5).loss == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("batch_blocks", [1, 2, 100])
def test_it_does_not_depend_on_the_batches(batch_blocks: int) -> None:
    model = models.make("llama")
    expected, found = (
        score(model, EXAMPLES, batch_blocks=5),
        score(model, EXAMPLES, batch_blocks=batch_blocks),
    )
    assert found.tokens == expected.tokens == 5 * 9
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)


def test_a_loss_that_is_not_finite_never_becomes_a_number() -> None:
    blocks = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2], [1, 2, 1, 2]])
    with pytest.raises(NonFiniteLossError, match=r"^validation loss is inf \(2 of 3 blocks are not finite\)$"):
        score(_Fixed([0.0, 0.25, 0.8, 0.1]), Examples.causal(blocks), batch_blocks=2)
    with pytest.raises(NonFiniteLossError, match=r"^validation loss is nan"):
        score(_Fixed([math.nan, 0.25, 0.8, 0.1]), Examples.causal(blocks), batch_blocks=2)


def test_scoring_needs_no_gradients_and_changes_nothing() -> None:
    model = models.make("llama").requires_grad_(True)
    score(model, EXAMPLES, batch_blocks=5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_of_half_precision_logits_is_taken_in_single_precision() -> None:
    half = _Fixed([0.5, 0.25, 0.8, 0.1]).bfloat16()
    logits, labels = CAUSAL_LM.predictions(half, {"input_ids": torch.arange(10).view(2, 5) % 4})
    assert logits.dtype == torch.float32
    assert torch.equal(labels, torch.tensor([1, 2, 3, 0, 2, 3, 0, 1]))


def test_perplexity_of_a_hopeless_loss_is_infinite() -> None:
    assert Score(1000.0, 0.0, 1).perplexity == math.inf
