"""Every family through the whole way: factors, a rank map put in, fine-tuned, taken out, saved and loaded."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import rank_search as rs
from rank_search.compress.checkpoint import load_checkpoint, save_checkpoint
from rank_search.compress.low_rank import LowRankLinear, compressed, place
from rank_search.compress.pivoted import PivotedLinear
from rank_search.errors import ModelError, RankMapError
from rank_search.factors.bank import tails
from rank_search.factors.build import factors_of
from rank_search.factors.decompose import Factors
from rank_search.factors.statistics import LayerStatistics, collect_statistics
from rank_search.model.load import LoadedModel
from rank_search.model.targets import Target, find_targets, rank_space
from rank_search.ranks import RankMap
from rank_search.spec import FactorSpec, FinetuneSpec, TargetSpec
from rank_search.task import CAUSAL_LM, MASKED_LM
from rank_search.train.finetune import finetune
from rank_search.train.nested import nested_finetune
from tests.conftest import StudyFactory
from tests.data import models
from tests.data.families import FAMILIES, MASK, asked, examples, pixels, trained
from tests.integration.conftest import rank_search

CPU = torch.device("cpu")
TWO_FACTOR = TargetSpec(storage="two-factor")
WAYS = {
    "matrix": TWO_FACTOR,
    "split": TWO_FACTOR.model_copy(update={"split_qkv": True}),
    "head": TWO_FACTOR.model_copy(update={"granularity": "head"}),
}
CASES = [
    (family, way)
    for family, of in FAMILIES.items()
    for way in WAYS
    if {"matrix": True, "split": of.fused, "head": of.by_head}[way]
]


@dataclass(frozen=True)
class Made:
    """A trained model of one family with its target layers, their statistics and their factors."""

    model: PreTrainedModel
    targets: tuple[Target, ...]
    statistics: dict[str, LayerStatistics]
    factors: dict[str, Factors]
    spec: TargetSpec

    @property
    def some(self) -> RankMap:
        """Two target layers of three at half of their largest rank."""
        return RankMap(
            {
                t.name: max(1, t.shape.max_rank() // 2)
                for i, t in enumerate(self.targets)
                if i % 3 and t.shape.max_rank()
            }
        )


@cache
def _made(family: str, way: str) -> Made:
    model, spec = trained(family), WAYS[way]
    targets = find_targets(model, spec)
    calibration = examples(family)[:32]
    found = collect_statistics(asked(model), targets, calibration, batch_blocks=8, seed=0)  # type: ignore[arg-type]
    factors = factors_of(targets, lambda name: found[name], FactorSpec(), "pivoted")
    return Made(model, targets, found, factors, spec)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest) -> tuple[str, Made]:
    """Family, and what was made of its model; the model is shared and must be dense again after a test."""
    family, way = request.param
    return family, _made(family, way)


def _output(family: str, model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return FAMILIES[family].task.logits(asked(model), examples(family)[:6].tensors)


def test_the_predicted_rise_is_the_error_that_truncation_makes(case: tuple[str, Made]) -> None:
    _, made = case
    for target in made.targets[:14]:
        statistics, factors = made.statistics[target.name], made.factors[target.name]
        A, G = statistics.A, statistics.G
        assert A is not None
        assert G is not None
        tail = tails({target.name: factors})[target.name]
        for rank in {1, max(1, target.shape.max_rank() // 2)} & set(range(len(factors.inn) + 1)):
            error = target.matrix.double() - factors.out[:rank].double().T @ factors.inn[:rank].double()
            rise = 0.5 * float(torch.trace(error.T @ G @ error @ A))
            # The factors' metric is damped, A and G are not.
            assert rise == pytest.approx(tail[rank], rel=0.05, abs=1e-3 * tail[0]), target.name


def test_full_rank_reproduces_the_dense_model(case: tuple[str, Made]) -> None:
    family, made = case
    dense = _output(family, made.model)
    exact = {}
    for target in made.targets:
        U, S, V = torch.linalg.svd(target.matrix, full_matrices=False)
        exact[target.name] = Factors((U * S).T.contiguous(), V.contiguous(), S.double())
    ranks = RankMap({target.name: min(target.shape.m, target.shape.n) for target in made.targets})
    with compressed(made.targets, exact, ranks):
        torch.testing.assert_close(_output(family, made.model), dense, rtol=1e-3, atol=1e-3)


def test_counted_parameters_are_the_stored_ones(case: tuple[str, Made]) -> None:
    family, made = case
    space = rank_space(made.model, made.targets, made.spec)
    assert space.num_params(RankMap()) == made.model.num_parameters()
    whole = {id(t.module): t.module.weight.numel() for t in made.targets}  # type: ignore[union-attr,operator]
    assert space.dense_params == sum(whole.values()), "parts make up their modules"
    with compressed(made.targets, made.factors, made.some) as layers:
        assert _count(made.model) == space.num_params(made.some)
        expected = _output(family, made.model)
        place(made.targets, {name: PivotedLinear.of(layer) for name, layer in layers.items()})
        assert _count(made.model) == space.with_storage("pivoted").num_params(made.some)
        torch.testing.assert_close(_output(family, made.model), expected, rtol=1e-3, atol=1e-3)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("train", ["factors", "all"])
def test_a_fine_tune_lowers_the_loss_and_leaves_the_dense_weights_alone(train: str, case: tuple[str, Made]) -> None:
    family, made = case
    spec = FinetuneSpec.model_validate({"steps": 12, "batch_blocks": 16, "learning_rate": 3e-3, "train": train})
    kept = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    modules = dict(made.model.named_modules())
    with compressed(made.targets, made.factors, made.some) as layers:
        result = finetune(asked(made.model), list(layers.values()), examples(family)[:16], spec, seed=0)
        assert result.losses[-1] < result.losses[0]
        if train == "all":
            _pivoting_keeps_what_was_trained(family, made, layers)
    assert list(map(id, dict(made.model.named_modules()).values())) == list(map(id, modules.values()))
    if train == "all":
        # A trial puts these back; parts that stayed dense were trained as copies.
        made.model.load_state_dict(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in made.model.state_dict().items())


NESTED = [("t5", "matrix"), ("albert", "head"), ("gpt2", "split"), ("gpt_neox", "head"), ("qwen3", "head")]


@pytest.mark.parametrize(("family", "way"), NESTED)
def test_a_nested_fine_tune_improves_every_slice(family: str, way: str) -> None:
    made = _made(family, way)
    kept = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    whole, given, task = asked(made.model), examples(family)[:16], FAMILIES[family].task
    fewer = RankMap({name: -(-rank // 2) for name, rank in made.some.items()})
    spec = FinetuneSpec(mode="nested", nested_steps=16, batch_blocks=16, learning_rate=3e-3)
    tuned = nested_finetune(
        whole, made.targets, made.factors, lambda index: (made.some, fewer)[index % 2], given, spec, seed=0
    )
    for rank_map in (made.some, fewer):
        losses = []
        for factors in (made.factors, tuned):
            with compressed(made.targets, factors, rank_map), torch.no_grad():
                losses.append(float(task.loss(whole, given.tensors)))
        assert losses[1] < losses[0]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in made.model.state_dict().items())


def _pivoting_keeps_what_was_trained(family: str, made: Made, layers: dict[str, LowRankLinear]) -> None:
    expected = _output(family, made.model)
    place(made.targets, {name: PivotedLinear.of(layer) for name, layer in layers.items()})
    torch.testing.assert_close(_output(family, made.model), expected, rtol=1e-3, atol=1e-3)


FRESH = """
import sys; sys.modules["rank_search"] = None
import json, torch, transformers
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads(1)
results = {}
for folder, auto_class, trusted in json.loads(sys.argv[1]):
    model, info = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=trusted, output_loading_info=True, local_files_only=True, dtype="auto")
    inputs = torch.load(f"{folder}/in.pt")
    with torch.no_grad():
        torch.save(model.eval()(**inputs).logits, f"{folder}/logits.pt")
    results[folder] = {"wrong": sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]),
                       "parameters": sum(p.numel() for p in model.parameters()), "class": type(model).__name__}
