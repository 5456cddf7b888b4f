"""Where the time of preparing a study goes, and how fast a second start finds the factor bank.

    python scripts/bench_prepare.py STUDY.toml [--json FILE]

Prepares the study twice in a working folder of its own that is removed afterwards.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from _bench import peak_memory, print_table, with_work_dir, write_report
from _run import run_script

from rank_search.preparing import Prepared, prepare
from rank_search.spec import load_study_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        study = with_work_dir(load_study_file(args.study), Path(scratch))
        for start in ("first start", "second start"):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            prepared = prepare(study)
            rows.append(_row(start, prepared, time.perf_counter() - began))
    print_table(rows)
    write_report(args.json, prepared.device, study.spec.name, rows)


def _row(start: str, prepared: Prepared, seconds: float) -> dict[str, object]:
    times = asdict(prepared.times)
    return {
        "start": start,
        **{f"{step}_seconds": round(value, 3) for step, value in times.items()},
        "besides_load_seconds": round(seconds - prepared.times.load, 3),
        "peak_memory_mib": peak_memory(prepared.device) // 2**20,
        "bank_mib": prepared.bank.path.stat().st_size // 2**20,
    }


if __name__ == "__main__":
    run_script(main)
