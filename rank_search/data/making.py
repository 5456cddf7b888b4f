"""How the examples of every task are made, and of which only :data:`MAKERS` knows the names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rank_search.data.blocks import Blocks
from rank_search.data.examples import Column, ExampleTable
from rank_search.data.labelled import ClassLabels, LabelledExamples, TargetTexts
from rank_search.data.sources import Source
from rank_search.data.splits import Splits, eval_blocks, make_splits, make_test_blocks
from rank_search.errors import DataError
from rank_search.progress import Progress
from rank_search.spec import DataSpec, TaskName
from rank_search.task import IGNORED

MASKED_SHARE = 0.15
"""Of a block's tokens, those that a masked language model has to find (Devlin et al., "BERT", 2019)."""


class ExampleMaker(Protocol):
    """Makes the examples of one task."""

    def splits(
        self, spec: DataSpec, folder: Path, work_dir: Path, progress: Progress, folds: int | None = None
    ) -> Splits:
        """Examples for calibration, fine-tune and validation, none of them in two of these."""

    def test(self, spec: DataSpec, folder: Path, work_dir: Path, progress: Progress) -> ExampleTable:
        """Examples of ``data.test``, none of them in another role."""

    def evaluation(
        self, spec: DataSpec, folder: Path, work_dir: Path, count: int | None, progress: Progress
    ) -> ExampleTable:
        """The first ``count`` examples of ``data.train``, None for all."""


def maker(task: TaskName, tokenizer: Any, label2id: Mapping[str, int]) -> ExampleMaker:
    """What makes the examples of a task for a model with this tokenizer, and these classes if it is a classifier.

    Raises:
        DataError: the tokenizer lacks what the task needs.
    """
    return MAKERS[task](tokenizer, label2id)


@dataclass(frozen=True)
class BlockExamples:
    """Token blocks; with ``mask``, some of their tokens are hidden and to be found."""

    tokenizer: Any
    mask: Masking | None = None

    def splits(
        self, spec: DataSpec, folder: Path, work_dir: Path, progress: Progress, folds: int | None = None
    ) -> Splits:
        """See :func:`make_splits`."""
        made = make_splits(self._cut(spec), self.tokenizer, folder, work_dir, progress, folds)
        calibration, train, validation = (
            self._finished(part.columns["input_ids"], seed)
            for seed, part in enumerate((made.calibration, made.train, made.validation))
        )
        return Splits(calibration, train, validation, folds)

    def test(self, spec: DataSpec, folder: Path, work_dir: Path, progress: Progress) -> ExampleTable:
        """See :func:`make_test_blocks`."""
        return self._finished(make_test_blocks(self._cut(spec), self.tokenizer, folder, work_dir, progress))

    def evaluation(
        self, spec: DataSpec, folder: Path, work_dir: Path, count: int | None, progress: Progress
    ) -> ExampleTable:
        """See :func:`eval_blocks`."""
        source = Source.of(spec, "train", folder)
        assert source is not None, "data.train has a default"
        length = self._cut(spec).sequence_length
        blocks = eval_blocks(source, self.tokenizer, length, work_dir=work_dir, blocks=count, progress=progress)
        return self._finished(blocks)

    def _cut(self, spec: DataSpec) -> DataSpec:
        """With room for special tokens."""
        if self.mask is None:
            return spec
        length = spec.sequence_length - len(self.mask.before) - len(self.mask.after)
        if length < 1:
            raise DataError(
                f"data.sequence_length {spec.sequence_length} leaves no room beside special tokens; raise it"
            )
        return spec.model_copy(update={"sequence_length": length})

    def _finished(self, blocks: Blocks, seed: int = 3) -> ExampleTable:
        return ExampleTable({"input_ids": blocks} if self.mask is None else self.mask.hidden(blocks, seed))


@dataclass(frozen=True)
class Masking:
    """Blocks of a masked language model: special tokens around them, and some tokens hidden, always the same ones."""

    token: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Masking:
        """With the mask and the special tokens of a tokenizer.

        Raises:
            DataError: it has no mask.
        """
        if tokenizer.mask_token_id is None:
            raise DataError("the model's tokenizer has no mask token, which model.task = 'masked-lm' needs")
        encoding = tokenizer.backend_tokenizer.encode("a")
        inner = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        first, last = (inner[0], inner[-1] + 1) if inner else (0, 0)
        return cls(tokenizer.mask_token_id, tuple(encoding.ids[:first]), tuple(encoding.ids[last:]))

    def hidden(self, blocks: Blocks, seed: int) -> dict[str, Column]:
        """Input ids and labels; as many tokens are hidden in every block, which ones depends on ``seed`` alone."""
        count, length = blocks.shape
        hidden = max(1, round(MASKED_SHARE * length))
        chosen = np.random.default_rng(seed).random((count, length)).argsort(1)[:, :hidden]
        ids = np.array(blocks)
        labels = np.full_like(ids, IGNORED)
        np.put_along_axis(labels, chosen, np.take_along_axis(ids, chosen, 1), 1)
        np.put_along_axis(ids, chosen, np.int32(self.token), 1)
        nothing = [IGNORED] * len(self.before), [IGNORED] * len(self.after)
        return {"input_ids": _around(ids, self.before, self.after), "labels": _around(labels, *nothing)}


def _around(rows: Column, before: Sequence[int], after: Sequence[int]) -> Column:
    left, right = (np.tile(np.array(end, dtype=np.int32), (len(rows), 1)) for end in (before, after))
    return np.concatenate([left, rows, right], axis=1)


MAKERS: Mapping[TaskName, Callable[[Any, Mapping[str, int]], ExampleMaker]] = {
    "causal-lm": lambda tokenizer, _: BlockExamples(tokenizer),
    "masked-lm": lambda tokenizer, _: BlockExamples(tokenizer, Masking.of(tokenizer)),
    "sequence-classification": lambda tokenizer, label2id: LabelledExamples(tokenizer, ClassLabels(label2id)),
    "seq2seq-lm": lambda tokenizer, _: LabelledExamples(tokenizer, TargetTexts(tokenizer)),
}
