"""How well the fits of multipliers tell, in the course of a search that was made, which trials to come are good.

    python scripts/bench_fits.py STUDY.toml ROWS.jsonl [--depth-buckets 0,10,30] [--json FILE]

ROWS.jsonl is of `bench_search.py`, with trials of `study` and of `nested-ladder` on STUDY.toml. After so many trials of
a study, its multipliers are fitted as the search would. What they say of each of the next trials is by how much its
predicted rise exceeds that of the closed form at its size, if layers count as fitted. That is compared with its loss
less that of the closed form there: their correlation, mean and deviation over studies. The closed form is that of the
ladder's rank maps, between the two nearest of it. A second table says by how much trials are worse than it from the
bottom of their nested range to the top.

Predicted rises are made here, on as many calibration blocks as STUDY.toml says; a few do for a comparison.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _bench import print_table, write_report
from _lines import whole_lines
from _run import run_script
from _search_rows import Run, rank_map_of

from rank_search.allocation import Allocator, Floats
from rank_search.errors import InputError
from rank_search.preparing import Prepared, prepare
from rank_search.ranges import bank_cuts, places, ranges_of
from rank_search.ranks import RankMap
from rank_search.spec import load_study_file
from rank_search.study.bounded import thinned
from rank_search.study.evidence import BEST, NEWEST, OLDEST
from rank_search.study.fitted import Measured
from rank_search.study.fitting import moved
from rank_search.study.space import MultiplierSpace

AFTER = (40, 80, 150, 250)
"""Trials that are known when the multipliers are fitted, as far as the shortest run goes."""
NEXT = 60
"""Trials whose losses are foretold."""
SETTLED = 60
"""Trials that are left out where a range's bottom is compared with its top."""
PLACES = 5
"""Of equal quotient, from a range's bottom to its top."""
LADDER: Run = ("nested-ladder", 0)
"""Whose rank maps are the closed form."""


@dataclass(frozen=True)
class Trials:
    """Of one run, in its order: predicted rises and those of the closed form (n, layers), kept fractions, losses."""

    rises: Floats
    closed: Floats
    kept: Floats
    losses: Floats

    def part(self, which: slice | list[int]) -> Trials:
        """Some of them."""
        return Trials(self.rises[which], self.closed[which], self.kept[which], self.losses[which])


def main() -> None:
    args = _arguments()
    prepared = prepare(load_study_file(args.study), nested=False)
    runs = _runs(args.rows, prepared.allocator)
    ladder = runs.pop(LADDER)
    rows = []
    for buckets in args.depth_buckets:
        search = prepared.spec.search.model_copy(update={"depth_buckets": buckets or None})
        terms = np.array(list(MultiplierSpace(search, prepared.allocator).terms.values()))
        told = _correlations(terms, list(runs.values()), ladder, prepared)
        rows.append({"depth_buckets": buckets, "terms": len(terms), **told})
    by_place = _by_place(runs.values(), ladder, ranges_of(prepared.spec, prepared.space))
    print_table(rows)
    print_table(by_place)
    write_report(args.json, prepared.device, prepared.spec.name, rows, places=by_place)


def _correlations(terms: Floats, runs: Sequence[Trials], ladder: Trials, study: Prepared) -> dict[str, float]:
    """Of what fits foretell with what came."""
    shortest = min(len(run.losses) for run in runs)
    row: dict[str, float] = {}
    for after in AFTER:
        if after + NEXT > shortest:
            break
        found = []
        for run in runs:
            known, coming = run.part(_seen(run, after)), run.part(slice(after, after + NEXT))
            told = _foretold(terms, known, coming, study)
            found.append(float(np.corrcoef(told, _worse(coming, ladder))[0, 1]))
        row[f"after_{after}"] = round(statistics.fmean(found), 3)
        row[f"deviation_{after}"] = round(statistics.stdev(found), 3) if len(found) > 1 else 0.0
    return row


