"""The short fine-tune of a trial: AdamW, warm-up and cosine, no host synchronisation in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rank_search.compress.alignment import aligned
from rank_search.compress.low_rank import LowRankLinear
from rank_search.errors import NonFiniteLossError
from rank_search.model.device import autocast, deterministic
from rank_search.model.gradients import requiring_grad
from rank_search.model.spread import devices_of
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.spec import PLAIN_RATE, FinetuneSpec
from rank_search.task import IGNORED, Batch, Examples, Task
from rank_search.train.capture import CapturedStep
from rank_search.train.checkpoints import Checkpoint, Keeping
from rank_search.train.fused import NO_COPIES, Copies, can_fuse, fused

_NOT_CAPTURED = "the steps of this model cannot be recorded ({}); running them one by one"


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """Training loss of every step, nats per prediction."""

    losses: tuple[float, ...]


def finetune(
    model: nn.Module,
    layers: Sequence[LowRankLinear],
    examples: Examples,
    spec: FinetuneSpec,
    *,
    seed: int,
    targets: Sequence[Target] = (),
    progress: Progress = SILENT,
    capture: bool = True,
    parts: int = 1,
    checkpoint: Checkpoint | None = None,
) -> FinetuneResult:
    """Train the factors in ``layers`` (or, with ``spec.train = "all"``, every parameter) on ``examples``, in place.

    The model stays in evaluation mode: a run this short repairs what truncation broke, and dropout would only blur it.

    Args:
        parts: in so many the batch of a step goes through the model; they need less memory than the whole of it.
        checkpoint: where the state is kept now and then; the fine-tune goes on from one that is there. It stays.

    Raises:
        NonFiniteLossError: the loss or a gradient became NaN or infinite.
        Preempted: this process is to end before the fine-tune can; its checkpoint is written.
    """
    steps = spec.steps_for(examples.sequence_length)
    if steps == 0:
        return FinetuneResult(())
    with aligned(model):
        groups = _groups(model, layers, spec)
        if not groups:
            return FinetuneResult(())
        with (
            requiring_grad([parameter for group in groups for parameter in group.parameters]),
            fused_if_worth_it(model, targets, spec, groups[0].parameters[0].device, progress) as copies,
        ):
            losses = train_steps(
                model, groups, examples, spec, steps, seed=seed, title="fine-tune", progress=progress,
                capture=capture, copies=copies, parts=parts, checkpoint=checkpoint,
            )  # fmt: skip
    return FinetuneResult(_checked(losses))


def fused_if_worth_it(
    model: nn.Module, targets: Sequence[Target], spec: FinetuneSpec, device: torch.device, progress: Progress
) -> AbstractContextManager[Copies]:
    """The model fused inside the block, where that is asked for and possible: on one GPU, factors trained alone."""
    on_one = len(devices_of(model)) == 1
    if device.type == "cuda" and on_one and spec.compiled and spec.train == "factors" and can_fuse(targets):
        return fused(model, targets, progress=progress)
    return nullcontext(NO_COPIES)


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are trained at one learning rate (its peak)."""

    parameters: Sequence[Tensor]
    learning_rate: float


def factor_groups(layers: Iterable[tuple[Sequence[Tensor], float, int]], spec: FinetuneSpec) -> list[Group]:
    """The factors of layers, each given with its rank and its full rank, by the rates at which ``spec`` trains them."""
    scaled: dict[float, list[Tensor]] = {}
    for factors, rank, full_rank in layers:
        scale = rank_scale(rank, full_rank) if spec.learning_rate_scale == "rank" else 1.0
        scaled.setdefault(scale, []).extend(factors)
    rate = PLAIN_RATE if spec.learning_rate is None else spec.learning_rate
    return [Group(factors, rate * scale) for scale, factors in scaled.items()]


def _groups(model: nn.Module, layers: Sequence[LowRankLinear], spec: FinetuneSpec) -> list[Group]:
    groups = factor_groups(((layer.factors, layer.rank, layer.full_rank) for layer in layers), spec)
    if spec.train == "all":
        known = {id(factor) for group in groups for factor in group.parameters}
        dense = [parameter for parameter in model.parameters() if id(parameter) not in known]
        groups.append(Group(dense, spec.dense_learning_rate))
    return [group for group in groups if group.parameters]


