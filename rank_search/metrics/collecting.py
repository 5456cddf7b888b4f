"""Metrics of one scoring, filled batch by batch beside the loss.

A metric is a module of ``evaluate``: one of those in ``modules``, which need no network, or one of the hub. What it is
given follows from its name and the task: losses, classes, or texts that the model writes by itself.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rank_search.errors import MetricError, one_line
from rank_search.spec import METRICS
from rank_search.task import IGNORED, Batch, Task

Given = Literal["losses", "classes", "texts"]


def check_metrics(names: Sequence[str]) -> None:
    """Load every metric once, so that one that cannot be is refused before minutes of work.

    Raises:
        MetricError: naming the metric.
    """
    for name in names:
        _load(name)


class Metrics:
    """The metrics of one scoring; an observer of :func:`rank_search.score.score`."""

    def __init__(self, names: Sequence[str], task: Task, tokenizer: Any) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._metrics = [_Metric(name, _load(name), _given(name, task)) for name in names]

    def observe(
        self,
        model: Any,
        batch: Batch,
        logits: Float[Tensor, "predictions classes"],
        labels: Int[Tensor, " predictions"],
        losses: Float[Tensor, " predictions"],
    ) -> None:
        """Take in one batch; where texts are asked for, the model writes them now."""
        asked = labels != IGNORED
        inputs: dict[Given, dict[str, Any]] = {}
        for given in {metric.given for metric in self._metrics}:
            if given == "losses":
                inputs[given] = {"losses": losses[asked].double().tolist()}
            elif given == "classes":
                classes = logits.argmax(-1)[asked].tolist()
                inputs[given] = {"predictions": classes, "references": labels[asked].tolist()}
            else:
                inputs[given] = self._written(model, batch)
        for metric in self._metrics:
            metric.add(inputs[metric.given])

    def values(self) -> dict[str, float]:
        """Metric → value over all batches; a metric of several values gives ``metric.value`` for each.

        Raises:
            MetricError: a metric failed, or gave no number.
        """
        return {name: value for metric in self._metrics for name, value in metric.values().items()}

    def _written(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Texts of greedy decoding, at most as long as the longest reference, and the references."""
        labels = batch["labels"]
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, num_beams=1,
            max_new_tokens=labels.shape[1],
        )  # fmt: skip
        padding = self._tokenizer.pad_token_id
        references = torch.where(labels == IGNORED, padding, labels)
        decode = self._tokenizer.batch_decode
        return {
            "predictions": decode(ids, skip_special_tokens=True),
            "references": decode(references, skip_special_tokens=True),
        }


@dataclass(frozen=True)
class _Metric:
    name: str
    module: Any
    given: Given

    def add(self, inputs: dict[str, Any]) -> None:
        try:
            self.module.add_batch(**inputs)
        except (ValueError, TypeError, KeyError) as error:
            raise MetricError(f"metric {self.name!r} does not take {self.given}: {one_line(error)}") from error

    def values(self) -> dict[str, float]:
        try:
            found = self.module.compute()
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, ZeroDivisionError) as error:
            raise MetricError(f"metric {self.name!r} failed: {one_line(error)}") from error
        numbers = {key: float(value) for key, value in (found or {}).items() if _is_number(value)}
        if not numbers:
            raise MetricError(f"metric {self.name!r} gave no number; choose another one")
        if len(numbers) == 1:
            return {self.name: next(iter(numbers.values()))}
        return {f"{self.name}.{key}": value for key, value in numbers.items()}


def _given(name: str, task: Task) -> Given:
    if name == "perplexity":
        return "losses"
    return "texts" if task.shifts_right else "classes"


def _is_number(value: object) -> bool:
    try:
        return not math.isnan(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"""Errors of writing into an open file, which name none."""


def _load(name: str) -> Any:
    """A module of ``evaluate``, with nothing in it yet."""
    import evaluate

    place = str(resources.files("rank_search.metrics").joinpath("modules", name)) if name in METRICS else name
    if name not in METRICS and Path(name).exists():
        # The library would prefer a folder of that name where the command happens to be started.
        raise MetricError(f"metric {name!r} is a name of the hub, but the current folder holds something of that name")
    try:
        # In memory: the library's files on disk are shared by all processes of a user.
        return evaluate.load(place, keep_in_memory=True)
    except (OSError, ValueError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        reason = one_line(error)
        if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_DISKS):
            # The system's, about a file; what the library says about the hub names none.
            way_out = "name a folder that can be written in HF_HOME"
            raise MetricError(f"metric {name!r} cannot be kept in the cache: {reason}; {way_out}") from error
        if isinstance(error, FileNotFoundError):
            reason = "the hub has none of that name, or cannot be reached"
        raise MetricError(
            f"metric {name!r} cannot be loaded: {reason}; {', '.join(METRICS)} need no network"
        ) from error
