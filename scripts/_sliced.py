"""A stand-in for sliced trials on SmolLM2-135M: its shapes, and losses that are made up over them.

What is made up is how far the closed form is off, layer by layer and range by range, and how steeply predicted rises
fall off. What was measured (``experiments/search`` of that study): the loss of the closed form at every size, by how
much it jumps where the factors of another nested fine-tune begin, and that losses scatter by 0.0012 nats from one rank
map of the closed form to the next. At ``off`` 0.75 trials of a study lie about as far above and below the closed form
as they did there (0.005 nats).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from _made_up import made_up_allocator, tail_of
from _surrogate import StandIn
from scipy.interpolate import PchipInterpolator

from rank_search.allocation import Allocator, Floats
from rank_search.ranges import kept_ranges
from rank_search.ranks import LayerShape, RankMap
from rank_search.search_spec import SearchSpec

MODEL_PARAMS = 134_515_008
KEPT = (0.28, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
LOSSES = (3.65, 3.60, 3.49, 3.385, 3.205, 3.05, 2.915, 2.825, 2.735, 2.705, 2.70)
"""Of the closed form at these kept fractions, sliced, nats per token; the first and the last are extrapolated."""
JUMPS = (-0.016, -0.026, 0.005, 0.009)
"""Of the closed form's loss between the five ranges, ascending."""
SEARCHED = SearchSpec(min_kept=0.3, max_kept=0.95)
_ALIKE = 0.4
"""Share that all ranges have in common of the variance of what the closed form is off by."""


class SlicedStandIn(StandIn):
    """Losses after what each layer's predicted rise is really worth, in the range of the rank map's size.

    Args:
        off: share of what follows, standard deviations of u: with depth 0.25, by layer type 0.2, of every block 0.3, of
            every layer 0.2; drawn for all ranges, and for each.
        seed: of what is drawn.
    """

    def __init__(self, off: float, seed: int = 0, noise: float = 0.0012) -> None:
        self.noise = noise
        random = np.random.default_rng(seed)
        space = dataclasses.replace(made_up_allocator(30).space, storage="pivoted", model_params=MODEL_PARAMS)
        self.allocator = Allocator(space, {shape.name: _tail(shape, random) for shape in space.shapes})
        self._ranges = kept_ranges(SEARCHED, len(JUMPS) + 1, 0.0)
        common = _off(space.shapes, random)
        us = [_ALIKE**0.5 * common + (1 - _ALIKE) ** 0.5 * _off(space.shapes, random) for _ in self._ranges]
        self._worths: list[Floats] = [np.exp(off * (u - u.mean())) for u in us]
        closed = [self.allocator.rises(self.allocator.closed_form(kept)) for kept in KEPT]
        self._losses = [
            PchipInterpolator([float(np.log(worth @ rises)) for rises in closed][::-1], LOSSES[::-1], extrapolate=True)
            for worth in self._worths
        ]

    def loss(self, rank_map: RankMap) -> float:
        """Without noise, nats per token."""
        kept = self.allocator.space.kept_of_targets(rank_map)
        number = int(np.searchsorted([high for _, high in self._ranges[:-1]], kept))
        # From half of the jump below it to half of the one above it: in the mean over sizes jumps change nothing.
        ends = (0.0, *JUMPS, 0.0)
        jump = np.interp(kept, self._ranges[number], (ends[number] / 2, -ends[number + 1] / 2))
        worth = np.log(self._worths[number] @ self.allocator.rises(rank_map))
        return float(self._losses[number](worth)) + float(jump)


def _off(shapes: tuple[LayerShape, ...], random: np.random.Generator) -> Floats:
    """(layers,), u of what each layer's predicted rise is off by."""
    depth = np.array([shape.depth for shape in shapes])
    groups = sorted({shape.group for shape in shapes})
    group = np.array([groups.index(shape.group) for shape in shapes])
    u: Floats = 0.25 * random.normal() * (2 * depth / depth.max() - 1) + 0.2 * random.normal(size=len(groups))[group]
    return u + 0.3 * random.normal(size=depth.max() + 1)[depth] + 0.2 * random.normal(size=len(shapes))


def _tail(shape: LayerShape, random: np.random.Generator) -> Floats:
    """Predicted rises of a layer by rank: energies fall as a power, and then exponentially, at various paces."""
    full = min(shape.m, shape.n)
    place = np.arange(1, full + 1) / full
    energies = place**-0.6 * np.exp(-place * random.uniform(1.5, 5)) * random.uniform(0.3, 2) * 1e-3
    return tail_of(energies)
