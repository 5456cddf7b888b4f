"""At which size the next rank map is worth most: expected gain of hypervolume. Pure: no torch, no Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from rank_search.allocation import Bools, Floats

_GRID = 260
"""Sizes that are looked at."""
_NEIGHBOURS = 3.0
"""Measurements, by their weights, that the expected loss at a size is read from."""
_SPREAD_NEIGHBOURS = 10.0
"""And those that its spread is read from."""
_NARROW = 0.005
"""Apart in kept fraction, by less than which measurements say little about how the loss falls with the size."""
_LEAST_LEFT = 0.3
"""Share of a measurement that its own line is taken to leave out at least: at the ends lines are mostly its own."""
_NEAR = 0.3
"""Weight above which a measurement's loss has to be like those of others."""
_DIVERGED = 7.0
"""Median distances from their lines, of ..."""
_DIVERGED_NEIGHBOURS = 10
"""... so many measurements about its size, by which a loss is off its own at most: one that is further up is of a
fine-tune that went wrong, and says nothing of others. ..."""
_DIVERGED_SPAN = 0.05
"""... It is further up than this share of what losses span, too: at their ends, lines are off by what they bend."""
_PASSES = 6
"""Over the losses, for the lines of others change with one that is left out."""
_HALVINGS = 20
"""Of the distance that holds so many neighbours: to a millionth."""
_ROWS = 48
"""Sizes at a time: what is computed for them stays in the processor's cache."""
_LEAST_NEAR = 1e-12
"""What a measurement counts however far it is, ..."""
_FARTHEST = -40.0
"""... whose logarithm is above this one by much. Below, exponentials run out of exponents, which is slow."""
_SMOOTH = 4
"""Power of the logarithm of the size up to which losses are smooth between jumps."""
_DOUBT = 0.06
"""Ridge on jumps, in measurements: the square of a loss's scatter (0.005) over that of a jump (0.02)."""
_POWER = 4
"""Of the gain, by which sizes are drawn: nearly always one of the best, but not the same by all workers."""


class LossCurve:
    """Which loss to expect at a size, and by how much that may be off.

    A line through the nearest measurements for the one, the residuals of such lines for the other.

    Args:
        kept, losses, weights: (n,), of what was measured.
        cuts: kept fractions, ascending, above each of which models are made of other factors than up to it: losses may
            jump there.

    Attributes:
        levelled: (n,), the losses without these jumps.
    """

    def __init__(self, kept: Floats, losses: Floats, weights: Floats, cuts: Sequence[float] = ()) -> None:
        self.kept = kept
        self.losses = losses
        self._weights = weights
        self.cuts: Floats = np.array(cuts, float)
        self._jumps = _jumps(kept, losses, weights, self.cuts)
        self.levelled: Floats = losses - _above(kept, self.cuts) @ self._jumps
        self._about = _About(kept, weights)
        lines, leverage = self._about.lines(kept, self.levelled)
        # As if every measurement were not there for its own line.
        self._left_out = (self.levelled - lines) / np.maximum(1 - weights * leverage, _LEAST_LEFT)

    @classmethod
    def of_undiverged(
        cls, kept: Floats, losses: Floats, weights: Floats, cuts: Sequence[float]
    ) -> tuple[LossCurve, Bools]:
        """The curve of the measurements that have not diverged, and (n,), which these are."""
        curve, left, used = cls(kept, losses, weights, cuts), np.ones(len(kept), bool), np.ones(len(kept), bool)
        for _ in range(_PASSES):
            outlying = curve._outlying()
            if not outlying.any():
                break
            these = np.flatnonzero(left)[outlying]
            # One far below is no wreck, but while it is in the lines of others these seem to be far above.
            left[these], used[these] = False, curve._left_out[outlying] < 0
            curve = cls(kept[left], losses[left], weights[left], cuts)
        return curve if (left == used).all() else cls(kept[used], losses[used], weights[used], cuts), used

    def _outlying(self) -> Bools:
        """(n,), which losses are so far off their lines, and farthest of those about their sizes."""
        found = np.zeros(len(self.kept), dtype=bool)
        near = np.flatnonzero(self._weights > _NEAR)
        if len(near) > _DIVERGED_NEIGHBOURS:
            off = np.abs(self._left_out[near])
            low, high = np.quantile(self.levelled[near], (0.1, 0.9))
            far = np.flatnonzero(off > max(_DIVERGED * np.median(off), _DIVERGED_SPAN * (high - low)))
            apart = np.abs(self.kept[near[far], None] - self.kept[near])
            nearest = np.argpartition(apart, _DIVERGED_NEIGHBOURS, axis=1)
            about = off[nearest[:, :_DIVERGED_NEIGHBOURS]]
            found[near[far]] = (off[far] > _DIVERGED * np.median(about, axis=1)) & (off[far] >= about.max(axis=1))
        return found

    @cached_property
    def spread(self) -> Floats:
        """(n,), by how much losses of about each one's size scatter."""
        return self._spread_at(self.kept)

    def at(self, sizes: Floats) -> tuple[Floats, Floats]:
        """(s,) and (s,), nats per token, at kept fractions (s,); something must have been measured."""
        smooth, _ = self._about.lines(sizes, self.levelled)
        return smooth + _above(sizes, self.cuts) @ self._jumps, self._spread_at(sizes)

    def _spread_at(self, sizes: Floats) -> Floats:
        squares = np.column_stack([np.ones(len(self.kept)), self._left_out**2])
        sums = self._about.sums(sizes, _SPREAD_NEIGHBOURS, squares)
        spread: Floats = np.sqrt(sums[:, 1] / sums[:, 0])
        return spread


