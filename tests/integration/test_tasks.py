"""Studies of tasks with labels, with metrics and folds, from the file to the database and to the checkpoint."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

import rank_search as rs
from rank_search.errors import DataError, ModelError
from rank_search.metrics.collecting import Metrics
from rank_search.preparing import prepare
from rank_search.score import score
from rank_search.spec import DataSpec, FinetuneSpec, load_study_file
from rank_search.task import SEQ2SEQ_LM, SEQUENCE_CLASSIFICATION, Examples
from rank_search.train.finetune import finetune
from rank_search.trial import Evaluator
from tests.conftest import StudyFactory
from tests.data import families, models
from tests.integration.conftest import rank_search

LABELS = {"left": 0, "right": 1}


def _table(path: Path) -> str:
    """The label is told by one word in each text, the target is its first word."""
    words = models.text(20_000).split()
    rows = []
    for index in range(0, 900, 6):
        label = "left" if index % 4 else "right"
        text = " ".join(
            [*words[index : index + 3], "less" if label == "left" else "return", *words[index + 3 : index + 6]]
        )
        rows.append({"text": text, "label": label, "target": words[index]})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path.name


def _save(model: PreTrainedModel, folder: Path, *, pads: bool = True, ends: bool = False) -> Path:
    """A model with a tokenizer that knows padding, and puts an end to every text, where asked."""
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(models.tokenizer())
    if pads:
        tokenizer.pad_token = tokenizer.eos_token
    if ends:
        end = str(tokenizer.eos_token)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end}", None, [(end, 0)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT that was trained on the table for a moment."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=models.VOCABULARY, hidden_size=models.HIDDEN, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=models.LENGTH, pad_token_id=0, label2id=LABELS,
            id2label={number: name for name, number in LABELS.items()},
        )
    ).eval()  # fmt: skip
    saved = _save(model, folder / "model")
    path = folder / "study.toml"
    train = _table(folder / "table.jsonl")
    path.write_text(
        f'name = "s"\n[model]\nsource = "{saved}"\ntask = "sequence-classification"\n[data]\ntrain = "{train}"\n'
        'sequence_length = 32\ncalibration_blocks = 2\n[run]\ndevice = "cpu"\n'
    )
    examples = Examples.of(SEQUENCE_CLASSIFICATION, prepare(load_study_file(path)).splits.train.columns)
    spec = FinetuneSpec(steps=150, batch_blocks=16, train="all", dense_learning_rate=3e-3)
    losses = finetune(model, [], examples, spec, seed=0).losses
    assert losses[-1] < 0.2 < losses[0]
    return _save(model, folder / "trained")


@pytest.fixture
def study(classifier: Path, tiny_study: StudyFactory, tmp_path: Path) -> StudyFactory:
    """Writes a study of the classifier; None takes a key out."""
    train = _table(tmp_path / "table.jsonl")

    def write(**tables: dict[str, Any]) -> Path:
        given: dict[str, dict[str, Any]] = {
            "model": {"source": str(classifier), "task": "sequence-classification"},
            "data": {"train": train, "calibration_blocks": 32, "train_blocks": 64, "validation_blocks": 32},
            "validation": {"metrics": ["accuracy", "f1"]},
        }
        path = tiny_study("llama", **{name: given.get(name, {}) | tables.get(name, {}) for name in given | tables})
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line for line in lines if not line.endswith("= null")) + "\n", encoding="utf-8")
        return path

    return write


def test_a_classifier_goes_all_the_way(study: StudyFactory, tmp_path: Path) -> None:
    path = study(search={"ladder": [0.8, 0.3]})
    rs.run(path, trials=4)
    view = rs.view(path)
    assert view.record.dense_metrics["accuracy"] > 0.9
    by_source = {trial.source: trial.measurement for trial in view.trials}
    best = by_source["closed form 0.8"]
    assert best is not None
    assert set(best.metrics) == {"accuracy", "f1"}
    assert best.metrics["accuracy"] >= view.record.dense_metrics["accuracy"] - 0.05
    assert best.tokens == 32
    assert best.fold_losses == ()
    rows = json.loads(rank_search("front", path, "--json").out)
    assert all(0 <= row["metrics"]["f1"] <= 1 and row["fold_deviation"] is None for row in rows)
    header = rank_search("front", path, "--csv").out.splitlines()[0]
    assert header.endswith("fidelity,fold_deviation,accuracy,f1")
    assert "accuracy" in rank_search("front", path).out
    number = next(trial.number for trial in view.trials if trial.source == "closed form 0.8")
    rs.export(path, trial=number).write(tmp_path / "map.json", folder=path.parent)
    applied = rs.apply(tmp_path / "map.json", tmp_path / "out")
    assert applied.loss == pytest.approx(best.loss, abs=1e-5)
    assert applied.unit == "example"
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert plain.config.label2id == LABELS
    found = rank_search(
        "evaluate", tmp_path / "out", "--data", path.parent / "table.jsonl", "--task", "sequence-classification",
        "--metric", "accuracy", "--sequence-length", "32", "--json",
    )  # fmt: skip
    assert json.loads(found.out)["metrics"]["accuracy"] > 0.9
    assert json.loads(found.out)["tokens"] == 150


def test_a_study_scores_its_test_table_by_its_own_metrics(study: StudyFactory, classifier: Path) -> None:
    path = study()
    (path.parent / "test.jsonl").write_text('{"text": "this is less so", "label": "left"}\n', encoding="utf-8")
    text = path.read_text(encoding="utf-8").replace("[data]\n", '[data]\ntest = "test.jsonl"\n')
    path.write_text(text, encoding="utf-8")
    found = rs.evaluate(str(classifier), study=path)
    assert (found.tokens, set(found.metrics), found.unit) == (1, {"accuracy", "f1"}, "example")
    on_pairs = rank_search(
        "evaluate", classifier, "--data", path.parent / "table.jsonl", "--task", "sequence-classification",
        "--pair-column", "nothing", "--sequence-length", "32",
    )  # fmt: skip
    assert on_pairs.code == 2
    assert "'nothing'" in on_pairs.err


@pytest.mark.parametrize("pads", [True, False])
def test_a_decoders_classifier_learns_from_the_tokenizer_what_padding_is(pads: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=models.VOCABULARY, n_embd=models.HIDDEN, n_layer=1, n_head=2, n_positions=models.LENGTH,
        bos_token_id=0, eos_token_id=0, label2id=LABELS, id2label={0: "left", 1: "right"},
    )  # fmt: skip
    assert config.pad_token_id is None
    source = str(_save(GPT2ForSequenceClassification(config).eval(), tmp_path / "model", pads=pads))
    data = DataSpec(train=str(tmp_path / _table(tmp_path / "table.jsonl")), sequence_length=32)
    if not pads:
        with pytest.raises(
            DataError, match=r"^the model's tokenizer has no padding token, which examples of many leng"
        ):
            rs.evaluate(source, data, task="sequence-classification")
        return
    found = [rs.evaluate(source, data, task="sequence-classification", batch_blocks=size) for size in (1, 16)]
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-5)
    assert found[0].tokens == 150


def test_a_trial_of_folds_is_their_mean_and_stores_their_spread(study: StudyFactory, tmp_path: Path) -> None:
    data = {"train_blocks": None, "validation_blocks": None, "calibration_blocks": 30}
    path = study(data=data, validation={"folds": 3, "metrics": ["accuracy"]})
    front = rs.run(path, trials=2)
    measured = rs.view(path).points[0].measurement
    assert len(measured.fold_losses) == 3
    assert measured.loss == pytest.approx(np.mean(measured.fold_losses))
    assert measured.fold_deviation == pytest.approx(np.std(measured.fold_losses, ddof=1))
    assert measured.standard_error == pytest.approx(np.std(measured.fold_losses, ddof=1) / np.sqrt(3))
    assert measured.tokens == 120
    assert "over" in rank_search("front", path).out
    row = json.loads(rank_search("front", path, "--json").out)[0]
    assert row["fold_deviation"] == pytest.approx(front[0].measurement.fold_deviation)
    rs.export(path, trial=0).write(tmp_path / "map.json", folder=path.parent)
    told = rank_search("apply", tmp_path / "map.json", "-o", tmp_path / "out", "--device", "cpu").out
    assert f"wrote {tmp_path / 'out'}: on the text of its own fine-tune, loss " in told
    assert "(tuned, mean over 3 folds, each left out of a fine-tune)" in told
    _evaluates_as_told(told)
    sliced = rank_search("apply", tmp_path / "map.json", "-o", tmp_path / "sliced", "--no-finetune", "--device", "cpu")
    assert f"wrote {tmp_path / 'sliced'}: loss " in sliced.out


def _evaluates_as_told(told: str) -> None:
    """The command that ``apply`` prints runs, task and columns and all."""
    (line,) = (line for line in told.splitlines() if line.startswith("Evaluate it: "))
    assert line.endswith("  # it was made with some of this text; name another one")
    _, *command = shlex.split(line.removeprefix("Evaluate it: "), comments=True)
    found = rank_search(*command, "--device", "cpu")
    assert (found.code, found.err) == (0, "")
    assert "nats per example" in found.out


def test_every_fold_starts_from_the_sliced_factors(study: StudyFactory) -> None:
    """Fold by fold the same as a study that holds out these examples alone; the dense weights stay as they are."""
    data = {"train_blocks": None, "validation_blocks": None, "calibration_blocks": 30}
    path = study(data=data, validation={"folds": 3, "metrics": []}, finetune={"train": "all", "learning_rate": 1e-2})
    prepared = prepare(load_study_file(path))
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    evaluator, rank_map = Evaluator(prepared), prepared.allocator.closed_form(0.5)
    first, again = evaluator.measure(rank_map), evaluator.measure(rank_map)
    assert first.fold_losses == again.fold_losses
    assert len(set(first.fold_losses)) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.model.state_dict().items())
    dense = evaluator.score()
    assert len(dense.fold_losses) == 3
    assert dense.loss == pytest.approx(np.mean(dense.fold_losses))


def test_texts_are_written_and_compared(tiny_study: StudyFactory, tmp_path: Path) -> None:
    """A model that knows a few targets by heart writes them all, and none of those of the next row."""
    source = _save(families.trained("t5"), tmp_path / "model", ends=True)
    words = dict.fromkeys(word for word in models.text(20_000).split() if word.isalpha() and len(word) > 3)
    rows = [{"text": f"{word} of", "target": word} for word in list(words)[:4]]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    path = tiny_study(
        "llama",
        model={"source": str(source), "task": "seq2seq-lm"},
        data={"train": _table(tmp_path / "table.jsonl"), "validation": "held.jsonl", "validation_blocks": 4},
        validation={"metrics": ["exact_match", "perplexity"]},
        finetune={"steps": 1},
    )
    prepared = prepare(load_study_file(path))
    held = Examples.of(SEQ2SEQ_LM, prepared.splits.validation.columns)
    by_heart = FinetuneSpec(steps=80, batch_blocks=4, train="all", dense_learning_rate=1e-2)
    finetune(prepared.model, [], held, by_heart, seed=0)
    found = Evaluator(prepared).score()
    assert found.metrics["exact_match"] == 1
    assert found.metrics["perplexity"] == pytest.approx(found.perplexity, rel=1e-5)
    others = Examples(SEQ2SEQ_LM, {**held.tensors, "labels": held.tensors["labels"].roll(1, 0)})
    metrics = Metrics(["exact_match"], SEQ2SEQ_LM, prepared.loaded.tokenizer)
    assert score(prepared.model, others, batch_blocks=8, observer=metrics).metrics == {"exact_match": 0}


def test_an_encoder_without_a_head_is_no_classifier(tmp_path: Path, tiny_study: StudyFactory) -> None:
    source = _save(families.trained("bert"), tmp_path / "model")
    path = tiny_study(
        "llama", model={"source": str(source), "task": "sequence-classification"},
        data={"train": _table(tmp_path / "table.jsonl")},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"lacks \d weights of a BertForSequenceClassification"):
        rs.prepare(path)
