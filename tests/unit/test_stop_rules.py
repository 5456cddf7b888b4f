"""When a search stops."""

from __future__ import annotations

import pytest

from rank_search.front import Front, FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap
from rank_search.stop_rules import StopRules, growth

FRONT = [(30, 3.0), (60, 2.5), (90, 2.2)]


def test_without_rules_nothing_stops() -> None:
    rules = StopRules()
    assert rules.of_times(1e9, 1e9) is None
    assert rules.of_outcomes(FRONT * 9, 100) is None
    assert rules.of_front(Front()) is None


def test_times() -> None:
    assert StopRules(wall_time=60).of_times(59.9, 1e9) is None
    assert "60 s (search.wall_time = 60)" in (StopRules(wall_time=60).of_times(60.2, 0) or "")
    assert "search.gpu_seconds = 5" in (StopRules(gpu_seconds=5).of_times(0, 5) or "")


def test_a_flat_hypervolume_stops_and_a_growing_one_does_not() -> None:
    rules = StopRules(flat_trials=2)
    dominated = [(70, 2.9), (95, 2.6)]
    assert rules.of_outcomes([*dominated, *FRONT], 100) is None
    reason = rules.of_outcomes([*FRONT, *dominated], 100)
    assert reason == "in 2 trials the hypervolume has grown by 0.000% (search.flat_trials = 2)"
    assert rules.of_outcomes(dominated, 100) is None  # too few to tell


def test_growth_counts_points_at_the_ends_of_the_front_and_ignores_bad_trials() -> None:
    smaller = (20, 3.4)
    assert growth([*FRONT, smaller], 1, 100) > 0.02
    assert growth([*FRONT, (95, 2.0)], 1, 100) > 0.001
    assert growth([(30, 3e3), *FRONT, (45, 2.7)], 1, 100) == growth([*FRONT, (45, 2.7)], 1, 100)


def test_growth_is_the_share_of_the_area_that_is_new() -> None:
    # The front's losses are 2 and 3, so the reference is 4: before (100 - 40) * 1, then (80 - 40) * 1 + (100 - 80) * 2.
    assert growth([(40, 3.0), (80, 2.0)], 1, 100) == pytest.approx((80 - 60) / 80)


@pytest.mark.parametrize(("loss", "kept", "stops"), [(2.5, 0.6, True), (2.5, 0.59, False), (2.49, 0.6, False)])
def test_a_target_needs_both(loss: float, kept: float, stops: bool) -> None:
    measured = Measurement(2.5, 0.0, 60, 60, 0.6, 0.6, Fidelity.TUNED, 10)
    reason = StopRules(target_loss=loss, target_kept=kept).of_front(Front((FrontPoint(7, RankMap(), measured),)))
    assert (reason is not None) == stops
