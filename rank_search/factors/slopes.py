"""How fast the loss really rises along what a compressed model has lost, layer by layer.

The decomposition counts every layer as if the others were whole. In a compressed model they are not, and errors of
layers that follow each other add up more often than they cancel. The slope of the loss along a layer's lost part,
``d/ds L(W + s Δ)`` at s = 1, is one number that holds all of that, and a backward pass gives it for all layers at
once: ``<∇L(Ŵ), Δ>`` with ``Δ = Ŵ − W``. What the layer's own curvature says it should be is ``<G Δ A, Δ>``; the
quotient of the two tells how much more, or less, the layer matters than its predicted rise.

The same gradient tells whether a layer's output should be larger or smaller than it is: ``<∇L(Ŵ), Ŵ>`` over
``<G Ŵ A, Ŵ>`` is the Newton step of the one number that the whole matrix is multiplied by. By the layer's own curvature
alone it would be zero, for what a truncation keeps is orthogonal to what it loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rank_search.factors.gradients import mean_gradients
from rank_search.factors.statistics import LayerStatistics
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.task import Examples

MOST = 4.0
"""A quotient counts as at most this, and as at least its inverse: a layer that lost little has a noisy one."""


MOST_GAIN = 0.5
"""The most that a Newton step may take from a matrix, or add to it, as a share of it, before it is shortened."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Of the loss along one direction, nats per prediction: as measured, and as the layer's own curvature has it."""

    measured: float
    own: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Slopes of one layer, nats per prediction: along what it lost, None where it is dense, and along its matrix."""

    lost: float | None
    matrix: float


def measured_slopes(
    model: nn.Module,
    targets: Sequence[Target],
    lost: Mapping[str, Float[Tensor, "m n"]],
    examples: Examples,
    *,
    batch_blocks: int,
    progress: Progress = SILENT,
) -> dict[str, Measured]:
    """``<∇L, Δ>`` and ``<∇L, Ŵ>`` of every target layer, on the labels of ``examples``.

    Args:
        lost: Δ by module name; layers that it has not are dense.

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    gradients = mean_gradients(model, targets, examples, batch_blocks=batch_blocks, progress=progress)
    return {
        target.name: Measured(
            _product(gradients[target.name], lost[target.name]) if target.name in lost else None,
            _product(gradients[target.name], target.matrix.detach()),
        )
        for target in targets
    }


def own_slope(statistics: LayerStatistics, along: Float[Tensor, "m n"]) -> float:
    """``<G Δ A, Δ>``: the slope at which a loss of this layer's curvature alone would rise."""
    assert statistics.A is not None
    assert statistics.G is not None
    delta = along.to(statistics.A.device, torch.float64)
    return _product(statistics.G @ delta @ statistics.A, delta)


def rise_factors(slopes: Mapping[str, Slope], groups: Mapping[str, str], power: float) -> dict[str, float]:
    """By how much to multiply each layer's predicted rise.

    The quotients themselves would do if a rank map could be allocated with one step; they change as ranks move, so
    that only a ``power`` of them, most often the square root, is taken. A layer that lost nothing takes the quotient
    of all layers of its type together, or that of all layers.

    Args:
        slopes: of the layers that lost something.
        groups: layer type of every target layer by module name.
    """
    by_group: dict[str, list[Slope]] = {}
    for name, slope in slopes.items():
        by_group.setdefault(groups[name], []).append(slope)
    every = _quotient(list(slopes.values()))
    of_group = {group: _quotient(found) for group, found in by_group.items()}
    return {
        name: (_quotient([slopes[name]]) if name in slopes else of_group.get(group, every)) ** power
        for name, group in groups.items()
    }


def gain(along_matrix: Slope, step: float) -> float:
    """What to multiply a layer's matrix by: one, less ``step`` of the Newton step."""
    if along_matrix.own <= 0:
        return 1.0
    return 1.0 - step * min(max(along_matrix.measured / along_matrix.own, -MOST_GAIN), MOST_GAIN)


def _quotient(slopes: Sequence[Slope]) -> float:
    own = sum(slope.own for slope in slopes)
    return min(max(sum(slope.measured for slope in slopes) / own, 1 / MOST), MOST) if own > 0 else 1.0


def _product(one: Float[Tensor, "m n"], other: Float[Tensor, "m n"]) -> float:
    return float((one.double() * other.to(one.device, torch.float64)).sum())
