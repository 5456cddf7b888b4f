"""From a study file to model, target layers, token blocks and factor bank."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from rank_search import api
from rank_search.errors import BankError, BudgetError, DataError, DeviceError, NonFiniteLossError, TargetError
from rank_search.factors import tensor_files
from rank_search.factors.bank import bank_path
from rank_search.model.targets import weight_matrix
from rank_search.preparing import Prepared, prepare
from rank_search.ranks import RankSpace
from rank_search.spec import Method, load_study_file
from tests.conftest import StudyFactory
from tests.data.heard import Heard


def _prepare(path: Path) -> Prepared:
    return prepare(load_study_file(path))


def _banks(folder: Path) -> list[Path]:
    return sorted(folder.rglob("banks/*.safetensors"))


def test_it_is_made_once_and_found_again(tiny_study: StudyFactory) -> None:
    path = tiny_study()
    first, second = _prepare(path), _prepare(path)
    assert first.built
    assert not second.built
    assert second.times.statistics == second.times.decomposition == 0
    assert first.bank.key == second.bank.key
    assert _banks(path.parent) == [bank_path(path.parent / "work", first.bank.key)]
    assert first.bank.made == {"model": first.spec.model.source, "device": "cpu", "calibration_blocks": 8}
    for name in first.bank.key.layers:
        assert torch.equal(first.bank[name[0]].out, second.bank[name[0]].out)


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_every_method_makes_a_bank_of_every_family(family: str, method: Method, tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study(family, factors={"method": method}))
    assert [shape.name for shape in prepared.space.shapes] == [target.name for target in prepared.targets]
    for target in prepared.targets:
        factors, shape = prepared.bank[target.name], target.shape
        most = shape.max_rank(prepared.space.storage)
        assert factors.out.shape == (most, shape.m)
        assert factors.inn.shape == (most, shape.n)
        assert factors.sigma.shape == (min(shape.m, shape.n),)
        # Plain SVD has the least plain error of all.
        plain = torch.linalg.svdvals(weight_matrix(target.module).double())
        error = float((weight_matrix(target.module) - factors.out.T @ factors.inn).double().norm())
        least = float(plain[most:].norm())
        assert error >= least * (1 - 1e-4)
        if method == "svd":
            torch.testing.assert_close(factors.sigma, plain, rtol=1e-6, atol=1e-8)
            assert error == pytest.approx(least, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "tables",
    [
        {"factors": {"method": "whitened"}}, {"factors": {"damping": 1e-2}}, {"factors": {"seed": 1}},
        {"data": {"calibration_blocks": 7}}, {"targets": {"layers": "attention"}},
        {"targets": {"storage": "two-factor"}}, {"factors": {"anchor": 0.5}}, {"factors": {"slope_power": 0.0}},
        {"factors": {"gain_step": 0.5}},
    ],
)  # fmt: skip
def test_what_changes_the_factors_makes_another_bank(
    tables: dict[str, dict[str, object]], tiny_study: StudyFactory
) -> None:
    first = _prepare(tiny_study())
    other = _prepare(tiny_study(**tables))
    assert other.built
    assert other.bank.path != first.bank.path
    assert len(_banks(first.study.folder)) == 2


@pytest.mark.parametrize(
    "tables",
    [
        {"search": {"seed": 5}}, {"finetune": {"steps": 9}}, {"targets": {"rank_multiple": 4}},
        {"run": {"calibration_batch_blocks": 3}},
    ],
)  # fmt: skip
def test_what_does_not_change_the_factors_shares_the_bank(
    tables: dict[str, dict[str, object]], tiny_study: StudyFactory
) -> None:
    _prepare(tiny_study())
    assert not _prepare(tiny_study(**tables)).built


def test_calibration_training_and_validation_are_apart(tiny_study: StudyFactory) -> None:
    splits = _prepare(tiny_study()).splits
    assert (len(splits.calibration), len(splits.train), len(splits.validation)) == (8, 24, 8)
    parts = (splits.calibration, splits.train, splits.validation)
    rows = {row.tobytes() for part in parts for row in np.array(part.columns["input_ids"])}
    assert len(rows) == 40


def test_preparing_leaves_the_model_dense_and_frozen(tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study())
    assert all(prepared.model.get_submodule(target.name) is target.module for target in prepared.targets)
    assert not prepared.model.training
    assert not any(parameter.requires_grad for parameter in prepared.model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in prepared.model.parameters())


def test_the_allocator_predicts_by_the_banks_singular_values(tiny_study: StudyFactory) -> None:
    prepared = _prepare(tiny_study())
    rank_map = prepared.allocator.closed_form(0.5)
    expected = sum(0.5 * float(prepared.bank[name].sigma[rank:].pow(2).sum()) for name, rank in rank_map.items())
    assert prepared.allocator.predicted_rise(rank_map) == pytest.approx(expected)
    assert prepared.allocator.predicted_rise(rank_map) < prepared.allocator.predicted_rise(
        prepared.allocator.uniform(0.5)
    )


def test_a_key_that_does_nothing_is_said_when_a_study_begins(tiny_study: StudyFactory) -> None:
    path, heard = tiny_study(finetune={"nested_steps": 8}, search={"trials": 1}), Heard()
    idle = "finetune.nested_steps does nothing here: it counts where finetune.mode is 'nested'"
    api.prepare(path, progress=heard)
    api.run(path, progress=heard)
    assert heard.lines.count(idle) == 2


def test_a_check_refuses_before_anything_is_written(tiny_study: StudyFactory) -> None:
    path = tiny_study()

    def refuse(space: RankSpace, _weights_digest: str) -> None:
        space.budget(0.0001)

    with pytest.raises(BudgetError):
        prepare(load_study_file(path), check=refuse)
    assert not (path.parent / "work").exists()


@pytest.mark.parametrize(
    ("tables", "error", "message"),
    [
        ({"data": {"sequence_length": 65}}, DataError, "at most 64 tokens long for this model, not 65"),
        ({"targets": {"include": ["*nothing*"]}}, TargetError, r"targets.include pattern '\*nothing\*' matches no"),
        ({"run": {"device": "cuda:99"}}, DeviceError, "device 'cuda:99' was asked for, but this machine has"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tables: dict[str, dict[str, object]], error: type[Exception], message: str, tiny_study: StudyFactory
) -> None:
    path = tiny_study(**tables)
    with pytest.raises(error, match=message):
        _prepare(path)
    assert not (path.parent / "work").exists()


def test_no_half_bank_is_left_by_a_full_disk(tiny_study: StudyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_study()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files.TensorStream, "write", full)
    with pytest.raises(BankError, match=r"No space left on device; free space or choose another run.work_dir"):
        _prepare(path)
    assert [file.suffix for file in (path.parent / "work" / "banks").iterdir()] in ([], [".lock"])
    monkeypatch.undo()
    assert _prepare(path).built


def test_a_model_whose_output_is_not_finite_makes_no_bank(tiny_study: StudyFactory, tmp_path: Path) -> None:
    from tests.data import models

    model = models.make("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "broken")
    models.tokenizer().save_pretrained(tmp_path / "broken")
    path = tiny_study(model={"source": str(tmp_path / "broken")})
    with pytest.raises(NonFiniteLossError, match="output on the calibration blocks is not finite"):
        _prepare(path)
    assert _banks(path.parent) == []


def test_the_number_of_threads_is_the_study_files(tiny_study: StudyFactory) -> None:
    path = tiny_study(run={"threads": 2})
    try:
        _prepare(path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
