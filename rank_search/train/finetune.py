"""The short fine-tune of a trial: AdamW, warm-up and cosine, no host synchronisation in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rank_search.compress.low_rank import LowRankLinear
from rank_search.errors import NonFiniteLossError
from rank_search.model.device import autocast, deterministic
from rank_search.progress import SILENT, Progress
from rank_search.score import next_token_loss
from rank_search.spec import FinetuneSpec


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """Training loss of every step, nats per token."""

    losses: tuple[float, ...]


def finetune(
    model: nn.Module,
    layers: Sequence[LowRankLinear],
    blocks: Int[Tensor, "blocks tokens"],
    spec: FinetuneSpec,
    *,
    seed: int,
    progress: Progress = SILENT,
) -> FinetuneResult:
    """Train the factors in ``layers`` (or, with ``spec.train = "all"``, every parameter) on ``blocks``, in place.

    The model stays in evaluation mode: a run this short repairs what truncation broke, and dropout would only blur it.

    Raises:
        NonFiniteLossError: the loss or a gradient became NaN or infinite.
    """
    steps = spec.steps_for(blocks.shape[1])
    if steps == 0:
        return FinetuneResult(())
    trained: list[Tensor] = [factor for layer in layers for factor in layer.factors]
    if spec.train == "all":
        trained = list(model.parameters())
    if not trained:
        return FinetuneResult(())
    with _requiring_grad(trained):
        losses = train_steps(model, trained, blocks, spec, steps, seed=seed, title="fine-tune", progress=progress)
    return FinetuneResult(_checked(losses))


def train_steps(
    model: nn.Module,
    trained: Sequence[Tensor],
    blocks: Int[Tensor, "blocks tokens"],
    spec: FinetuneSpec,
    steps: int,
    *,
    seed: int,
    title: str,
    progress: Progress = SILENT,
    before_step: Callable[[int], None] = lambda _index: None,
) -> Float[Tensor, " steps"]:
    """The loop of every fine-tune: ``steps`` of AdamW on ``trained``; returns each step's loss, on the device.

    ``before_step`` is called with a step's index before its forward pass.
    """
    device = trained[0].device
    optimizer = torch.optim.AdamW(
        trained, lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=spec.weight_decay, fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, spec.warmup))
    losses = torch.zeros(steps, device=device)
    with deterministic(device), progress.step(title, steps) as step:
        for index, ids in enumerate(batches(blocks.to(device, torch.long), spec.batch_blocks, steps, seed)):
            before_step(index)
            with autocast(device):
                logits = model(input_ids=ids, use_cache=False).logits
            loss = next_token_loss(logits, ids)
            if loss.requires_grad:  # a step of the nested fine-tune may leave every layer dense
                loss.backward()
                nn.utils.clip_grad_norm_(trained, spec.clip)
                optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses[index] = loss.detach()
            step.advance()
    return losses


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Learning rate relative to its peak: linear rise over the warm-up, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def batches(
    blocks: Int[Tensor, "blocks tokens"], batch_blocks: int, steps: int, seed: int
) -> Iterator[Int[Tensor, "batch tokens"]]:
    """Every block once an epoch, in an order of its own each epoch; the order depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_blocks:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:batch_blocks].to(blocks.device, non_blocking=True)]
        order = order[batch_blocks:]


@contextmanager
def _requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


def _checked(losses: Float[Tensor, " steps"]) -> tuple[float, ...]:
    values = losses.tolist()
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteLossError(f"training loss is {value} at step {index + 1} of {len(values)}")
    return tuple(values)