def train_steps(
    model: nn.Module,
    groups: Sequence[Group],
    examples: Examples,
    spec: FinetuneSpec,
    steps: int,
    *,
    seed: int,
    title: str,
    progress: Progress = SILENT,
    before_step: Callable[[int], object] = lambda _index: None,
    capture: bool = True,
    copies: Copies = NO_COPIES,
    parts: int = 1,
    checkpoint: Checkpoint | None = None,
) -> Float[Tensor, " steps"]:
    """The loop of every fine-tune: ``steps`` of AdamW on ``groups``; returns each step's loss, on the device.

    ``before_step`` is called with a step's index before its forward pass; it may change the content of tensors, but
    not the work of a step: on one GPU it is recorded once and replayed (:class:`CapturedStep`), unless ``capture`` is
    False. ``parts`` and ``checkpoint``: as for :func:`finetune`.
    """
    trained = [parameter for group in groups for parameter in group.parameters]
    devices = devices_of(model)
    device = devices[0]
    on_one_gpu = device.type == "cuda" and len(devices) == 1
    optimizer = _adamw(groups, device, spec, on_one_gpu=on_one_gpu)

    def one_step(batch: Batch) -> Tensor:
        total = torch.zeros((), device=device)
        for part, share in _parts(examples.task, batch, parts):
            with autocast(device):
                loss = examples.task.loss(model, part)
            loss = loss if share is None else loss * share
            if loss.requires_grad:  # a step of the nested fine-tune may leave every layer dense
                loss.backward()
            total += loss.detach()
        if loss.requires_grad:
            copies.hand_gradients_over()
            nn.utils.clip_grad_norm_(trained, spec.clip)
            optimizer.step()
            copies.refresh()
        optimizer.zero_grad(set_to_none=True)
        return total

    do_step = one_step
    if on_one_gpu and capture:
        do_step = CapturedStep(model, one_step, on_refusal=lambda reason: progress.say(_NOT_CAPTURED.format(reason)))
    losses = torch.zeros(steps, device=device)
    keeping = Keeping(checkpoint, trained, optimizer, losses, progress)
    if first := keeping.resume():
        copies.refresh()
    moved = examples.to(device, torch.long)
    with deterministic(device), progress.step(title, steps) as step:
        step.advance(first)
        for index, batch in enumerate(batches(moved, spec.batch_blocks, steps, seed, first), start=first):
            before_step(index)
            _set_learning_rates(optimizer, groups, learning_rate_factor(index, steps, spec.warmup))
            losses[index] = do_step(batch)
            step.advance()
            keeping.after_step(index + 1)
    return losses


def _parts(task: Task, batch: Batch, parts: int) -> Iterator[tuple[Batch, Float[Tensor, ""] | None]]:
    """``batch`` in ``parts`` of almost one size, each with its share of the predictions; None: it is the whole."""
    if parts == 1:
        yield batch, None
        return
    predictions = (task.labels(batch) != IGNORED).sum()
    size = len(batch["input_ids"])
    for part in range(parts):
        rows = slice(size * part // parts, size * (part + 1) // parts)
        cut = {name: tensor[rows] for name, tensor in batch.items()}
        yield cut, (task.labels(cut) != IGNORED).sum() / predictions


def _adamw(groups: Sequence[Group], device: torch.device, spec: FinetuneSpec, *, on_one_gpu: bool) -> torch.optim.AdamW:
    # On one GPU the rates are tensors: a recorded step has to read them anew.
    rates = [torch.tensor(g.learning_rate, device=device) if on_one_gpu else g.learning_rate for g in groups]
    return torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": rate} for g, rate in zip(groups, rates, strict=True)],
        betas=(0.9, 0.95), weight_decay=spec.weight_decay, fused=device.type == "cuda", capturable=on_one_gpu,
    )  # fmt: skip


def _set_learning_rates(optimizer: torch.optim.Optimizer, groups: Sequence[Group], factor: float) -> None:
    for held, group in zip(optimizer.param_groups, groups, strict=True):
        if isinstance(held["lr"], Tensor):
            held["lr"].fill_(factor * group.learning_rate)
        else:
            held["lr"] = factor * group.learning_rate


def rank_scale(rank: float | int, full_rank: int) -> float:
    """1 - rank / full_rank, up to the next sixteenth, so that many layers make few groups."""
    return max(1, math.ceil(16 * (1 - rank / full_rank))) / 16


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Learning rate relative to its peak: linear rise over the warm-up, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def batches(examples: Examples, batch_blocks: int, steps: int, seed: int, first: int = 0) -> Iterator[Batch]:
    """Every example once an epoch, in an order of its own each epoch; the order depends on the seed alone.

    ``first``: the step to begin with.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_blocks // len(examples))
    orders = [torch.randperm(len(examples), generator=generator) for _ in range(epochs)]
    # Moved at once: a copy from the host in every step would make the host wait.
    order = torch.cat(orders)[first * batch_blocks : steps * batch_blocks].to(examples.device)
    for taken in order.split(batch_blocks):
        yield examples[taken].tensors


def _checked(losses: Float[Tensor, " steps"]) -> tuple[float, ...]:
    values = losses.tolist()
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteLossError(f"training loss is {value} at step {index + 1} of {len(values)}")
    return tuple(values)
