"""Trials an hour of several workers on one host, against one worker.

    python scripts/bench_scaling.py STUDY.toml [--workers 1,2] [--trials 24] [--json FILE]
    python scripts/bench_scaling.py --merge FILE ... [--json FILE]

The study is launched as `rank-search launch` does it, once for each number of workers, each time over a database of its
own that is removed afterwards; the factor bank is made before. A worker's first trial is left out, for loading and
compiling belong to a start. What counts is the time from the end of that trial to the end of the worker's last one,
with all that passes between trials. With --trials as many as the study file has seeds, all launches measure the same
rank maps. --merge puts launches of several calls into one file, as those on one and on two GPUs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _bench import environment, print_table
from _run import run_script

from rank_search.atomic import write_atomically
from rank_search.launch import exits
from rank_search.launch.launching import launch
from rank_search.launch.supervisor import View
from rank_search.model.device import resolve_device
from rank_search.preparing import prepare
from rank_search.spec import load_study_file
from rank_search.study.records import State, TrialRecord
from rank_search.study.store import StudyStore


class Lines:
    """Says how far a launch is whenever a trial has ended."""

    _finished = -1

    def show(self, view: View) -> None:
        """Called a few times a second."""
        finished = 0 if view.study is None else view.study.finished
        if finished != self._finished:
            self._finished = finished
            print(f"{finished} of {view.wanted} trials", flush=True)


def main() -> None:
    args = _arguments()
    if args.merge:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in args.merge]
        _report(reports[0], [row for report in reports for row in report["rows"]], args.json)
        return
    prepare(load_study_file(args.study))
    rows: list[dict[str, Any]] = []
    told = {"environment": environment(resolve_device("auto")), "study": load_study_file(args.study).spec.name}
    for workers in args.workers:
        rows.append(_row(args.study, workers, args.trials))
        _report(told, rows, args.json)  # after every row: what was measured outlasts an interrupt


def _row(study: Path, workers: int, trials: int) -> dict[str, Any]:
    name = load_study_file(study).spec.name
    with tempfile.TemporaryDirectory() as scratch:
        storage = f"sqlite:///{scratch}/bench.db"
        code = launch(study, Lines(), storage=storage, workers=workers, trials=trials)
        if code != exits.DONE:
            raise SystemExit(f"the launch of {workers} workers ended with exit code {code}")
        with StudyStore(storage) as store:
            measured = [trial for trial in store.trials(name) if trial.state is State.COMPLETE]
    by_worker: defaultdict[str, list[TrialRecord]] = defaultdict(list)
    for trial in measured:
        by_worker[trial.worker].append(trial)
    if len(by_worker) > workers:
        raise SystemExit(
            f"{len(by_worker) - workers} workers were started again, so that rates do not add up; see logs/"
        )
    if len(by_worker) < workers or any(len(own) < 2 for own in by_worker.values()):
        raise SystemExit(f"{trials} trials are too few for {workers} workers; each needs two")
    counted = [trial for own in by_worker.values() for trial in own[1:] if trial.measurement is not None]
    seconds = [trial.measurement.seconds for trial in counted if trial.measurement is not None]
    return {
        "workers": workers,
        "trials": len(measured),
        "trials_an_hour": round(sum(map(_rate, by_worker.values())), 1),
        "measuring_seconds": round(sum(seconds) / len(seconds), 3),
        "other_seconds": round(sum(map(_span, by_worker.values())) / len(counted) - sum(seconds) / len(seconds), 3),
        "rank_maps": len({trial.rank_map.digest for trial in measured}),
    }


def _span(own: Sequence[TrialRecord]) -> float:
    """Seconds from the end of a worker's first trial to that of its last."""
    ends = [trial.finished for trial in own if trial.finished is not None]
    return (max(ends) - min(ends)).total_seconds()


def _rate(own: Sequence[TrialRecord]) -> float:
    """Trials an hour of one worker, all but its first."""
    return 3600 * (len(own) - 1) / _span(own)


def _report(told: Mapping[str, Any], rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    alone = next((row["trials_an_hour"] for row in rows if row["workers"] == 1), None)
    for row in rows:
        row["of_linear"] = None if alone is None else round(row["trials_an_hour"] / (alone * row["workers"]), 4)
    print_table(rows)
    if path is not None:
        report = {"environment": told["environment"], "study": told["study"], "rows": rows}
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.study is None) == (args.merge is None):
        parser.error("give a study file, or files of earlier calls after --merge")
    return args


if __name__ == "__main__":
    run_script(main)
