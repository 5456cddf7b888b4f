"""Trials that climb, over a database: what is pruned, promoted, resumed, skipped, infeasible, and told to Optuna."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from typing import Any

import optuna
import pytest

from rank_search.errors import ExhaustedError
from rank_search.front import Front, FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap
from rank_search.study.records import State, TrialRecord
from rank_search.study.store import StudyStore
from rank_search.study.study import MAX_SKIPS, Proposal, Study
from tests.contract.conftest import ON_ONE, ON_TWO
from tests.contract.synthetic import make_allocator, measure, open_study
from tests.contract.test_storage_study import optuna_trials

CLIMBING: dict[str, Any] = {
    "fidelities": ["sliced", "tuned"], "sampler": "random", "multiplier_range": 3.0, "ladder": [0.9, 0.8, 0.6, 0.4],
}  # fmt: skip
TOP = 2


def losses(rank_map: RankMap) -> tuple[Measurement, ...]:
    """What its rungs would measure: on a few blocks, on all, and after a fine-tune, each with noise of its own."""
    rng = random.Random(rank_map.digest)
    rise = make_allocator().predicted_rise(rank_map)
    sliced, own = 3 + rise, rng.gauss(0, 0.01)
    few = [sliced + 0.2 * block + rng.gauss(0, 0.02) for block in (-1, 1)]
    return (
        replace(
            measure(rank_map, sum(few) / 2, Fidelity.SLICED), tokens=2, finetune_seconds=0.0, block_losses=tuple(few)
        ),
        replace(
            measure(rank_map, sliced, Fidelity.SLICED), finetune_seconds=0.0, block_losses=(sliced - 0.1, sliced + 0.1)
        ),
        measure(rank_map, 3 + 0.5 * rise + own),
    )


def climb(study: Study, proposal: Proposal, rungs: int = TOP + 1) -> State:
    """What a worker does with a proposal, cut off after so many rungs."""
    for rung, measurement in list(enumerate(losses(proposal.rank_map)))[len(proposal.known) : rungs]:
        if rung == TOP:
            return study.tell(proposal, measurement, rung)
        if not study.report(proposal, rung, measurement):
            return State.PRUNED
    return State.RUNNING


def climb_all(study: Study, trials: int) -> list[Proposal]:
    proposals = []
    while study.finished() < trials:
        effort = study.effort()
        proposals.append(study.ask(trials - effort.finished - effort.running))
        climb(study, proposals[-1])
    return proposals


def trials_of(storage: str) -> list[TrialRecord]:
    with StudyStore(storage) as store:
        return store.trials("tiny")


@ON_TWO
def test_pruned_trials_keep_what_was_measured_and_never_reach_the_front(storage: str) -> None:
    study = open_study(storage, **CLIMBING)
    climb_all(study, 26)
    trials = {trial.number: trial for trial in trials_of(storage)}
    pruned = [trial for trial in trials.values() if trial.state is State.PRUNED]
    assert len(pruned) >= 4
    assert not {trial.source for trial in pruned} - {"random"}  # seeds always go all the way
    with StudyStore(storage) as store:
        for trial in pruned:
            known = store.measurements("tiny", trial.number)
            assert trial.measurement == known[-1] == losses(trial.rank_map)[len(known) - 1]
            assert trial.measurement is not None
            assert trial.measurement.fidelity is Fidelity.SLICED
        assert store.block_losses("tiny", pruned[0].number, 0) == losses(pruned[0].rank_map)[0].block_losses
        status = store.status("tiny")
        assert study.front() == store.recompute_front("tiny")
    assert {point.measurement.fidelity for point in study.front()} == {Fidelity.TUNED}
    assert (status.pruned, status.finished) == (len(pruned), 26)
    measured = sum(m.seconds for t in trials.values() for m in losses(t.rank_map)[: 1 if t in pruned else TOP + 1])
    assert status.pruned_seconds < status.seconds == pytest.approx(measured, rel=0.1)
    study.close()
    # Optuna is told no loss that was not measured, and gets no intermediate values.
    theirs = {t.number: t for t in optuna_trials(storage) if t.state is optuna.trial.TrialState.PRUNED}
    assert theirs.keys() == {trial.number for trial in pruned}
    for trial in pruned:
        told = theirs[trial.number]
        assert (told.values, told.intermediate_values) == (None, {})
        assert trial.measurement is not None
        assert told.user_attrs["sliced loss"] == trial.measurement.loss


@ON_ONE
@pytest.mark.parametrize("sampler", ["fitted", "tpe", "nsga2", "mutation"])
def test_every_sampler_lives_with_pruned_trials(storage: str, sampler: str) -> None:
    space = "direct" if sampler == "mutation" else "multipliers"
    study = open_study(storage, **CLIMBING | {"sampler": sampler, "space": space})
    climb_all(study, 20)
    study.close()
    assert [trial.state for trial in trials_of(storage)].count(State.RUNNING) == 0


@ON_TWO
def test_a_pruned_trial_that_would_be_on_the_front_by_now_is_promoted_at_the_end(storage: str) -> None:
    study = open_study(storage, **CLIMBING)
    climb_all(study, 18)
    with StudyStore(storage) as store:
        pruned = store.unpromoted("tiny")
        # Hindsight: this one is good after all.
        number = pruned[-1]
        record = store.trial("tiny", number)
        assert record is not None
    assert study.ask(left=100).promotes is None  # there is time
    better_than_all = replace(losses(record.rank_map)[0], loss=0.5)
    study._climbs.add([_step(number, rung, better_than_all) for rung in (0, 1)])
    promoted = study.ask(left=1)
    assert study.unsettled() == []  # it is on its way
    assert (promoted.promotes, promoted.rank_map, promoted.source) == (number, record.rank_map, record.source)
    known = len(promoted.known)
    assert promoted.known == losses(record.rank_map)[:known]
    assert climb(study, promoted) is State.COMPLETE
    with StudyStore(storage) as store:
        # What was known was not measured again.
        assert len(store.measurements("tiny", promoted.number)) == TOP + 1 - known
        # As a rival it goes by the first one's number, and is compared block by block on the rungs of both.
        for rung, measured in enumerate(losses(record.rank_map)):
            assert store.block_losses("tiny", number, rung) == measured.block_losses
        assert number not in store.unpromoted("tiny")
        front = store.recompute_front("tiny")
    assert study.front() == front
    study.close()


def _step(trial: int, rung: int, measured: Measurement) -> Any:
    from rank_search.climbing import Step

    return Step(trial, rung, measured.loss, measured.kept_of_targets, measured.num_params)


@ON_ONE
def test_at_the_end_no_pruned_trial_would_be_on_the_front_by_prediction(storage: str) -> None:
    study = open_study(storage, **CLIMBING)
    climb_all(study, 36)
    study._catch_up()
    with StudyStore(storage) as store:
        assert study._climbs.promising(store.unpromoted("tiny")) == []
    # Nothing that an exhaustive run would have put on the front is lost.
    maps = {trial.rank_map for trial in trials_of(storage) if trial.state in {State.COMPLETE, State.PRUNED}}
    due = Front.of(FrontPoint(0, rank_map, losses(rank_map)[TOP]) for rank_map in maps)
    assert len({p.rank_map for p in due} - {p.rank_map for p in study.front()}) <= 0.02 * len(due)
    study.close()


@ON_TWO
def test_what_a_killed_worker_had_measured_is_not_measured_again(storage: str, processes: ForkServerContext) -> None:
    open_study(storage, **CLIMBING).close()
    process = processes.Process(target=dies_after_two_rungs, args=(storage,))
    process.start()
    process.join()
    study = open_study(storage, **CLIMBING)
    for _ in range(7):
        climb(study, study.ask())
    again = study.ask()
    assert again.source == "closed form 0.9"
    assert again.known == losses(again.rank_map)[:2]
    assert again.known[0].block_losses
    assert climb(study, again) is State.COMPLETE
    with StudyStore(storage) as store:
        assert store.measurements("tiny", 0) == ()
        assert store.measurements("tiny", again.number) == losses(again.rank_map)
    study.close()


def dies_after_two_rungs(storage: str) -> None:
    study = open_study(storage, **CLIMBING)
    climb(study, study.ask(), rungs=2)
    os.kill(os.getpid(), signal.SIGKILL)


@ON_TWO
def test_an_interrupted_promotion_goes_on_as_one(storage: str) -> None:
    study = open_study(storage, **CLIMBING)
    climb_all(study, 18)
    with StudyStore(storage) as store:
        number = store.unpromoted("tiny")[0]
    best = replace(losses(RankMap({"block.0.attn": 1}))[0], loss=0.1)
    study._climbs.add([_step(number, rung, best) for rung in (0, 1)])
    promoted = study.ask(left=1)
    study.requeue(promoted)
    again = study.ask(left=1)
    assert (again.promotes, again.known) == (number, promoted.known)
    assert again.number != promoted.number
    study.close()


@ON_TWO
def test_a_second_attempt_that_begins_before_the_first_has_ended_is_no_repetition(storage: str) -> None:
    with StudyStore(storage) as store:
        study = open_study(storage, **CLIMBING)
        first = study.ask()
        study.report(first, 0, losses(first.rank_map)[0])
        again = store.begin_trial("tiny", 99, first.source, first.rank_map, "host:1:", continues=first.number)
        assert (again.state, again.same_as) == (State.RUNNING, None)
        store.requeue_trial("tiny", first.number, "interrupted")
        assert store.measurements("tiny", 99) == losses(first.rank_map)[:1]
        study.close()


@ON_TWO
def test_an_equal_rank_map_is_told_what_is_known_and_not_proposed(storage: str) -> None:
    study = open_study(storage, space="direct", sampler="random", ladder=[0.7])
    for _ in range(2):
        proposal = study.ask()
        study.tell(proposal, measure(proposal.rank_map))
    first, running = study.ask(), study.ask()
    study.tell(first, measure(first.rank_map))
    for equal in (first, running):
        params = study._space.encode_map(equal.rank_map)  # type: ignore[attr-defined]
        study._optuna.enqueue(params, {})
    new = study.ask()
    assert new.rank_map not in {first.rank_map, running.rank_map}
    assert study.finished() == 3
    study.close()
    skipped = [trial for trial in trials_of(storage) if trial.state is State.SKIPPED]
    assert [(t.same_as, t.measurement) for t in skipped] == [(first.number, None), (running.number, None)]
    assert skipped[0].reason == f"trial {first.number} has the same rank map"
    told, untold = (optuna_trials(storage)[trial.number] for trial in skipped)
    measured = measure(first.rank_map)
    assert (told.values, told.user_attrs["same_as"]) == ([measured.loss, float(measured.num_params)], first.number)
    assert untold.state is optuna.trial.TrialState.FAIL  # nothing is known of it yet


@ON_TWO
def test_a_space_without_another_rank_map_ends_the_search(storage: str) -> None:
    study = open_study(storage, space="direct", sampler="random", ladder=[0.7])
    rank_map, _ = study.ask().rank_map, study.ask()
    study._space.decode = lambda _params: rank_map  # type: ignore[method-assign]
    with pytest.raises(ExhaustedError, match=f"every rank map of {MAX_SKIPS} proposals in a row"):
        study.ask()
    assert len(optuna_trials(storage)) == MAX_SKIPS + 2
    study.close()


@ON_TWO
def test_what_misses_a_goal_is_infeasible_and_off_the_front(storage: str) -> None:
    allocator = make_allocator()
    most = allocator.space.num_params(allocator.closed_form(0.8))
    study = open_study(storage, ladder=[0.6], max_params=most, max_loss=3.5)
    within, beyond = study.ask(), study.ask()
    assert study.tell(within, measure(within.rank_map, 3.4)) is State.COMPLETE
    assert study.tell(beyond, measure(beyond.rank_map, 3.6)) is State.INFEASIBLE
    for _ in range(12):
        proposal = study.ask()
        measured = measure(proposal.rank_map)
        assert measured.num_params <= most  # the space ends there
        study.tell(proposal, measured)
    assert all(point.loss <= 3.5 for point in study.front())
    study.close()
    with StudyStore(storage) as store:
        trial = store.trial("tiny", beyond.number)
        assert trial is not None
        assert (trial.reason, trial.measurement) == (
            "loss 3.6000, above search.max_loss (3.5)",
            measure(beyond.rank_map, 3.6),
        )
        assert store.status("tiny").infeasible >= 1
        assert store.status("tiny").finished == 14
        assert store.front("tiny") == store.recompute_front("tiny")
    feasible, infeasible = optuna_trials(storage)[:2]
    assert all(excess <= 0 for excess in feasible.constraints.values())
    assert infeasible.constraints == pytest.approx({"loss": 0.1, "parameters": measured_excess(beyond, most)})


def measured_excess(proposal: Proposal, most: int) -> float:
    return float(measure(proposal.rank_map).num_params - most)


@ON_TWO
def test_proposals_that_are_too_large_are_skipped(storage: str) -> None:
    allocator = make_allocator()
    most = allocator.space.num_params(allocator.closed_form(0.6))
    study = open_study(storage, space="direct", sampler="random", ladder=[0.5], max_params=most)
    sizes = [allocator.space.num_params(study.ask().rank_map) for _ in range(6)]
    study.close()
    assert max(sizes) <= most
    skipped = [trial for trial in trials_of(storage) if trial.state is State.SKIPPED]
    assert skipped
    assert skipped[0].reason is not None
    assert skipped[0].reason.endswith(f"above search.max_params ({most:,})")


@ON_ONE
@pytest.mark.parametrize(
    ("sampler", "space"),
    [("fitted", "multipliers"), ("tpe", "multipliers"), ("random", "groups"), ("mutation", "direct")],
)
def test_four_of_five_proposals_lie_in_the_range_of_interest(storage: str, sampler: str, space: str) -> None:
    study = open_study(storage, sampler=sampler, space=space, ladder=[0.7], interest=[0.5, 0.6])
    kept = []
    for _ in range(32):
        proposal = study.ask()
        measured = measure(proposal.rank_map)
        study.tell(proposal, measured)
        kept.append(measured.kept_of_targets)
    study.close()
    # A mutation keeps its parent's size more often than not, and the first parents are seeds.
    inside = [0.48 <= fraction <= 0.61 for fraction in kept[7:]]
    assert 0.6 * len(inside) <= sum(inside) < len(inside)  # of 25 drawn with four in five


@ON_TWO
def test_one_worker_repeats_a_climbing_study_trial_by_trial(storage: str) -> None:
    def rows(name: str, parts: tuple[int, ...]) -> list[tuple[Any, ...]]:
        for trials in parts:
            study = open_study(storage, name, **CLIMBING | {"sampler": "tpe"})
            climb_all(study, trials)
            study.close()
        with StudyStore(storage) as store:
            return [(t.number, t.state, t.rank_map, t.measurement, t.same_as, t.promotes) for t in store.trials(name)]

    assert rows("straight", (20,)) == rows("resumed", (6, 14, 20))


def worker_climbs(storage: str, trials: int) -> list[RankMap]:
    """A worker process; the rank maps that it measured at the top."""
    study = open_study(storage, **CLIMBING | {"sampler": "tpe"})
    try:
        return [proposal.rank_map for proposal in climb_all(study, trials) if proposal.promotes is None]
    finally:
        study.close()


@ON_TWO
def test_eight_workers_measure_no_rank_map_twice_and_seeds_once(storage: str, processes: ForkServerContext) -> None:
    with processes.Pool(8) as pool:
        results = pool.starmap(worker_climbs, [(storage, 26)] * 8, chunksize=1)
    measured = [rank_map for result in results for rank_map in result]
    assert len(measured) == len(set(measured)) >= 26
    trials = trials_of(storage)
    seeds = [trial.source for trial in trials if trial.source not in {"tpe", "random"}]
    assert sorted(seeds) == sorted(
        {f"{kind} {kept}" for kept in CLIMBING["ladder"] for kind in ("closed form", "uniform")}
    )
    with StudyStore(storage) as store:
        assert store.front("tiny") == store.recompute_front("tiny")


@ON_TWO
def test_why_a_search_stopped_is_kept_until_the_next_one(storage: str) -> None:
    study = open_study(storage)
    study.set_stop_reason("40 trials are finished")
    with StudyStore(storage) as store:
        assert store.status("tiny").stop_reason == "40 trials are finished"
        study.set_stop_reason(None)
        assert store.status("tiny").stop_reason is None
    study.close()


@ON_TWO
def test_other_stop_rules_are_no_other_study_and_other_goals_are(storage: str) -> None:
    open_study(storage).close()
    open_study(storage, wall_time=5.0, gpu_seconds=9.0, flat_trials=3, target_loss=1.0, target_kept=0.5).close()
    with pytest.raises(Exception, match=r"search\.max_loss = null, the file now says 2\.0"):
        open_study(storage, max_loss=2.0)
