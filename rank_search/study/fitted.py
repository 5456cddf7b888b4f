"""The project's own sampler over multipliers: the closed form, corrected by what is measured. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from rank_search.allocation import Floats
from rank_search.study.evidence import Tried
from rank_search.study.fitting import MultiplierFit, moved, nearness
from rank_search.study.sizes import LossCurve, draw_size, size_gains, size_grid
from rank_search.study.space import MultiplierSpace, Params
from rank_search.study.whole_space import WholeSpaceSampler

_DEVIATION = 0.2
"""Standard deviation of every multiplier around the fitted one, as a share of the study's range of multipliers: little
enough to cost next to nothing in loss, for the closed form lies in the middle of a flat bowl, and enough to tell which
way is down."""
_TRYING = 16
"""Measured trials after which deviations shrink, as the root of their number: what is known by then is to be used."""
_UNLIKE = 1e-3
"""What a rank map far from the closed form still counts when the loss at a size is told, so that something always does.
"""
_STEP = 0.005
"""In kept fraction, between the closed forms that others are interpolated from."""
_TRIES = 20
"""Draws after which a proposal may be a rank map that another trial has already."""


class FittedSampler(WholeSpaceSampler):
    """Proposes the closed form with the multipliers that fit the losses measured so far, where that is worth most.

    A size is drawn by how much hypervolume a measurement there is expected to add; a trial that runs counts as a
    measured one, with the loss that is expected of it. The multipliers are those of :class:`MultiplierFit` at that
    size, and a little off them, which is what the next fit learns from.

    A proposal depends on the seed and on what was tried alone, and is no rank map of those.

    Args:
        space: ``uniformity`` is proposed as 0.
        rises: of what was tried.
        seed: of this proposal.
        tried: what there is.
        max_loss: above it a measurement is worth nothing.
        cuts: kept fractions above each of which trials slice other factors than up to it.
    """

    def __init__(
        self, space: MultiplierSpace, rises: Rises, seed: int, tried: Callable[[], Sequence[Tried]],
        max_loss: float | None, cuts: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__(space)
        self._space = space
        self._rises = rises
        self._random = np.random.default_rng(seed)
        self._tried = tried
        self._max_loss = max_loss
        self._cuts = cuts

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a size and multipliers."""
        allowed = search_space.get("kept", self._space.distributions["kept"])
        assert isinstance(allowed, FloatDistribution)
        tried = self._tried()
        measured = self._measured([one for one in tried if one.loss is not None])
        sizes = size_grid(allowed.low, allowed.high)
        running = [self._rises.kept_of(one) for one in tried if one.loss is None]
        gains = size_gains(measured.curve, sizes, running, self._max_loss)
        fit, taken = self._fit(measured), {one.rank_map for one in tried}
        for _ in range(_TRIES):
            kept = draw_size(sizes, gains, self._random)
            params = self._drawn(kept, fit.at(kept), len(measured.curve.kept))
            if self._space.decode(params) not in taken:
                break
        return {name: params[name] for name in search_space}

    def _measured(self, tried: Sequence[Tried]) -> Measured:
        kept, losses = (np.array([getattr(one, name) for one in tried], float) for name in ("kept", "loss"))
        return Measured.of(*self._rises.of(tried), kept, losses, self._cuts)

    def _fit(self, measured: Measured) -> MultiplierFit:
        terms, kept = self._space.terms, self._space.distributions["kept"]
        assert isinstance(kept, FloatDistribution)
        matrix = np.array(list(terms.values())).reshape(len(terms), len(self._space.allocator.space.shapes))
        return measured.fit(matrix, kept.low, kept.high)

    def _drawn(self, kept: float, multipliers: Floats, count: int) -> Params:
        """Multipliers a little off those given, the less the more was measured."""
        terms, reach = self._space.terms, self._space.reach
        deviation = _DEVIATION * min(1.0, _TRYING / max(count, 1)) ** 0.5
        values = np.clip(multipliers + self._random.normal(0.0, deviation * reach, len(terms)), -reach, reach)
        return {"kept": kept, "uniformity": 0.0, **dict(zip(terms, values.tolist(), strict=True))}


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, as far as fits go by it.

    Attributes:
        rises, closed: (n, layers), predicted rises, and those of the closed form at the same sizes.
        curve: of the losses, of which those near the closed form tell most.
    """

    rises: Floats
    closed: Floats
    curve: LossCurve

    @classmethod
    def of(cls, rises: Floats, closed: Floats, kept: Floats, losses: Floats, cuts: Sequence[float]) -> Measured:
        """Of rank maps by their kept fractions (n,) and losses (n,), but for those that have diverged."""
        weights = nearness(moved(rises, closed)) + _UNLIKE
        curve, used = LossCurve.of_undiverged(kept, losses, weights, cuts)
        return cls(rises[used], closed[used], curve)

    def fit(self, terms: Floats, low: float, high: float) -> MultiplierFit:
        """Multipliers of terms (t, layers), for sizes between two kept fractions."""
        curve = self.curve
        ends = (low, *(cut for cut in curve.cuts if low < cut < high), high)
        return MultiplierFit(terms, self.rises, self.closed, curve.kept, curve.levelled, curve.spread, ends)


class Rises:
    """Predicted rises of rank maps that were tried, layer by layer, beside those of the closed form at their sizes, and
    kept fractions; each computed once."""

    def __init__(self, space: MultiplierSpace) -> None:
        self._allocator = space.allocator
        self._known: dict[int, tuple[Floats, Floats]] = {}
        self._closed: dict[int, Floats] = {}
        self._kept: dict[int, float] = {}

    def kept_of(self, running: Tried) -> float:
        """Kept fraction of a trial that is being measured."""
        if running.number not in self._kept:
            self._kept[running.number] = self._allocator.space.kept_of_targets(running.rank_map)
        return self._kept[running.number]

    def of(self, measured: Sequence[Tried]) -> tuple[Floats, Floats]:
        """(n, layers) and (n, layers)."""
        for one in measured:
            if one.number not in self._known:
                assert one.kept is not None
                self._known[one.number] = self._allocator.rises(one.rank_map), self._closed_at(one.kept)
        rises, closed = ([self._known[one.number][k] for one in measured] for k in (0, 1))
        layers = len(self._allocator.space.shapes)
        return np.array(rises).reshape(-1, layers), np.array(closed).reshape(-1, layers)

    def _closed_at(self, kept: float) -> Floats:
        """Between those of the two nearest steps."""
        below = int(kept / _STEP)
        share = kept / _STEP - below
        return (1 - share) * self._closed_step(below) + share * self._closed_step(below + 1)

    def _closed_step(self, step: int) -> Floats:
        if step not in self._closed:
            space = self._allocator.space
            least, most = (params / space.dense_params for params in (space.min_params, space.max_params))
            kept = min(max(step * _STEP, least + 1e-9), most)
            self._closed[step] = self._allocator.rises(self._allocator.closed_form(kept))
        return self._closed[step]
