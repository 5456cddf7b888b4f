"""Compressed models as folders that transformers loads by itself, in a process that knows nothing of this package."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rank_search.compress import checkpoint
from rank_search.compress.checkpoint import is_compressed, load_checkpoint, save_checkpoint
from rank_search.compress.low_rank import LowRankLinear, compressed
from rank_search.errors import CheckpointError, ModelError
from rank_search.factors.decompose import decompose
from rank_search.model.load import LoadedModel, load_model
from rank_search.model.targets import Target, find_targets, weight_matrix
from rank_search.ranks import RankMap
from rank_search.spec import ModelSpec, TargetSpec
from tests.data import models

CPU = torch.device("cpu")
IDS = torch.arange(60).view(2, 30) * 7 % models.VOCABULARY

FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads(1)
results = {}
for folder, trusted, dtype in json.loads(sys.argv[1]):
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trusted, output_loading_info=True, local_files_only=True, dtype=dtype)
    except Exception as error:
        results[folder] = {"error": f"{type(error).__name__}: {error}"}
        continue
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    ids = torch.arange(60).view(2, 30) * 7 % model.config.vocab_size
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        told = model.generate(ids[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    torch.save(logits, f"{folder}/logits.pt")
    results[folder] = {
        "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
        "parameters": sum(p.numel() for p in model.parameters()), "class": type(model).__name__,
        "dtype": str(model.dtype), "told": told.shape[1], "text": tokenizer.decode(tokenizer("rank maps")["input_ids"]),
    }
assert sys.modules["rank_search"] is None
print(json.dumps(results))
"""


