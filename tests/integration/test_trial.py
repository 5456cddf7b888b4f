"""A trial: a rank map goes in, a measurement comes out, and the model is as it was."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rank_search import trial as trial_module
from rank_search.errors import NonFiniteLossError, RankMapError
from rank_search.measurement import Fidelity, Measurement
from rank_search.preparing import Prepared, prepare
from rank_search.ranks import RankMap
from rank_search.spec import load_study_file
from rank_search.trial import Evaluator
from tests.conftest import StudyFactory


def _prepare(path: Path) -> Prepared:
    return prepare(load_study_file(path))


@pytest.fixture(scope="module")
def prepared(write_study: StudyFactory, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The tiny study: every trial fine-tunes for two steps. What it counts stands in the model as it is trained."""
    return _prepare(write_study(tmp_path_factory.mktemp("study"), targets={"storage": "two-factor"}))


@pytest.fixture(scope="module")
def evaluator(prepared: Prepared) -> Evaluator:
    """One evaluator for all tests, as in a worker."""
    return Evaluator(prepared)


def _without_times(measurement: Measurement) -> tuple[object, ...]:
    return (
        measurement.loss, measurement.standard_error, measurement.num_params, measurement.target_params,
        measurement.kept_of_targets, measurement.kept_of_model, measurement.fidelity, measurement.tokens,
    )  # fmt: skip


def _weights(prepared: Prepared) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}


def _assert_bit_identical(prepared: Prepared, before: dict[str, Tensor]) -> None:
    after = prepared.model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert not any(parameter.requires_grad for parameter in prepared.model.parameters())
    assert all(parameter.grad is None for parameter in prepared.model.parameters())


def test_the_same_rank_map_gives_the_same_measurement(prepared: Prepared, evaluator: Evaluator) -> None:
    rank_map = prepared.allocator.closed_form(0.6)
    first = evaluator.measure(rank_map)
    evaluator.measure(prepared.allocator.uniform(0.4))
    assert _without_times(evaluator.measure(rank_map)) == _without_times(first)


def test_another_worker_measures_the_same(prepared: Prepared, evaluator: Evaluator) -> None:
    again = _prepare(prepared.study.folder / "study.toml")
    assert not again.built
    rank_map = prepared.allocator.closed_form(0.5)
    assert again.allocator.closed_form(0.5) == rank_map
    assert _without_times(Evaluator(again).measure(rank_map)) == _without_times(evaluator.measure(rank_map))


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.3])
def test_a_measurement_counts_what_the_rank_map_keeps(prepared: Prepared, evaluator: Evaluator, kept: float) -> None:
    rank_map = prepared.allocator.closed_form(kept)
    measurement = evaluator.measure(rank_map)
    with evaluator.applied(rank_map):
        counted = sum(parameter.numel() for parameter in prepared.model.parameters())
    assert measurement.num_params == counted
    assert measurement.kept_of_model == counted / prepared.space.model_params
    assert measurement.target_params == counted - (prepared.space.model_params - prepared.space.dense_params)
    assert kept - 0.02 < measurement.kept_of_targets <= kept
    assert measurement.fidelity is Fidelity.TUNED
    assert measurement.tokens == 8 * 31
    assert measurement.seconds > 0
    assert measurement.peak_memory > 0


