"""Examples of tasks with labels: rows of a table, tokenised, and told apart by their text.

Repeated texts are left out, and rows are shuffled once, in an order that is always the same: tables are often sorted by
label, and calibration, training and validation are cut from them one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from rank_search.data.apart import check_count, named_sources, refuse_shared_rows
from rank_search.data.blocks import FastTokenizer
from rank_search.data.examples import Column, ExampleTable
from rank_search.data.sources import ClassNumber, Role, Source, read_columns
from rank_search.data.splits import Splits, check_names_test, cut_train
from rank_search.errors import DataError
from rank_search.progress import Progress
from rank_search.spec import DataSpec
from rank_search.task import IGNORED

_SHUFFLE_SEED = 0


class Row(NamedTuple):
    """One example as it stands in a table."""

    text: str
    pair: str
    answer: Any

    @property
    def key(self) -> str:
        """What tells it from other examples: its text, white space evened out."""
        return " ".join(self.text.split()) + "\n" + " ".join(self.pair.split())


class Answers(Protocol):
    """What the answers of a task become."""

    def column(self, spec: DataSpec) -> str:
        """Where a table has them."""

    def labels(self, answers: Sequence[Any], spec: DataSpec, label: str) -> Column:
        """One row an answer; ``label`` is the table's name in messages."""


@dataclass(frozen=True)
class ClassLabels:
    """Labels of a classifier: by the names it knows, else by their order."""

    label2id: Mapping[str, int]

    def column(self, spec: DataSpec) -> str:
        """The labels' column."""
        return spec.label_column or "label"

    def labels(self, answers: Sequence[Any], spec: DataSpec, label: str) -> Column:
        """The number of every label.

        Raises:
            DataError: a label that the classifier has no class for.
        """
        numbers = self._numbers(answers, f"column {self.column(spec)!r} of {label}")
        return np.array([[numbers[_label(answer)]] for answer in answers], dtype=np.int32)

    def _numbers(self, answers: Sequence[Any], where: str) -> dict[str, int]:
        found = {_label(answer): answer for answer in answers}
        if found.keys() <= self.label2id.keys():
            return {name: self.label2id[name] for name in found}
        classes = len(self.label2id)
        if all(isinstance(answer, int) for answer in found.values()):
            wrong = [int(answer) for answer in found.values() if not 0 <= answer < classes]
            if wrong:
                raise DataError(
                    f"{where} holds {wrong[0]}, but the model has classes 0 to {classes - 1}; name its own table"
                )
            return {name: int(answer) for name, answer in found.items()}
        if any(name != f"LABEL_{number}" for name, number in self.label2id.items()):
            unknown = min(found.keys() - self.label2id.keys())
            raise DataError(
                f"{where} holds {unknown!r}, which is no class of the model; it knows {_some(sorted(self.label2id))}"
            )
        if len(found) != classes:
            raise DataError(
                f"{where} holds {len(found)} labels, but the model has {classes} classes and no names for them; "
                "give it names (label2id in its config.json), or a table with all labels"
            )
        return {name: number for number, name in enumerate(sorted(found))}


@dataclass(frozen=True)
class TargetTexts:
    """Texts that a decoder writes."""

    tokenizer: FastTokenizer

    def column(self, spec: DataSpec) -> str:
        """The texts' column."""
        return spec.target_column or "target"

    def labels(self, answers: Sequence[Any], spec: DataSpec, label: str) -> Column:
        """Token ids, with the end-of-text token that the tokenizer adds, padded by a label that is ignored.

        Raises:
            DataError: an answer that is no text.
        """
        for answer in answers:
            if not isinstance(answer, str):
                kind = type(answer).__name__
                raise DataError(f"column {self.column(spec)!r} of {label} holds {kind}, not text; name a text column")
        return _encoded(self.tokenizer, list(answers), spec.sequence_length, padding=IGNORED)["input_ids"]


