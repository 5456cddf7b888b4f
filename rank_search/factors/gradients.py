"""Gradients of the loss at the target layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rank_search.errors import NonFiniteLossError
from rank_search.model.device import autocast, deterministic
from rank_search.model.gradients import requiring_grad
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.task import IGNORED, Examples


def mean_gradients(
    model: nn.Module, targets: Sequence[Target], examples: Examples, *, batch_blocks: int, progress: Progress = SILENT
) -> dict[str, Float[Tensor, "m n"]]:
    """Module name → gradient of the loss on ``examples`` (their own labels, nats per prediction) at the weights.

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    device = next(model.parameters()).device
    weights = {id(target.module): target.module.weight for target in targets}
    parameters = [weight for weight in weights.values() if isinstance(weight, nn.Parameter)]
    total = torch.zeros((), device=device)
    predictions = torch.zeros((), device=device)
    with requiring_grad(parameters):
        with deterministic(device), progress.step("gradients", len(examples)) as step:
            for batch in examples.batches(batch_blocks, device):
                with torch.enable_grad(), autocast(device):
                    logits, labels = examples.task.predictions(model, batch)
                    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
                loss.backward()
                total += loss.detach()
                predictions += (labels != IGNORED).sum()
                step.advance(len(batch["input_ids"]))
        if not math.isfinite(float(total)):
            raise NonFiniteLossError(f"the model's loss on the calibration blocks is {float(total)}")
        count = int(predictions)  # a number: the model's layers may be on several devices
        return {target.name: _gradient(target) / count for target in targets}


def _gradient(target: Target) -> Float[Tensor, "m n"]:
    """The gradient at a target layer's matrix; zero where it had no part in the loss."""
    weight = target.module.weight
    assert isinstance(weight, Tensor)
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    # Conv1D stores its matrix transposed.
    gradient = gradient.T if isinstance(target.module, Conv1D) else gradient
    return target.part.of(gradient) if target.part else gradient
