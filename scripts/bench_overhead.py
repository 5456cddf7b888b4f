"""What a study costs beside its measurements: sampling and storing a trial, reading the front, resuming.

    python scripts/bench_overhead.py [--storage sqlite,postgresql] [--trials 0,500,2000] [--blocks 30,60]
        [--space multipliers] [--sampler tpe] [--json FILE]

For each number of blocks, a study is filled with trials of made-up losses on the shapes of SmolLM2-135M (7 linear
layers in a block), through the same calls as a worker's; no model is loaded. At each number of finished trials the next
20 are timed (the median of their seconds; `processor_ms` is the processor time of this process alone, making up losses
included, which other processes on the machine disturb less), and then `front`, `status` and opening the study again.
PostgreSQL is an embedded server on this host, or the one of RANK_SEARCH_TEST_POSTGRES. Rows of FILE that are not
measured anew stay in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from _bench import environment, print_table
from _made_up import facts_of, made_up_allocator, made_up_measurement
from _postgres import postgres
from _run import run_script

from rank_search import api
from rank_search.allocation import Allocator
from rank_search.spec import StudySpec, parse_study
from rank_search.study.study import Study

TIMED = 20


def main() -> None:
    args = _arguments()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:
        for kind in args.storage:
            with _database(kind, Path(folder)) as url:
                for blocks in args.blocks:
                    rows += _rows(kind, url, blocks, args)
    print_table(rows)
    if args.json is not None:
        others = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
        keys = {_key(row) for row in rows}
        rows = [*(row for row in others if _key(row) not in keys), *rows]
        told = {"environment": environment(torch.device("cpu")), "rows": rows}
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _key(row: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("storage", "space", "sampler", "layers", "trials"))


def _rows(kind: str, url: str, blocks: int, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    allocator = made_up_allocator(blocks)
    search = {"space": args.space, "sampler": args.sampler, "seed": 0}
    spec = parse_study({"name": f"overhead-{blocks}", "model": {"source": "none"}, "search": search}, where="bench")
    facts = facts_of(allocator)
    random = np.random.default_rng(0)
    done, first = 0, time.perf_counter()
    study = Study.open(spec, url, allocator, facts)
    for wanted in args.trials:
        while done < wanted:
            _trial(study, allocator, random)
            done += 1
        processor = time.process_time()
        timed = [_trial(study, allocator, random) for _ in range(TIMED)]
        processor = (time.process_time() - processor) / TIMED
        done += TIMED
        asks, tells = zip(*timed, strict=True)
        study.close()
        front, status = (
            _best(lambda: api.front(spec.name, storage=url)),
            _best(lambda: api.status(spec.name, storage=url)),
        )
        started = time.perf_counter()
        study = Study.open(spec, url, allocator, facts)
        opened = time.perf_counter() - started
        resumed = sum(_trial(study, allocator, random))
        done += 1
        yield {
            "storage": kind, "space": args.space, "sampler": args.sampler, "layers": len(allocator.space.shapes),
            "trials": wanted, "sample_ms": round(1e3 * statistics.median(asks), 1),
            "store_ms": round(1e3 * statistics.median(tells), 1),
            "trial_ms": round(1e3 * statistics.median(map(sum, timed)), 1),
            "processor_ms": round(1e3 * processor, 1),
            "front_s": round(front, 3), "status_s": round(status, 3), "resume_s": round(opened + resumed, 3),
        }  # fmt: skip
        print(f"{kind}, {blocks} blocks: {done} trials after {time.perf_counter() - first:.0f} s", flush=True)
    study.close()


def _trial(study: Study, allocator: Allocator, random: np.random.Generator) -> tuple[float, float]:
    """Seconds of sampling and of storing one trial, beside its measurement."""
    started = time.perf_counter()
    proposal = study.ask()
    asked = time.perf_counter()
    measured = made_up_measurement(allocator, proposal.rank_map, random)
    measured_at = time.perf_counter()
    study.tell(proposal, measured)
    return asked - started, time.perf_counter() - measured_at


def _best(call: Callable[[], object]) -> float:
    """Seconds of the quickest of three calls: a process has imported what it needs after the first."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[str]:
    """URL of an empty database."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/study.db"
        return
    with postgres() as (url, _):
        yield url


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=lambda text: text.split(","), default=["sqlite", "postgresql"])
    parser.add_argument("--trials", type=lambda text: [int(n) for n in text.split(",")], default=[0, 500, 2000])
    parser.add_argument("--blocks", type=lambda text: [int(n) for n in text.split(",")], default=[30])
    parser.add_argument("--space", default=StudySpec.model_fields["search"].default.space)
    parser.add_argument("--sampler", default=StudySpec.model_fields["search"].default.sampler)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
