"""Whether sliced losses of the nested fine-tune order rank maps as own fine-tunes do.

    python scripts/bench_order.py STUDY.toml [--kept 0.5] [--maps 20] [--own-steps 100] [--json FILE]

STUDY.toml is in nested mode. Rank maps of equal size, as the search might propose them, are sliced and scored, then
fine-tuned one by one from the untrained factors and scored again; Spearman's rank correlation of the two losses.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from _bench import evaluator_with, print_table, write_report
from _run import run_script
from rich.progress import track
from scipy.stats import spearmanr

from rank_search.preparing import Prepared, prepare
from rank_search.ranks import RankMap
from rank_search.spec import load_study_file
from rank_search.study.space import make_space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--maps", type=int, default=20)
    parser.add_argument("--own-steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study))
    finetune = prepared.spec.finetune
    if finetune.mode != "nested":
        parser.error(f'{args.study} must say finetune.mode = "nested"')
    sliced = evaluator_with(prepared, finetune.model_copy(update={"steps": 0, "tokens": None}))
    own = evaluator_with(prepared, finetune.model_copy(update={"mode": "own", "steps": args.own_steps, "tokens": None}))
    rows: list[dict[str, float]] = []
    for rank_map in track(_rank_maps(prepared, args.kept, args.maps), "rank maps"):
        losses = sliced.measure(rank_map).loss, own.measure(rank_map).loss
        rows.append(dict(zip(("sliced_loss", "own_loss"), (round(loss, 5) for loss in losses), strict=True)))
        write_report(  # after every row: what was measured outlasts an interrupt
            args.json, prepared.device, prepared.spec.name, rows,
            kept_of_targets=args.kept, own_steps=args.own_steps, spearman=_correlation(rows),
            nested_seconds=round(prepared.times.nested, 3),
        )  # fmt: skip
    print_table(rows)
    print(f"Spearman's rank correlation: {_correlation(rows)}")


def _correlation(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Spearman's, of the two losses; None of fewer than three rank maps."""
    if len(rows) < 3:
        return None
    columns = ([row[name] for row in rows] for name in ("sliced_loss", "own_loss"))
    return round(float(spearmanr(*columns).statistic), 4)


def _rank_maps(prepared: Prepared, kept: float, count: int) -> list[RankMap]:
    space, random = make_space(prepared.spec.search, prepared.allocator), np.random.default_rng(0)
    names = [name for name in space.distributions if name not in {"kept", "uniformity"}]
    reach = prepared.spec.search.multiplier_range
    return [
        space.decode(
            {
                "kept": kept,
                "uniformity": random.random(),
                **dict(zip(names, random.uniform(-reach, reach, len(names)), strict=True)),
            }
        )
        for _ in range(count)
    ]


if __name__ == "__main__":
    run_script(main)
