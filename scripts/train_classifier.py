"""Train a classifier from a pretrained encoder on a table of labelled texts.

    python scripts/train_classifier.py ENCODER TABLE OUT [--steps 150] [--seed 0] ...

ENCODER is a folder or hub id of an encoder (BERT-like), TABLE a CSV, TSV, JSONL or Parquet file with a column of texts
and one of labels; OUT becomes an ordinary folder that AutoModelForSequenceClassification loads, with the labels' names.
The head starts at random, everything is trained.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _run import run_script
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rank_search.cli.progress import TerminalProgress
from rank_search.cli.quiet import quiet_libraries
from rank_search.data.making import maker
from rank_search.data.sources import Source, read_columns
from rank_search.model.device import resolve_device
from rank_search.spec import DataSpec, FinetuneSpec
from rank_search.task import SEQUENCE_CLASSIFICATION, Examples
from rank_search.train.finetune import finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--sequence-length", type=int, default=24)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    table = str(args.table.resolve())
    answers = read_columns(Source(table, Path()), [args.column, args.label_column])[args.label_column]
    label2id = {label: number for number, label in enumerate(sorted({str(answer) for answer in answers}))}
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.encoder, num_labels=len(label2id), label2id=label2id,
        id2label={number: label for label, number in label2id.items()}, dtype=torch.float32,
    ).to(resolve_device(args.device)).eval()  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    data = DataSpec(
        train=table, column=args.column, label_column=args.label_column, sequence_length=args.sequence_length
    )
    recipe = FinetuneSpec(
        steps=args.steps, batch_blocks=args.batch, train="all", learning_rate=args.learning_rate,
        dense_learning_rate=args.learning_rate, weight_decay=0.01,
    )  # fmt: skip
    with TerminalProgress() as progress, tempfile.TemporaryDirectory() as scratch:
        make = maker(SEQUENCE_CLASSIFICATION.name, tokenizer, label2id)
        rows = make.evaluation(data, Path(), Path(scratch), None, progress)
        examples = Examples.of(SEQUENCE_CLASSIFICATION, rows.columns)
        losses = finetune(model, [], examples, recipe, seed=args.seed, progress=progress).losses
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    last = losses[-20:]
    mean = sum(last) / len(last)
    print(f"wrote {args.out}: {len(label2id)} classes, mean loss of the last {len(last)} steps {mean:.4f}")


if __name__ == "__main__":
    run_script(main)
