"""From a model and calibration blocks to the factors of every target layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rank_search.factors.decompose import NEEDS, Factors, Roots, decompose
from rank_search.factors.statistics import LayerStatistics, collect_statistics
from rank_search.model.device import synchronize
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.ranks import Storage
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
    storage: Storage,
    *,
    batch_blocks: int,
    progress: Progress = SILENT,
    times: BuildTimes | None = None,
) -> dict[str, Factors]:
    """Factors of every target layer, up to the largest rank that ``storage`` makes smaller than dense.

    Raises:
        DecompositionError: naming the layer.
        NonFiniteLossError: the model's output on the calibration blocks is not finite.
        TargetError: a target layer that the model does not use.
    """
    times = times if times is not None else BuildTimes()
    device = next(model.parameters()).device
    needs = NEEDS[spec.method]
    started = time.perf_counter()
    statistics = collect_statistics(
        model, targets, calibration, batch_blocks=batch_blocks, seed=spec.seed,
        inputs=needs.inputs, gradients=needs.gradients, progress=progress,
    )  # fmt: skip
    synchronize(device)
    times.statistics = time.perf_counter() - started
    started = time.perf_counter()
    # Popped: the statistics of a layer are freed as soon as its factors are there.
    factors = factors_of(targets, statistics.pop, spec, storage, progress=progress)
    times.decomposition = time.perf_counter() - started
    return factors


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
