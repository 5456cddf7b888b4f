"""Pivoted storage from the study file to a folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rank_search as rs
from rank_search.compress.checkpoint import load_checkpoint, save_checkpoint
from rank_search.compress.low_rank import place
from rank_search.compress.pivoted import PivotedLinear
from rank_search.errors import RankMapError
from tests.conftest import StudyFactory
from tests.integration.test_checkpoint import CPU, _compressed, _in_a_fresh_process, _load, _logits


def test_transformers_alone_loads_it(model_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Of three families, in one process, for transformers takes seconds to import."""
    expected: dict[str, tuple[torch.Tensor, int]] = {}
    for family in ("llama", "gpt2", "opt"):
        loaded = _load(model_folders(family))
        with _compressed(loaded) as (targets, layers):
            logits = _logits(loaded.model)
            pivoted = {name: PivotedLinear.of(layer) for name, layer in layers.items()}
            place(targets, pivoted)
            stored = sum(parameter.numel() for parameter in loaded.model.parameters())
            save_checkpoint(loaded, targets, pivoted, tmp_path / family)
        saved = sum(target.shape.dense_params for target in targets) - sum(
            t.shape.params(pivoted[t.name].rank if t.name in pivoted else None, "pivoted") for t in targets
        )
        assert stored == sum(p.numel() for p in loaded.model.parameters()) - saved
        expected[family] = logits, stored
    told = _in_a_fresh_process(tmp_path, *((tmp_path / family, True, "float32") for family in expected))
    for family, (logits, stored) in expected.items():
        found = told[str(tmp_path / family)]
        assert found["missing"] == found["unexpected"] == []
        assert found["parameters"] == stored
        there = torch.load(tmp_path / family / "logits.pt", weights_only=True)
        torch.testing.assert_close(there, logits, rtol=1e-4, atol=1e-4)
        here = _logits(load_checkpoint(tmp_path / family, CPU).model)
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


def test_a_study_that_counts_it_ends_in_a_checkpoint_of_that_size(tiny_study: StudyFactory, tmp_path: Path) -> None:
    path = tiny_study(targets={"storage": "pivoted"}, finetune={"learning_rate": 1e-2})
    rs.run(path, trials=3)
    file = rs.export(path, trial=2)
    assert file.storage == "pivoted"
    file.write(tmp_path / "map.json", folder=path.parent)
    applied = rs.apply(tmp_path / "map.json", tmp_path / "out")
    assert file.measurement is not None
    assert applied.loss == pytest.approx(file.measurement.loss, abs=1e-5)
    model = load_checkpoint(tmp_path / "out", CPU).model
    assert sum(parameter.numel() for parameter in model.parameters()) == file.num_params == applied.num_params
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["low_rank"]["storage"] == "pivoted"
    logits = _logits(model)
    _with_orders_of_64_bits(tmp_path / "out" / "model.safetensors")  # as in checkpoints of earlier versions
    assert torch.equal(_logits(load_checkpoint(tmp_path / "out", CPU).model), logits)


def _with_orders_of_64_bits(path: Path) -> None:
    tensors = load_file(path)
    orders = {name: tensor for name, tensor in tensors.items() if name.endswith(".order")}
    assert {order.dtype for order in orders.values()} == {torch.int32}
    save_file(tensors | {name: order.long() for name, order in orders.items()}, path, {"format": "pt"})


def test_other_calibration_text_is_refused(tiny_study: StudyFactory, tmp_path: Path) -> None:
    path = tiny_study()
    rs.run(path, trials=1)
    rs.export(path, trial=0).write(tmp_path / "map.json", folder=path.parent)
    text = path.parent / "text.txt"
    text.write_text(text.read_text()[100:])
    with pytest.raises(RankMapError, match=r"made with calibration blocks \w{12}, but .* restore the text"):
        rs.apply(tmp_path / "map.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()