@dataclass(frozen=True)
class LabelledExamples:
    """Makes the examples of a task with labels."""

    tokenizer: Any
    answers: Answers

    def splits(
        self, spec: DataSpec, folder: Path, work_dir: Path, progress: Progress, folds: int | None = None
    ) -> Splits:
        """Examples for calibration, fine-tune and validation; what stands in another role is taken out of training.

        Raises:
            DataError: a table is missing, too short or unfit, or shares most of its texts with another one.
        """
        rows = self._rows_by_role(spec, folder, search=True)
        train, own = rows["train"], rows.get("validation")
        if own is not None:
            held = {row.key for row in own}
            kept = [row for row in train if row.key not in held]
            if len(kept) < len(train):
                progress.say(f"{len(train) - len(kept)} examples of {spec.train} stand in {spec.validation}: left out")
            train = kept
        cut = cut_train(spec, spec.train, len(train), "examples", cut_validation=own is None, folds=folds)
        made = self._table(train, spec, spec.train)
        calibration, train_examples, validation = (made[rows] for rows in cut)
        if own is not None:
            validation = self._first(own, spec, "validation", spec.validation_blocks)
        return Splits(calibration, train_examples, validation, folds)

    def test(self, spec: DataSpec, folder: Path, work_dir: Path, progress: Progress) -> ExampleTable:
        """Examples of ``data.test`` that stand in no other role.

        Raises:
            DataError: the study names no test table, or it is missing, too short or unfit.
        """
        check_names_test(spec)
        rows = self._rows_by_role(spec, folder, search=False)
        seen = {row.key for role in rows if role != "test" for row in rows[role]}
        return self._first([row for row in rows["test"] if row.key not in seen], spec, "test", spec.test_blocks)

    def evaluation(
        self, spec: DataSpec, folder: Path, work_dir: Path, count: int | None, progress: Progress
    ) -> ExampleTable:
        """The first ``count`` examples of ``data.train``, None for all.

        Raises:
            DataError: the table is missing, too short or unfit.
        """
        source = Source.of(spec, "train", folder)
        assert source is not None, "data.train has a default"
        return self._first(self._rows(source, spec), spec, "train", count)

    def _rows_by_role(self, spec: DataSpec, folder: Path, *, search: bool) -> dict[Role, list[Row]]:
        """In a search, a test table on the hub is not fetched only to be compared."""
        sources = named_sources(spec, folder)
        rows = {
            role: self._rows(source, spec) for role, source in sources.items()
            if role != "test" or source.is_here or not search
        }  # fmt: skip
        labels = {role: sources[role].label for role in rows}
        refuse_shared_rows({role: {row.key for row in found} for role, found in rows.items()}, labels)
        return rows

    def _rows(self, source: Source, spec: DataSpec) -> list[Row]:
        """Rows with a text and an answer, each text once, shuffled."""
        columns = [spec.column, self.answers.column(spec), *([spec.pair_column] if spec.pair_column else [])]
        values = read_columns(source, columns)
        pairs = values[spec.pair_column] if spec.pair_column else [""] * len(values[spec.column])
        found: dict[str, Row] = {}
        for text, answer, pair in zip(values[spec.column], values[columns[1]], pairs, strict=True):
            if text is None or answer is None or pair is None:
                continue
            if not isinstance(text, str) or not isinstance(pair, str):
                kind = type(text if not isinstance(text, str) else pair).__name__
                raise DataError(f"a text column of {source.label} holds {kind}, not text; name a text column")
            row = Row(text, pair, answer)
            found.setdefault(row.key, row)
        rows = list(found.values())
        if not rows:
            raise DataError(f"{source.label} has no row with a text and an answer; name a table with examples in it")
        return [rows[index] for index in np.random.default_rng(_SHUFFLE_SEED).permutation(len(rows))]

    def _first(self, rows: Sequence[Row], spec: DataSpec, role: Role, count: int | None) -> ExampleTable:
        label = str(getattr(spec, role))
        check_count(label, len(rows), "examples", {role: count or 1})
        # All of them, so that labels without names are numbered as in the whole table.
        return self._table(rows, spec, label)[:count]

    def _table(self, rows: Sequence[Row], spec: DataSpec, label: str) -> ExampleTable:
        texts: list[Any] = [(row.text, row.pair) if spec.pair_column else row.text for row in rows]
        if self.tokenizer.pad_token_id is None:
            raise DataError("the model's tokenizer has no padding token, which examples of many lengths need; add one")
        inputs = _encoded(self.tokenizer, texts, spec.sequence_length, padding=self.tokenizer.pad_token_id)
        takes_types = "token_type_ids" in self.tokenizer.model_input_names
        if not (spec.pair_column and takes_types):
            del inputs["token_type_ids"]
        return ExampleTable({**inputs, "labels": self.answers.labels([row.answer for row in rows], spec, label)})


def _encoded(tokenizer: FastTokenizer, texts: list[Any], most: int, *, padding: int) -> dict[str, Column]:
    """Token ids with the model's special tokens, at most ``most`` of them, padded at the end to the longest."""
    # A copy, because truncation and padding are state of the backend that other callers may have set.
    backend = tokenizer.backend_tokenizer
    backend = type(backend).from_str(backend.to_str())
    backend.enable_truncation(most)
    backend.no_padding()
    encodings = backend.encode_batch(texts)
    length = max(len(encoding.ids) for encoding in encodings)
    ids = np.full((len(texts), length), padding, dtype=np.int32)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        count = len(encoding.ids)
        ids[row, :count], mask[row, :count], types[row, :count] = encoding.ids, 1, encoding.type_ids
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _label(answer: Any) -> str:
    return answer.name if isinstance(answer, ClassNumber) else str(answer)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
