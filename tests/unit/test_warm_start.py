"""Fronts carried over: as they are to the same model, by layer type and relative depth to a sibling."""

from __future__ import annotations

from pathlib import Path

import pytest

from rank_search.allocation import Allocator
from rank_search.errors import BudgetError, StorageError, StudyFileError
from rank_search.front import FrontPoint
from rank_search.ranks import RankMap
from rank_search.study.study import Study
from rank_search.study.warm_start import OtherFront, carried_over
from tests.contract.synthetic import make_allocator, make_facts, make_spec, measure, open_study, run_trials


def point(rank_map: RankMap, allocator: Allocator, trial: int = 7) -> FrontPoint:
    measured = measure(rank_map, loss=3.0, allocator=allocator)
    return FrontPoint(trial, rank_map, measured)


@pytest.mark.parametrize("kept", [0.35, 0.6, 0.9])
def test_the_same_model_gets_the_same_rank_map(kept: float) -> None:
    allocator = make_allocator(layers=5)
    for rank_map in (allocator.closed_form(kept), allocator.blend(kept, 0.5, {"block.1.mlp": 1.0})):
        (carried,) = carried_over(
            [point(rank_map, allocator)], "other", allocator.space.shapes, "two-factor", allocator, (0.3, 0.95)
        )
        assert carried.rank_map == rank_map
        assert carried.source == "warm-start other 7"


def test_a_database_without_a_studys_name_is_refused() -> None:
    with pytest.raises(StudyFileError, match=r"--warm-start sqlite:///a\.db names a database but no study; append #"):
        OtherFront.read("sqlite:///a.db", "sqlite:///b.db", "own")


@pytest.mark.parametrize("told", ["own", "sqlite:///a.db#own"])
def test_a_study_does_not_begin_with_its_own_front(told: str) -> None:
    with pytest.raises(StudyFileError, match=f"^--warm-start {told} is the study itself, .*; name another one$"):
        OtherFront.read(told, "sqlite:///a.db", "own")


def test_a_sibling_gets_the_profile_at_its_own_size() -> None:
    small, large = make_allocator(layers=3), make_allocator(layers=6, groups=(("attn", 24, 24), ("mlp", 24, 40)))
    dense = {shape.name: None for shape in small.space.shapes if shape.depth == 2}
    rank_map = RankMap({s.name: 3 for s in small.space.shapes if s.name not in dense})
    (carried,) = carried_over([point(rank_map, small)], "small", small.space.shapes, "two-factor", large, (0.1, 0.95))
    space = large.space
    assert space.kept_of_targets(carried.rank_map) <= carried.kept
    assert space.kept_of_targets(carried.rank_map) == pytest.approx(carried.kept, abs=0.03)

    def held(depth: int) -> float:
        layers = [s for s in space.shapes if s.depth == depth]
        return sum(s.params(carried.rank_map.get(s.name)) for s in layers) / sum(s.dense_params for s in layers)

    profile = [held(depth) for depth in range(6)]
    assert profile[0] < profile[3] < profile[4] < profile[5] == 1


def test_a_type_that_the_other_lacks_takes_the_whole_models_fraction() -> None:
    small = make_allocator(layers=2, groups=(("attn", 12, 12),))
    ours = make_allocator(layers=2)
    (carried,) = carried_over(
        [point(small.uniform(0.6), small)], "small", small.space.shapes, "two-factor", ours, (0.3, 0.95)
    )
    assert ours.space.kept_of_targets(carried.rank_map) == pytest.approx(carried.kept, abs=0.05)


def test_points_outside_of_the_range_are_left_out() -> None:
    allocator = make_allocator()
    points = [point(allocator.closed_form(kept), allocator) for kept in (0.5, 0.8)]
    shapes = allocator.space.shapes
    assert len(carried_over(points, "o", shapes, "two-factor", allocator, (0.6, 0.95))) == 1
    with pytest.raises(BudgetError, match=r"no point of the front of study 'o' keeps between 0\.9 and 0\.95"):
        carried_over(points, "o", shapes, "two-factor", allocator, (0.9, 0.95))


@pytest.mark.parametrize(("space", "sampler"), [("multipliers", "fitted"), ("direct", "tpe")])
def test_a_study_measures_the_other_front_first_and_once(tmp_path: Path, space: str, sampler: str) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    first = open_study(storage, name="first", space="direct", sampler="mutation", ladder=[0.8, 0.5])
    run_trials(first, 14)
    wanted = {point.rank_map for point in first.front()}
    first.close()
    allocator = make_allocator()
    spec = make_spec("second", space=space, sampler=sampler, ladder=[0.7], seeds=["closed-form"])
    for _ in range(2):  # resumed with the same option
        study = Study.open(spec, storage, allocator, make_facts(allocator))
        carried = OtherFront.read(f"{storage}#first", "sqlite:///none.db", "second").carried_to(allocator, spec.search)
        new = study.warm_start(carried)
        if not new:
            break
        proposals = run_trials(study, 1 + new)
        study.close()
    assert new == 0
    sources = [proposal.source for proposal in proposals]
    assert sources[0] == "closed form 0.7"
    assert all(source.startswith("warm-start first ") for source in sources[1 : len(carried)])
    assert {p.rank_map for p in proposals} >= {one.rank_map for one in carried} - {allocator.closed_form(0.7)}
    assert {one.rank_map for one in carried} <= wanted
    study.close()


def test_a_study_that_is_not_there_is_refused(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    open_study(storage, ladder=[0.7]).close()
    with pytest.raises(StorageError, match="no study 'other'; known studies are tiny"):
        OtherFront.read("other", storage, "own")
