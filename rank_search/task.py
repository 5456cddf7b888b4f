"""What a model is asked for: how it is loaded, and where its output is compared with what.

Training, scoring and statistics know examples and predictions only; what tells one task from another stands here and
in how :mod:`rank_search.data` makes examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.cross_entropy import mean_cross_entropy
from rank_search.spec import LOSS_UNITS, TaskName

IGNORED = -100
"""The label of a position at which nothing is predicted."""

Batch = Mapping[str, Tensor]
"""The tensors of some examples, first axis examples: ``labels``, where the task has them, and the model's inputs."""


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of prediction.

    Attributes:
        name: in study files.
        auto_class: the class of transformers that loads such a model.
        made_for: what a checkpoint of the task was made for, in messages.
        next_token: the labels are the inputs themselves, one token on.
        shifts_right: the decoder's inputs are made from the labels by the model itself.
        cached: the model would keep keys and values unless told not to.
    """

    name: TaskName
    auto_class: str
    made_for: str
    next_token: bool = False
    shifts_right: bool = False
    cached: bool = False

    @property
    def unit(self) -> str:
        """What a loss is a mean over."""
        return LOSS_UNITS[self.name]

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "examples positions classes"]:
        """The model's output at every position; a classifier has one position an example."""
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if self.shifts_right:
            shift: Any = model.prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = shift(labels=batch["labels"])
        if self.cached:
            inputs["use_cache"] = False
        logits: Tensor = model(**inputs).logits
        return logits if logits.dim() == 3 else logits.unsqueeze(1)

    def labels(self, batch: Batch) -> Int[Tensor, "examples labelled"]:
        """What is right at the first positions, :data:`IGNORED` where nothing is predicted."""
        return batch["input_ids"][:, 1:] if self.next_token else batch["labels"]

    def asked(self, batch: Batch) -> Bool[Tensor, "examples positions"] | None:
        """The positions at which the model is asked for a prediction; None for all, a causal model's last included."""
        return None if self.next_token else batch["labels"] != IGNORED

    def predictions(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Float[Tensor, "predictions classes"], Int[Tensor, " predictions"]]:
        """Float32 logits and labels of all examples in a row; nothing in it makes the host wait for the device."""
        labels = self.labels(batch)
        logits = self.logits(model, batch)[:, : labels.shape[1]]
        return logits.flatten(0, 1).float(), labels.flatten()

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Mean cross-entropy, nats per prediction."""
        labels, logits = self.labels(batch), self.logits(model, batch)
        # Labels for the positions after the last one, because to cut these off the logits would copy them.
        labels = F.pad(labels, (0, logits.shape[1] - labels.shape[1]), value=IGNORED)
        return mean_cross_entropy(logits.flatten(0, 1), labels.flatten(), ignored=IGNORED)


CAUSAL_LM = Task("causal-lm", "AutoModelForCausalLM", "causal language modelling", next_token=True, cached=True)
MASKED_LM = Task("masked-lm", "AutoModelForMaskedLM", "masked language modelling")
SEQUENCE_CLASSIFICATION = Task(
    "sequence-classification", "AutoModelForSequenceClassification", "sequence classification"
)
SEQ2SEQ_LM = Task(
    "seq2seq-lm", "AutoModelForSeq2SeqLM", "turning one text into another", shifts_right=True, cached=True
)
TASKS: Mapping[TaskName, Task] = {
    task.name: task for task in (CAUSAL_LM, MASKED_LM, SEQUENCE_CLASSIFICATION, SEQ2SEQ_LM)
}


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one task as tensors of equal length; integers of any width on any device."""

    task: Task
    tensors: Batch

    @classmethod
    def of(cls, task: Task, columns: Mapping[str, NDArray[np.integer[Any]]]) -> Examples:
        """Copies of the columns of a table of examples."""
        return cls(task, {name: torch.from_numpy(np.array(column)) for name, column in columns.items()})

    @classmethod
    def causal(cls, blocks: Int[Tensor, "blocks tokens"]) -> Examples:
        """Token blocks of which a causal language model predicts every token but the first."""
        return cls(CAUSAL_LM, {"input_ids": blocks})

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: slice | Int[Tensor, " chosen"]) -> Examples:
        return Examples(self.task, {name: tensor[index] for name, tensor in self.tensors.items()})

    @property
    def sequence_length(self) -> int:
        """Tokens of an example, its padding included."""
        return self.tensors["input_ids"].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors["input_ids"].device

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Examples:
        """The same examples on a device."""
        return Examples(self.task, {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()})

    def batches(self, size: int, device: torch.device) -> Iterator[Batch]:
        """All examples in their order, ``size`` at a time, as a model takes them."""
        for start in range(0, len(self), size):
            yield self[start : start + size].to(device, torch.long).tensors

    def unpadded(self, size: int, device: torch.device) -> Iterator[Batch]:
        """As :meth:`batches`, but without padding: at most ``size`` examples of one length at a time, short ones first.

        The order does not depend on ``size``.
        """
        mask = self.tensors.get("attention_mask")
        if mask is None:
            yield from self.batches(size, device)
            return
        lengths = [mask.sum(1)]
        if self.task.shifts_right:
            lengths.append((self.tensors["labels"] != IGNORED).sum(1))
        kinds, kind = torch.stack(lengths, 1).unique(dim=0, return_inverse=True)
        for index, sizes in enumerate(kinds.tolist()):
            same = self[(kind == index).nonzero().squeeze(1)]
            for batch in same.batches(size, device):
                yield {name: tensor[:, : sizes[-1 if name == "labels" else 0]] for name, tensor in batch.items()}
