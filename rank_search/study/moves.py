"""Small changes of a rank map along the hulls of its layers. No torch, no Optuna."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from rank_search.allocation import Allocator, Floats, proportional
from rank_search.ranks import LayerShape, RankMap

_FREED = (0.03, 0.4)
"""Share of the parameters of the layers that give in a trade, drawn evenly on a logarithmic scale."""
_FEW = 3
"""The most single layers on one side of a trade."""


class Moves:
    """Moves from one rank map to another; every choice comes from the random generator that is handed in."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._space = allocator.space
        self._curves = allocator.curves
        shapes = [curve.shape for curve in self._curves]
        self._groups = _by_group(shapes)
        self._depths = max(shape.depth for shape in shapes) - min(shape.depth for shape in shapes) + 1
        # A layer whose hull is one point has nothing to trade.
        self._movable = [k for k, curve in enumerate(self._curves) if len(curve.hull) > 1]
        self._least = np.array([float(curve.params[curve.hull[0]]) for curve in self._curves])
        self._dense = np.array([float(curve.params[-1]) for curve in self._curves])

    def trade(self, rank_map: RankMap, random: np.random.Generator) -> RankMap:
        """Some layers give parameters along their hulls, least predicted rise per parameter first, and others take
        them, most rise saved per parameter first; the size stays what it was, but for less than a step of one layer.

        Either side is a few single layers, or the layers of one type in a stretch of neighbouring blocks.
        """
        chosen = self._indices(rank_map)
        budget = self._used(chosen)
        givers = [k for k in self._some(random) if self._lowered(k, chosen[k]) is not None]
        takers = [k for k in self._some(random) if k not in givers and self._raised(k, chosen[k]) is not None]
        if givers and takers:
            share = math.exp(random.uniform(math.log(_FREED[0]), math.log(_FREED[1])))
            held = sum(int(self._curves[k].params[chosen[k]]) for k in givers)
            # Enough for one step of a taker, which to dense may be a long one.
            self._give(chosen, givers, max(share * held, min(self._cost(k, chosen[k]) for k in takers)))
            self._take(chosen, takers, budget - self._used(chosen))
        return self._allocator.filled(chosen, budget)

    def resize(self, rank_map: RankMap, kept: float) -> RankMap:
        """The same deviations from the closed form at another kept fraction of the target layers: every layer's
        parameters are those of the closed form there, times what it had over those of the closed form here.

        Raises:
            BudgetError: the kept fraction cannot be met.
        """
        budget = self._space.budget(kept)
        here = self._params(self._allocator.closed_form(self._space.kept_of_targets(rank_map)))
        there = self._params(self._allocator.closed_form(kept))
        weights = np.maximum(there * self._params(rank_map) / here, 1.0)
        wanted = proportional(weights, self._least, self._dense, float(budget))
        chosen = [self._floor(k, params) for k, params in enumerate(wanted)]
        return self._allocator.filled(chosen, budget)

    def _some(self, random: np.random.Generator) -> list[int]:
        """Indices of a few single layers, or of those of one type in neighbouring blocks."""
        if random.random() < 0.5:
            count = min(int(random.integers(1, _FEW + 1)), len(self._movable))
            return [int(k) for k in random.choice(self._movable, count, replace=False)]
        group = self._groups[int(random.integers(len(self._groups)))]
        # Half the width on a logarithmic scale: from single blocks to more than the whole model.
        reach = math.exp(random.uniform(0, math.log(self._depths + 1))) - 1
        centre = self._curves[int(random.choice(group))].shape.depth
        return [k for k in group if abs(self._curves[k].shape.depth - centre) <= reach]

    def _give(self, chosen: list[int], layers: Collection[int], wanted: float) -> None:
        """Lower ``layers`` until they have given ``wanted`` parameters."""
        queue = [
            (self._slope(k, low, chosen[k]), k) for k in layers if (low := self._lowered(k, chosen[k])) is not None
        ]
        heapq.heapify(queue)
        while queue and wanted > 0:
            _, k = heapq.heappop(queue)
            low = self._lowered(k, chosen[k])
            assert low is not None  # only such layers are queued
            wanted -= int(self._curves[k].params[chosen[k]] - self._curves[k].params[low])
            chosen[k] = low
            following = self._lowered(k, low)
            if following is not None:
                heapq.heappush(queue, (self._slope(k, following, low), k))

    def _take(self, chosen: list[int], layers: Collection[int], left: int) -> None:
        """Raise ``layers`` while their next steps fit into ``left`` parameters."""
        upper = ((k, self._raised(k, chosen[k])) for k in layers)
        queue = [(-self._slope(k, chosen[k], up), k) for k, up in upper if up is not None]
        heapq.heapify(queue)
        while queue:
            _, k = heapq.heappop(queue)
            up = self._raised(k, chosen[k])
            assert up is not None  # only such layers are queued
            cost = int(self._curves[k].params[up] - self._curves[k].params[chosen[k]])
            if cost > left:
                continue
            left -= cost
            chosen[k] = up
            following = self._raised(k, up)
            if following is not None:
                heapq.heappush(queue, (-self._slope(k, up, following), k))

    def _lowered(self, k: int, index: int) -> int | None:
        """The next cheaper point of a layer's hull."""
        hull = self._curves[k].hull
        position = int(np.searchsorted(hull, index)) - 1
        return int(hull[position]) if position >= 0 else None

    def _raised(self, k: int, index: int) -> int | None:
        """The next dearer point of a layer's hull."""
        hull = self._curves[k].hull
        position = int(np.searchsorted(hull, index, side="right"))
        return int(hull[position]) if position < len(hull) else None

    def _cost(self, k: int, index: int) -> float:
        """Parameters of a layer's next step up its hull."""
        up = self._raised(k, index)
        return math.inf if up is None else float(self._curves[k].params[up] - self._curves[k].params[index])

    def _floor(self, k: int, params: float) -> int:
        """The dearest point of a layer's hull of at most ``params`` parameters, or its cheapest."""
        curve = self._curves[k]
        # The bisection behind the wanted numbers ends a little below what it means.
        position = int(np.searchsorted(curve.params[curve.hull], params * (1 + 1e-6), side="right")) - 1
        return int(curve.hull[max(position, 0)])

    def _slope(self, k: int, low: int, high: int) -> float:
        curve = self._curves[k]
        return float((curve.rises[low] - curve.rises[high]) / (curve.params[high] - curve.params[low]))

    def _indices(self, rank_map: RankMap) -> list[int]:
        """Of every layer, the index of its choice: the dearest of at most its rank, or dense."""
        found = []
        for curve in self._curves:
            rank = rank_map.get(curve.shape.name)
            last = len(curve.ranks) - 1
            if rank is None:
                found.append(last)
            else:
                found.append(max(0, int(np.searchsorted(curve.ranks[:last], rank, side="right")) - 1))
        return found

    def _used(self, chosen: Sequence[int]) -> int:
        return sum(int(curve.params[index]) for curve, index in zip(self._curves, chosen, strict=True))

    def _params(self, rank_map: RankMap) -> Floats:
        chosen = self._indices(rank_map)
        return np.array([float(curve.params[index]) for curve, index in zip(self._curves, chosen, strict=True)])


def _by_group(shapes: Iterable[LayerShape]) -> list[list[int]]:
    """Indices of the layers of every type, in the model's order."""
    groups: dict[str, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape.group, []).append(index)
    return list(groups.values())
