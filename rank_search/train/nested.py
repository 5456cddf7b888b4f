"""The nested fine-tune: the bank's factors trained once for all rank maps, by another rank map at every step.

A trial is then a slice and a score. Rank r of a matrix is always its first r factors, so the factors of small ranks are
trained in every step and those of large ranks in few (after slimmable networks: Yu and Huang, 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from rank_search.allocation import Allocator
from rank_search.compress.low_rank import place, restore
from rank_search.compress.nested_linear import NestedLinear
from rank_search.errors import NonFiniteLossError
from rank_search.factors.decompose import Factors
from rank_search.model.spread import devices_of
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankMap
from rank_search.spec import FinetuneSpec, SearchSpec
from rank_search.task import Examples
from rank_search.train.checkpoints import Checkpoint
from rank_search.train.finetune import Group, factor_groups, fused_if_worth_it, train_steps


def sampled_rank_maps(
    allocator: Allocator, search: SearchSpec, kept_range: tuple[float, float]
) -> Callable[[int], RankMap]:
    """The rank map of every step: in turn the closed form at the range's smallest and largest kept fraction and two
    that the search might propose between them."""
    low, high = kept_range
    groups = sorted({shape.group for shape in allocator.space.shapes})
    closed_form = cache(allocator.closed_form)

    def draw(index: int) -> RankMap:
        if index % 4 in (0, 2):
            return closed_form(low if index % 4 == 0 else high)
        random = np.random.default_rng((search.seed, index))
        kept, uniformity = random.uniform(low, high), random.random() ** 3
        u = dict(zip(groups, random.uniform(-1, 1, len(groups)) * search.multiplier_range, strict=True))
        return allocator.blend(kept, uniformity, {shape.name: u[shape.group] for shape in allocator.space.shapes})

    return draw


def nested_finetune(
    model: nn.Module,
    targets: Sequence[Target],
    factors: Mapping[str, Factors],
    rank_maps: Callable[[int], RankMap],
    examples: Examples,
    spec: FinetuneSpec,
    *,
    seed: int,
    progress: Progress = SILENT,
    parts: int = 1,
    checkpoint: Checkpoint | None = None,
) -> Mapping[str, Factors]:
    """Train the factors for ``spec.nested_steps`` steps, each under the rank map of its index.

    Factors that none of the rank maps asks for come back as they are. Those that were trained stay where they are and
    are copied to the host's memory, or wherever the untrained ones lie, whenever they are asked for.

    The model is the same dense model afterwards. Singular values are handed through: predicted rises stay those of the
    untrained factors. ``parts`` and ``checkpoint``: as for :func:`finetune`.

    Raises:
        NonFiniteLossError: the training loss became NaN or infinite.
    """
    steps = spec.nested_steps
    devices = devices_of(model)
    wanted = torch.tensor([_ranks(rank_maps(index), targets) for index in range(steps)])
    ranks = {device: wanted.to(device) for device in devices}  # all at once: one copy to a device, none in the loop
    now = {device: of_all[0].clone() for device, of_all in ranks.items()}

    def set_ranks(index: int) -> None:
        for device, of_all in ranks.items():
            now[device].copy_(of_all[index])

    layers = {
        target.name: NestedLinear(
            target,
            factors[target.name],
            now[target.device][number],
            masked=target.device.type == "cuda",
            largest=largest,
            ever_dense=least < 0,
        )
        for number, (target, largest, least) in enumerate(
            zip(targets, wanted.amax(0).tolist(), wanted.amin(0).tolist(), strict=True)
        )
        if largest > 0
    }
    if not layers:
        return dict(factors)
    place(targets, layers)
    try:
        groups = _groups(layers, wanted, targets, spec)
        with fused_if_worth_it(model, targets, spec, devices[0], progress) as copies:
            losses = train_steps(
                model, groups, examples, spec, steps, seed=seed, title="nested fine-tune",
                progress=progress, before_step=set_ranks, copies=copies, parts=parts, checkpoint=checkpoint,
            )  # fmt: skip
    finally:
        restore(targets)
    worst = int((~torch.isfinite(losses)).sum())
    if worst:
        raise NonFiniteLossError(
            f"the nested fine-tune's loss was not finite in {worst} of {steps} steps; lower finetune.learning_rate"
        )
    return _Trained(factors, layers)


class _Trained(Mapping[str, Factors]):
    """Copies of trained factors, made one layer at a time: a bank is written without another whole one in memory."""

    def __init__(self, untrained: Mapping[str, Factors], layers: Mapping[str, NestedLinear]) -> None:
        self._untrained = untrained
        self._layers = layers

    def __getitem__(self, name: str) -> Factors:
        untrained = self._untrained[name]
        return self._layers[name].trained(untrained) if name in self._layers else untrained

    def __iter__(self) -> Iterator[str]:
        return iter(self._untrained)

    def __len__(self) -> int:
        return len(self._untrained)


def _groups(
    layers: Mapping[str, NestedLinear], ranks: Int[Tensor, "steps targets"], targets: Sequence[Target],
    spec: FinetuneSpec,
) -> list[Group]:  # fmt: skip
    """All factors; a layer's rank is its mean one in the steps in which it has one."""
    return factor_groups(
        (
            (layers[target.name].factors, float(asked[asked > 0].double().mean()), min(target.shape.m, target.shape.n))
            for target, asked in zip(targets, ranks.T, strict=True)
            if target.name in layers
        ),
        spec,
    )


def _ranks(rank_map: RankMap, targets: Sequence[Target]) -> list[int]:
    return [rank_map.get(target.name, -1) for target in targets]