def size_gains(curve: LossCurve, sizes: Floats, running: Sequence[float] = (), max_loss: float | None = None) -> Floats:
    """What :func:`expected_gains` says after the measurements of a curve; the same everywhere where there are none.

    Args:
        running: kept fractions of what is being measured: as if it had come out as expected.
    """
    if not len(curve.kept):
        return np.ones(len(sizes))
    expected, spread = curve.at(sizes)
    known = list(zip(curve.kept.tolist(), curve.losses.tolist(), strict=True))
    known += [(kept, float(np.interp(kept, sizes, expected))) for kept in running]
    return expected_gains(known, sizes, expected, spread, max_loss)


def expected_gains(
    known: Sequence[tuple[float, float]], sizes: Floats, expected: Floats, spread: Floats, max_loss: float | None = None
) -> Floats:
    """Hypervolume, in nats times kept fraction, that a measurement at every size is expected to add to the front.

    The expected improvement (Jones, Schonlau and Welch, 1998) over the best loss at every size from the measurement's
    own on, summed over these.

    Args:
        known: kept fraction and loss of what was measured.
        sizes: (s,), ascending and evenly apart; hypervolume is counted between the first and the last.
        expected, spread: (s,), mean and deviation of the loss there.
        max_loss: what is above adds nothing; None: what is above the loss that the smallest size may have.
    """
    worst = float(expected[0] + 2 * spread[0])
    lowest = np.full(len(sizes), worst if max_loss is None else min(max_loss, worst))
    for size, loss in known:
        reached = sizes >= size - 1e-9
        lowest[reached] = np.minimum(lowest[reached], loss)
    # The lowest loss is the same from one point of the front to the next, so each of them is looked at once.
    starts = np.flatnonzero(np.diff(lowest, prepend=np.inf))
    ends = np.append(starts[1:], len(sizes))
    larger = np.clip(ends[None, :] - np.maximum(starts[None, :], np.arange(len(sizes))[:, None]), 0, None)
    # Of a logistic distribution it is a logarithm; its deviation is π / √3 times its scale.
    scale = np.maximum(spread, 1e-9)[:, None] * np.sqrt(3) / np.pi
    better = scale * np.logaddexp(0.0, (lowest[starts] - expected[:, None]) / scale)
    gains: Floats = (better * larger).sum(axis=1) * (sizes[1] - sizes[0])
    return gains


def size_grid(low: float, high: float) -> Floats:
    """Kept fractions between two."""
    return np.linspace(low, high, _GRID)


def draw_size(sizes: Floats, gains: Floats, random: np.random.Generator) -> float:
    """One of the sizes, mostly of a large gain, and a little off it."""
    chances = (np.maximum(gains, 0.0) / max(float(gains.max()), 1e-12)) ** _POWER
    if not chances.sum() > 0:
        chances = np.ones(len(sizes))
    step = sizes[1] - sizes[0]
    drawn = sizes[int(random.choice(len(sizes), p=chances / chances.sum()))] + random.uniform(-0.5, 0.5) * step
    return float(np.clip(drawn, sizes[0], sizes[-1]))


