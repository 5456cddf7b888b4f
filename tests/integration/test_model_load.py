"""Loading pretrained models from folders and GGUF files, and refusing what is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    IBertConfig,
    IBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from rank_search.errors import ModelError
from rank_search.model.load import LoadedModel, load_model, locate, make_ready, weights_digest
from rank_search.model.targets import find_targets
from rank_search.spec import ModelSpec, TargetSpec
from rank_search.task import CAUSAL_LM
from tests.data import families, models

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20) * 7 % models.VOCABULARY


def _load(source: Path | str, folder: Path = Path()) -> LoadedModel:
    return load_model(ModelSpec(source=str(source)), folder, CPU)


@pytest.fixture
def llama_folder(model_folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(model_folders("llama"), tmp_path / "llama"))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_folder_is_loaded_in_single_precision_and_frozen(family: str, model_folders: Callable[[str], Path]) -> None:
    loaded, made = _load(model_folders(family)), models.make(family)
    assert type(loaded.model) is type(made)
    assert torch.equal(loaded.model(input_ids=IDS).logits, made(input_ids=IDS).logits)
    assert loaded.revision is None
    assert loaded.max_length == models.LENGTH
    assert not loaded.model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("rank maps")["input_ids"]) == "rank maps"


def test_a_relative_path_starts_from_the_study_files_folder(llama_folder: Path) -> None:
    assert _load("llama", llama_folder.parent).source == "llama"


def test_the_digest_is_that_of_the_weights_whatever_file_they_are_in(llama_folder: Path, tmp_path: Path) -> None:
    whole = _load(llama_folder)
    sharded, pickled = tmp_path / "sharded", tmp_path / "pickled"
    whole.model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole.tokenizer.save_pretrained(sharded)
    shutil.copytree(llama_folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(whole.model.state_dict(), pickled / "pytorch_model.bin")
    assert _load(sharded).weights_digest == _load(pickled).weights_digest == whole.weights_digest


def test_the_digest_changes_with_any_weight(llama_folder: Path) -> None:
    model = _load(llama_folder).model
    before = weights_digest(model.state_dict().items())
    with torch.no_grad():
        model.model.norm.weight[-1] = torch.nextafter(model.model.norm.weight[-1], torch.tensor(9.0))
    assert weights_digest(model.state_dict().items()) != before


def test_the_digest_sees_names_shapes_and_types() -> None:
    zeros = torch.zeros(2, 3)
    digests = {
        weights_digest([("a", zeros)]), weights_digest([("b", zeros)]), weights_digest([("a", zeros.T.contiguous())]),
        weights_digest([("a", zeros.double())]), weights_digest([("a", torch.zeros(6))]),
        weights_digest([("a", torch.zeros(()))]), weights_digest([]),
    }  # fmt: skip
    assert len(digests) == 7
    assert weights_digest([("a", zeros), ("b", zeros + 1)]) == weights_digest([("b", zeros + 1), ("a", zeros)])
    assert weights_digest([("a", zeros.T)]) == weights_digest([("a", zeros.T.contiguous())])


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "~/nowhere-at-all", "nowhere.gguf", "a b", "a/b/c"])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such folder or file .*; give a model folder, a .gguf file or a hub id"):
        locate(ModelSpec(source=source), tmp_path)


def test_hub_ids_keep_their_revision(tmp_path: Path) -> None:
    where = locate(ModelSpec(source="someone/model-1.5", revision="abc"), tmp_path)
    assert (where.name, where.arguments, where.is_local) == ("someone/model-1.5", {"revision": "abc"}, False)


def test_a_file_that_is_not_gguf_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file but not GGUF"):
        _load(llama_folder / "model.safetensors")


def _assert_refused(source: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        _load(source)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    _assert_refused(tmp_path, "cannot be loaded: ")


def test_a_folder_without_weights_is_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    _assert_refused(llama_folder, "cannot be loaded: .*model.safetensors")


def test_a_folder_without_a_tokenizer_is_refused(llama_folder: Path) -> None:
    for path in llama_folder.glob("tokenizer*"):
        path.unlink()
    _assert_refused(llama_folder, "cannot be loaded: ")


def test_truncated_weights_are_refused(llama_folder: Path) -> None:
    data = (llama_folder / "model.safetensors").read_bytes()
    (llama_folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    _assert_refused(llama_folder, "cannot be loaded: ")


def test_a_pickle_that_would_run_code_is_refused_and_not_run(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Trap(tmp_path / "sprung")}, llama_folder / "pytorch_model.bin")
    _assert_refused(llama_folder, "cannot be loaded: ")
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self._path,)  # type: ignore[return-value]


def test_missing_weights_are_refused_not_made_up(llama_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(llama_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama_folder / "model.safetensors", metadata={"format": "pt"})
    _assert_refused(llama_folder, "lacks 1 weights of a LlamaForCausalLM, first model.layers.1.mlp.up_proj.weight")


def test_weights_of_another_shape_are_refused(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    config["intermediate_size"] = 40
    (llama_folder / "config.json").write_text(json.dumps(config))
    _assert_refused(llama_folder, "cannot be loaded: |lacks ")


def test_a_model_that_is_no_causal_language_model_is_refused(llama_folder: Path) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (llama_folder / "config.json").write_text(json.dumps(config))
    _assert_refused(llama_folder, "cannot be loaded: .*T5")


def test_an_encoder_is_no_causal_language_model_though_it_loads_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    families.bert().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    assert load_model(ModelSpec(source=str(folder), task="masked-lm"), Path(), CPU).max_length == models.LENGTH
    _assert_refused(
        folder,
        r"^model '.*bert': as it is configured, BertLMHeadModel sees the tokens that it should predict; "
        r"set model.task = 'masked-lm', or take a checkpoint made for causal language modelling$",
    )


def test_a_vocabulary_of_a_few_letters_is_enough_to_look_for_a_leak() -> None:
    tiny = {"vocab_size": 4, "n_positions": 3, "n_embd": 8, "n_layer": 1, "n_head": 2}
    make_ready(GPT2LMHeadModel(GPT2Config(**tiny)).eval(), None, CAUSAL_LM, "model")
    leaky = BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=3, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(ModelError, match="sees the tokens that it should predict"):
        make_ready(BertLMHeadModel(leaky).eval(), None, CAUSAL_LM, "model")


@pytest.mark.parametrize(
    ("config_of", "model_of"), [(RobertaConfig, RobertaForMaskedLM), (IBertConfig, IBertForMaskedLM)]
)
def test_the_first_positions_of_a_roberta_are_those_of_padding(
    tmp_path: Path, config_of: Callable[..., Any], model_of: Callable[..., Any]
) -> None:
    config = config_of(
        vocab_size=models.VOCABULARY, hidden_size=models.HIDDEN, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=models.LENGTH + 2, pad_token_id=1,
    )  # fmt: skip
    model_of(config).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(source=str(tmp_path), task="masked-lm"), Path(), CPU)
    assert loaded.max_length == models.LENGTH
    ids = torch.arange(models.LENGTH + 1)[None] + 5
    assert loaded.model(input_ids=ids[:, :-1]).logits.shape[1] == loaded.max_length
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        loaded.model(input_ids=ids)


def test_remote_code_is_not_run_unless_allowed(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (llama_folder / "config.json").write_text(json.dumps(config))
    (llama_folder / "mine.py").write_text("raise SystemExit('remote code was run')")
    _assert_refused(llama_folder, "needs code of its own; set model.trust_remote_code = true if you trust it$")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file."""
    import gguf

    model, tokenizer = models.make("llama"), models.tokenizer()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(models.LENGTH)
    writer.add_embedding_length(models.HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(models.VOCABULARY)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # GGUF keeps the two halves of a rotated head interleaved
            data = data.reshape(heads, 2, -1, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_same_model(gguf_file: Path, model_folders: Callable[[str], Path]) -> None:
    loaded = _load(gguf_file)
    expected = AutoModelForCausalLM.from_pretrained(model_folders("llama"))
    torch.testing.assert_close(loaded.model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert len(find_targets(loaded.model, TargetSpec())) == 14
    assert loaded.tokenizer.decode(loaded.tokenizer("rank maps", add_special_tokens=False)["input_ids"]) == "rank maps"


def test_a_damaged_gguf_file_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(gguf_file.read_bytes()[:5000])
    _assert_refused(tmp_path / "half.gguf", "cannot be loaded: ")
