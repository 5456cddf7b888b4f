"""How fast the short fine-tune's steps are: as they come, recorded and replayed, and compiled as well.

    python scripts/bench_finetune.py STUDY.toml [--steps 60] [--kept 0.8 0.6] [--json FILE]

Every row trains the closed form's factors twice: a few steps, and ``--steps`` more. The time of a step is that of the
difference, so that the recording, which happens once a trial, stands in a column of its own, and so does the first
compilation of the process. All ways end at about the same training loss.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from _bench import peak_memory, print_table, write_report
from _run import run_script

from rank_search.compress.low_rank import compressed
from rank_search.model.device import synchronize
from rank_search.preparing import Prepared, prepare
from rank_search.spec import load_study_file
from rank_search.task import Examples
from rank_search.train.capture import EAGER_STEPS
from rank_search.train.finetune import FinetuneResult, finetune

FEW = EAGER_STEPS + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kept", nargs="+", type=float)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study), nested=False)
    rows = []
    for kept in args.kept or prepared.spec.search.ladder:
        on_gpu = prepared.device.type == "cuda"
        for compiled, capture in ((False, False), (False, True), (True, True)) if on_gpu else ((False, False),):
            rows.append(_row(prepared, kept, args.steps, compiled=compiled, capture=capture))
            write_report(args.json, prepared.device, prepared.spec.name, rows)
    print_table(rows)


def _row(prepared: Prepared, kept: float, steps: int, *, compiled: bool, capture: bool) -> dict[str, object]:
    if prepared.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, _ = _train(prepared, kept, FEW, compiled=compiled, capture=capture)
    few, _ = _train(prepared, kept, FEW, compiled=compiled, capture=capture)
    many, result = _train(prepared, kept, FEW + steps, compiled=compiled, capture=capture)
    spec = prepared.spec
    tokens = spec.finetune.batch_blocks * spec.data.sequence_length
    return {
        "kept_of_targets": kept,
        "storage": spec.targets.storage,
        "recorded": capture,
        "compiled": compiled,
        "tokens_in_a_step": tokens,
        "step_milliseconds": round(1000 * (many - few) / steps, 2),
        "tokens_per_second": round(tokens * steps / (many - few)),
        "first_steps_seconds": round(few, 3),
        "first_steps_of_the_process_seconds": round(first, 3),
        "last_loss": result.losses[-1],
        "peak_memory_mib": peak_memory(prepared.device) // 2**20,
    }


def _train(
    prepared: Prepared, kept: float, steps: int, *, compiled: bool, capture: bool
) -> tuple[float, FinetuneResult]:
    update = {"mode": "own", "steps": steps, "tokens": None, "compiled": compiled}
    spec = prepared.spec.finetune.model_copy(update=update)
    spec = spec.at(kept, prepared.space.storage)
    examples = Examples.of(prepared.loaded.task, prepared.splits.train.columns).to(prepared.device)
    factors = prepared.bank.on(prepared.device)
    with compressed(prepared.targets, factors, prepared.allocator.closed_form(kept)) as layers:
        synchronize(prepared.device)
        started = time.perf_counter()
        result = finetune(
            prepared.model, list(layers.values()), examples, spec,
            seed=prepared.spec.search.seed, targets=prepared.targets, capture=capture,
        )  # fmt: skip
        synchronize(prepared.device)
        return time.perf_counter() - started, result


if __name__ == "__main__":
    run_script(main)
