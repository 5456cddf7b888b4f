"""Sizes are drawn where a front has the widest and steepest gaps, its ends included."""

from __future__ import annotations

import numpy as np
import pytest

from rank_search.study.gaps import Gap, draw_size, find_gaps, loss_at

FRONT = [(0.4, 3.5), (0.6, 3.2), (0.8, 3.1)]


def test_gaps_cover_the_range_and_tell_width_times_fall() -> None:
    gaps = find_gaps(FRONT, 0.3, 0.9)
    assert sorted((gap.start, gap.end) for gap in gaps) == [(0.3, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.9)]
    areas = {gap.start: gap.area for gap in gaps}
    assert areas[0.4] == pytest.approx(0.2 * 0.3)
    assert areas[0.3] == pytest.approx(0.1 * 1.5 * 0.1)  # the first slope, 1.5, goes on


def test_of_a_gap_that_leaves_the_range_the_part_within_counts() -> None:
    (gap,) = find_gaps(FRONT, 0.65, 0.75)
    assert (gap.start, gap.end) == (0.65, 0.75)
    assert gap.area == pytest.approx(0.2 * 0.1 / 4)


@pytest.mark.parametrize("front", [[], [(0.5, 3.0)]])
def test_without_a_front_the_range_is_one_gap(front: list[tuple[float, float]]) -> None:
    assert find_gaps(front, 0.3, 0.9) == [Gap(0.3, 0.9, 1.0)]


def test_large_gaps_are_drawn_most_and_about_their_middle() -> None:
    gaps, random = [Gap(0.3, 0.4, 1.0), Gap(0.4, 0.8, 3.0)], np.random.default_rng(0)
    sizes = np.array([draw_size(gaps, random) for _ in range(400)])
    in_large = sizes > 0.4
    assert 0.85 < in_large.mean() < 0.95  # 9 to 1
    assert sizes[in_large].min() > 0.5
    assert sizes[in_large].max() < 0.7


def test_where_the_loss_falls_nowhere_width_decides() -> None:
    gaps = find_gaps([(0.4, 3.0), (0.8, 3.0)], 0.3, 0.9)
    assert 0.3 < draw_size(gaps, np.random.default_rng(0)) < 0.9


@pytest.mark.parametrize(("kept", "loss"), [(0.5, 3.35), (0.6, 3.2), (0.3, 3.65), (0.9, 3.05)])
def test_a_front_goes_on_as_steeply_as_it_came(kept: float, loss: float) -> None:
    assert loss_at(FRONT, kept) == pytest.approx(loss)
    assert loss_at(FRONT[:1], kept) == 3.5
