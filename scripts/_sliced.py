"""A stand-in for sliced trials on SmolLM2-135M: its shapes, and losses that are made up over them.

What is made up is how far the closed form is off, layer by layer, and how steeply predicted rises fall off. What was
measured (``search_nested.jsonl`` among that study's experiments): the loss of the closed form at every size, and that
sliced losses scatter by 0.0015 nats from one rank map of the closed form to the next.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from _made_up import made_up_allocator, tail_of
from _surrogate import StandIn
from scipy.interpolate import PchipInterpolator

from rank_search.allocation import Allocator, Floats
from rank_search.ranks import LayerShape, RankMap

MODEL_PARAMS = 134_515_008
KEPT = (0.28, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
LOSSES = (3.65, 3.60, 3.49, 3.385, 3.205, 3.05, 2.915, 2.825, 2.735, 2.705, 2.70)
"""Of the closed form at these kept fractions, sliced, nats per token; the first and the last are extrapolated."""


class SlicedStandIn(StandIn):
    """Losses after what each layer's predicted rise is really worth.

    Args:
        off: share of what follows: later blocks want more (u from -0.34 to 0.34), ``down_proj`` less (-0.25), and
            every block and layer something of its own (standard deviations 0.3 and 0.2).
        seed: of what is drawn.
    """

    def __init__(self, off: float, seed: int = 0, noise: float = 0.0015) -> None:
        self.noise = noise
        random = np.random.default_rng(seed)
        space = dataclasses.replace(made_up_allocator(30).space, storage="pivoted", model_params=MODEL_PARAMS)
        self.allocator = Allocator(space, {shape.name: _tail(shape, random) for shape in space.shapes})
        depth = np.array([shape.depth for shape in space.shapes])
        u = 0.34 * (2 * depth / depth.max() - 1) - 0.25 * np.array(["down" in shape.group for shape in space.shapes])
        u += 0.3 * random.normal(size=depth.max() + 1)[depth] + 0.2 * random.normal(size=len(depth))
        self._worth: Floats = np.exp(off * (u - u.mean()))
        worth = [self._worth_of(self.allocator.closed_form(kept)) for kept in KEPT]
        self._loss = PchipInterpolator(worth[::-1], LOSSES[::-1], extrapolate=True)

    def loss(self, rank_map: RankMap) -> float:
        """Without noise, nats per token."""
        return float(self._loss(self._worth_of(rank_map)))

    def _worth_of(self, rank_map: RankMap) -> float:
        """Logarithm of the whole rise."""
        return float(np.log(self._worth @ self.allocator.rises(rank_map)))


def _tail(shape: LayerShape, random: np.random.Generator) -> Floats:
    """Predicted rises of a layer by rank: energies fall as a power, and then exponentially, at various paces."""
    full = min(shape.m, shape.n)
    place = np.arange(1, full + 1) / full
    energies = place**-0.6 * np.exp(-place * random.uniform(1.5, 5)) * random.uniform(0.3, 2) * 1e-3
    return tail_of(energies)
