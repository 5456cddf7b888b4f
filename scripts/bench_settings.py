"""What one setting of a study does to the closed form's perplexity.

    python scripts/bench_settings.py STUDY.toml factors.damping 1e-6 1e-4 1e-2 [--kept 0.8 0.4] [--json FILE]
    python scripts/bench_settings.py STUDY.toml finetune.learning_rate 2e-4 4e-4 8e-4

Settings of [factors] are compared without a fine-tune, those of [finetune] after it. Banks are made in a working folder
of their own that is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _bench import print_table, with_work_dir, write_report
from _run import run_script

from rank_search.preparing import prepare
from rank_search.spec import StudyFile, load_study_file, parse_study
from rank_search.trial import Evaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("setting", help="such as finetune.learning_rate")
    parser.add_argument("values", nargs="+", type=json.loads)
    parser.add_argument("--kept", nargs="+", type=float)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = with_work_dir(load_study_file(args.study), Path(scratch))
        for value in args.values:
            prepared = prepare(_changed(base, args.setting, value))
            evaluator = Evaluator(prepared)
            for kept in args.kept or prepared.spec.search.ladder:
                measured = evaluator.measure(prepared.allocator.closed_form(kept))
                rows.append(
                    {
                        args.setting: value,
                        "kept_of_targets": kept,
                        "fidelity": measured.fidelity.label,
                        "val_loss": round(measured.loss, 5),
                        "perplexity": round(measured.perplexity, 3),
                        "finetune_seconds": round(measured.finetune_seconds, 2),
                    }
                )
    print_table(rows)
    write_report(args.json, prepared.device, prepared.spec.name, rows)


def _changed(study: StudyFile, setting: str, value: object) -> StudyFile:
    table, _, key = setting.partition(".")
    tables = study.spec.model_dump(mode="json")
    tables[table][key] = value
    if table == "factors":
        tables["finetune"] |= {"mode": "own", "steps": 0, "tokens": None}
    return StudyFile(spec=parse_study(tables, where=str(setting)), folder=study.folder)


if __name__ == "__main__":
    run_script(main)