def _seen(run: Trials, after: int) -> list[int]:
    """The trials of the first so many that a search goes by then: the oldest, the newest, and of the front."""
    front: list[int] = []
    for one in np.lexsort((run.losses[:after], run.kept[:after])).tolist():
        if not front or run.losses[one] < run.losses[front[-1]]:
            front.append(one)
    newest = range(max(0, after - NEWEST), after)
    return sorted({*thinned(front, BEST), *newest, *range(min(after, OLDEST))})


def _worse(trials: Trials, ladder: Trials) -> Floats:
    """(n,), losses less those of the closed form at the same sizes."""
    order = np.argsort(ladder.kept)
    worse: Floats = trials.losses - np.interp(trials.kept, ladder.kept[order], ladder.losses[order])
    return worse


def _by_place(runs: Iterable[Trials], ladder: Trials, ranges: Sequence[tuple[float, float]]) -> list[dict[str, object]]:
    """How much worse than the closed form trials are from the bottom to the top of their ranges: mean, in nats."""
    late = [run.part(slice(SETTLED, None)) for run in runs]
    kept, worse = np.concatenate([run.kept for run in late]), np.concatenate([_worse(run, ladder) for run in late])
    number, share = places(np.array([ranges[0][0], *(high for _, high in ranges)]), kept)
    part = np.minimum(np.floor(PLACES * share), PLACES - 1)
    rows: list[dict[str, object]] = []
    for at, (low, high) in enumerate(ranges):
        row: dict[str, object] = {"range": f"{low:.3f} to {high:.3f}"}
        for place in range(PLACES):
            here = worse[(number == at) & (part == place)]
            row[f"place_{place + 1}"] = round(float(here.mean()), 4) if len(here) else None
        rows.append(row)
    return rows


def _foretold(terms: Floats, known: Trials, coming: Trials, study: Prepared) -> Floats:
    """(n,), of every trial to come: by how much its predicted rise exceeds the closed form's, as a share of that, if
    each layer's counts as the fit says."""
    search = study.spec.search
    measured = Measured.of(known.rises, known.closed, known.kept, known.losses, bank_cuts(study.spec, study.space))
    fit = measured.fit(terms, search.min_kept, search.max_kept)
    differences = moved(coming.rises, coming.closed)
    return np.array([fit.factors(float(kept)) @ one for kept, one in zip(coming.kept, differences, strict=True)])


def _runs(path: Path, allocator: Allocator) -> dict[Run, Trials]:
    """Those of `study`, by competitor and seed, and of `nested-ladder`, whose rank maps are the closed form."""
    found: dict[Run, list[tuple[RankMap, float]]] = {}
    for record in whole_lines(path):
        run = record.get("competitor"), record.get("seed")
        if (run[0] == "study" or run == LADDER) and record.get("loss") is not None:
            found.setdefault(run, []).append((rank_map_of(record, allocator.space), record["loss"]))
    if LADDER not in found or len(found) < 2:
        raise InputError(f"{path} lacks trials of study or of nested-ladder, seed 0; give a file that holds both")
    kept, rises = (np.array(column) for column in _sizes_and_rises(allocator, found[LADDER]))
    order = np.argsort(kept)
    return {run: _trials(allocator, measured, kept[order], rises[order]) for run, measured in found.items()}


def _sizes_and_rises(
    allocator: Allocator, measured: Sequence[tuple[RankMap, float]]
) -> tuple[list[float], list[Floats]]:
    return (
        [allocator.space.kept_of_targets(rank_map) for rank_map, _ in measured],
        [allocator.rises(rank_map) for rank_map, _ in measured],
    )


def _trials(allocator: Allocator, measured: Sequence[tuple[RankMap, float]], sizes: Floats, closed: Floats) -> Trials:
    """Beside the closed form at ascending sizes (s,), whose rises are (s, layers)."""
    kept, rises = (np.array(column) for column in _sizes_and_rises(allocator, measured))
    beside = np.column_stack([np.interp(kept, sizes, layer) for layer in closed.T])
    return Trials(rises, beside, kept, np.array([loss for _, loss in measured]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--depth-buckets", type=lambda text: [int(n) for n in text.split(",")], default=[0, 10, 30])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
