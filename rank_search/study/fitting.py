"""Multipliers of the closed form, fitted to measured losses. Pure: no torch, no Optuna, no database."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from rank_search.allocation import Bools, Floats
from rank_search.ranges import places
from rank_search.ranks import Ints

LEAST = 5
"""Losses before anything is fitted."""

_FAR = 0.08
"""Excess of predicted rise, as a share of the closed form's, at which a rank map counts 1/e: what holds near the closed
form is wanted."""
_SUREST = 0.3
"""Of the median scatter, the least that any is taken for."""
_COMMON = 1.2
"""Prior deviation of the factor, 1 by the closed form, that all predicted rises are off by."""
_TERM = 0.4
"""Prior deviation, around 0, of what a term adds to that factor."""
_SCALES = (0.1, 1.0)
"""Of these variances, between which the losses choose; ..."""
_NOISES = (0.1, 0.2, 0.4, 0.7)
"""... of what is no rank map's own, as shares of what a smooth curve over the size leaves of the losses; ..."""
_SHARES = ((0.5, 0.3, 0.2), (0.3, 0.2, 0.5))
"""... and of what factors have in common at all sizes, in a range of them, and at about one place in it."""
_PLACE = 0.25
"""Width of a place, of its range."""
_SMOOTH = 0.5
"""Distance in the logarithm of the kept fraction over which losses are smooth, ..."""
_BEND = 0.15
"""... and that over which they may bend or jump by little in a range of their own."""
_BENDS = 3.0
"""Deviation of such bends, of what a smooth curve leaves."""
_JUDGES = 96
"""Losses by which the choice is made, at most."""
_LEAST_FACTOR = 0.3
"""Of the mean factor, which multipliers are in proportion to."""
_CLIP = (0.5, 2.0)
"""Least and largest factor of a layer over the mean one."""


def nearness(differences: Floats) -> Floats:
    """(n,), by how much rank maps count: 1 for the closed form, less the more predicted rise they have beyond it.

    Args:
        differences: (n, layers), those of :func:`moved`.
    """
    near: Floats = np.exp(-np.maximum(differences.sum(axis=1), 0.0) / _FAR)
    return near


def moved(rises: Floats, closed: Floats) -> Floats:
    """(n, layers), what predicted rises differ by from the closed form's, as shares of its whole one.

    Args:
        rises, closed: as for :class:`MultiplierFit`.
    """
    found: Floats = (rises - closed) / _totals(closed)[:, None]
    return found


