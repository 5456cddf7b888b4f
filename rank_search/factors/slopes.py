"""How fast the loss really rises along what a compressed model has lost, layer by layer.

The decomposition counts every layer as if the others were whole. In a compressed model they are not, and errors of
layers that follow each other add up more often than they cancel. The slope of the loss along a layer's lost part,
``d/ds L(W + s Δ)`` at s = 1, is one number that holds all of that, and a backward pass gives it for all layers at
once: ``<∇L(Ŵ), Δ>`` with ``Δ = Ŵ − W``. What the layer's own curvature says it should be is ``<G Δ A, Δ>``; the
quotient of the two tells how much more, or less, the layer matters than its predicted rise.
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


@dataclass(frozen=True, slots=True)
class Slope:
    """Of the loss along one layer's lost part, nats per prediction: as measured, and as its own curvature has it."""

    measured: float
    own: float


def measured_slopes(
    model: nn.Module,
    targets: Sequence[Target],
    lost: Mapping[str, Float[Tensor, "m n"]],
    examples: Examples,
    *,
    batch_blocks: int,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """``<∇L, Δ>`` of every layer in ``lost`` (Δ by module name), on the labels of ``examples``.

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    chosen = [target for target in targets if target.name in lost]
    if not chosen:
        return {}
    gradients = mean_gradients(model, chosen, examples, batch_blocks=batch_blocks, progress=progress)
    return {name: _product(gradient, lost[name]) for name, gradient in gradients.items()}


def own_slope(statistics: LayerStatistics, lost: Float[Tensor, "m n"]) -> float:
    """``<G Δ A, Δ>``: the slope at which a loss of this layer's curvature alone would rise."""
    assert statistics.A is not None
    assert statistics.G is not None
    delta = lost.to(statistics.A.device, torch.float64)
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


def _quotient(slopes: Sequence[Slope]) -> float:
    own = sum(slope.own for slope in slopes)
    return min(max(sum(slope.measured for slope in slopes) / own, 1 / MOST), MOST) if own > 0 else 1.0


def _product(one: Float[Tensor, "m n"], other: Float[Tensor, "m n"]) -> float:
    return float((one.double() * other.to(one.device, torch.float64)).sum())
