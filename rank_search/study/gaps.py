"""Gaps of a front: at which size the next rank map is worth most. Pure: no torch, no Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_MIDDLE = (0.3, 0.7)
"""Where in a gap a size is drawn."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two neighbours on a front.

    Attributes:
        start, end: kept fractions.
        area: width times fall in loss; a point in the middle adds a quarter of it to the hypervolume.
    """

    start: float
    end: float
    area: float


def find_gaps(front: Sequence[tuple[float, float]], low: float, high: float) -> list[Gap]:
    """The gaps of a front between two kept fractions, those at its ends included.

    Args:
        front: kept fraction and loss of its points, by ascending size.
    """
    if len(front) < 2:
        return [Gap(low, high, 1.0)]
    inner = [Gap(start, end, (end - start) * (a - b)) for (start, a), (end, b) in pairwise(front)]
    # Beyond the ends the loss goes on as steeply as it came.
    (first, a), (second, b) = front[:2]
    (before, c), (last, d) = front[-2:]
    ends = [
        Gap(low, first, (a - b) / (second - first) * (first - low) ** 2),
        Gap(last, high, (c - d) / (last - before) * (high - last) ** 2),
    ]
    found = []
    for gap in [*inner, *ends]:
        start, end = max(gap.start, low), min(gap.end, high)
        if start < end:
            found.append(Gap(start, end, gap.area * ((end - start) / (gap.end - gap.start)) ** 2))
    return found or [Gap(low, high, 1.0)]


def loss_at(front: Sequence[tuple[float, float]], kept: float) -> float:
    """Of a front at a size between its points, or beyond its ends, where it goes on as steeply as it came."""
    if len(front) < 2:
        return front[0][1]
    right = min(max(int(np.searchsorted([point[0] for point in front], kept)), 1), len(front) - 1)
    (start, a), (end, b) = front[right - 1 : right + 1]
    return a + (b - a) * (kept - start) / (end - start)


def draw_size(gaps: Sequence[Gap], random: np.random.Generator) -> float:
    """A kept fraction about the middle of a gap, which is drawn by the square of its area: mostly a large one, but not
    the same by all workers."""
    areas = np.array([gap.area for gap in gaps]) ** 2
    if not areas.sum() > 0:  # no fall in loss anywhere
        areas = np.array([gap.end - gap.start for gap in gaps])
    gap = gaps[int(random.choice(len(gaps), p=areas / areas.sum()))]
    return gap.start + (gap.end - gap.start) * float(random.uniform(*_MIDDLE))
