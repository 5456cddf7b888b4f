"""Ranges of kept fractions, each of which has a nested fine-tune. Pure: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from rank_search.allocation import Floats
from rank_search.ranks import Ints, RankSpace
from rank_search.search_spec import SearchSpec
from rank_search.spec import StudySpec


def kept_ranges(search: SearchSpec, count: int, least: float) -> list[tuple[float, float]]:
    """Ranges of kept fractions, ascending, each as many times larger than the one before; none reaches below
    ``least``, that of the smallest ranks."""
    low = max(search.min_kept, least)
    ends = np.geomspace(low, max(search.max_kept, low), count + 1).tolist()
    return list(pairwise(ends))


def shared_steps(ranges: Sequence[tuple[float, float]], mean: int) -> list[int]:
    """Steps of every range's fine-tune, about ``mean`` of them on average, to two digits: more where more is removed,
    for what has lost more takes longer to mend, in proportion to 3 + the share of the target layers that the middle of
    the range lacks."""
    weights = np.array([4 - (low + high) / 2 for low, high in ranges])
    return [max(1, round(float(f"{steps:.2g}"))) for steps in (mean * weights / weights.mean()).tolist()]


def ranges_of(spec: StudySpec, space: RankSpace) -> list[tuple[float, float]]:
    """Those of a study in nested mode, on the target layers of its model."""
    return kept_ranges(spec.search, spec.finetune.nested_ranges, space.min_params / space.dense_params)


def places(ends: Floats, kept: Floats) -> tuple[Ints, Floats]:
    """(n,) and (n,), of kept fractions: which of the ranges between each two of ``ends``, ascending, holds each, and
    how far up in it, by its quotient, each lies: from 0 to 1."""
    number: Ints = np.clip(np.searchsorted(ends, kept) - 1, 0, len(ends) - 2)
    low, high = np.log(ends[number]), np.log(ends[number + 1])
    return number, (np.log(kept) - low) / np.maximum(high - low, 1e-9)


def bank_cuts(spec: StudySpec, space: RankSpace) -> tuple[float, ...]:
    """Kept fractions, ascending, above each of which a study's trials slice other factors than up to it."""
    if spec.finetune.mode != "nested":
        return ()
    return tuple(high for _, high in ranges_of(spec, space)[:-1])
