"""How good random proposals of the multipliers space are, against the closed form at the same budget.

    python scripts/bench_space.py STUDY.toml [--kept 0.6] [--draws 12] [--reach 1 0.5 0.25] [--blend 0 0.25 0.5]

Losses without a fine-tune, in nats per token, as a difference to the closed form's: multipliers drawn in ± reach with
no blending, then the closed form blended with uniform ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from _bench import evaluator_with, print_table
from _run import run_script

from rank_search.preparing import prepare
from rank_search.spec import load_study_file
from rank_search.study.space import make_space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--kept", type=float, default=0.6)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--reach", nargs="+", type=float, default=[1.0, 0.5, 0.25])
    parser.add_argument("--blend", nargs="+", type=float, default=[0.0, 0.1, 0.25, 0.5, 0.75])
    args = parser.parse_args()
    study = load_study_file(args.study)
    untrained = study.spec.finetune.model_copy(update={"mode": "own", "steps": 0, "tokens": None})
    prepared = prepare(study, nested=False)
    evaluator, allocator = evaluator_with(prepared, untrained), prepared.allocator
    base = evaluator.measure(allocator.closed_form(args.kept)).loss
    names = [name for name in make_space(study.spec.search, allocator).distributions if name.startswith("u.")]
    rows: list[dict[str, object]] = []
    for reach in args.reach:
        search = study.spec.search.model_copy(update={"multiplier_range": reach})
        space, random = make_space(search, allocator), np.random.default_rng(0)
        draws = [dict(zip(names, random.uniform(-reach, reach, len(names)), strict=True)) for _ in range(args.draws)]
        maps = [space.decode({"kept": args.kept, "uniformity": 0.0, **draw}) for draw in draws]
        rises = sorted(evaluator.measure(rank_map).loss - base for rank_map in maps)
        rows.append(_row(f"reach {reach:g}", rises))
    for blend in args.blend:
        rows.append(_row(f"blend {blend:g}", [evaluator.measure(allocator.blend(args.kept, blend)).loss - base]))
    print_table(rows)


def _row(name: str, rises: list[float]) -> dict[str, object]:
    return {"proposals": name, "best": rises[0], "median": float(np.median(rises)), "worst": rises[-1]}


if __name__ == "__main__":
    run_script(main)