def test_a_trial_leaves_the_base_weights_bit_identical(prepared: Prepared, evaluator: Evaluator) -> None:
    before = _weights(prepared)
    evaluator.measure(prepared.allocator.closed_form(0.5))
    _assert_bit_identical(prepared, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_training_everything_leaves_the_base_weights_bit_identical(family: str, tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study(family, finetune={"train": "all", "learning_rate": 1e-2}))
    evaluator, before = Evaluator(prepared), _weights(prepared)
    rank_map = prepared.allocator.closed_form(0.5)
    first = evaluator.measure(rank_map)
    _assert_bit_identical(prepared, before)
    assert _without_times(evaluator.measure(rank_map)) == _without_times(first)


@pytest.mark.parametrize("train", ["factors", "all"])
def test_a_trial_that_fails_in_the_middle_leaves_the_base_weights_bit_identical(
    train: str, tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = _prepare(tiny_study(finetune={"train": train, "learning_rate": 1e-2}))
    evaluator, before = Evaluator(prepared), _weights(prepared)

    def failing(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial_module, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluator.measure(prepared.allocator.closed_form(0.5))
    _assert_bit_identical(prepared, before)


@pytest.mark.parametrize("train", ["factors", "all"])
def test_a_loss_that_is_not_finite_fails_the_trial_and_nothing_else(train: str, tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study(finetune={"train": train, "learning_rate": 1e25, "steps": 4}))
    evaluator, before = Evaluator(prepared), _weights(prepared)
    with pytest.raises(NonFiniteLossError, match=r"training loss is (nan|inf) at step \d of 4"):
        evaluator.measure(prepared.allocator.closed_form(0.5))
    _assert_bit_identical(prepared, before)
    assert math.isfinite(evaluator.score().loss)


def test_whoever_looks_sees_the_model_that_is_scored_and_changes_nothing(prepared: Prepared) -> None:
    rank_map, seen = prepared.allocator.closed_form(0.5), []
    unseen = Evaluator(prepared).measure(rank_map)

    def look(of: RankMap, loss: float) -> None:
        time.sleep(0.5)
        seen.append((of, loss, evaluator.score().loss))

    evaluator = Evaluator(prepared, look)
    measured = evaluator.measure(rank_map)
    assert seen == [(rank_map, measured.loss, measured.loss)]
    assert _without_times(measured) == _without_times(unseen)
    assert measured.swap_seconds < 0.5


def test_a_trial_without_steps_of_its_own_reads_the_bank_where_it_lies(tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study(finetune={"steps": 0}))
    bank = prepared.bank.on(prepared.device)
    before = {name: (factors.inn.clone(), factors.out.clone()) for name, factors in bank.items()}
    read: set[int] = set()

    def look(rank_map: RankMap, _loss: float) -> None:
        layers = [prepared.model.get_submodule(name) for name in rank_map]
        read.update(parameter.untyped_storage().data_ptr() for layer in layers for parameter in layer.parameters())

    Evaluator(prepared, look).measure(prepared.allocator.closed_form(0.5))
    assert read & {factors.inn.untyped_storage().data_ptr() for factors in bank.values()}
    assert all(
        torch.equal(bank[name].inn, inn) and torch.equal(bank[name].out, out) for name, (inn, out) in before.items()
    )


def test_without_fine_tune_the_loss_is_that_of_the_sliced_factors(tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study(finetune={"steps": 0}))
    evaluator = Evaluator(prepared)
    dense = evaluator.score()
    assert evaluator.measure(RankMap()).loss == dense.loss
    measurement = evaluator.measure(prepared.allocator.closed_form(0.5))
    assert measurement.fidelity is Fidelity.SLICED
    assert measurement.train_losses == ()
    assert measurement.loss != dense.loss


@pytest.mark.parametrize(
    ("rank_map", "message"),
    [
        (RankMap({"model.layers.7.mlp.up_proj": 1}), "model.layers.7.mlp.up_proj is not a target layer of this model"),
        (RankMap({"model.layers.0.mlp.up_proj": 20}), r"up_proj has rank 20, but above 19 its \(48, 32\) matrix is"),
    ],
)
def test_a_rank_map_that_does_not_fit_is_refused(
    prepared: Prepared, evaluator: Evaluator, rank_map: RankMap, message: str
) -> None:
    before = _weights(prepared)
    with pytest.raises(RankMapError, match=message):
        evaluator.measure(rank_map)
    _assert_bit_identical(prepared, before)


def test_another_seed_trains_on_other_blocks(prepared: Prepared, tiny_study: StudyFactory) -> None:
    rank_map = prepared.allocator.closed_form(0.5)
    losses = {
        Evaluator(_prepare(tiny_study(search={"seed": seed}, finetune={"steps": 3}))).measure(rank_map).loss
        for seed in (0, 1)
    }
    assert len(losses) == 2


def test_pivoted_storage_counts_fewer_parameters_for_the_same_function(tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study(targets={"storage": "pivoted"}, finetune={"steps": 0}))
    # Above the rank at which two factors stop paying: allowed here.
    rank_map = RankMap({shape.name: shape.max_rank("two-factor") + 1 for shape in prepared.space.shapes})
    measurement = Evaluator(prepared).measure(rank_map)
    assert measurement.kept_of_targets < 1
    assert measurement.num_params == prepared.space.num_params(rank_map)
    assert prepared.space.with_storage("two-factor").num_params(rank_map) > prepared.space.model_params
