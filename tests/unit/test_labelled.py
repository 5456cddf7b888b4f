"""Labelled examples: what a table becomes, that no text is in two roles, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rank_search.data.examples import ExampleTable
from rank_search.data.making import maker
from rank_search.data.splits import Splits
from rank_search.errors import DataError
from rank_search.progress import SILENT, Progress
from rank_search.spec import DataSpec
from rank_search.task import IGNORED
from tests.data.heard import Heard

WORDS = [f"w{number}" for number in range(60)]
LABELS = {"no": 0, "yes": 1}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; [CLS] and [SEP] stand around a text."""
    vocabulary = {name: index for index, name in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path.name


def _rows(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Sorted by label, as tables often are."""
    rows = [{"text": f"w{n} w{n // 7} w3", "label": "yes" if n % 2 else "no", "target": f"w{n}"} for n in numbers]
    return sorted(rows, key=lambda row: str(row["label"]))


def _splits(
    folder: Path, tokenizer: Any, task: Any = "sequence-classification", *, labels: dict[str, int] = LABELS,
    folds: int | None = None, progress: Progress = SILENT, **data: Any,
) -> Splits:  # fmt: skip
    spec = DataSpec(**{"sequence_length": 8, "calibration_blocks": 4, **data})
    return maker(task, tokenizer, labels).splits(spec, folder, folder, progress, folds)


def _texts(table: ExampleTable) -> set[bytes]:
    return {row.tobytes() for row in np.asarray(table.columns["input_ids"])}


def test_examples_are_padded_ids_with_a_mask_and_the_models_own_labels(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": "w1 w2", "label": "yes"}, {"text": "w3", "label": "no"}, {"text": "w5 w6 w7 w8 w9", "label": "no"}]
    spec = DataSpec(train=_write(tmp_path / "a.jsonl", rows), sequence_length=5)
    table = maker("sequence-classification", tokenizer, {"no": 1, "yes": 0}).evaluation(
        spec, tmp_path, tmp_path, None, SILENT
    )
    rows_of = zip(*table.columns.values(), strict=True)
    found = {tuple(ids): (int(sum(mask)), int(label[0])) for ids, mask, label in rows_of}
    cls, sep, word = 1, 2, 5
    assert list(table.columns) == ["input_ids", "attention_mask", "labels"]
    assert found == {
        (cls, word + 1, word + 2, sep, 0): (4, 0),
        (cls, word + 3, sep, 0, 0): (3, 1),
        (cls, word + 5, word + 6, word + 7, sep): (5, 1),  # cut
    }


def test_a_sorted_table_is_shuffled_always_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    name = _write(tmp_path / "a.jsonl", _rows(range(50)))
    first, again = (_splits(tmp_path, tokenizer, train=name) for _ in range(2))
    assert first.train_digest == again.train_digest
    assert first.validation_digest == again.validation_digest
    for table in (first.calibration, first.train, first.validation):
        assert set(table.columns["labels"].flatten().tolist()) == {0, 1}


def test_no_text_is_in_two_roles(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = _rows(range(40))
    name = _write(tmp_path / "a.jsonl", [*rows, *rows, {"text": " w1   w0 w3 ", "label": "no"}])
    splits = _splits(tmp_path, tokenizer, train=name)
    parts = [splits.calibration, splits.train, splits.validation]
    assert [len(part) for part in parts] == [4, 32, 4]
    assert len(set.union(*map(_texts, parts))) == 40


def test_validation_texts_are_left_out_of_training(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    heard = Heard()
    train = _write(tmp_path / "a.jsonl", _rows(range(40)))
    own = _write(tmp_path / "b.jsonl", _rows(range(37, 47)))
    splits = _splits(tmp_path, tokenizer, train=train, validation=own, progress=heard)
    assert (len(splits.calibration), len(splits.train), len(splits.validation)) == (4, 33, 10)
    assert not _texts(splits.validation) & (_texts(splits.train) | _texts(splits.calibration))
    assert heard.lines == ["3 examples of a.jsonl stand in b.jsonl: left out"]


def test_the_test_examples_are_in_no_other_role(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = {
        "train": _write(tmp_path / "a.jsonl", _rows(range(40))),
        "test": _write(tmp_path / "c.jsonl", _rows(range(36, 52))),
    }
    splits = _splits(tmp_path, tokenizer, **data)
    spec = DataSpec(**data, sequence_length=8, calibration_blocks=4)
    table = maker("sequence-classification", tokenizer, LABELS).test(spec, tmp_path, tmp_path, SILENT)
    assert len(table) == 12
    assert not _texts(table) & set.union(*map(_texts, (splits.calibration, splits.train, splits.validation)))


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm", "masked-lm", "seq2seq-lm"])
def test_folds_hold_out_every_example_once_and_never_share_any(
    task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = _rows(range(50)) if task != "causal-lm" else []
    name = _write(tmp_path / "a.jsonl", rows) if task in {"sequence-classification", "seq2seq-lm"} else "a.txt"
    numbers = np.random.default_rng(0).integers(0, 60, 400)
    (tmp_path / "a.txt").write_text(" ".join(WORDS[number] for number in numbers), encoding="utf-8")
    splits = _splits(tmp_path, tokenizer, task, folds=3, train=name)
    held_out = splits.held_out
    numbers = np.arange(len(splits.train))
    assert sorted(np.concatenate([numbers[rows] for rows in held_out]).tolist()) == numbers.tolist()
    sizes = [len(splits.train[rows]) for rows in held_out]
    assert max(sizes) - min(sizes) <= 1
    assert len(splits.validation) == 0
    folds = [_texts(splits.train[rows]) for rows in held_out]
    assert not folds[0] & folds[1]
    assert not folds[1] & folds[2]
    assert not set.union(*folds) & _texts(splits.calibration)


def test_masks_hide_the_same_share_of_every_block_and_always_the_same_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    numbers = np.random.default_rng(0).integers(0, 60, 2000)
    (tmp_path / "a.txt").write_text(" ".join(WORDS[number] for number in numbers), encoding="utf-8")
    first, again = (_splits(tmp_path, tokenizer, "masked-lm", train="a.txt", sequence_length=22) for _ in range(2))
    assert first.validation_digest == again.validation_digest
    ids, labels = first.train.columns["input_ids"], first.train.columns["labels"]
    hidden = labels != IGNORED
    assert (hidden.sum(1) == 3).all()  # 15 % of the 20 tokens between [CLS] and [SEP]
    assert (ids[hidden] == tokenizer.mask_token_id).all()
    assert not (ids[~hidden] == tokenizer.mask_token_id).any()
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()
    # What is hidden is what stood there.
    restored = np.where(hidden, labels, ids)[:, 1:-1].flatten().tolist()
    assert restored == [int(number) + 5 for number in numbers[80 : 80 + len(restored)]]


def test_targets_are_labels_with_ignored_padding(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"source": "w1 w2 w3", "answer": "w4"}, {"source": "w5", "answer": "w6 w7"}]
    spec = DataSpec(train=_write(tmp_path / "a.jsonl", rows), column="source", target_column="answer")
    table = maker("seq2seq-lm", tokenizer, {}).evaluation(spec, tmp_path, tmp_path, None, SILENT)
    found = sorted(table.columns["labels"].tolist())
    assert found == [[1, 9, 2, IGNORED], [1, 11, 12, 2]]


def test_two_texts_are_judged_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "w1", "other": "w2 w3", "label": "no"}, {"text": "w1", "other": "w4", "label": "yes"}]
    spec = DataSpec(train=_write(tmp_path / "a.jsonl", rows), pair_column="other")
    table = maker("sequence-classification", tokenizer, LABELS).evaluation(spec, tmp_path, tmp_path, None, SILENT)
    assert sorted(table.columns["input_ids"].tolist()) == [[1, 6, 2, 7, 8, 2], [1, 6, 2, 9, 2, 0]]
    assert sorted(table.columns["token_type_ids"].tolist()) == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("labels", "known", "expected"),
    [
        (["b", "a", "b"], {"a": 1, "b": 0}, [0, 1, 0]),
        (["b", "a", "b"], {"LABEL_0": 0, "LABEL_1": 1}, [1, 0, 1]),
        ([1, 0, 1], {"LABEL_0": 0, "LABEL_1": 1}, [1, 0, 1]),
        ([1, 0, 1], {"a": 0, "b": 1}, [1, 0, 1]),
    ],
)
def test_labels_are_numbered_as_the_model_does_else_in_order(
    labels: list[Any], known: dict[str, int], expected: list[int], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": f"w{number}", "label": label} for number, label in enumerate(labels)]
    spec = DataSpec(train=_write(tmp_path / "a.jsonl", rows))
    table = maker("sequence-classification", tokenizer, known).evaluation(spec, tmp_path, tmp_path, None, SILENT)
    words, found = table.columns["input_ids"][:, 1] - 5, table.columns["labels"][:, 0]
    assert dict(zip(words.tolist(), found.tolist(), strict=True)) == dict(enumerate(expected))


@pytest.mark.parametrize(
    ("rows", "known", "message"),
    [
        ([{"text": "w1", "label": "maybe"}], LABELS, "of a.jsonl holds 'maybe', which is no class of the model; it"),
        ([{"text": "w1", "label": 7}], {"LABEL_0": 0, "LABEL_1": 1}, "holds 7, but the model has classes 0 to 1; name"),
        ([{"text": "w1", "label": "a"}], {"LABEL_0": 0, "LABEL_1": 1}, "holds 1 labels, but the model has 2 classes"),
        ([{"text": "w1"}], LABELS, "text a.jsonl has no column 'label'; its columns are text"),
        ([{"text": 5, "label": "no"}], LABELS, "a text column of a.jsonl holds int, not text; name a text column"),
        ([{"text": None, "label": "no"}], LABELS, "a.jsonl has no row with a text and an answer; name a table"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_the_classifier_is_refused(
    rows: list[dict[str, Any]], known: dict[str, int], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = DataSpec(train=_write(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError) as caught:
        maker("sequence-classification", tokenizer, known).evaluation(spec, tmp_path, tmp_path, None, SILENT)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tables_that_cannot_serve_are_refused_in_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = _write(tmp_path / "a.jsonl", _rows(range(40)))
    same = _write(tmp_path / "b.jsonl", _rows(range(30, 44)))
    (tmp_path / "a.txt").write_text("w1 w2 w3", encoding="utf-8")
    cases = [
        ({"train": "python-docs"}, "python-docs has no columns; name a table"),
        ({"train": "a.txt"}, r"a.txt has no columns; name a table \(.jsonl, "),
        ({"train": train, "validation": same}, "71% of the rows of b.jsonl stand in a.jsonl; name another text"),
        (
            {"train": train, "train_blocks": 40},
            r"has 40 examples, but 48 are needed \(4 calibration \+ 40 train",
        ),
    ]
    for data, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            _splits(tmp_path, tokenizer, **data)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="has 40 examples, but 44 are needed"):
        _splits(tmp_path, tokenizer, train=train, folds=40)


def test_tokenizers_without_what_a_task_needs_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match="no mask token"):
        maker("masked-lm", bare, {})
    with pytest.raises(DataError, match="no padding token"):
        _splits(tmp_path, bare, train=_write(tmp_path / "a.jsonl", _rows(range(40))))
    with pytest.raises(DataError, match=r"data.sequence_length 2 leaves no room beside special tokens"):
        _splits(tmp_path, tokenizer, "masked-lm", sequence_length=2)


def test_names_of_classes_of_a_dataset_go_before_their_numbers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    rows = {"text": ["w1", "w2", "w3"], "label": [0, 1, -1]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    spec = DataSpec(train="./set")
    for known, expected in ((LABELS, {6: 1, 7: 0}), ({"LABEL_0": 0, "LABEL_1": 1}, {6: 0, 7: 1})):
        table = maker("sequence-classification", tokenizer, known).evaluation(spec, tmp_path, tmp_path, None, SILENT)
        words, found = table.columns["input_ids"][:, 1], table.columns["labels"][:, 0]
        assert dict(zip(words.tolist(), found.tolist(), strict=True)) == expected
