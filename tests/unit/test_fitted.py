"""Fitted multipliers find what a closed form is off by; their sampler proposes it where it is worth most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rank_search.allocation import Allocator, Floats
from rank_search.errors import StudyFileError
from rank_search.ranges import bank_cuts
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.spec import parse_study
from rank_search.study import fitted as fitted_module
from rank_search.study import mutation as mutation_module
from rank_search.study.fitted import FittedSampler, Rises
from rank_search.study.fitting import LEAST, MultiplierFit
from rank_search.study.samplers import check_sampler
from rank_search.study.sizes import LossCurve
from rank_search.study.space import MultiplierSpace
from rank_search.study.study import Study
from tests.contract.synthetic import make_allocator, make_facts, make_spec, measure, skipped

GROUPS = {"attn": (96, 96), "mlp": (96, 192)}
Loss = Callable[[RankMap], float]


def off_by(allocator: Allocator, factors: dict[str, float]) -> Loss:
    """A loss whose rise is the predicted one, times a factor for every layer type, under a root."""
    by_layer = np.array([factors[shape.group] for shape in allocator.space.shapes])
    return lambda rank_map: 3.0 + float(np.sqrt(by_layer @ allocator.rises(rank_map)))


def fitted(
    allocator: Allocator, loss: Loss, *, trials: int = 40, at: float = 0.6,
    spread: Callable[[Floats], Floats] = np.ones_like, ends: Sequence[float] = (0.3, 0.95),
) -> dict[str, float]:  # fmt: skip
    """What is fitted to the losses of rank maps near the closed form, for the size ``at``."""
    space, random = MultiplierSpace(make_spec().search, allocator), np.random.default_rng(0)
    names = [shape.name for shape in allocator.space.shapes]
    terms = np.array(list(space.terms.values()))
    rank_maps = [
        allocator.closed_form(kept, dict(zip(names, random.normal(0, 0.1, len(terms)) @ terms, strict=True)))
        for kept in random.uniform(0.3, 0.95, trials)
    ]
    kept = np.array([allocator.space.kept_of_targets(rank_map) for rank_map in rank_maps])
    rises, closed = (
        np.array([allocator.rises(m) for m in maps])
        for maps in (rank_maps, [allocator.closed_form(fraction) for fraction in kept])
    )
    losses = np.array([loss(m) for m in rank_maps])
    found: Floats = MultiplierFit(terms, rises, closed, kept, losses, spread(kept), ends).at(at)
    return dict(zip(space.terms, found.tolist(), strict=True))


@pytest.fixture(scope="module")
def allocator() -> Allocator:
    shapes = tuple(LayerShape(f"{depth}.{g}", *GROUPS[g], g, depth) for depth in range(6) for g in GROUPS)
    random, tails = np.random.default_rng(0), {}
    for shape in shapes:
        energies = np.exp(-np.arange(96) / random.uniform(15, 60)) * random.uniform(0.2, 2) * 1e-2
        tails[shape.name] = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    return Allocator(RankSpace(shapes, sum(shape.dense_params for shape in shapes) + 10_000), tails)


def test_rises_of_layers_sum_to_the_predicted_rise(allocator: Allocator) -> None:
    for rank_map in (allocator.closed_form(0.5), allocator.uniform(0.7), RankMap()):
        assert allocator.rises(rank_map).sum() == pytest.approx(allocator.predicted_rise(rank_map))
    frozen = make_allocator(multiple=3)
    odd = RankMap({frozen.space.shapes[0].name: 2})  # not allowed: counts as the next one
    assert frozen.rises(odd).sum() == frozen.predicted_rise(odd) > 0


def test_a_right_closed_form_is_left_alone(allocator: Allocator) -> None:
    found = fitted(allocator, off_by(allocator, {"attn": 1.0, "mlp": 1.0}))
    assert abs(found["u.attn"] - found["u.mlp"]) < 0.25
    assert max(map(abs, found.values())) < 0.25


@pytest.mark.parametrize("more", [2.5, 0.4])
def test_what_the_closed_form_is_off_by_is_found(allocator: Allocator, more: float) -> None:
    found = fitted(allocator, off_by(allocator, {"attn": more, "mlp": 1.0}))
    assert (found["u.attn"] - found["u.mlp"]) * np.sign(np.log(more)) > 0.3


def test_trials_of_about_the_size_count_most(allocator: Allocator) -> None:
    right, small, large = (off_by(allocator, {"attn": more, "mlp": 1.0}) for more in (1.0, 3.0, 0.4))

    def loss(rank_map: RankMap) -> float:
        kept = allocator.space.kept_of_targets(rank_map)
        closed, off = allocator.closed_form(kept), small if kept < 0.6 else large
        return right(closed) + off(rank_map) - off(closed)

    low, high = (fitted(allocator, loss, trials=80, at=kept) for kept in (0.3, 0.95))
    assert low["u.attn"] - low["u.mlp"] > high["u.attn"] - high["u.mlp"] + 0.2


def test_what_holds_at_the_bottom_of_a_range_is_not_carried_to_its_top(allocator: Allocator) -> None:
    right, off = (off_by(allocator, {"attn": more, "mlp": 1.0}) for more in (1.0, 3.0))

    def loss(rank_map: RankMap) -> float:
        kept = allocator.space.kept_of_targets(rank_map)
        closed, is_low = allocator.closed_form(kept), kept < 0.42 or 0.6 < kept < 0.75
        return off(rank_map) - off(closed) + right(closed) if is_low else right(rank_map)

    found = [fitted(allocator, loss, trials=200, at=kept, ends=(0.3, 0.6, 0.95)) for kept in (0.35, 0.57, 0.65, 0.92)]
    low, top, next_low, next_top = (one["u.attn"] - one["u.mlp"] for one in found)
    assert min(low, next_low) > 0.5
    assert max(abs(top), abs(next_top)) < 0.2


@pytest.mark.parametrize(
    ("at", "noisy"), [(0.45, lambda kept: (kept * 40).astype(int) % 2 == 0), (0.65, lambda kept: kept < 0.5)],
    ids=["every second size", "small sizes"],
)  # fmt: skip
def test_losses_that_scatter_less_say_more(allocator: Allocator, at: float, noisy: Callable[[Floats], Floats]) -> None:
    exact, random = off_by(allocator, {"attn": 2.5, "mlp": 1.0}), np.random.default_rng(1)

    def scatter(kept: Floats) -> Floats:
        return np.where(noisy(kept), 0.1, 0.001)

    def loss(rank_map: RankMap) -> float:
        return exact(rank_map) + float(random.normal() * scatter(np.array(allocator.space.kept_of_targets(rank_map))))

    def wrong(spread: Callable[[Floats], Floats]) -> float:
        found = [fitted(allocator, loss, at=at, spread=spread) for _ in range(8)]
        return float(np.mean([abs(one["u.attn"] - one["u.mlp"] - np.log(2.5)) for one in found]))

    assert wrong(scatter) < 0.7 * wrong(np.ones_like)


@pytest.mark.parametrize("loss", [lambda kept: 3.0, lambda kept: 4.0 - kept, lambda kept: 3.0 + (kept > 0.6)])
def test_losses_that_are_of_the_size_alone_say_that_layers_count_alike(
    allocator: Allocator, loss: Callable[[float], float]
) -> None:
    found = fitted(allocator, lambda rank_map: loss(allocator.space.kept_of_targets(rank_map)), trials=60)
    assert max(map(abs, found.values())) < 0.7


def test_many_losses_of_one_size_are_enough(allocator: Allocator) -> None:
    exact, random = off_by(allocator, {"attn": 2.5, "mlp": 1.0}), np.random.default_rng(0)
    terms = np.array([[shape.group == group for shape in allocator.space.shapes] for group in GROUPS], float)
    names = [shape.name for shape in allocator.space.shapes]
    rank_maps = [
        allocator.closed_form(0.6, dict(zip(names, random.normal(0, 0.1, 2) @ terms, strict=True))) for _ in range(20)
    ]
    rises = np.array([allocator.rises(rank_map) for rank_map in rank_maps])
    closed = np.tile(allocator.rises(allocator.closed_form(0.6)), (20, 1))
    losses, alike = np.array([exact(rank_map) for rank_map in rank_maps]), np.ones(20)
    attn, mlp = MultiplierFit(terms, rises, closed, 0.6 * alike, losses, alike, (0.3, 0.95)).at(0.6)
    assert attn > mlp


def test_nothing_is_fitted_to_few_losses(allocator: Allocator) -> None:
    loss = off_by(allocator, {"attn": 3.0, "mlp": 1.0})
    assert not any(fitted(allocator, loss, trials=LEAST - 1).values())
    assert any(fitted(allocator, loss, trials=LEAST).values())


def open_fitted(storage: str, allocator: Allocator, **search: object) -> Study:
    spec = make_spec(**{"sampler": "fitted", "seeds": ["closed-form"], **search})
    return Study.open(spec, storage, allocator, make_facts(allocator))


def run(study: Study, allocator: Allocator, loss: Loss, count: int) -> list[RankMap]:
    measured = []
    for _ in range(count):
        proposal = study.ask()
        study.tell(proposal, measure(proposal.rank_map, loss(proposal.rank_map), allocator=allocator))
        measured.append(proposal.rank_map)
    return measured


@pytest.mark.parametrize(
    ("sampler", "space", "module"), [("fitted", "multipliers", fitted_module), ("mutation", "direct", mutation_module)]
)
@pytest.mark.parametrize("mode", ["own", "nested"])
def test_samplers_are_told_where_the_factors_of_another_nested_fine_tune_begin(
    tmp_path: Path, allocator: Allocator, monkeypatch: pytest.MonkeyPatch,
    sampler: str, space: str, module: ModuleType, mode: str,
) -> None:  # fmt: skip
    told: list[tuple[float, ...]] = []

    class Spy(LossCurve):
        def __init__(self, kept: Floats, losses: Floats, weights: Floats, cuts: Sequence[float] = ()) -> None:
            told.append(tuple(cuts))
            super().__init__(kept, losses, weights, cuts)

    monkeypatch.setattr(module, "LossCurve", Spy)
    search = {"sampler": sampler, "space": space, "seeds": ["closed-form"], "ladder": [0.5]}
    tables = {**make_spec(**search).model_dump(mode="json"), "finetune": {"mode": mode}}
    spec = parse_study(tables, where="test")
    study = Study.open(spec, f"sqlite:///{tmp_path}/study.db", allocator, make_facts(allocator))
    run(study, allocator, off_by(allocator, {"attn": 1.0, "mlp": 1.0}), 3)
    study.close()
    assert set(told) == {bank_cuts(spec, allocator.space)}
    assert len(told[0]) == (4 if mode == "nested" else 0)


def test_a_study_repeats_itself_and_no_rank_map(tmp_path: Path, allocator: Allocator) -> None:
    loss = off_by(allocator, {"attn": 2.0, "mlp": 1.0})
    sequences = []
    for name, seed, pause in (("a", 1, False), ("b", 1, True), ("c", 2, False)):
        study = open_fitted(f"sqlite:///{tmp_path}/{name}.db", allocator, seed=seed)
        measured = run(study, allocator, loss, 8)
        if pause:  # a resumed study goes on as if it had not stopped
            study.close()
            study = open_fitted(f"sqlite:///{tmp_path}/{name}.db", allocator, seed=seed)
        sequences.append(measured + run(study, allocator, loss, 4))
        study.close()
    assert sequences[0] == sequences[1] != sequences[2]
    assert len(set(sequences[0])) == 12


def test_few_rank_maps_are_each_proposed_once(tmp_path: Path) -> None:
    # A single layer of few ranks, which draws hit again and again.
    alone = make_allocator(layers=1, groups=(("mlp", 12, 20),))
    study = open_fitted(f"sqlite:///{tmp_path}/s.db", alone, ladder=[0.8])
    measured = run(study, alone, off_by(alone, {"mlp": 1.0}), 5)
    study.close()
    assert len(set(measured)) == 5
    assert skipped(f"sqlite:///{tmp_path}/s.db") == []


def test_deviations_shrink_as_trials_come_in(allocator: Allocator) -> None:
    space = MultiplierSpace(make_spec(sampler="fitted", ladder=[0.8, 0.5]).search, allocator)
    sampler = FittedSampler(space, Rises(space), 0, list, None, ())
    none = np.zeros(len(space.terms))

    def off(count: int) -> float:
        drawn = [sampler._drawn(0.5, none, count) for _ in range(200)]
        return float(np.std([[params[term] for term in space.terms] for params in drawn]))

    assert off(0) == pytest.approx(off(16), rel=0.2)
    assert off(256) == pytest.approx(off(16) / 4, rel=0.2)


def test_what_runs_counts_as_measured(tmp_path: Path, allocator: Allocator) -> None:
    study = open_fitted(f"sqlite:///{tmp_path}/s.db", allocator)
    run(study, allocator, off_by(allocator, {"attn": 1.0, "mlp": 1.0}), 8)
    asked = [allocator.space.kept_of_targets(study.ask().rank_map) for _ in range(16)]
    study.close()
    assert len(set(asked)) == 16
    assert np.diff(sorted(asked)).max() < 0.15


def test_sizes_that_cannot_meet_the_largest_loss_are_left_alone(tmp_path: Path, allocator: Allocator) -> None:
    loss = off_by(allocator, {"attn": 1.0, "mlp": 1.0})
    goal = loss(allocator.closed_form(0.55))
    study = open_fitted(f"sqlite:///{tmp_path}/s.db", allocator, max_loss=goal)
    missed = [loss(rank_map) > goal for rank_map in run(study, allocator, loss, 32)]
    study.close()
    assert sum(missed) < 10


def test_a_space_without_multipliers_is_searched_by_size(tmp_path: Path) -> None:
    alone = make_allocator(layers=1, groups=(("mlp", 12, 20),))
    study = open_fitted(f"sqlite:///{tmp_path}/s.db", alone, ladder=[0.8])
    assert len(set(run(study, alone, off_by(alone, {"mlp": 1.0}), 5))) == 5
    study.close()


def test_the_range_of_interest_is_kept_to(tmp_path: Path, allocator: Allocator) -> None:
    study = open_fitted(f"sqlite:///{tmp_path}/s.db", allocator, interest=[0.5, 0.6])
    run(study, allocator, off_by(allocator, {"attn": 1.0, "mlp": 1.0}), 4)
    kept = [allocator.space.kept_of_targets(study.ask().rank_map) for _ in range(10)]
    study.close()
    assert sum(0.48 <= fraction <= 0.6 for fraction in kept) >= 8


def test_rank_maps_have_no_multipliers_to_fit() -> None:
    with pytest.raises(StudyFileError, match=r"'fitted' fits multipliers.*take space = 'multipliers'"):
        check_sampler(make_spec(sampler="fitted", space="direct").search)
