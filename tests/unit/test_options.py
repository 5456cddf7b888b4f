"""Options of commands that go without a study file, in messages that were written for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rank_search.cli.model_commands import _evaluate_command, _text_of
from rank_search.cli.options import keys_as_options
from rank_search.errors import InputError, ModelError
from rank_search.spec import parse_study


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("lower data.sequence_length", "lower --sequence-length"),
        ("lower data.sequence_length.", "lower --sequence-length."),
        ("set model.task = 'masked-lm', or", "give --task masked-lm, or"),
        ("set model.trust_remote_code = true if you trust it", "give --trust-remote-code if you trust it"),
        ('exclude it or set targets.granularity = "matrix"', "exclude it or give --granularity matrix"),
        ("exclude it or set targets.split_qkv = false", "exclude it or leave out --split-qkv"),
        ("targets.split_qkv = true, but no fused QKV", "--split-qkv, but no fused QKV"),
        ("data.train and data.train_split", "--data and --split"),
        ("dataset 'a/b' has no data.revision 'x'", "dataset 'a/b' has no --data-revision 'x'"),
        ("a relative path starts from the study file's folder", "a relative path starts from the current folder"),
    ],
)
def test_keys_of_the_study_file_are_told_as_options(message: str, told: str) -> None:
    with pytest.raises(InputError) as caught, keys_as_options():
        raise InputError(message)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp", "targets.frozen", "./data.train", "data.train/x", "data.column.csv"]
)
def test_names_of_modules_and_files_stay_as_they_are(name: str) -> None:
    with pytest.raises(ModelError, match=f"^{name} must stay dense$"), keys_as_options():
        raise ModelError(f"{name} must stay dense")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"train": "a/b", "test": "a/b", "revision": "c0ffee", "test_split": "holdout", "test_blocks": 3},
            "--data a/b --split holdout --data-revision c0ffee --sequence-length 128 --blocks 3",
        ),
        (
            {"train": "a/b", "validation": "a/b", "config": "raw", "validation_blocks": 5, "sequence_length": 64},
            "--data a/b --split validation --config raw --sequence-length 64 --blocks 5",
        ),
        ({"train": "python-docs"}, "--data python-docs --sequence-length 128  # it was made with some of this text"),
    ],
)
def test_a_checkpoint_is_scored_as_its_study_would(data: dict[str, object], told: str) -> None:
    recipe = parse_study({"name": "x", "model": {"source": "org/model"}, "data": data}, where="test")
    assert _evaluate_command(Path("out"), recipe, Path()).startswith(f"rank-search evaluate out {told}")
    trusted = _evaluate_command(Path("out"), recipe, Path(), trust=True)
    assert "--trust-remote-code" in trusted.partition("  #")[0]


def test_a_revision_of_the_data_is_no_revision_of_the_model() -> None:
    with pytest.raises(InputError, match=r"^--data-revision: String should"):
        _text_of("a/b", None, {"revision": ""}, {})
    with pytest.raises(InputError, match=r"^--data-revision goes with --data"):
        _text_of(None, Path("study.toml"), {"revision": "c0ffee"}, {})
