"""What the benchmarks share: the machine they ran on, peak memory, tables."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
import torch
import transformers
from rich.console import Console
from rich.table import Table

from rank_search.data.sources import Source
from rank_search.data.splits import eval_blocks
from rank_search.factors.bank import TrialBanks
from rank_search.model.load import LoadedModel
from rank_search.preparing import Prepared
from rank_search.spec import FinetuneSpec, StudyFile
from rank_search.task import Examples
from rank_search.trial import Evaluator, Look


def environment(device: torch.device) -> dict[str, object]:
    """Hardware and versions that a figure belongs to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "optuna": optuna.__version__,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: on the accelerator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def with_work_dir(study: StudyFile, folder: Path) -> StudyFile:
    """The same study with another working folder."""
    run = study.spec.run.model_copy(update={"work_dir": str(folder)})
    return StudyFile(spec=study.spec.model_copy(update={"run": run}), folder=study.folder)


def evaluator_with(prepared: Prepared, finetune: FinetuneSpec, look: Look | None = None) -> Evaluator:
    """An evaluator of the same study under another fine-tune, on the bank that its mode asks for."""
    study = StudyFile(spec=prepared.spec.model_copy(update={"finetune": finetune}), folder=prepared.study.folder)
    banks = prepared.trial_banks if finetune.mode == "nested" else TrialBanks.single(prepared.bank)
    return Evaluator(dataclasses.replace(prepared, study=study, trial_banks=banks), look)


def text_examples(text: Path, loaded: LoadedModel, sequence_length: int, work_dir: Path) -> Examples:
    """All blocks of one text file."""
    source = Source(str(text.resolve()), Path())
    blocks = eval_blocks(source, loaded.tokenizer, sequence_length, work_dir=work_dir)
    return Examples.causal(torch.tensor(blocks))


def write_report(
    path: Path | None, device: torch.device, study: str, rows: Sequence[Mapping[str, object]], **told: object
) -> None:
    """The figures as JSON: environment, study, what else is ``told``, rows. Nothing without a ``path``."""
    if path is not None:
        report = {"environment": environment(device), "study": study, **told, "rows": rows}
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of equal keys as a table."""
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(table)
