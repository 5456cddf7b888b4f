"""The nested fine-tune: trained once, sliced by every trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_search as rs
from rank_search.compress.nested_linear import NestedLinear
from rank_search.errors import NonFiniteLossError, TrialError
from rank_search.measurement import Fidelity
from rank_search.preparing import Prepared, prepare
from rank_search.ranges import bank_cuts, kept_ranges, shared_steps
from rank_search.spec import FinetuneSpec, SearchSpec, load_study_file
from rank_search.train.nested import (
    nested_finetune,
    sampled_rank_maps,
)
from rank_search.trial import Evaluator
from tests.conftest import StudyFactory

NESTED = {"mode": "nested", "nested_steps": 30, "nested_ranges": 2, "steps": 0, "learning_rate": 1e-2}


@pytest.fixture
def prepared(tiny_study: StudyFactory) -> Prepared:
    return prepare(load_study_file(tiny_study(finetune=NESTED)))


@pytest.mark.parametrize(("masked", "largest"), [(False, 9), (True, 9), (True, 4)])
def test_a_nested_layer_is_the_slice_of_its_rank(prepared: Prepared, masked: bool, largest: int) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    for target in prepared.targets:
        factors = prepared.bank[target.name]
        rank = torch.tensor(-1)
        layer = NestedLinear(target, factors, rank, masked=masked, largest=largest, ever_dense=largest > 4)
        inputs = x[..., : target.shape.n]
        with torch.no_grad():
            if largest > 4:
                torch.testing.assert_close(layer(inputs), target.module(inputs), rtol=1e-5, atol=1e-6)
            rank.fill_(3)
            expected = inputs @ (factors.out[:3].T @ factors.inn[:3]).T
            torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-5)


def test_masking_trains_as_slicing_does(prepared: Prepared) -> None:
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    target = prepared.targets[0]
    gradients = []
    for masked in (False, True):
        layer = NestedLinear(
            target, prepared.bank[target.name], torch.tensor(5), masked=masked, largest=8, ever_dense=False
        )
        layer(x[..., : target.shape.n]).square().sum().backward()
        assert layer.outer.grad is not None
        assert layer.inner.grad is not None
        assert not layer.outer.grad[:, 5:].any()
        assert not layer.inner.grad[5:].any()
        gradients.append((layer.outer.grad, layer.inner.grad))
    for sliced, zeroed in zip(*gradients, strict=True):
        torch.testing.assert_close(sliced, zeroed, rtol=1e-4, atol=1e-6)


def test_slices_of_the_tuned_factors_score_better_at_every_size(prepared: Prepared, tiny_study: StudyFactory) -> None:
    plain = Evaluator(prepare(load_study_file(tiny_study(finetune={"steps": 0}))))
    tuned = Evaluator(prepared)
    for kept in (0.3, 0.5, 0.7):
        rank_map = prepared.allocator.closed_form(kept)
        found = tuned.measure(rank_map)
        assert found.fidelity == Fidelity.SLICED
        assert found.loss < plain.measure(rank_map).loss


def test_the_dense_model_and_the_predicted_rises_stay(tiny_study: StudyFactory) -> None:
    path = tiny_study(finetune=NESTED)
    before = prepare(load_study_file(path), nested=False)
    weights = {name: tensor.clone() for name, tensor in before.model.state_dict().items()}
    after = prepare(load_study_file(path))
    assert all(torch.equal(weights[name], tensor) for name, tensor in after.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in after.model.parameters())
    for bank in after.trial_banks.banks:
        for name, tail in before.bank.tails().items():
            assert (bank.tails()[name] == tail).all()
    assert len({bank.path for bank in (after.bank, *after.trial_banks.banks)}) == 3


def test_it_is_made_once(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("rank_search.preparing.nested_finetune", again)
    assert prepare(prepared.study).trial_banks.digest == prepared.trial_banks.digest


def test_another_host_downloads_all_its_banks(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def again(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("made again")

    def at_host(work_dir: str) -> Prepared:
        run = prepared.spec.run.model_copy(
            update={"work_dir": f"{tmp_path}/{work_dir}", "bank_url": f"file://{tmp_path}/objects"}
        )
        return prepare(prepared.study.model_copy(update={"spec": prepared.spec.model_copy(update={"run": run})}))

    monkeypatch.setattr("rank_search.preparing.nested_finetune", again)
    monkeypatch.setattr("rank_search.preparing.Build", again)
    at_host("work")  # which has them, and uploads them
    other = at_host("other")
    assert other.trial_banks.digest == prepared.trial_banks.digest
    for theirs, ours in zip(
        (other.bank, *other.trial_banks.banks), (prepared.bank, *prepared.trial_banks.banks), strict=True
    ):
        assert theirs.path.parent == tmp_path / "other" / "banks"
        assert theirs.path.read_bytes() == ours.path.read_bytes()


def test_another_learning_rate_is_another_bank_and_own_steps_are_not(
    prepared: Prepared, tiny_study: StudyFactory
) -> None:
    other = prepare(load_study_file(tiny_study(finetune=NESTED | {"learning_rate": 1e-3})))
    assert other.trial_banks.digest != prepared.trial_banks.digest
    own = prepare(load_study_file(tiny_study(finetune=NESTED | {"steps": 2})))
    assert own.trial_banks.digest == prepared.trial_banks.digest
    assert Evaluator(own).measure(own.allocator.closed_form(0.5)).fidelity == Fidelity.TUNED


def test_multiples_of_ranks_share_the_bank_but_not_the_nested_fine_tune(
    prepared: Prepared, tiny_study: StudyFactory
) -> None:
    other = prepare(load_study_file(tiny_study(finetune=NESTED, targets={"rank_multiple": 2})))
    assert other.bank.key == prepared.bank.key
    ours, theirs = ({bank.key.digest for bank in made.trial_banks.banks} for made in (prepared, other))
    assert not ours & theirs


@pytest.fixture
def fine_tunes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The nested fine-tunes that were made, so far."""
    made: list[object] = []

    def counted(*arguments: Any, **keywords: Any) -> object:
        made.append(arguments)
        return nested_finetune(*arguments, **keywords)

    monkeypatch.setattr("rank_search.preparing.nested_finetune", counted)
    return made


