"""Metrics through ``evaluate``: values computed by hand, and what is refused."""

from __future__ import annotations

import copy
import errno
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rank_search.errors import MetricError
from rank_search.metrics.collecting import Metrics, check_metrics
from rank_search.spec import METRICS
from rank_search.task import CAUSAL_LM, IGNORED, SEQ2SEQ_LM, SEQUENCE_CLASSIFICATION
from tests.data import models


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _logits(classes: list[int], count: int = 3) -> torch.Tensor:
    return torch.eye(count)[classes] * 5


def test_accuracy_and_f1_over_two_batches() -> None:
    metrics = Metrics(["accuracy", "f1"], SEQUENCE_CLASSIFICATION, None)
    for predicted, right in (([0, 1, 2], [0, 1, 1]), ([2, 0], [2, 1])):
        metrics.observe(nn.Module(), {}, _logits(predicted), torch.tensor(right), torch.zeros(len(right)))
    # Class 0: 1 right of 2 predicted and 1 there; class 1: 1 of 1 and 3; class 2: 1 of 2 and 1.
    assert metrics.values() == pytest.approx({"accuracy": 3 / 5, "f1": (2 / 3 + 2 / 4 + 2 / 3) / 3})


def test_what_is_not_asked_does_not_count() -> None:
    metrics = Metrics(["accuracy", "perplexity"], CAUSAL_LM, None)
    labels = torch.tensor([0, IGNORED, 2])
    metrics.observe(nn.Module(), {}, _logits([0, 1, 1]), labels, torch.tensor([1.0, 0.0, 3.0]))
    assert metrics.values() == pytest.approx({"accuracy": 0.5, "perplexity": math.exp(2)})


class _Writer(nn.Module):
    """Writes the same texts whatever it reads."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts
        self.longest = 0

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        self.longest = max_new_tokens
        rows = [models.tokenizer()(text)["input_ids"] for text in self.texts]
        width = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def test_exact_match_is_of_texts_that_the_model_writes() -> None:
    tokenizer = copy.deepcopy(models.tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    references = ["low rank", "front"]
    rows = [tokenizer(text)["input_ids"] for text in references]
    width = max(map(len, rows))
    labels = torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in rows])
    batch = {"input_ids": labels.clamp(0), "attention_mask": torch.ones_like(labels), "labels": labels}
    writer = _Writer(["low rank", "back"])
    metrics = Metrics(["exact_match"], SEQ2SEQ_LM, tokenizer)
    metrics.observe(writer, batch, torch.zeros(2 * width, 3), labels.flatten(), torch.zeros(2 * width))
    assert metrics.values() == {"exact_match": 0.5}
    assert writer.longest == width


def test_all_that_come_along_can_be_loaded() -> None:
    check_metrics(list(METRICS))


def test_a_metric_that_the_hub_does_not_give_is_refused_in_one_line() -> None:
    with pytest.raises(MetricError, match=r"^metric 'owner/none' cannot be loaded: .*need no network$") as caught:
        check_metrics(["owner/none"])
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", "/proc/none/modules")
    with pytest.raises(
        MetricError, match=r"^metric 'accuracy' cannot be kept in the cache: .*'/proc/none'; name a fold"
    ):
        check_metrics(["accuracy"])


def test_a_full_disk_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # of a write into an open file, which names none

    monkeypatch.setattr("evaluate.load", full)
    with pytest.raises(MetricError, match=r"cannot be kept in the cache: .*No space left on device; name a folder"):
        check_metrics(["accuracy"])


def test_a_metric_is_never_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MetricError, match="the current folder holds something of that name"):
        check_metrics(["mine"])


def test_losses_beyond_a_float_are_an_infinite_perplexity() -> None:
    metrics = Metrics(["perplexity"], CAUSAL_LM, None)
    metrics.observe(nn.Module(), {}, _logits([0]), torch.tensor([0]), torch.tensor([1000.0]))
    assert metrics.values() == {"perplexity": math.inf}
