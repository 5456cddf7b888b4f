"""Where the time of a trial goes: proposing, swapping, fine-tuning, scoring, storing.

    python scripts/bench_trial.py STUDY.toml [--trials 6] [--json FILE]

Runs the study's first trials (its ladder comes first) in a database of its own that is removed afterwards.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from _bench import environment, peak_memory, print_table, write_report
from _run import run_script

from rank_search.api import facts_of
from rank_search.preparing import prepare
from rank_search.spec import load_study_file
from rank_search.study.study import Study
from rank_search.trial import Evaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study))
    evaluator = Evaluator(prepared)
    with tempfile.TemporaryDirectory() as scratch:
        study = Study.open(prepared.spec, f"sqlite:///{scratch}/bench.db", prepared.allocator, facts_of(prepared))
        rows = [_trial(study, evaluator) for _ in range(args.trials)]
        study.close()
    peak = peak_memory(prepared.device) // 2**20
    print_table(rows)
    print(f"peak memory {peak} MiB on {environment(prepared.device)['device']}")
    write_report(args.json, prepared.device, prepared.spec.name, rows, peak_memory_mib=peak)


def _trial(study: Study, evaluator: Evaluator) -> dict[str, object]:
    started = time.perf_counter()
    proposal = study.ask()
    asked = time.perf_counter()
    measurement = evaluator.measure(proposal.rank_map)
    measured = time.perf_counter()
    study.tell(proposal, measurement)
    ended = time.perf_counter()
    useful = measurement.finetune_seconds + measurement.score_seconds
    return {
        "source": proposal.source,
        "kept_of_targets": round(measurement.kept_of_targets, 4),
        "loss": round(measurement.loss, 4),
        "ask_seconds": round(asked - started, 4),
        "swap_seconds": round(measurement.swap_seconds, 4),
        "finetune_seconds": round(measurement.finetune_seconds, 3),
        "score_seconds": round(measurement.score_seconds, 3),
        "store_seconds": round(ended - measured, 4),
        "outside_percent": round(100 * (1 - useful / (ended - started)), 2),
    }


if __name__ == "__main__":
    run_script(main)
