"""Tasks: what a model's output is compared with, and statistics of models that are no causal language models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rank_search.factors.statistics import collect_statistics
from rank_search.model.targets import find_targets
from rank_search.score import Score, score
from rank_search.spec import FinetuneSpec, TargetSpec
from rank_search.task import CAUSAL_LM, IGNORED, MASKED_LM, SEQ2SEQ_LM, SEQUENCE_CLASSIFICATION, TASKS, Batch, Examples
from rank_search.train.finetune import finetune
from tests.data import families

CPU = torch.device("cpu")
CLASSES = 3


@dataclass
class _Output:
    logits: Tensor


class _Classifier(PreTrainedModel):  # type: ignore[no-untyped-call]
    """One layer on every token, the mean over those that are no padding, and a head."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6)
        self.blocks = nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(6, 5, bias=False)})])
        self.head = nn.Linear(5, CLASSES)
        self.train(False)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> _Output:
        y = self.get_submodule("blocks.0.layer")(self.embedding(input_ids))
        weights = attention_mask / attention_mask.sum(1, keepdim=True)
        return _Output(self.head((y * weights.unsqueeze(-1)).sum(1)))


def _examples(lengths: tuple[int, ...] = (3, 5, 2, 5, 3), padding: int = 19) -> Examples:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, 19, mask.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(len(lengths))[:, None] % CLASSES
    tensors = {"input_ids": ids.where(mask, torch.tensor(padding)), "attention_mask": mask.long(), "labels": labels}
    return Examples(SEQUENCE_CLASSIFICATION, {name: tensor.int() for name, tensor in tensors.items()})


def test_every_task_has_its_class_of_transformers() -> None:
    import transformers

    assert all(hasattr(transformers, task.auto_class) for task in TASKS.values())
    assert all(name == task.name for name, task in TASKS.items())


def test_statistics_of_a_classifier_are_those_computed_by_hand() -> None:
    model, examples = _Classifier(), _examples()
    found = collect_statistics(model, find_targets(model, TargetSpec()), examples, batch_blocks=2, seed=3)
    layer = found["blocks.0.layer"]
    generator = torch.Generator().manual_seed(3)
    inputs, gradients = [], []
    for index in (2, 0, 4, 1, 3):  # by length
        length = int(examples.tensors["attention_mask"][index].sum())
        x = model.embedding(examples.tensors["input_ids"][index, :length].long())
        W, H = model.get_submodule("blocks.0.layer").weight, model.head.weight
        logits = (x @ W.T).mean(0) @ H.T + model.head.bias
        p = logits.softmax(-1)
        label = int(torch.multinomial(p, 1, generator=generator))
        # Every token has an equal part in the mean, hence the same gradient.
        g = (p - torch.eye(CLASSES)[label]) @ H / length
        inputs.append(x)
        gradients.append(g.expand(length, -1))
    x, g = torch.cat(inputs).double(), torch.cat(gradients).double()
    assert layer.A is not None
    assert layer.G is not None
    torch.testing.assert_close(layer.A, x.T @ x / len(x), rtol=1e-5, atol=1e-7)
    # A loss is one example's: the sum over its tokens, the mean over examples.
    torch.testing.assert_close(layer.G, g.T @ g / len(examples), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_blocks", [1, 5])
def test_statistics_depend_neither_on_padding_nor_on_batches(batch_blocks: int) -> None:
    model = _Classifier()
    targets = find_targets(model, TargetSpec())
    expected = collect_statistics(model, targets, _examples(), batch_blocks=2, seed=0)["blocks.0.layer"]
    found = collect_statistics(model, targets, _examples(padding=7), batch_blocks=batch_blocks, seed=0)
    torch.testing.assert_close(found["blocks.0.layer"].A, expected.A, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["blocks.0.layer"].G, expected.G, rtol=1e-5, atol=1e-7)


def test_unpadded_batches_hold_every_example_once_and_no_padding() -> None:
    lengths = (3, 5, 2, 5, 3)
    ids = [batch["input_ids"] for batch in _examples(lengths).unpadded(2, CPU)]
    assert [tuple(batch.shape) for batch in ids] == [(1, 2), (2, 3), (2, 5)]
    assert all(bool((batch != 19).all()) for batch in ids)


def test_sources_and_targets_are_both_unpadded() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0]])
    labels = torch.tensor([[4, IGNORED], [4, 5], [6, IGNORED]])
    examples = Examples(SEQ2SEQ_LM, {"input_ids": mask * 9, "attention_mask": mask, "labels": labels})
    batches = list(examples.unpadded(8, CPU))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 2), (1, 2)]
    assert [tuple(batch["labels"].shape) for batch in batches] == [(2, 1), (1, 2)]
    assert batches[0]["labels"].flatten().tolist() == [4, 6]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_loss_is_that_of_transformers(family: str) -> None:
    model, examples = families.trained(family), families.examples(family, 6)
    with torch.no_grad():
        own = float(model(**{name: tensor.contiguous() for name, tensor in examples.tensors.items()}).loss)
    assert float(examples.task.loss(model, examples.tensors)) == pytest.approx(own, rel=1e-5)
    found = score(model, examples, batch_blocks=4)
    assert found.loss == pytest.approx(own, rel=1e-5)
    assert found.tokens == int((examples.tensors["labels"] != IGNORED).sum())


