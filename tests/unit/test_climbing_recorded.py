"""The rule that decides who climbs, replayed on rank maps that were measured at every fidelity, pruned or not.

``tests/data/fidelities_quickstart.json`` is what `scripts/record_fidelities.py` wrote of the quickstart study with
``fidelities = ["sliced", "tuned"]``, its losses and seconds measured on a CPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rank_search.climbing import Climbs, Step
from rank_search.front import Outcome, non_dominated
from rank_search.measurement import Fidelity

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "fidelities_quickstart.json").read_text(encoding="utf-8"))
TRIALS: list[dict[str, Any]] = RECORDED["trials"]


@dataclass(frozen=True)
class Replay:
    pruned: frozenset[int]
    seconds: float
    pruned_seconds: float


@pytest.fixture(scope="module")
def replay() -> Replay:
    climbs, pruned, spent, wasted = Climbs(), set(), 0.0, 0.0
    for number, trial in enumerate(TRIALS):
        steps = [
            Step(number, rung, loss, trial["kept_of_targets"], trial["num_params"], top=rung == len(trial["rungs"]) - 1)
            for rung, (loss, _) in enumerate(trial["rungs"])
        ]
        cost = 0.0
        for step, (_, seconds) in zip(steps, trial["rungs"], strict=True):
            cost += seconds
            climbs.add([step])
            if not step.top and trial["source"] == "tpe" and not climbs.goes_on(step):
                pruned.add(number)
                wasted += cost
                break
        spent += cost
    return Replay(frozenset(pruned), spent, wasted)


def _front() -> set[int]:
    outcomes = [
        Outcome(number, Fidelity.TUNED, trial["num_params"], trial["rungs"][-1][0])
        for number, trial in enumerate(TRIALS)
    ]
    return {outcome.trial for outcome in non_dominated(outcomes)}


def test_enough_is_recorded() -> None:
    assert len(TRIALS) >= 200
    assert all(len(trial["rungs"]) == len(RECORDED["rungs"]) >= 3 for trial in TRIALS)


def test_of_the_front_at_most_two_percent_is_lost(replay: Replay) -> None:
    front = _front()
    assert len(front & replay.pruned) <= 0.02 * len(front)


def test_pruned_trials_cost_at_most_fifteen_percent(replay: Replay) -> None:
    assert replay.pruned
    assert replay.pruned_seconds <= 0.15 * replay.seconds