print(json.dumps(results))
"""


def _inputs(family: str) -> dict[str, Tensor]:
    tensors = examples(family)[:4].tensors
    if family == "vit":
        return {"pixel_values": pixels(tensors["input_ids"])}
    inputs = {name: tensor for name, tensor in tensors.items() if name != "labels"}
    return inputs | ({"decoder_input_ids": tensors["labels"]} if family == "t5" else {})


@dataclass(frozen=True)
class Saved:
    """What was saved in a folder, and what a fresh process made of it."""

    logits: Tensor
    parameters: int
    loaded_by: str
    trusted: bool


FORMS = ("factored", "half", "dense", "pivoted")


def _save(family: str, way: str, root: Path) -> Iterator[tuple[Path, Saved]]:
    made = _made(family, way)
    loaded = LoadedModel(made.model, None if family == "vit" else models.tokenizer(), family, None, "")
    with compressed(made.targets, made.factors, made.some) as layers:
        for name in FORMS:
            stored = layers if name != "pivoted" else {n: PivotedLinear.of(layer) for n, layer in layers.items()}
            place(made.targets, stored)
            dtype = torch.bfloat16 if name == "half" else torch.float32
            form = "dense" if name == "dense" else "factored"
            save_checkpoint(loaded, made.targets, stored, root / name, form=form, dtype=dtype)
            inputs = _inputs(family)
            with torch.no_grad():
                logits = made.model(**inputs).logits
            torch.save(
                {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, root / name / "in.pt"
            )
            parameters = made.model.num_parameters() if form == "factored" else 0
            yield root / name, Saved(logits, parameters, FAMILIES[family].loaded_by, form == "factored")
    assert all(getattr(parent, name) is t.module for t in made.targets for parent, name in t.places)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, Saved], dict[str, dict[str, object]]]:
    """All cases' compressed models in all forms, loaded in one fresh process: starting it is what takes the time."""
    root = tmp_path_factory.mktemp("families")
    folders = {folder: saved for family, way in CASES for folder, saved in _save(family, way, root / f"{family}-{way}")}
    asked_for = [(str(folder), saved.loaded_by, saved.trusted) for folder, saved in folders.items()]
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, json.dumps(asked_for)], capture_output=True, text=True, cwd=root,
        env={"HF_HOME": str(root), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root, folders, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case_name", ["-".join(case) for case in CASES])
def test_transformers_alone_loads_what_was_saved(
    form: str, case_name: str, saved: tuple[Path, dict[Path, Saved], dict[str, dict[str, object]]]
) -> None:
    root, folders, found = saved
    folder = root / case_name / form
    expected, loaded = folders[folder], found[str(folder)]
    assert loaded["wrong"] == []
    if form == "dense":
        assert loaded["class"] != "LowRankModel"
    else:
        assert loaded["class"] == "LowRankModel"
        assert loaded["parameters"] == expected.parameters
    logits = torch.load(folder / "logits.pt").float()
    if form == "half":
        assert float((logits - expected.logits).norm() / expected.logits.norm()) < 0.03
        return
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    if form != "dense":
        model = load_checkpoint(folder, CPU).model
        with torch.no_grad():
            torch.testing.assert_close(model(**_inputs(case_name.split("-")[0])).logits, logits, rtol=1e-5, atol=1e-5)


def _stand_in(family: str, folder: Path) -> Path:
    """A trained model with a tokenizer that knows padding and masks."""
    trained(family).save_pretrained(folder)
    tokenizer = copy.deepcopy(models.tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(MASK)
    tokenizer.save_pretrained(folder)
    return folder


def _pairs(path: Path) -> str:
    """A table of texts, and their ends as the texts to be written."""
    words = models.text(20_000).split()
    rows = [{"text": " ".join(words[i : i + 8]), "target": " ".join(words[i + 5 : i + 8])} for i in range(0, 600, 8)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path.name


STUDIES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gpt2", {"split_qkv": True, "storage": "pivoted"}, {"train": "all"}),
    ("gpt_neox", {"split_qkv": True, "layers": "query-value"}, {"mode": "nested", "nested_steps": 4, "steps": 0}),
    ("llama", {"granularity": "head", "storage": "pivoted"}, {"mode": "nested", "nested_steps": 4, "steps": 2}),
    ("opt", {"granularity": "head", "layers": "attention"}, {}),
    ("bert", {}, {}),
    ("albert", {"granularity": "head"}, {"train": "all"}),
    ("t5", {"storage": "pivoted"}, {"mode": "nested", "nested_steps": 4, "steps": 2}),
]


@pytest.mark.parametrize(("family", "targets", "finetune_keys"), STUDIES, ids=[family for family, *_ in STUDIES])
def test_a_study_of_a_trained_model_ends_in_the_checkpoint_that_it_measured(
    family: str, targets: dict[str, Any], finetune_keys: dict[str, Any], tiny_study: StudyFactory, tmp_path: Path
) -> None:
    task = FAMILIES[family].task
    model = {"source": str(_stand_in(family, tmp_path / "model")), "task": task.name}
    data = {"train": _pairs(tmp_path / "pairs.jsonl")} if family == "t5" else {}
    path = tiny_study(
        "llama", model=model, data=data, targets=targets, finetune={"learning_rate": 3e-3, **finetune_keys}
    )
    rs.run(path, trials=4)
    file = rs.export(path, trial=3)
    assert file.ranks
    assert file.measurement is not None
    file.write(tmp_path / "map.json", folder=path.parent)
    applied = rs.apply(tmp_path / "map.json", tmp_path / "out")
    assert applied.loss == pytest.approx(file.measurement.loss, abs=1e-5)
    compressed_model = load_checkpoint(tmp_path / "out", CPU, task).model
    assert _count(compressed_model) == file.num_params == applied.num_params
    multiplied_out = rs.apply(tmp_path / "map.json", tmp_path / "dense", form="dense")
    assert multiplied_out.loss == pytest.approx(applied.loss, abs=1e-5)
    plain = getattr(transformers, task.auto_class).from_pretrained(tmp_path / "dense").eval()
    batch = examples(family)[:4].tensors
    with torch.no_grad():
        expected = task.logits(compressed_model, batch)
        torch.testing.assert_close(task.logits(plain, batch), expected, rtol=1e-3, atol=1e-3)


def test_layers_lists_parts_and_tells_of_experts(tmp_path: Path) -> None:
    split = rank_search("layers", _stand_in("gpt2", tmp_path / "gpt2"), "--split-qkv", "--layers", "query-value").out
    assert "transformer.h.1.attn.c_attn.v" in split
    assert "c_attn.k" not in split
    heads = rank_search("layers", tmp_path / "gpt2", "--granularity", "head", "--json").out
    assert "transformer.h.0.attn.c_proj.head.1" in [layer["name"] for layer in json.loads(heads)["layers"]]
    mixtral = rank_search("layers", _stand_in("mixtral", tmp_path / "mixtral"))
    assert "(experts of a mixture, say) are left dense; they hold " in mixtral.out + mixtral.err


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    made = _made("bert", "matrix")
    loaded = LoadedModel(made.model, models.tokenizer(), "bert", None, "")
    with compressed(made.targets, made.factors, made.some) as layers:
        save_checkpoint(loaded, made.targets, layers, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out", CPU).task is MASKED_LM
    with pytest.raises(
        ModelError,
        match=r"out holds a BertForMaskedLM, not a model made for causal .*; set model.task = 'masked-lm'$",
    ):
        load_checkpoint(tmp_path / "out", CPU, CAUSAL_LM)


def test_a_rank_map_of_whole_matrices_does_not_fit_parts(tiny_study: StudyFactory, tmp_path: Path) -> None:
    path = tiny_study("gpt2")
    file = rs.allocate(path, 0.5)
    split = find_targets(trained("gpt2"), WAYS["split"])
    with pytest.raises(RankMapError, match=r"^transformer.h.0.attn.c_attn is in the rank map but not in this model"):
        file.check_fits([target.shape for target in split])