def test_a_range_is_trained_when_a_rank_map_asks_for_it(
    prepared: Prepared, tiny_study: StudyFactory, fine_tunes: list[object]
) -> None:
    path = tiny_study(finetune=NESTED, run={"work_dir": "other"})
    late = prepare(load_study_file(path), nested=False)
    assert late.trial_banks.digest == prepared.trial_banks.digest
    assert fine_tunes == []
    evaluator = Evaluator(late)
    for kept, trained in ((0.9, 1), (0.85, 1), (0.4, 2), (0.9, 2)):
        rank_map = prepared.allocator.closed_form(kept)
        assert evaluator.measure(rank_map).loss == Evaluator(prepared).measure(rank_map).loss
        assert len(fine_tunes) == trained


def test_a_trial_whose_range_cannot_be_trained_is_proposed_again(
    tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_study(finetune=NESTED, search={"ladder": [0.9, 0.4], "seeds": ["closed-form"]})

    def failing(error: BaseException) -> Callable[..., None]:
        def fails(*_args: object, **_keywords: object) -> None:
            raise error

        return fails

    errors = (
        (NonFiniteLossError("not finite; lower finetune.learning_rate"), NonFiniteLossError),
        (torch.OutOfMemoryError("CUDA out of memory"), TrialError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    )
    for error, told in errors:
        with monkeypatch.context() as broken:
            broken.setattr("rank_search.preparing.nested_finetune", failing(error))
            with pytest.raises(told):
                rs.run(path, trials=2)
        assert rs.front(path).points == ()
    rs.run(path, trials=2)
    status = rs.status(path)
    assert (status.complete, status.failed, status.requeued) == (2, 0, len(errors))


def test_rank_maps_of_the_steps_cover_the_range(prepared: Prepared) -> None:
    draw = sampled_rank_maps(prepared.allocator, prepared.spec.search, (0.4, 0.6))
    space = prepared.space
    kept = [space.kept_of_targets(draw(index)) for index in range(40)]
    assert kept[0] == pytest.approx(0.4, abs=0.02)
    assert kept[2] == pytest.approx(0.6, abs=0.02)
    assert max(kept) <= 0.6
    assert len({draw(index).digest for index in range(40)}) == 22
    assert draw(7) == draw(7)


def test_a_search_knows_where_the_factors_of_another_range_begin(prepared: Prepared, tiny_study: StudyFactory) -> None:
    assert bank_cuts(prepared.spec, prepared.space) == prepared.trial_banks.tops[:-1]
    assert len(prepared.trial_banks.tops) == 2
    own = load_study_file(tiny_study(finetune={"steps": 1})).spec
    assert bank_cuts(own, prepared.space) == ()


def test_ranges_meet_and_cover_what_the_study_proposes() -> None:
    search = SearchSpec(min_kept=0.3, max_kept=0.9)
    ranges = kept_ranges(search, 3, least=0.1)
    assert (ranges[0][0], ranges[-1][1]) == (pytest.approx(0.3), pytest.approx(0.9))
    assert [high / low for low, high in ranges] == [pytest.approx(3 ** (1 / 3))] * 3
    assert kept_ranges(search, 2, least=0.5)[0] == pytest.approx((0.5, 0.45**0.5))


def test_a_trial_slices_the_bank_of_its_range(prepared: Prepared) -> None:
    low, high = prepared.trial_banks.banks
    middle = (prepared.spec.search.min_kept * prepared.spec.search.max_kept) ** 0.5
    assert prepared.trial_banks.at(middle - 0.01) is low
    assert prepared.trial_banks.at(middle + 0.01) is high
    assert prepared.trial_banks.at(1.0) is high
    assert prepared.trial_banks.at(0.01) is low


def test_finished_ranges_outlast_an_interrupt(tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study_file(tiny_study(finetune=NESTED | {"learning_rate": 9e-3}))
    made = []

    def once(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return nested_finetune(*args, **kwargs)

    monkeypatch.setattr("rank_search.preparing.nested_finetune", once)
    with pytest.raises(KeyboardInterrupt):
        prepare(study)
    prepare(study)
    assert len(made) == 3


def test_factors_that_no_rank_map_asks_for_stay(prepared: Prepared) -> None:
    low = prepared.trial_banks.at(0.01)
    untouched = 0
    for name in (target.name for target in prepared.targets):
        same = (low[name].inn == prepared.bank[name].inn).all(1)
        assert not same[0] or same.all()
        untouched += int(same.sum())
    assert untouched > 0


def test_a_study_is_searched_exported_and_applied(tiny_study: StudyFactory, tmp_path: Path) -> None:
    path = tiny_study(finetune=NESTED)
    front = rs.run(path, trials=5)
    assert {point.measurement.fidelity for point in front} == {Fidelity.SLICED}
    file = rs.export(path, trial=front[0].trial)
    file.write(tmp_path / "map.json", folder=path.parent)
    assert file.measurement is not None
    # The checkpoint is in pivoted form: the same function, in other roundings.
    assert rs.apply(tmp_path / "map.json", tmp_path / "out").loss == pytest.approx(file.measurement.loss, rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error(tiny_study: StudyFactory) -> None:
    path = tiny_study(finetune=NESTED | {"learning_rate": 1e30})
    with pytest.raises(
        NonFiniteLossError, match=r"^the nested fine-tune's loss was not finite in \d+ of 3\d steps; lower"
    ):
        prepare(load_study_file(path))


def test_ranges_of_small_models_get_more_steps() -> None:
    ranges = kept_ranges(SearchSpec(min_kept=0.3, max_kept=0.95), 5, 0.0)
    steps = shared_steps(ranges, 128)
    assert steps == sorted(steps, reverse=True)
    assert 1.1 < steps[0] / steps[-1] < 1.4
    assert steps == [140, 130, 130, 120, 120]
    assert shared_steps(ranges[:1], 30) == [30]
    assert shared_steps(ranges, 1) == [1] * 5


def test_without_a_budget_of_its_own_a_trial_only_slices() -> None:
    assert FinetuneSpec(mode="nested").steps_for(128) == 0
    assert FinetuneSpec().steps_for(128) == 100