class MultiplierFit:
    """What multiplier every term would have if each layer's predicted rise were scaled to fit measured losses.

    To first order around the closed form, a rank map's loss is a smooth function of its size plus the slope of the loss
    over the predicted rise times Σ_l c_l Δ_l. Δ_l is what layer l's predicted rise differs by from the closed form's at
    the same size. The factors c_l = h + Σ_t terms[t, l] v_t are 1 where the closed form is right. The function of size,
    h and v are drawn from a Gaussian process (Rasmussen and Williams, "Gaussian processes for machine learning", 2006,
    chapters 2 and 5). h and v may differ from one range of sizes to the next, and from the bottom of a range to its
    top: a nested fine-tune trains the ranks that only the largest models of its range have less often than others. The
    scale of the parts is that which makes the losses likeliest. The best allocation under factors c is the closed form
    with multipliers log(c_l / mean c).

    Args:
        terms: (t, layers), what each multiplier adds to the u of every layer.
        rises: (n, layers), predicted rise of every layer in every measured rank map, nats.
        closed: (n, layers), those of the closed form at the same kept fractions.
        kept: (n,), kept fractions of the target layers.
        losses: (n,), measured, nats per token, without the jumps that are not the rank maps' own (:class:`LossCurve`).
        spread: (n,), by how much losses of about that size scatter; what scatters less says more.
        ends: kept fractions, ascending, between each two of which a range lies.
    """

    def __init__(
        self, terms: Floats, rises: Floats, closed: Floats, kept: Floats, losses: Floats, spread: Floats,
        ends: Sequence[float],
    ) -> None:  # fmt: skip
        self._terms = terms
        self._known = len(losses) >= LEAST and len(terms) > 0
        if not self._known:
            return
        self._ends = np.array(ends)
        self._places = places(self._ends, kept)
        self._kept = np.log(kept)
        differences = moved(rises, closed)
        weights = nearness(differences) + 1e-6
        slopes: Floats = _slopes(_totals(closed), losses, weights)
        self._moves = slopes[:, None] * np.column_stack([differences.sum(axis=1), differences @ terms.T])
        # What h = 1 and v = 0 leave.
        unexplained = losses - self._moves[:, 0]
        unexplained = unexplained - np.average(unexplained, weights=weights)
        scatter = np.maximum(spread / (float(np.median(spread)) + 1e-12), _SUREST)
        self._prior: Floats = np.array([_COMMON, *[_TERM] * len(terms)]) ** 2
        self._fit(unexplained, scatter, weights)

    def _fit(self, losses: Floats, scatter: Floats, weights: Floats) -> None:
        """Choose the scale of every part, and solve for what each loss says."""
        left, noise = _left_of_smooth(self._kept, losses, scatter, weights), scatter**2 / weights
        of_size = self._of_size(losses, left)
        beside, products = self._beside(*self._places), (self._moves * self._prior) @ self._moves.T
        judges = np.unique(np.linspace(0, len(losses) - 1, min(len(losses), _JUDGES)).astype(int))
        among = np.ix_(judges, judges)
        judged = {shares: products[among] * _alike((beside[0][among], beside[1][among]), shares) for shares in _SHARES}
        best = -np.inf
        for shares, scale in product(_SHARES, _SCALES):
            known = of_size[among] + scale * judged[shares]
            for level in _NOISES:
                likely = _log_likelihood(known, (level * left) ** 2 * noise[judges], losses[judges])
                likely -= 0.5 * np.log(scale) ** 2
                if likely > best:
                    best, self._shares, self._scale, chosen = likely, shares, scale, level
        # In place, as below: to get memory for a matrix takes longer than to fill it.
        whole = products
        whole *= self._scale
        whole *= _alike(beside, self._shares)
        whole += of_size
        whole[np.diag_indices(len(losses))] += (chosen * left) ** 2 * noise
        self._said: Floats = np.asarray(np.linalg.solve(whole, losses), dtype=np.float64)

    def at(self, kept: float) -> Floats:
        """(t,), multipliers for a size, by what was measured about there above all; all 0 where fewer than
        :data:`LEAST` losses are known."""
        if not self._known:
            return np.zeros(len(self._terms))
        factors = self.factors(kept)
        relative: Floats = np.clip(factors / max(float(factors.mean()), _LEAST_FACTOR), *_CLIP)
        found = np.linalg.lstsq(self._terms.T, np.log(relative), rcond=None)[0]
        return np.asarray(found, dtype=np.float64)

    def factors(self, kept: float) -> Floats:
        """(layers,), the c_l of a size."""
        if not self._known:
            return np.ones(self._terms.shape[1])
        alike = _alike(self._beside(*places(self._ends, np.array([kept]))), self._shares)[0]
        # By how much h and v are off from 1 and 0.
        off = self._scale * self._prior * (self._moves.T @ (self._said * alike))
        factors: Floats = 1 + off[0] + off[1:] @ self._terms
        return factors

    def _beside(self, number: Ints, place: Floats) -> tuple[Bools, Floats]:
        """(s, n) and (s, n), of places in ranges beside those of what was measured: whether the range is the same, and
        how near they are."""
        other, other_place = self._places
        return number[:, None] == other, np.exp(-0.5 * ((place[:, None] - other_place) / _PLACE) ** 2)

    def _of_size(self, losses: Floats, left: float) -> Floats:
        """(n, n), covariance of the function of size."""
        apart = self._kept[:, None] - self._kept
        apart *= apart
        number, _ = self._places
        variance = float(losses.var()) + 1e-12
        covariance: Floats = np.exp(apart * (-0.5 / _SMOOTH**2))
        covariance += 1
        covariance *= 4 * variance
        bends = np.exp(np.multiply(apart, -0.5 / _BEND**2, out=apart), out=apart)
        bends *= number[:, None] == number
        bends *= (_BENDS * left) ** 2
        covariance += bends
        # So little that it stands for nothing, and enough for losses that lie on a curve exactly.
        covariance[np.diag_indices(len(losses))] += 8e-9 * variance
        return covariance


def _alike(beside: tuple[Bools, Floats], shares: tuple[float, float, float]) -> Floats:
    """(s, n), correlation of h and v between sizes that lie so beside each other."""
    (same, near), (always, in_range, at_place) = beside, shares
    alike: Floats = at_place * near
    alike += in_range
    alike *= same
    alike += always
    return alike


def _totals(closed: Floats) -> Floats:
    """(n,), predicted rise of the closed form."""
    totals: Floats = np.maximum(closed.sum(axis=1), 1e-12)
    return totals


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


def _left_of_smooth(kept: Floats, losses: Floats, scatter: Floats, weights: Floats) -> float:
    """Deviation of losses from a polynomial over the logarithm of the size, in proportion to their scatter."""
    degree = min(4, len(losses) // 3)
    powers = np.vander(kept - kept.mean(), degree + 1)
    root = np.sqrt(weights) / scatter
    left = losses - powers @ np.linalg.lstsq(root[:, None] * powers, root * losses, rcond=None)[0]
    return float(np.sqrt(np.average((left / scatter) ** 2, weights=weights))) + 1e-9


def _log_likelihood(known: Floats, noise: Floats, losses: Floats) -> float:
    """Of losses under a Gaussian process, but for a constant.

    Args:
        known: (j, j), covariance of what they are of.
        noise: (j,), variance of each on top.
    """
    count = len(losses)
    # A row more, for the losses: it holds them, whitened, in the root.
    bordered = np.empty((count + 1, count + 1))
    bordered[:count, :count] = known
    bordered[np.diag_indices(count)] += noise
    bordered[count, :count] = losses
    # Any that is above the square of what is whitened will do.
    bordered[count, count] = 2 * (losses**2 / noise).sum() + 1
    root = np.linalg.cholesky(bordered)
    return float(-0.5 * np.square(root[count, :count]).sum() - np.log(np.diagonal(root)[:count]).sum())
