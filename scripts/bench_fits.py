"""How well the fits of multipliers tell, in the course of a search that was made, which trials to come are good.

    python scripts/bench_fits.py STUDY.toml ROWS.jsonl [--depth-buckets 0,10,30] [--json FILE]

ROWS.jsonl is of `bench_search.py`, with trials of `study` and of `nested-ladder` on STUDY.toml. After so many trials of
a study, its multipliers are fitted as the search would. What they say of each of the next trials, by how much its
weighted predicted rise exceeds that of the closed form at its size, is compared with its loss less that of the closed
form there, between the two nearest of the ladder: their correlation, mean and deviation over studies.

The allocator is made here, on as many calibration blocks as STUDY.toml says; a few do for a comparison.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _bench import print_table, write_report
from _lines import whole_lines
from _run import run_script

from rank_search.allocation import Allocator, Floats
from rank_search.preparing import prepare
from rank_search.ranges import bank_cuts
from rank_search.ranks import RankMap
from rank_search.spec import load_study_file
from rank_search.study.fitting import MultiplierFit, nearness
from rank_search.study.sizes import LossCurve
from rank_search.study.space import MultiplierSpace

AFTER = (40, 80, 150, 250)
"""Trials that are known when the multipliers are fitted."""
NEXT = 60
"""Trials whose losses are foretold."""


@dataclass(frozen=True)
class Trials:
    """Of one run, in its order: predicted rises and those of the closed form (n, layers), kept fractions, losses."""

    rises: Floats
    closed: Floats
    kept: Floats
    losses: Floats

    def part(self, which: slice) -> Trials:
        """Some of them."""
        return Trials(self.rises[which], self.closed[which], self.kept[which], self.losses[which])


def main() -> None:
    args = _arguments()
    prepared = prepare(load_study_file(args.study), nested=False)
    runs = _runs(args.rows, prepared.allocator)
    ladder = runs.pop(("nested-ladder", 0))
    order, at = np.argsort(ladder.kept), bank_cuts(prepared.spec, prepared.space)
    rows: list[dict[str, object]] = []
    for buckets in args.depth_buckets:
        search = prepared.spec.search.model_copy(update={"depth_buckets": buckets or None})
        terms = np.array(list(MultiplierSpace(search, prepared.allocator).terms.values()))
        row: dict[str, object] = {"depth_buckets": buckets, "terms": len(terms)}
        for after in AFTER:
            found = []
            for run in runs.values():
                known, coming = run.part(slice(after)), run.part(slice(after, after + NEXT))
                better = coming.losses - np.interp(coming.kept, ladder.kept[order], ladder.losses[order])
                found.append(float(np.corrcoef(_foretold(terms, known, coming, at), better)[0, 1]))
            row[f"after_{after}"] = round(statistics.fmean(found), 3)
            row[f"deviation_{after}"] = round(statistics.stdev(found), 3) if len(found) > 1 else 0.0
        rows.append(row)
    print_table(rows)
    write_report(args.json, prepared.device, prepared.spec.name, rows)


def _foretold(terms: Floats, known: Trials, coming: Trials, cuts: Sequence[float]) -> Floats:
    """(n,), of every trial to come: logarithm of its weighted rise over that of the closed form."""
    weights = nearness(known.rises, known.closed) + 1e-3
    curve = LossCurve(known.kept, known.losses, weights, cuts)
    fit = MultiplierFit(terms, known.rises, known.closed, known.kept, curve.levelled, curve.at(known.kept)[1])
    told = []
    for rises, closed, kept in zip(coming.rises, coming.closed, coming.kept, strict=True):
        worth = np.exp(fit.at(float(kept)) @ terms)
        told.append(np.log((worth @ rises) / (worth @ closed)))
    return np.array(told)


def _runs(path: Path, allocator: Allocator) -> dict[tuple[str, int], Trials]:
    """Those of `study` and of `nested-ladder`, by competitor and seed."""
    names = [shape.name for shape in allocator.space.shapes]
    found: dict[tuple[str, int], list[tuple[RankMap, float]]] = {}
    for record in whole_lines(path):
        if record.get("competitor") in {"study", "nested-ladder"} and record.get("loss") is not None:
            ranked = zip(names, record["ranks"], strict=True)
            rank_map = RankMap({name: rank for name, rank in ranked if rank is not None})
            found.setdefault((record["competitor"], record["seed"]), []).append((rank_map, record["loss"]))
    return {run: _trials(allocator, measured) for run, measured in found.items()}


def _trials(allocator: Allocator, measured: Sequence[tuple[RankMap, float]]) -> Trials:
    kept = [allocator.space.kept_of_targets(rank_map) for rank_map, _ in measured]
    rises = [allocator.rises(rank_map) for rank_map, _ in measured]
    closed = [allocator.rises(allocator.closed_form(fraction)) for fraction in kept]
    return Trials(*(np.array(column) for column in (rises, closed, kept, [loss for _, loss in measured])))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--depth-buckets", type=lambda text: [int(n) for n in text.split(",")], default=[0, 10, 30])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
