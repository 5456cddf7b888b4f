"""The project's own sampler over multipliers: the closed form, corrected by what is measured. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from rank_search.allocation import Floats
from rank_search.study.evidence import Tried
from rank_search.study.fitting import fitted_multipliers
from rank_search.study.gaps import draw_size, find_gaps, loss_at
from rank_search.study.space import MultiplierSpace, Params
from rank_search.study.whole_space import WholeSpaceSampler

_DEVIATION = 0.2
"""Standard deviation of every multiplier around the fitted one, as a share of the study's range of multipliers: little
enough to cost next to nothing in loss, for the closed form lies in the middle of a flat bowl, and enough to tell which
way is down."""
_STEP = 0.005
"""In kept fraction, between the closed forms that others are interpolated from."""
_TRIES = 20
"""Draws after which a proposal may be a rank map that another trial has already."""


class FittedSampler(WholeSpaceSampler):
    """Proposes the closed form with the multipliers that fit all losses measured so far, where the front has gaps.

    A size is drawn in the gaps of the front, wide and steep ones most; a trial that runs counts as a point of it. The
    multipliers are those of :func:`fitted_multipliers`, and a little off them, which is what the next fit learns from.

    A proposal depends on the seed and on what was tried alone, and is no rank map of those.

    Args:
        space: ``uniformity`` is proposed as 0.
        rises: of what was tried.
        seed: of this proposal.
        tried: what there is.
    """

    def __init__(self, space: MultiplierSpace, rises: Rises, seed: int, tried: Callable[[], Sequence[Tried]]) -> None:
        super().__init__(space)
        self._space = space
        self._rises = rises
        self._random = np.random.default_rng(seed)
        self._tried = tried

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a size and multipliers."""
        allowed = search_space.get("kept", self._space.distributions["kept"])
        assert isinstance(allowed, FloatDistribution)
        tried = self._tried()
        multipliers = self._fitted([one for one in tried if one.loss is not None])
        gaps = find_gaps(self._front(tried), allowed.low, allowed.high)
        taken = {one.rank_map for one in tried}
        for _ in range(_TRIES):
            params = self._drawn(multipliers, draw_size(gaps, self._random))
            if self._space.decode(params) not in taken:
                break
        return {name: params[name] for name in search_space}

    def _fitted(self, measured: Sequence[Tried]) -> Floats:
        terms = self._space.terms
        matrix = np.array(list(terms.values())).reshape(len(terms), -1)
        rises, closed = self._rises.of(measured)
        kept, losses = (np.array([getattr(one, name) for one in measured], float) for name in ("kept", "loss"))
        return fitted_multipliers(matrix, rises, closed, kept, losses)

    def _front(self, tried: Sequence[Tried]) -> list[tuple[float, float]]:
        """Kept fraction and loss of the front, and of what runs, as if it came to lie on it."""
        front: list[tuple[float, float]] = []
        measured = ((one.kept, one.loss) for one in tried if one.kept is not None and one.loss is not None)
        for kept, loss in sorted(measured):
            if not front or loss < front[-1][1]:
                front.append((kept, loss))
        if not front:
            return []
        running = {self._rises.kept_of(one) for one in tried if one.loss is None}
        return sorted([*front, *((kept, loss_at(front, kept)) for kept in running - {kept for kept, _ in front})])

    def _drawn(self, multipliers: Floats, kept: float) -> Params:
        names, reach = list(self._space.terms), self._space.reach
        off = self._random.normal(0.0, _DEVIATION * reach, len(names))
        values = np.clip(multipliers + off, -reach, reach)
        return {"kept": kept, "uniformity": 0.0, **dict(zip(names, values.tolist(), strict=True))}


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
