"""Measure every proposal of a study on all its rungs, pruning nothing, and write losses and seconds of each rung: what
the rule that decides who climbs can be judged by.

python scripts/record_fidelities.py STUDY.toml --trials 200 --out FILE.json [--storage URL]

The study file must name `search.fidelities`. Trials are kept in the database, so a run that is cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from _run import run_script

from rank_search.api import facts_of, storage_url
from rank_search.atomic import write_atomically
from rank_search.preparing import prepare
from rank_search.spec import load_study_file
from rank_search.study.records import State
from rank_search.study.store import StudyStore
from rank_search.study.study import Study
from rank_search.trial import Evaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--storage")
    args = parser.parse_args()
    file = load_study_file(args.study)
    if file.spec.search.fidelities is None:
        sys.exit(f"{args.study}: name search.fidelities")
    url = storage_url(args.storage, file)
    prepared = prepare(file)
    evaluator = Evaluator(prepared)
    study = Study.open(file.spec, url, prepared.allocator, facts_of(prepared))
    while study.finished() < args.trials:
        # Not prunable, so it climbs all the way.
        proposal = replace(study.ask(), prunable=False)
        for rung, measurement in enumerate(
            evaluator.climb(proposal.rank_map, len(proposal.known)), len(proposal.known)
        ):
            if rung == len(evaluator.rungs) - 1:
                study.tell(proposal, measurement, rung)
            else:
                study.report(proposal, rung, measurement)
    study.close()
    write_atomically(args.out, recorded(url, file.spec.name, prepared.space.model_params).encode())
    print(f"wrote {args.out}")


def recorded(url: str, name: str, dense_params: int) -> str:
    """One line a trial: its source, size, and (loss, seconds) on every rung."""
    rows = []
    with StudyStore(url) as store:
        for trial in store.trials(name):
            if trial.state is State.COMPLETE and trial.measurement is not None:
                rungs = store.measurements(name, trial.number)
                rows.append(
                    {
                        "source": trial.source,
                        "num_params": trial.measurement.num_params,
                        "kept_of_targets": round(trial.measurement.kept_of_targets, 6),
                        "rungs": [[round(m.loss, 5), round(m.seconds, 4)] for m in rungs],
                    }
                )
        rungs = [f"{m.fidelity.label}, {m.tokens} tokens" for m in store.measurements(name, 0)]
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"study": name, "dense_params": dense_params, "rungs": rungs})[1:-1]
    return f'{{{head}, "trials": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    run_script(main)
