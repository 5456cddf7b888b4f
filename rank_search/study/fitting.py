"""Multipliers of the closed form, fitted to measured losses. Pure: no torch, no Optuna, no database."""

from __future__ import annotations

import numpy as np

from rank_search.allocation import Floats

LEAST = 5
"""Losses before anything is fitted."""

_BANDWIDTH = 0.12
"""Width in kept fraction of the neighbourhood in which a loss is compared; wider where trials lie sparsely."""
_NEIGHBOURS = 6
"""Trials that a neighbourhood holds at least."""
_FAR = 0.08
"""Excess of predicted rise, as a share of the closed form's, at which a rank map counts 1/e: what holds near the closed
form is wanted."""
_REACH = 0.25
"""Distance in the logarithm of the kept fraction over which what is off carries."""
_SUREST = 0.3
"""Of the median scatter, the least that any is taken for."""
_TRUST = 0.5
"""Prior deviation of the factor, 1 by the closed form, that all predicted rises are off by."""
_PRIOR = 0.4
"""Prior deviation, around 0, of what a term adds to that factor."""
_LEAST_FACTOR = 0.3
"""Of the common factor, which multipliers are in proportion to."""
_CLIP = (0.5, 2.0)
"""Least and largest factor of a layer over the common one."""
_ROUNDS = 3
"""Of estimating the residual's variance and the factors from each other."""


def nearness(rises: Floats, closed: Floats) -> Floats:
    """(n,), by how much rank maps count: 1 for the closed form, less the more predicted rise they have beyond it.

    Args:
        rises, closed: as for :class:`MultiplierFit`.
    """
    excess = _moved(rises, closed).sum(axis=1)
    near: Floats = np.exp(-np.maximum(excess, 0.0) / _FAR)
    return near


class MultiplierFit:
    """What multiplier every term would have if each layer's predicted rise were scaled to fit measured losses.

    To first order around the closed form, a rank map's loss is a smooth function of its size plus the slope of the loss
    over the predicted rise times Σ_l c_l Δ_l. Δ_l is what layer l's predicted rise differs by from the closed form's at
    the same size. The factors c_l = h + Σ_t terms[t, l] v_t are 1 where the closed form is right. A partially linear
    regression (Speckman, "Kernel smoothing in partial linear models", 1988) takes the function of size out of both
    sides, so that trials are compared with those of about their size alone, and h and v are estimated by ridge
    regression towards 1 and 0. The best allocation under factors c is the closed form with multipliers log(c_l / h).

    Args:
        terms: (t, layers), what each multiplier adds to the u of every layer.
        rises: (n, layers), predicted rise of every layer in every measured rank map, nats.
        closed: (n, layers), those of the closed form at the same kept fractions.
        kept: (n,), kept fractions of the target layers.
        losses: (n,), measured, nats per token, without the jumps that are not the rank maps' own (:class:`LossCurve`).
        spread: (n,), by how much losses of about that size scatter; what scatters less says more.
    """

    def __init__(
        self, terms: Floats, rises: Floats, closed: Floats, kept: Floats, losses: Floats, spread: Floats
    ) -> None:
        self._terms = terms
        self._kept = kept
        self._known = len(losses) >= LEAST and len(terms) > 0
        if not self._known:
            return
        moved, self._weights = _moved(rises, closed), nearness(rises, closed)
        slopes = _slopes(_totals(closed), losses, self._weights)
        design = slopes[:, None] * np.column_stack([moved.sum(axis=1), moved @ terms.T])
        others = np.eye(len(losses)) - _smoother(kept, self._weights)
        self._x, self._y = others @ design, others @ losses
        middle = float(np.median(spread)) + 1e-12
        self._sure: Floats = (middle / np.maximum(spread, _SUREST * middle)) ** 2

    def at(self, kept: float) -> Floats:
        """(t,), multipliers for a size, by what was measured of about that size above all; all 0 where fewer than
        :data:`LEAST` losses are known."""
        if not self._known:
            return np.zeros(len(self._terms))
        near = self._weights * np.exp(-0.5 * (np.log(self._kept / kept) / _REACH) ** 2)
        # By how much h and v are off from 1 and 0.
        off = _ridge(self._x, self._y - self._x[:, 0], near * self._sure, float(near.sum()))
        factors = np.clip(1 + off[1:] @ self._terms / max(1 + off[0], _LEAST_FACTOR), *_CLIP)
        found: Floats = np.linalg.lstsq(self._terms.T, np.log(factors), rcond=None)[0]
        return found


def _totals(closed: Floats) -> Floats:
    """(n,), predicted rise of the closed form."""
    totals: Floats = np.maximum(closed.sum(axis=1), 1e-12)
    return totals


def _moved(rises: Floats, closed: Floats) -> Floats:
    """(n, layers), what predicted rises differ by, as shares of the closed form's whole one."""
    moved: Floats = (rises - closed) / _totals(closed)[:, None]
    return moved


def _slopes(totals: Floats, losses: Floats, weights: Floats) -> Floats:
    """Rise of the loss over the logarithm of the predicted rise at every trial's size, by a parabola."""
    x = np.log(totals)
    spread = float(x.std())
    if spread < 1e-6:
        return np.ones(len(x))
    x = (x - x.mean()) / spread
    root = np.sqrt(weights)
    _, slope, bend = np.linalg.lstsq(root[:, None] * np.vander(x, 3, increasing=True), root * losses, rcond=None)[0]
    slopes: Floats = (slope + 2 * bend * x) / spread
    return np.maximum(slopes, 1e-3)


def _smoother(kept: Floats, weights: Floats) -> Floats:
    """(n, n): takes losses to what a parabola through each one's neighbours in size says."""
    apart = np.abs(kept[None, :] - kept[:, None])
    place = min(len(kept) - 1, _NEIGHBOURS)
    reach = np.partition(apart, place, axis=1)[:, place]
    width = np.maximum(_BANDWIDTH, 1.2 * reach)[:, None]
    w = np.exp(-0.5 * (apart / width) ** 2) * weights + 1e-12
    powers = np.vander(kept - kept.mean(), 5, increasing=True)
    moments = (w @ powers)[:, [[0, 1, 2], [1, 2, 3], [2, 3, 4]]] + np.diag([1e-12, 1e-9, 1e-9])
    parabolas = powers[:, :3]
    here = np.linalg.solve(moments, parabolas[:, :, None])[..., 0]
    smoother: Floats = w * (here @ parabolas.T)
    return smoother


def _ridge(x: Floats, y: Floats, weights: Floats, count: float) -> Floats:
    """Coefficients of the common factor and of every term; the residual's variance, of ``count`` trials, sets how far
    priors count."""
    precision: Floats = np.array([_TRUST, *[_PRIOR] * (x.shape[1] - 1)]) ** -2
    squares: Floats = x.T @ (weights[:, None] * x)
    found: Floats = np.zeros(x.shape[1])
    residual: Floats = y
    for _ in range(_ROUNDS):
        freedom = max(count - 4, 1.0)
        variance = max(float(weights @ residual**2) / freedom, 1e-10)
        solution = np.linalg.solve(squares + np.diag(variance * precision), x.T @ (weights * y))
        found = np.asarray(solution, dtype=np.float64)
        residual = y - x @ found
    return found
