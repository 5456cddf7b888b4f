"""Moves keep size and bounds; the mutation sampler proposes new rank maps near the front, from its seed alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from rank_search.errors import StudyFileError
from rank_search.ranks import RankMap
from rank_search.study.moves import Moves
from rank_search.study.mutation import good_parents, rank_map_text
from rank_search.study.samplers import check_sampler
from rank_search.study.study import Study
from tests.contract.synthetic import make_allocator, make_facts, make_spec, measure, run_trials, skipped


@pytest.mark.parametrize("storage", ["two-factor", "pivoted"])
@pytest.mark.parametrize("multiple", [1, 3])
def test_a_trade_keeps_the_size_and_fits_the_model(storage: str, multiple: int) -> None:
    allocator = make_allocator(layers=6, multiple=multiple, storage=storage)
    space, moves, random = allocator.space, Moves(allocator), np.random.default_rng(0)
    largest = max(
        curve.params[i + 1] - curve.params[i] for curve in allocator.curves for i in range(len(curve.params) - 1)
    )
    changed = 0
    for start in (allocator.closed_form(0.6), allocator.uniform(0.6), allocator.closed_form(0.9)):
        rank_map = start
        for _ in range(50):
            before = space.target_params(rank_map)
            traded = moves.trade(rank_map, random)
            space.validate(traded)
            assert all(rank in space.ranks(space[name]) for name, rank in traded.items())
            assert before - largest < space.target_params(traded) <= before
            changed += traded != rank_map
            rank_map = traded
    assert changed > 40


def test_a_trade_changes_few_layers() -> None:
    allocator = make_allocator(layers=12)
    moves, random, start = Moves(allocator), np.random.default_rng(1), make_allocator(layers=12).closed_form(0.6)
    counts = []
    for _ in range(100):
        traded = moves.trade(start, random)
        counts.append(sum(traded.get(s.name) != start.get(s.name) for s in allocator.space.shapes))
    assert np.median(counts) <= len(allocator.space.shapes) / 3


def test_resizing_the_closed_form_gives_the_closed_form() -> None:
    allocator = make_allocator(layers=5)
    moves = Moves(allocator)
    for here, there in ((0.5, 0.8), (0.8, 0.5), (0.6, 0.6)):
        assert moves.resize(allocator.closed_form(here), there) == allocator.closed_form(there)


def test_resizing_carries_deviations_along() -> None:
    allocator = make_allocator(layers=5)
    more_attention = {s.name: 1.5 for s in allocator.space.shapes if s.group == "attn"}
    bent = allocator.closed_form(0.5, more_attention)
    resized, neutral = Moves(allocator).resize(bent, 0.7), allocator.closed_form(0.7)

    def held(rank_map: RankMap) -> int:
        return sum(s.params(rank_map.get(s.name)) for s in allocator.space.shapes if s.group == "attn")

    assert held(resized) > held(neutral)
    assert allocator.space.target_params(resized) <= allocator.space.budget(0.7)


def trial(params: float, loss: float, rank: int, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    values = [loss, params] if state is TrialState.COMPLETE else None
    return create_trial(state=state, values=values, user_attrs={"rank_map": rank_map_text(RankMap({"a": rank}))})


def test_parents_are_the_first_two_fronts() -> None:
    trials = [
        trial(10, 3.0, 1), trial(20, 2.0, 2), trial(20, 2.5, 3), trial(15, 3.5, 4), trial(30, 1.0, 5),
        trial(25, 2.6, 6), trial(5, 0.0, 7, TrialState.PRUNED),
    ]  # fmt: skip
    assert [RankMap({"a": rank}) for rank in (1, 2, 5)] == [RankMap(_ranks(p.text)) for p in good_parents(trials)[:3]]
    assert {_ranks(p.text)["a"] for p in good_parents(trials)[3:]} == {3, 4}


def _ranks(text: str) -> dict[str, int]:
    import json

    ranks: dict[str, int] = json.loads(text)
    return ranks


def open_mutation(storage: str, **search: object) -> Study:
    allocator = make_allocator()
    spec = make_spec(sampler="mutation", space="direct", ladder=[0.8, 0.5], **search)
    return Study.open(spec, storage, allocator, make_facts(allocator))


def test_a_study_by_mutation_repeats_itself_and_no_rank_map(tmp_path: Path) -> None:
    sequences = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        study = open_mutation(f"sqlite:///{tmp_path}/{name}.db", seed=seed)
        sequences.append([proposal.rank_map for proposal in run_trials(study, 16)])
        study.close()
    assert sequences[0] == sequences[1] != sequences[2]
    assert len(set(sequences[0])) == 16
    assert skipped(f"sqlite:///{tmp_path}/a.db") == []
    space = make_allocator().space
    for rank_map in sequences[0]:
        space.validate(rank_map)


def test_waiting_and_running_rank_maps_are_not_proposed_again(tmp_path: Path) -> None:
    study = open_mutation(f"sqlite:///{tmp_path}/s.db")
    asked = [study.ask().rank_map for _ in range(24)]
    study.close()
    assert len(set(asked)) == 24
    assert skipped(f"sqlite:///{tmp_path}/s.db") == []  # the sampler knew, before the study had to


def test_sizes_that_cannot_meet_the_largest_loss_are_left_alone(tmp_path: Path) -> None:
    allocator = make_allocator()
    goal = measure(allocator.closed_form(0.55)).loss
    study = open_mutation(f"sqlite:///{tmp_path}/s.db", max_loss=goal)
    missed = [measure(proposal.rank_map).loss > goal for proposal in run_trials(study, 32)]
    study.close()
    assert sum(missed) < 16  # 24 where it is not known


def test_an_interrupted_proposal_comes_again_whole(tmp_path: Path) -> None:
    study = open_mutation(f"sqlite:///{tmp_path}/s.db")
    run_trials(study, 5)
    proposal = study.ask()
    study.requeue(proposal)
    again = study.ask()
    study.tell(again, measure(again.rank_map))
    study.close()
    assert again.rank_map == proposal.rank_map
    assert again.number == proposal.number + 1


def test_a_process_that_dies_over_a_proposal_leaves_its_rank_map(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    study = open_mutation(storage)
    run_trials(study, 4)
    study.close()
    program = (
        "import os, signal, sys; from tests.unit.test_mutation import open_mutation; "
        f"print(open_mutation({storage!r}).ask().rank_map.digest, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    study = open_mutation(storage)
    assert study.ask().rank_map.digest == died.stdout.strip()
    study.close()


@pytest.mark.parametrize("space", ["multipliers", "groups"])
def test_mutation_is_refused_over_numbers(space: str) -> None:
    with pytest.raises(StudyFileError, match="take space = 'direct'"):
        check_sampler(make_spec(sampler="mutation", space=space).search)


def test_depth_buckets_without_multipliers_are_refused() -> None:
    with pytest.raises(StudyFileError, match=r"depth_buckets goes with search\.space = 'groups' or 'multipliers'"):
        check_sampler(make_spec(sampler="mutation", space="direct", depth_buckets=3).search)
