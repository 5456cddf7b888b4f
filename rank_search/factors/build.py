"""From a model and calibration blocks to the factors of every target layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from rank_search.allocation import Allocator
from rank_search.factors.bank import tails
from rank_search.factors.decompose import NEEDS, Factors, Roots, decompose
from rank_search.factors.statistics import LayerStatistics, collect_statistics, mean_statistics
from rank_search.model.device import synchronize
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankMap, RankSpace, Storage
from rank_search.spec import FactorSpec
from rank_search.task import Examples


@dataclass
class BuildTimes:
    """Seconds of the two steps, filled in by :func:`build_factors`."""

    statistics: float = 0.0
    decomposition: float = 0.0


def build_factors(
    model: PreTrainedModel,
    targets: Sequence[Target],
    calibration: Examples,
    spec: FactorSpec,
    space: RankSpace,
    *,
    batch_blocks: int,
    progress: Progress = SILENT,
    times: BuildTimes | None = None,
) -> dict[str, Factors]:
    """Factors of every target layer, up to the largest rank that the storage form makes smaller than dense.

    With ``spec.anchor`` the statistics are the mean of the dense model's and of those of the model compressed to that
    kept fraction: the rise of the loss from one to the other is about the integral of its curvature between them, of
    which this is the trapezoid rule.

    Raises:
        DecompositionError: naming the layer.
        NonFiniteLossError: the model's output on the calibration blocks is not finite.
        TargetError: a target layer that the model does not use.
    """
    times = times if times is not None else BuildTimes()
    device = next(model.parameters()).device
    needs = NEEDS[spec.method]

    def collect(seed: int) -> dict[str, LayerStatistics]:
        started = time.perf_counter()
        collected = collect_statistics(
            model, targets, calibration, batch_blocks=batch_blocks, seed=seed,
            inputs=needs.inputs, gradients=needs.gradients, progress=progress,
        )  # fmt: skip
        synchronize(device)
        times.statistics += time.perf_counter() - started
        return collected

    statistics = collect(spec.seed)
    started, collecting = time.perf_counter(), times.statistics
    if spec.anchor < 1 and (needs.inputs or needs.gradients):
        statistics = anchored(targets, statistics, spec, space, collect, progress=progress)
    # Popped: the statistics of a layer are freed as soon as its factors are there.
    factors = factors_of(targets, statistics.pop, spec, space.storage, progress=progress)
    times.decomposition = time.perf_counter() - started - (times.statistics - collecting)
    return factors


def anchored(
    targets: Sequence[Target],
    statistics: dict[str, LayerStatistics],
    spec: FactorSpec,
    space: RankSpace,
    collect: Callable[[int], dict[str, LayerStatistics]],
    *,
    progress: Progress = SILENT,
) -> dict[str, LayerStatistics]:
    """The mean of ``statistics``, the dense model's, and what ``collect`` (given a seed) finds at ``spec.anchor``.

    Raises:
        DecompositionError: naming the layer.
        BudgetError: the anchor is below what the smallest ranks need.
    """
    first = factors_of(targets, statistics.__getitem__, spec, space.storage, progress=progress)
    # Among all ranks, so that studies with other rank multiples or frozen layers share the bank.
    rank_map = Allocator(replace(space, multiple=1, frozen=()), tails(first)).closed_form(spec.anchor)
    with _overwritten(targets, first, rank_map):
        return mean_statistics(statistics, collect(spec.seed + 1))


@contextmanager
def _overwritten(targets: Sequence[Target], factors: Mapping[str, Factors], rank_map: RankMap) -> Iterator[None]:
    """The matrices of ``rank_map`` hold what their factors stand for inside the block, and themselves after it."""
    chosen = [target for target in targets if target.name in rank_map]
    # On the host: this is the one time that a model and a copy of its matrices are needed at once.
    kept = [target.matrix.detach().cpu().clone() for target in chosen]
    try:
        for target in chosen:
            layer, rank, device = factors[target.name], rank_map[target.name], target.matrix.device
            target.write(layer.out[:rank].to(device).T @ layer.inn[:rank].to(device))
        yield
    finally:
        for target, matrix in zip(chosen, kept, strict=True):
            target.write(matrix)


@torch.no_grad()
def factors_of(
    targets: Sequence[Target], statistics_of: Callable[[str], LayerStatistics], spec: FactorSpec, storage: Storage,
    *, progress: Progress = SILENT,
) -> dict[str, Factors]:  # fmt: skip
    """Factors of every target layer from its statistics, which ``statistics_of`` gives by module name.

    Raises:
        DecompositionError: naming the layer.
    """
    roots = Roots(spec.method, spec.damping)
    factors: dict[str, Factors] = {}
    with progress.step("decomposition", len(targets)) as step:
        for target in targets:
            layer = statistics_of(target.name)
            made = decompose(
                target.name, target.matrix, roots.columns(target.name, layer),
                roots.rows(target.name, layer), target.shape.max_rank(storage),
            )  # fmt: skip
            factors[target.name] = Factors(made.out.cpu(), made.inn.cpu(), made.sigma.cpu())
            step.advance(note=target.name)
    return factors