def test_examples_of_unequal_length_weigh_by_their_predictions() -> None:
    """The loss is a mean over predictions, not over examples, and its error that of a ratio."""
    labels = torch.tensor([[1, IGNORED, IGNORED], [0, 1, 1]])

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor([0.2, 0.8]))

        def forward(self, input_ids: Tensor) -> _Output:
            return _Output(self.p.log().expand(*input_ids.shape, 2))

    found = score(Fixed(), Examples(MASKED_LM, {"input_ids": labels.clamp(0), "labels": labels}), batch_blocks=1)
    losses = [-math.log(0.8), -math.log(0.2), -math.log(0.8), -math.log(0.8)]
    assert found.tokens == 4
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    # Residuals of the two examples: predictions ÷ their mean number, times the distance of their mean losses.
    first, second = 0.5 * (losses[0] - found.loss), 1.5 * (sum(losses[1:]) / 3 - found.loss)
    assert found.standard_error == pytest.approx(abs(first - second) / 2, rel=1e-5)


def test_a_causal_model_predicts_every_token_but_the_first() -> None:
    ids = torch.arange(8).view(2, 4)
    assert CAUSAL_LM.labels({"input_ids": ids}).tolist() == [[1, 2, 3], [5, 6, 7]]
    assert CAUSAL_LM.asked({"input_ids": ids}) is None


def test_a_classifier_learns() -> None:
    examples = _examples(lengths=(3, 5, 2, 5, 3, 4))
    model = _Classifier()
    spec = FinetuneSpec(steps=60, batch_blocks=6, train="all", dense_learning_rate=0.1)
    losses = finetune(model, [], examples, spec, seed=0).losses
    assert losses[-1] < 0.1 < losses[0]
    assert score(model, examples, batch_blocks=2).loss == pytest.approx(losses[-1], abs=0.05)


def test_the_mean_of_folds() -> None:
    folds = [Score(1.0, 0.5, 10, {"accuracy": 0.5}), Score(3.0, 0.5, 12, {"accuracy": 1.0})]
    mean = Score.mean_of(folds)
    assert (mean.loss, mean.tokens, mean.metrics, mean.fold_losses) == (2.0, 22, {"accuracy": 0.75}, (1.0, 3.0))
    assert mean.standard_error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert Score.mean_of(folds[:1]) is folds[0]


def test_what_an_observer_sees() -> None:
    seen: list[tuple[int, int, int]] = []

    class Watch:
        def observe(self, model: nn.Module, batch: Batch, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
            seen.append((len(batch["input_ids"]), len(logits), len(labels)))
            assert losses.shape == labels.shape

        def values(self) -> dict[str, float]:
            return {"seen": float(len(seen))}

    result = score(_Classifier(), _examples(), batch_blocks=2, observer=Watch())
    assert seen == [(2, 2, 2), (2, 2, 2), (1, 1, 1)]
    assert result.metrics == {"seen": 3.0}