def _in_a_fresh_process(cache: Path, *folders: tuple[Path, bool, str]) -> dict[str, dict[str, object]]:
    """Load folders with transformers alone: folder, ``trust_remote_code``, dtype. Logits are left in the folders."""
    asked = json.dumps([(str(folder), trusted, dtype) for folder, trusted, dtype in folders])
    blocked = "import sys; sys.modules['rank_search'] = None\n"  # importing it fails from here on
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked + FRESH, asked], capture_output=True, text=True, cwd=cache,
        env={"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return results


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@contextmanager
def _compressed(
    loaded: LoadedModel, spec: TargetSpec | None = None
) -> Iterator[tuple[tuple[Target, ...], dict[str, LowRankLinear]]]:
    """The model with all but every third target layer factorised."""
    targets = find_targets(loaded.model, spec or TargetSpec())
    factors = {
        target.name: decompose(target.name, weight_matrix(target.module), None, None, target.shape.max_rank())
        for target in targets
    }
    ranks = RankMap({t.name: max(1, t.shape.max_rank() // 2) for i, t in enumerate(targets) if i % 3 != 1})
    with compressed(targets, factors, ranks) as layers:
        yield targets, layers


@pytest.fixture(scope="session")
def llama_folder(model_folders: Callable[[str], Path]) -> Path:
    """A saved Llama of two blocks."""
    return model_folders("llama")


def _load(folder: Path) -> LoadedModel:
    return load_model(ModelSpec(source=str(folder)), Path(), CPU)


@dataclass(frozen=True)
class Saved:
    """One family's folders, what was saved in them, and what a fresh process made of them."""

    folder: Path
    logits: Tensor
    parameters: int
    dense_parameters: int
    dense_class: str
    loaded: dict[str, dict[str, object]]


FRESH_FAMILIES = ("llama", "llama_tied", "gpt2", "opt", "gpt_neox")


@pytest.fixture(scope="module")
def saved_families(model_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """All families' compressed models, loaded in one fresh process: starting it is what takes the time."""
    root = tmp_path_factory.mktemp("saved")
    families: dict[str, Saved] = {}
    for family in FRESH_FAMILIES:
        loaded, folder = _load(model_folders(family)), root / family
        with _compressed(loaded) as (targets, layers):
            logits = _logits(loaded.model)
            parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
            save_checkpoint(loaded, targets, layers, folder / "factored", extra={"rank_map.json": "{}"})
            save_checkpoint(loaded, targets, layers, folder / "refused")
            save_checkpoint(loaded, targets, layers, folder / "dense", form="dense")
            save_checkpoint(loaded, targets, layers, folder / "half", dtype=torch.bfloat16)
            assert torch.equal(_logits(loaded.model), logits), "saving must not change the model"
        dense = sum(parameter.numel() for parameter in loaded.model.parameters())
        families[family] = Saved(folder, logits, parameters, dense, type(loaded.model).__name__, {})
    # Folders of one name in one process: their code must not be mixed up.
    asked = [
        (root / family / name, name in {"factored", "half"}, "auto")
        for family in FRESH_FAMILIES
        for name in ("factored", "refused", "dense", "half")
    ]
    for name, found in _in_a_fresh_process(root, *asked).items():
        families[Path(name).parent.name].loaded[Path(name).name] = found
    return families


@pytest.mark.parametrize("family", FRESH_FAMILIES)
def test_transformers_alone_loads_the_factored_form(family: str, saved_families: dict[str, Saved]) -> None:
    saved = saved_families[family]
    found = saved.loaded["factored"]
    assert found["missing"] == found["unexpected"] == []
    assert found["parameters"] == saved.parameters, "tied weights stay tied"
    assert found["class"] == "LowRankModel"
    assert found["dtype"] == "torch.float32"
    torch.testing.assert_close(torch.load(saved.folder / "factored" / "logits.pt"), saved.logits, rtol=1e-5, atol=1e-5)
    assert (saved.folder / "factored" / "rank_map.json").read_text() == "{}"


@pytest.mark.parametrize("family", FRESH_FAMILIES)
def test_the_factored_form_generates_and_brings_its_tokenizer(family: str, saved_families: dict[str, Saved]) -> None:
    found = saved_families[family].loaded["factored"]
    assert found["told"] == 7
    assert found["text"] == "rank maps"


@pytest.mark.parametrize("family", FRESH_FAMILIES)
def test_without_trust_the_factored_form_is_refused(family: str, saved_families: dict[str, Saved]) -> None:
    # Not filled with random numbers, but refused, and the error says what to do.
    assert "trust_remote_code" in str(saved_families[family].loaded["refused"]["error"])


@pytest.mark.parametrize("family", FRESH_FAMILIES)
def test_transformers_alone_loads_the_dense_form(family: str, saved_families: dict[str, Saved]) -> None:
    saved = saved_families[family]
    found = saved.loaded["dense"]
    assert found["missing"] == found["unexpected"] == []
    assert found["parameters"] == saved.dense_parameters
    assert found["class"] == saved.dense_class
    torch.testing.assert_close(torch.load(saved.folder / "dense" / "logits.pt"), saved.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FRESH_FAMILIES)
def test_bfloat16_halves_the_file_and_keeps_the_function(family: str, saved_families: dict[str, Saved]) -> None:
    saved = saved_families[family]
    found = saved.loaded["half"]
    assert found["missing"] == found["unexpected"] == []
    assert found["parameters"] == saved.parameters, "tied weights stay tied"
    assert found["dtype"] == "torch.bfloat16"
    torch.testing.assert_close(
        torch.load(saved.folder / "half" / "logits.pt").float(), saved.logits, rtol=0.1, atol=0.3
    )
    sizes = [(saved.folder / name / "model.safetensors").stat().st_size for name in ("factored", "half")]
    # The rest is the header.
    assert abs(sizes[0] - 2 * sizes[1]) < 16_000
    assert sizes[1] < 2 * saved.parameters + 16_000


@pytest.mark.parametrize("family", models.FAMILIES)
def test_load_checkpoint_gives_the_same_model(
    family: str, model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = _load(model_folders(family))
    with _compressed(loaded) as (targets, layers):
        expected = _logits(loaded.model)
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        save_checkpoint(loaded, targets, layers, tmp_path / "out")
    assert is_compressed(tmp_path / "out")
    again = load_checkpoint(tmp_path / "out", CPU)
    assert torch.equal(_logits(again.model), expected)
    assert sum(parameter.numel() for parameter in again.model.parameters()) == parameters
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    assert not again.model.training
    assert again.max_length == loaded.max_length
    assert again.tokenizer("rank maps")["input_ids"] == loaded.tokenizer("rank maps")["input_ids"]


def test_a_factorised_head_is_saved_too(llama_folder: Path, tmp_path: Path) -> None:
    loaded = _load(llama_folder)
    with _compressed(loaded, TargetSpec(include=("lm_head",))) as (targets, layers):
        assert "lm_head" in layers
        expected = _logits(loaded.model)
        save_checkpoint(loaded, targets, layers, tmp_path / "out")
    assert torch.equal(_logits(load_checkpoint(tmp_path / "out", CPU).model), expected)


def test_the_dense_model_is_unchanged_by_saving(llama_folder: Path, tmp_path: Path) -> None:
    loaded = _load(llama_folder)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with _compressed(loaded) as (targets, layers):
        save_checkpoint(loaded, targets, layers, tmp_path / "dense", form="dense")
        assert all(loaded.model.get_submodule(name) is layer for name, layer in layers.items())
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_dense_form_is_an_ordinary_model_folder(llama_folder: Path, tmp_path: Path) -> None:
    loaded = _load(llama_folder)
    with _compressed(loaded) as (targets, layers):
        expected = _logits(loaded.model)
        save_checkpoint(loaded, targets, layers, tmp_path / "dense", form="dense")
    assert not is_compressed(tmp_path / "dense")
    torch.testing.assert_close(_logits(_load(tmp_path / "dense").model), expected, rtol=1e-3, atol=1e-4)


def test_a_folder_with_something_in_it_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    loaded = _load(llama_folder)
    (tmp_path / "mine").write_text("keep me")
    with _compressed(loaded) as (targets, layers):
        with pytest.raises(CheckpointError, match="exists and is not empty; choose another folder"):
            save_checkpoint(loaded, targets, layers, tmp_path)
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            save_checkpoint(loaded, targets, layers, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(llama_folder: Path, tmp_path: Path) -> None:
    loaded = _load(llama_folder)
    out = tmp_path / "out"
    out.mkdir()
    with _compressed(loaded) as (targets, layers):
        save_checkpoint(loaded, targets, layers, out)
    assert is_compressed(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_when_the_disk_is_full(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _load(llama_folder)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # The tokenizer comes after the weights: half of the folder is there.
    monkeypatch.setattr(type(loaded.tokenizer), "save_pretrained", full)
    with _compressed(loaded) as (targets, layers), pytest.raises(CheckpointError) as caught:
        save_checkpoint(loaded, targets, layers, tmp_path / "out")
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_transformers_does_not_have_saves_in_dense_form_only(llama_folder: Path, tmp_path: Path) -> None:
    loaded = _load(llama_folder)
    loaded.model.__class__ = type("HomeMadeForCausalLM", (type(loaded.model),), {})
    with _compressed(loaded) as (targets, layers):
        with pytest.raises(ModelError, match=r"HomeMadeForCausalLM is not a class of transformers.*use the dense form"):
            save_checkpoint(loaded, targets, layers, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        save_checkpoint(loaded, targets, layers, tmp_path / "out", form="dense")


@pytest.fixture
def saved(llama_folder: Path, tmp_path: Path) -> Path:
    """A factored checkpoint."""
    loaded = _load(llama_folder)
    with _compressed(loaded) as (targets, layers):
        save_checkpoint(loaded, targets, layers, tmp_path / "saved")
    return tmp_path / "saved"


def test_a_checkpoint_without_weights_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^checkpoint .*saved cannot be loaded: .*model.safetensors"):
        load_checkpoint(saved, CPU)


def test_a_checkpoint_with_truncated_weights_is_refused(saved: Path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"^checkpoint .*saved cannot be loaded: "):
        load_checkpoint(saved, CPU)


def test_a_checkpoint_of_another_rank_map_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    ranks = config["low_rank"]["ranks"]
    ranks[min(ranks)] += 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"^checkpoint .*saved "):
        load_checkpoint(saved, CPU)


def test_a_checkpoint_lacking_a_layer_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["low_rank"]["ranks"][min(config["low_rank"]["ranks"])]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks weights, first model\.layers\.0\..*; it is damaged"):
        load_checkpoint(saved, CPU)


def test_loading_leaves_no_module_behind(saved: Path) -> None:
    load_checkpoint(saved, CPU)
    assert not any(name.startswith("_rank_search") for name in sys.modules)


def test_other_folders_are_not_compressed_checkpoints(llama_folder: Path, tmp_path: Path) -> None:
    assert not is_compressed(llama_folder)
    assert not is_compressed(tmp_path)
    (tmp_path / "config.json").write_text("[")
    assert not is_compressed(tmp_path)


def test_the_folders_own_code_is_that_of_this_package(saved: Path, llama_folder: Path) -> None:
    code, names = checkpoint._modelling_code(type(_load(llama_folder).model))
    assert (saved / "modeling_low_rank.py").read_text() == code
    assert names["model_type"] == "low_rank_llama"
    with pytest.raises(ValueError, match="argument `trust_remote_code=True`"):
        AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=False)
