"""From a model and calibration blocks to the factors of every target layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rank_search.allocation import Allocator
from rank_search.factors.bank import tails
from rank_search.factors.decompose import NEEDS, Factors, Roots, decompose
from rank_search.factors.slopes import Slope, measured_slopes, own_slope, rise_factors
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
    recalibration: Examples | None = None,
    batch_blocks: int,
    progress: Progress = SILENT,
    times: BuildTimes | None = None,
) -> dict[str, Factors]:
    """Factors of every target layer, up to the largest rank that the storage form makes smaller than dense.

    Args:
        recalibration: what a compressed model is looked at on (see :func:`anchored`); None: ``calibration`` again.

    Raises:
        DecompositionError: naming the layer.
        NonFiniteLossError: the model's output on the calibration blocks is not finite.
        TargetError: a target layer that the model does not use.
    """
    times = times if times is not None else BuildTimes()
    device = next(model.parameters()).device
    needs = NEEDS[spec.method]

    @contextmanager
    def timed() -> Iterator[None]:
        started = time.perf_counter()
        yield
        synchronize(device)
        times.statistics += time.perf_counter() - started

    def collect(examples: Examples, seed: int) -> dict[str, LayerStatistics]:
        with timed():
            return collect_statistics(
                model, targets, examples, batch_blocks=batch_blocks, seed=seed,
                inputs=needs.inputs, gradients=needs.gradients, progress=progress,
            )  # fmt: skip

    def look(lost: Mapping[str, Tensor]) -> tuple[dict[str, LayerStatistics], dict[str, float]]:
        examples = recalibration or calibration
        statistics = collect(examples, spec.seed + 1)
        if not (spec.slope_power and needs.inputs and needs.gradients):
            return statistics, {}
        # A slope is one number a layer; it needs fewer examples than a layer's second moments.
        half = examples[torch.arange((len(examples) + 1) // 2)]
        with timed():
            return statistics, measured_slopes(model, targets, lost, half, batch_blocks=batch_blocks, progress=progress)

    statistics = collect(calibration, spec.seed)
    started, collecting = time.perf_counter(), times.statistics
    factors_of_rises: dict[str, float] = {}
    if spec.anchor < 1 and (needs.inputs or needs.gradients):
        statistics, factors_of_rises = anchored(targets, statistics, spec, space, look, progress=progress)
    # Popped: the statistics of a layer are freed as soon as its factors are there.
    factors = factors_of(targets, statistics.pop, spec, space.storage, progress=progress)
    times.decomposition = time.perf_counter() - started - (times.statistics - collecting)
    return with_rises(factors, factors_of_rises)


def anchored(
    targets: Sequence[Target],
    statistics: dict[str, LayerStatistics],
    spec: FactorSpec,
    space: RankSpace,
    look: Callable[[Mapping[str, Tensor]], tuple[dict[str, LayerStatistics], dict[str, float]]],
    *,
    progress: Progress = SILENT,
) -> tuple[dict[str, LayerStatistics], dict[str, float]]:
    """What a look at the model compressed to ``spec.anchor`` adds to the dense model's statistics.

    The mean of both: the rise of the loss from one model to the other is about the integral of its curvature between
    them, of which this is the trapezoid rule. And by how much to multiply predicted rises (:func:`rise_factors`).

    Args:
        statistics: the dense model's; emptied.
        look: given what each layer has lost, takes statistics of the model as it is then, and slopes along the lost
            parts (or none).

    Raises:
        DecompositionError: naming the layer.
        BudgetError: the anchor is below what the smallest ranks need.
    """
    first = factors_of(targets, statistics.__getitem__, spec, space.storage, progress=progress)
    # Among all ranks, so that studies with other rank multiples or frozen layers share the bank.
    rank_map = Allocator(replace(space, multiple=1, frozen=()), tails(first)).closed_form(spec.anchor)
    with _overwritten(targets, first, rank_map) as lost:
        at_anchor, measured = look(lost)
    mean = mean_statistics(statistics, at_anchor)
    slopes = {name: Slope(slope, own_slope(mean[name], lost[name])) for name, slope in measured.items()}
    groups = {target.name: target.shape.group for target in targets}
    return mean, rise_factors(slopes, groups, spec.slope_power) if slopes else {}


def with_rises(factors: Mapping[str, Factors], by: Mapping[str, float]) -> dict[str, Factors]:
    """The same factors with every predicted rise multiplied, of layers that ``by`` names."""
    return {name: replace(made, sigma=made.sigma * by.get(name, 1.0) ** 0.5) for name, made in factors.items()}


@contextmanager
def _overwritten(
    targets: Sequence[Target], factors: Mapping[str, Factors], rank_map: RankMap
) -> Iterator[dict[str, Tensor]]:
    """The matrices of ``rank_map`` hold what their factors stand for inside the block, and themselves after it.

    Yields what that took from each of them, on the host.
    """
    chosen = [target for target in targets if target.name in rank_map]
    # On the host: this is the one time that a model and a copy of its matrices are needed at once.
    kept = [target.matrix.detach().cpu().clone() for target in chosen]
    try:
        for target in chosen:
            layer, rank, device = factors[target.name], rank_map[target.name], target.matrix.device
            target.write(layer.out[:rank].to(device).T @ layer.inn[:rank].to(device))
        yield {t.name: t.matrix.detach().cpu() - before for t, before in zip(chosen, kept, strict=True)}
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
