"""The rule that decides who climbs: safe while it knows little, sharper with every pair, and cheap for the front."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rank_search.climbing import LEAST_PAIRS, Climbs, Rung, Step, make_rungs, paired_error, t_quantile
from rank_search.measurement import Fidelity

TOP = 3
Losses = tuple[float, ...]


def losses(rng: random.Random, kept: float, flaw: float, noise: float = 0.03) -> Losses:
    """A made-up rank map's losses on four rungs: ever more of the text without a fine-tune, then with one.

    A fine-tune repairs most of what removal does, and half to three quarters of a rank map's own ``flaw``; on every
    rung there is something of the rank map's that no other one tells of.
    """
    own = noise * (1.2 - kept)
    sliced = 2.8 + 3 * (1 - kept) ** 2 + 2 * flaw * (1.5 - kept) + rng.gauss(0, own)
    tuned = 2.8 + 0.9 * (1 - kept) ** 1.5 + (1 - 0.5 * kept) * flaw + rng.gauss(0, own)
    return sliced + rng.gauss(0, 0.1), sliced + rng.gauss(0, 0.03), sliced, tuned


def made_up_study(seed: int, trials: int, noise: float = 0.03) -> list[tuple[float, Losses]]:
    """Kept fraction and losses: closed form and uniform at four sizes, then proposals between them."""
    rng = random.Random(seed)
    points = [(kept, flaw * (1.3 - kept)) for kept in (0.9, 0.8, 0.6, 0.4) for flaw in (0.02, 0.5)]
    while len(points) < trials:
        kept = rng.uniform(0.3, 0.95)
        points.append((kept, abs(rng.gauss(0, 0.15)) * (1.3 - kept)))
    return [(kept, losses(rng, kept, flaw, noise)) for kept, flaw in points]


def step(trial: int, rung: int, point: tuple[float, Losses]) -> Step:
    kept, found = point
    return Step(trial, rung, found[rung], kept, round(kept * 1e6), top=rung == TOP)


def climb(points: list[tuple[float, Losses]], seeds: int = 8) -> tuple[set[int], Climbs]:
    """The trials that reach the top when they run one after the other."""
    climbs, reached = Climbs(), set()
    for trial, point in enumerate(points):
        for rung in range(TOP):
            here = step(trial, rung, point)
            goes_on = trial < seeds or climbs.goes_on(here)
            climbs.add([here])
            if not goes_on:
                break
        else:
            climbs.add([step(trial, TOP, point)])
            reached.add(trial)
    return reached, climbs


def front(points: list[tuple[float, Losses]]) -> set[int]:
    found: set[int] = set()
    lowest = float("inf")
    for trial, (_, found_losses) in sorted(enumerate(points), key=lambda item: item[1][0]):
        if found_losses[TOP] < lowest:
            lowest = found_losses[TOP]
            found.add(trial)
    return found


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.06])
def test_pruning_spares_trials_and_hardly_a_point_of_the_front(noise: float) -> None:
    lost = points = spared = 0
    for seed in range(6):
        study = made_up_study(seed, 150, noise)
        reached, _ = climb(study)
        due = front(study)
        lost, points, spared = lost + len(due - reached), points + len(due), spared + len(study) - len(reached)
    assert lost <= 0.02 * points
    assert spared >= 0.12 * 6 * 150


def test_nothing_is_pruned_before_there_are_pairs() -> None:
    _, climbs = climb(made_up_study(1, 40)[: LEAST_PAIRS - 1])
    assert climbs.pairs(0) == LEAST_PAIRS - 1
    hopeless = Step(99, 0, 50.0, 0.9, 900_000)
    assert climbs.predict(hopeless) is None
    assert climbs.goes_on(hopeless)
    _, climbs = climb(made_up_study(1, LEAST_PAIRS))
    assert not climbs.goes_on(hopeless)


def test_the_margin_shrinks_with_pairs() -> None:
    points = made_up_study(2, 300)
    margins = []
    for count in (8, 20, 60, 300):
        climbs = Climbs(step(t, rung, p) for t, p in enumerate(points[:count]) for rung in range(TOP + 1))
        predicted = climbs.predict(Step(1000, 2, 3.6, 0.6, 600_000))
        assert predicted is not None
        margins.append(predicted.mean - predicted.lower_edge())
    assert margins == sorted(margins, reverse=True)
    assert margins[-1] < 0.4 * margins[0]


def test_a_straight_line_is_found() -> None:
    rng = np.random.default_rng(0)
    steps = []
    for trial in range(40):
        low, kept = float(rng.uniform(3, 5)), float(rng.uniform(0.3, 0.9))
        top = 2 + 0.4 * low - 0.7 * kept
        steps += [Step(trial, 0, low, kept, 0), Step(trial, 1, top, kept, 0, top=True)]
    predicted = Climbs(steps).predict(Step(99, 0, 4.0, 0.5, 0))
    assert predicted is not None
    assert predicted.mean == pytest.approx(2 + 1.6 - 0.35, abs=0.01)
    assert predicted.slope == pytest.approx(0.4, abs=0.02)


def test_what_no_smaller_model_beats_goes_on() -> None:
    _, climbs = climb(made_up_study(3, 60))
    assert climbs.goes_on(Step(99, 0, 50.0, 0.2, 200_000))
    assert climbs.rival(200_000) is None
    assert not climbs.goes_on(Step(99, 0, 50.0, 0.2, 200_000), max_loss=4.0)  # but a goal can


def test_a_trial_that_misses_a_goal_is_no_rival() -> None:
    climbs = Climbs([Step(0, 1, 1.0, 0.5, 5, top=True, feasible=False), Step(1, 1, 2.0, 0.5, 5, top=True)])
    rival = climbs.rival(5)
    assert rival is not None
    assert rival.trial == 1


def test_an_uncertain_difference_on_the_same_blocks_widens_the_margin() -> None:
    _, climbs = climb(made_up_study(4, 200))
    predicted = climbs.predict(Step(99, 0, 4.0, 0.6, 600_000))
    assert predicted is not None
    assert predicted.lower_edge(error=0.0) == predicted.lower_edge(error=1e-6)
    assert predicted.lower_edge(error=5.0) < predicted.lower_edge() - 1


def test_pruned_trials_that_would_be_on_the_front_by_now_are_named_best_first() -> None:
    points = made_up_study(5, 100)
    _, climbs = climb(points)
    better = [(900, 3.2), (901, 2.9), (902, 60.0)]
    climbs.add(Step(trial, 2, loss, 0.5, 500_000) for trial, loss in better)
    assert climbs.promising([trial for trial, _ in better]) == [901, 900]
    assert climbs.promising([901], max_loss=0.1) == []


def test_paired_differences_are_surer_than_the_losses_themselves() -> None:
    rng = random.Random(0)
    blocks = [rng.gauss(3, 1) for _ in range(50)]
    other = [loss + 0.1 + rng.gauss(0, 0.01) for loss in blocks]
    assert paired_error(blocks, other) < 0.005
    assert paired_error(blocks, other[:-1]) == 0.0
    assert paired_error([1.0], [2.0]) == 0.0


@pytest.mark.parametrize(("freedom", "expected"), [(3, 4.541), (5, 3.365), (10, 2.764), (100, 2.364)])
def test_quantiles_of_the_t_distribution(freedom: float, expected: float) -> None:
    assert t_quantile(0.99, freedom) == pytest.approx(expected, rel=0.005)  # tables: Abramowitz and Stegun, 26.10


def test_rungs_grow_up_to_all_blocks() -> None:
    sliced, tuned = Fidelity.SLICED, Fidelity.TUNED
    assert make_rungs(None, (2048,), tuned, 100, 128) == (Rung(tuned),)
    assert make_rungs(["tuned"], (2048,), tuned, 100, 128) == (Rung(tuned),)
    both = make_rungs(["sliced", "tuned"], (16384, 2048, 1, 2050), tuned, 100, 128)
    # 16384 tokens are more than there are; one block has no standard error.
    assert both == (Rung(sliced, 2), Rung(sliced, 16), Rung(sliced, 17), Rung(sliced), Rung(tuned))
    assert make_rungs(["predicted", "sliced"], (), sliced, 5, 8) == (Rung(Fidelity.PREDICTED), Rung(sliced))