def _above(sizes: Floats, cuts: Floats) -> Floats:
    """(s, cuts), 1 where a size is above a cut."""
    above: Floats = (sizes[:, None] > cuts[None, :]).astype(float)
    return above


def _jumps(kept: Floats, losses: Floats, weights: Floats, cuts: Floats) -> Floats:
    """(cuts,), by how much losses jump at each, beside a smooth curve over the logarithm of the size."""
    if not len(cuts) or len(kept) < 2:
        return np.zeros(len(cuts))
    x = np.log(kept)
    x = (x - x.mean()) / max(float(x.std()), 1e-3)
    design = np.column_stack([np.vander(x, _SMOOTH + 1, increasing=True), _above(kept, cuts)])
    # Level and slope are free, or nearly so.
    priors = np.diag([1e-9, 1e-3, *[_DOUBT] * (_SMOOTH - 1), *[_DOUBT] * len(cuts)])
    found = np.linalg.solve(design.T @ (weights[:, None] * design) + priors, design.T @ (weights * losses))
    jumps: Floats = found[_SMOOTH + 1 :]
    return jumps


class _About:
    """Measurements about a size: a Gaussian kernel over their distances, as wide as it takes to hold so many.

    Args:
        kept, weights: (n,), of what was measured.
    """

    def __init__(self, kept: Floats, weights: Floats) -> None:
        order = np.argsort(kept)
        self._kept, self._weights, self._ascending = kept, weights, kept[order]
        self._before = np.append(0.0, np.cumsum(weights[order]))

    def lines(self, sizes: Floats, values: Floats) -> tuple[Floats, Floats]:
        """(s,), at every size what a line through the values (n,) around it says; and (s,), what share a measurement at
        that size has in it, for every unit of its weight."""
        if not len(sizes):
            return sizes, sizes
        # About their means, for sums of squares are to leave something.
        origin, level = float(self._kept.mean()), float(values.mean())
        x, y = self._kept - origin, values - level
        total, first, second, height, product = self.sums(
            sizes, _NEIGHBOURS, np.column_stack([np.ones(len(x)), x, x * x, y, x * y])
        ).T
        middle = first / total
        moment = second - middle * first + _NARROW**2 * total
        off = sizes - origin - middle
        lines: Floats = level + height / total + (product - middle * height) / moment * off
        leverage: Floats = 1 / total + off**2 / moment
        return lines, leverage

    def sums(self, sizes: Floats, neighbours: float, columns: Floats) -> Floats:
        """(s, k), of columns (n, k) over the measurements, by how near every size they are."""
        widths, weighted = self._widths(sizes, neighbours), self._weights[:, None] * columns
        sums: Floats = np.empty((len(sizes), columns.shape[1]))
        for start in range(0, len(sizes), _ROWS):
            rows = slice(start, start + _ROWS)
            near: Floats = sizes[rows, None] - self._kept
            near /= widths[rows, None]  # in place, for this is what a proposal spends most on
            near *= near
            near *= -0.5
            np.maximum(near, _FARTHEST, out=near)
            np.exp(near, out=near)
            sums[rows] = near @ weighted
        sums += _LEAST_NEAR * columns.sum(axis=0)
        return sums

    def _widths(self, sizes: Floats, neighbours: float) -> Floats:
        """(s,), distance within which so many measurements lie, by their weights; all, where they are fewer."""
        if not len(sizes):
            return sizes
        below = np.zeros(len(sizes))
        above = np.maximum(np.abs(sizes - self._ascending[0]), np.abs(sizes - self._ascending[-1]))
        for _ in range(_HALVINGS):
            middle = (below + above) / 2
            last = np.searchsorted(self._ascending, sizes + middle, side="right")
            held = self._before[last] - self._before[np.searchsorted(self._ascending, sizes - middle)]
            enough = held >= neighbours
            above, below = np.where(enough, middle, above), np.where(enough, below, middle)
        widths: Floats = np.maximum(above, 1e-6)
        return widths
