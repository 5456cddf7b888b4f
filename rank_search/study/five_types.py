"""Bolaco's search of kept fractions by layer type, with Optuna's Gaussian process. No torch of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import TrialState

from rank_search.allocation import Allocator, proportional
from rank_search.progress import SILENT, Progress
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.study.optuna_study import quiet
from rank_search.study.samplers import require_scipy

EVALUATIONS = 50
"""Of the paper's search."""
TYPES = 5
_LOWEST = 0.2
"""Smallest kept fraction that a layer type may have beside a largest of 1, as in the paper's code."""


def five_types(
    allocator: Allocator,
    kept: float,
    evaluate: Callable[[RankMap], float],
    *,
    evaluations: int = EVALUATIONS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> RankMap:
    """The best rank map found over kept fractions that all layers of a type share, at one budget (Bolaco: Ji et al.,
    "Adaptive feature-based low-rank compression of large language models via Bayesian optimization", 2024).

    The paper's five types are query and key, output, gate, up and down, the value projections staying dense, and its
    proposals may miss the budget by up to a tenth. Here any model's layer types are joined to five at most, and every
    proposal is scaled to the budget. The first one is the same fraction for all.

    Args:
        evaluate: the loss to be least; infinite where there is none.

    Raises:
        StudyFileError: scipy is missing.
    """
    require_scipy("the allocation 'bolaco'")
    types = joined_types(allocator.space)
    names = list(dict.fromkeys(types.values()))
    distributions: dict[str, BaseDistribution] = {name: FloatDistribution(_LOWEST, 1.0) for name in names}
    best, best_loss = allocator.uniform(kept), math.inf
    with quiet(), progress.step(f"layer types at {kept:g}", evaluations) as step:
        study = optuna.create_study(sampler=GPSampler(seed=seed, n_startup_trials=2 * len(names)))
        study.enqueue_trial(dict.fromkeys(names, 1.0))
        for _ in range(evaluations):
            trial = study.ask(fixed_distributions=distributions)
            fractions = {shape.name: trial.params[types[shape.group]] for shape in allocator.space.shapes}
            rank_map = allocator.towards(kept, _scaled(allocator.space, fractions, kept))
            loss = evaluate(rank_map)
            if math.isfinite(loss):
                study.tell(trial, loss)
            else:
                study.tell(trial, state=TrialState.FAIL)
            if loss < best_loss:
                best, best_loss = rank_map, loss
            step.advance()
    return best


def joined_types(space: RankSpace) -> dict[str, str]:
    """Layer type → name of the joined type it belongs to: the two smallest are joined until five are left."""
    sizes: dict[tuple[str, ...], int] = {}
    for shape in space.shapes:
        sizes[(shape.group,)] = sizes.get((shape.group,), 0) + shape.dense_params
    while len(sizes) > TYPES:
        # Sorting is stable: of equal sizes the first in the model go first.
        (a, size_a), (b, size_b), *others = sorted(sizes.items(), key=lambda item: item[1])
        sizes = {**dict(others), a + b: size_a + size_b}
    return {group: " + ".join(sorted(groups)) for groups in sizes for group in groups}


def _scaled(space: RankSpace, fractions: dict[str, float], kept: float) -> dict[str, float]:
    """Parameters by module name: kept fractions in the given proportions, scaled to the budget."""
    shapes: Sequence[LayerShape] = space.shapes
    dense = np.array([float(shape.dense_params) for shape in shapes])
    least = np.array([float(shape.params(next(iter(space.ranks(shape)), None), space.storage)) for shape in shapes])
    weights = dense * [fractions[shape.name] for shape in shapes]
    params = proportional(weights, least, dense, float(space.budget(kept)))
    return {shape.name: float(p) for shape, p in zip(shapes, params, strict=True)}
