"""Allocations: rules that turn a parameter budget into a rank map. Pure: no torch, no Optuna.

The closed form rests on one fact: with factors from the two-sided decomposition, the predicted rise of the loss
is a sum over layers, so the best rank maps of all budgets lie on the lower convex hulls of the layers' points
(parameters, predicted rise), walked down together by rise saved per parameter (Lagrange; Shoham and Gersho,
"Efficient bit allocation for an arbitrary set of quantizers", 1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rank_search.ranks import Ints, LayerShape, RankMap, RankSpace

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LayerCurve:
    """The choices of one layer, by ascending parameters, dense last if it may be.

    ``ranks`` (c,) holds 0 for dense; ``params`` (c,) numbers stored; ``rises`` (c,) predicted rise of the loss in
    nats, 0 for dense; ``hull`` the indices of the lower convex hull.
    """

    shape: LayerShape
    ranks: Ints
    params: Ints
    rises: Floats
    hull: Ints

    @classmethod
    def of(cls, space: RankSpace, shape: LayerShape, tail: Floats) -> LayerCurve:
        """``tail[r]`` is the predicted rise at rank r, for r = 0 .. min(m, n)."""
        allowed = np.asarray(space.ranks(shape), dtype=np.int64)
        ranks = np.append(allowed, 0) if space.may_be_dense(shape) else allowed
        params = np.array([shape.params(int(r) or None, space.storage) for r in ranks], dtype=np.int64)
        rises = np.where(ranks > 0, tail[ranks], 0.0)
        return cls(shape, ranks, params, rises, lower_hull(params, rises))


def lower_hull(params: Ints, rises: Floats) -> Ints:
    """Indices of the lower convex hull of points sorted by ascending ``params``, cheapest point first.

    Only edges that save rise are kept, so slopes fall strictly in magnitude along the hull; the last index may
    stop before the last point when more parameters save nothing.
    """
    hull: list[int] = []
    for i in range(len(params)):
        if hull and rises[i] >= rises[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            left = (rises[a] - rises[b]) * (params[i] - params[b])
            right = (rises[b] - rises[i]) * (params[b] - params[a])
            if left > right:
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, dtype=np.int64)


def proportional(weights: Floats, low: Floats, high: Floats, total: float) -> Floats:
    """Numbers in proportion to ``weights`` (all above 0), each within ``low`` and ``high``, that sum to ``total``.

    A ``total`` outside of the sums of ``low`` and ``high`` is moved to the nearer one.
    """
    # The sum rises with the scale, which is that of the whole only where no bound is met: bisected.
    below, above = 0.0, float((high / weights).max())
    for _ in range(200):
        scale = (below + above) / 2
        if np.clip(scale * weights, low, high).sum() > total:
            above = scale
        else:
            below = scale
    return np.clip(below * weights, low, high)


class Allocator:
    """Allocates budgets over the layers of one rank space.

    Args:
        space: the layers, the storage form and the allowed ranks.
        tails: module name → predicted rise at rank 0, 1, ..., min(m, n), in nats (``½ Σ_{i>r} σᵢ²``).
    """

    def __init__(self, space: RankSpace, tails: Mapping[str, Floats]) -> None:
        self.space = space
        self._curves = [LayerCurve.of(space, shape, np.asarray(tails[shape.name])) for shape in space.shapes]
        layer, start, end, slope, cost = [], [], [], [], []
        for index, curve in enumerate(self._curves):
            steps = np.diff(curve.params[curve.hull])
            layer.append(np.full(len(steps), index))
            start.append(curve.hull[:-1])
            end.append(curve.hull[1:])
            cost.append(steps)
            slope.append(-np.diff(curve.rises[curve.hull]) / steps)
        self._layer: Ints = np.concatenate(layer).astype(np.int64)
        self._end: Ints = np.concatenate(end).astype(np.int64)
        self._cost: Ints = np.concatenate(cost).astype(np.int64)
        self._slope: Floats = np.concatenate(slope)

    @property
    def curves(self) -> tuple[LayerCurve, ...]:
        """The choices of every layer, in the order of the space's shapes."""
        return tuple(self._curves)

    def closed_form(self, kept: float, multipliers: Mapping[str, float] | None = None) -> RankMap:
        """The rank map of least predicted rise within the budget.

        ``multipliers`` maps module names to u; a layer's predicted rise is scaled by exp(u) first. At budgets where
        the walk down the hulls ends on a vertex the result is optimal among all rank maps; between them it
        differs from the optimum by less than one step of one hull.
        """
        return self._rank_map(self._walk(self.space.budget(kept), self._weights(multipliers)))

    def uniform(self, kept: float) -> RankMap:
        """The same kept fraction for every layer, what rounding leaves over going to the largest remainders."""
        return self._rank_map(self._uniform(self.space.budget(kept)))

    def towards(self, kept: float, wanted: Mapping[str, float]) -> RankMap:
        """The rank map whose layers hold about ``wanted`` parameters each (by module name), within the budget.

        Every layer takes its largest choice of at most what is wanted; what is left of the budget goes to the largest
        remainders, and where too much is wanted the layers that exceed theirs most give back.
        """
        shares = [wanted[curve.shape.name] for curve in self._curves]
        return self._rank_map(self._towards(self.space.budget(kept), shares))

    def blend(self, kept: float, uniformity: float, multipliers: Mapping[str, float] | None = None) -> RankMap:
        """Between the closed form (``uniformity`` 0) and uniform (1): each layer's parameters are interpolated.

        A shrinkage towards uniform guards against predicted rises that are off for single layers.
        """
        budget = self.space.budget(kept)
        weights = self._weights(multipliers)
        if uniformity <= 0:
            return self._rank_map(self._walk(budget, weights))
        even = self._uniform(budget)
        if uniformity >= 1:
            return self._rank_map(even)
        closed = self._walk(budget, weights)
        chosen = []
        for curve, a, b in zip(self._curves, closed, even, strict=True):
            wanted = (1 - uniformity) * curve.params[a] + uniformity * curve.params[b]
            chosen.append(max(0, int(np.searchsorted(curve.params, wanted, side="right")) - 1))
        self._spend(chosen, budget, self._saving(weights))
        return self._rank_map(chosen)

    def filled(self, chosen: Sequence[int], budget: int) -> RankMap:
        """The rank map of a choice for every layer (an index into its curve), after single steps, the one of most
        predicted rise saved per parameter first, have spent what it leaves of ``budget`` parameters."""
        spent = list(chosen)
        self._spend(spent, budget, self._saving(self._weights(None)))
        return self._rank_map(spent)

    def rises(self, rank_map: RankMap) -> Floats:
        """Predicted rise of every layer (layers,), in nats; they sum to :meth:`predicted_rise`."""
        ranks = [rank_map.get(curve.shape.name, 0) for curve in self._curves]
        found: Floats = self._by_rank[np.arange(len(ranks)), ranks]
        return found

    @cached_property
    def _by_rank(self) -> Floats:
        """(layers, ranks), the predicted rise of every layer at every rank, 0 for dense; of a rank that is not allowed
        that of the next larger one."""
        table = np.zeros((len(self._curves), 1 + max(min(shape.m, shape.n) for shape in self.space.shapes)))
        for row, curve in zip(table, self._curves, strict=True):
            allowed = curve.ranks > 0
            if allowed.any():
                last = int(curve.ranks[allowed][-1])
                row[1 : last + 1] = curve.rises[np.searchsorted(curve.ranks[allowed], np.arange(1, last + 1))]
        return table

    def predicted_rise(self, rank_map: RankMap) -> float:
        """Predicted rise of the loss over the dense model, in nats per token."""
        return float(self.rises(rank_map).sum())

    def _weights(self, multipliers: Mapping[str, float] | None) -> Floats:
        if not multipliers:
            return np.ones(len(self._curves))
        return np.exp([multipliers.get(curve.shape.name, 0.0) for curve in self._curves])

    def _walk(self, budget: int, weights: Floats) -> list[int]:
        """Indices into each layer's choices after walking all hulls, steepest first."""
        first = np.array([curve.hull[0] for curve in self._curves])
        left = budget - self._used(first.tolist())
        order = self._plain_order if (weights == 1).all() else self._order(weights)
        spent = np.cumsum(self._cost[order])
        steps = order[: int(np.searchsorted(spent, left, side="right"))]
        np.maximum.at(first, self._layer[steps], self._end[steps])  # the ends of a layer's steps rise
        chosen: list[int] = first.tolist()
        self._spend(chosen, budget, self._saving(weights))
        return chosen

    @cached_property
    def _plain_order(self) -> Ints:
        """Of the closed form itself, which is asked for again and again."""
        return self._order(np.ones(len(self._curves)))

    def _order(self, weights: Floats) -> Ints:
        """The steps of all hulls, steepest first; a stable sort keeps those of one layer in order where slopes are
        equal."""
        return np.argsort(-(self._slope * weights[self._layer]), kind="stable")

    def _uniform(self, budget: int) -> list[int]:
        fraction = budget / self.space.dense_params
        return self._towards(budget, [fraction * curve.shape.dense_params for curve in self._curves])

    def _towards(self, budget: int, shares: Sequence[float]) -> list[int]:
        chosen: list[int] = []
        surplus: dict[int, float] = {}
        for curve, share in zip(self._curves, shares, strict=True):
            index = max(0, int(np.searchsorted(curve.params, share + 1e-6, side="right")) - 1)
            chosen.append(index)
            following = min(index + 1, len(curve.params) - 1)
            step = curve.params[following] - curve.params[index]
            # A layer's second extra step comes after every other layer's first.
            surplus[id(curve)] = index + ((share - curve.params[index]) / step if step else 0.0)
        # Layers that cannot go as low as their share may have overspent; the others give it back.
        self._give_back(chosen, budget, shares)
        self._spend(chosen, budget, lambda curve, i: surplus[id(curve)] - i)
        return chosen

    def _give_back(self, chosen: list[int], budget: int, shares: Sequence[float]) -> None:
        """Lower the layers that exceed their share most, relative to it, until the budget is met."""
        used = self._used(chosen)
        while used > budget:
            lowerable = [k for k, i in enumerate(chosen) if i > 0]
            k = max(lowerable, key=lambda k: self._curves[k].params[chosen[k]] / max(shares[k], 1.0))
            curve = self._curves[k]
            used -= int(curve.params[chosen[k]] - curve.params[chosen[k] - 1])
            chosen[k] -= 1

    def _saving(self, weights: Floats) -> Callable[[LayerCurve, int], float]:
        index = {id(curve): k for k, curve in enumerate(self._curves)}

        def per_parameter(curve: LayerCurve, i: int) -> float:
            saved = curve.rises[i] - curve.rises[i + 1]
            return float(weights[index[id(curve)]] * saved / (curve.params[i + 1] - curve.params[i]))

        return per_parameter

    def _spend(self, chosen: list[int], budget: int, value: Callable[[LayerCurve, int], float]) -> None:
        """Spend what is left of the budget on single steps, the most valuable that fits first, until none fits."""
        left = budget - self._used(chosen)
        queue = [
            (-value(curve, i), k)
            for k, (curve, i) in enumerate(zip(self._curves, chosen, strict=True))
            if i + 1 < len(curve.params)
        ]
        heapq.heapify(queue)
        while queue and left > 0:
            _, k = heapq.heappop(queue)
            curve, i = self._curves[k], chosen[k]
            cost = int(curve.params[i + 1] - curve.params[i])
            if cost > left:
                continue  # left only falls, so this step will never fit again
            left -= cost
            chosen[k] = i + 1
            if i + 2 < len(curve.params):
                heapq.heappush(queue, (-value(curve, i + 1), k))

    def _used(self, chosen: list[int]) -> int:
        return sum(int(curve.params[i]) for curve, i in zip(self._curves, chosen, strict=True))

    def _rank_map(self, chosen: list[int]) -> RankMap:
        return RankMap(
            (curve.shape.name, int(curve.ranks[i]))
            for curve, i in zip(self._curves, chosen, strict=True)
            if curve.ranks[i] > 0
        )
