"""Samplers, seeds and parallel workers, on losses of the quickstart's model that a stand-in gives in a millisecond.

    python scripts/bench_samplers.py [--samplers fitted,tpe,...] [--workers 1,8] [--trials 64] [--seeds 5]
        [--seed-trials closed-form] [--off 1,0] [--sliced] [--diverged 0.5] [--json FILE]

A sampler is one of `[search]`, with a space after a colon if it is not its usual one, and `depth_buckets` after
another, or the bar: `ladder`, as many points of the closed form on a ladder that gets finer and finer. Trials go
through the same calls as a worker's. ``--workers 8`` are eight openings of one study in one SQLite file, whose trials
take various times (log-normal, a third of their mean); whoever is free next asks next. ``--off`` scales what the closed
form is off by: 1 as fitted to the recorded losses, 0 where it is right. ``--sliced``: instead on made-up losses of
SmolLM2's shapes as sliced trials have them, which scatter less and are many; other ones for every seed. ``--diverged``:
the measured losses of one rank map in 32 are above their own by so many nats.

The hypervolume is that of :mod:`bench_search`: of the best points by measured loss within 100 budgets, at their loss
without noise. ``repeated``: rank maps measured twice; ``seeds``: how often each seed ran. Rows of FILE that are not
measured anew stay in it.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from _competitors import budgets
from _run import run_script
from _search_rows import Protocol, hypervolume
from _sliced import SlicedStandIn
from _surrogate import StandIn, Surrogate
from rich.console import Console
from rich.table import Table

from rank_search.measurement import Measurement
from rank_search.ranks import RankMap
from rank_search.spec import StudySpec, parse_study
from rank_search.study.study import Proposal, Study

BUDGETS = 100
REFERENCE_RISE = 1.0
DIVERGING = 32
"""One rank map in so many diverges where that is asked for."""
SPREAD = 0.33
"""Standard deviation of the logarithm of a trial's time."""


def main() -> None:
    args = _arguments()
    rows = []
    for off in args.off:
        recorded = Surrogate.recorded(off=off)
        for sampler in args.samplers:
            for workers in args.workers if sampler != "ladder" else [1]:
                for seed in range(args.seeds if args.sliced or sampler != "ladder" else 1):
                    surrogate = SlicedStandIn(off, seed) if args.sliced else recorded
                    if args.diverged:
                        surrogate = Diverging(surrogate, args.diverged)
                    told = {
                        **({"sliced": True} if args.sliced else {}),
                        **({"diverged": args.diverged} if args.diverged else {}),
                        "off": off, "sampler": sampler, "seed_trials": "+".join(args.seed_trials), "workers": workers,
                        "trials": args.trials, "seed": seed,
                    }  # fmt: skip
                    spec = study_spec(sampler, seed, args.seed_trials, sliced=args.sliced)
                    rows.append({**told, **run(surrogate, spec, sampler, workers, args.trials)})
    _print(rows)
    if args.json is not None:
        others = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
        keys = {_key(row) for row in rows}
        lines = ",\n".join(json.dumps(row) for row in [*(row for row in others if _key(row) not in keys), *rows])
        args.json.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")


class Diverging(StandIn):
    """Another one's, but that the fine-tunes of some rank maps went wrong: their losses are finite, and too high."""

    def __init__(self, other: StandIn, by: float) -> None:
        self.allocator = other.allocator
        self.noise = other.noise
        self._other = other
        self._by = by

    def loss(self, rank_map: RankMap) -> float:
        """As if it had gone well."""
        return self._other.loss(rank_map)

    def measure(self, rank_map: RankMap) -> Measurement:
        """As the trial went."""
        measured = self._other.measure(rank_map)
        went_wrong = int(rank_map.digest[8:16], 16) % DIVERGING == 0
        return replace(measured, loss=measured.loss + self._by) if went_wrong else measured


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(
        row.get(name) for name in ("sliced", "diverged", "off", "sampler", "seed_trials", "workers", "trials", "seed")
    )


def study_spec(sampler: str, seed: int, seed_trials: list[str], *, sliced: bool = False) -> StudySpec:
    """A study by a sampler, over the space that it takes."""
    name, space, buckets, *_ = [*sampler.split(":"), "", ""]
    search = {
        "sampler": name if name != "ladder" else "fitted",
        "space": space or ("direct" if name == "mutation" else "multipliers"),
        "seed": seed, "seeds": seed_trials, "trials": 10**9,
        **({"depth_buckets": int(buckets)} if buckets else {}),
    }  # fmt: skip
    tables = {"name": "stand-in", "model": {"source": "none"}, "search": search}
    if sliced:
        tables |= {"finetune": {"mode": "nested"}, "search": {**search, "min_kept": 0.3, "max_kept": 0.95}}
    return parse_study(tables, where="bench")


def run(surrogate: StandIn, spec: StudySpec, sampler: str, workers: int, trials: int) -> dict[str, object]:
    """Measure so many rank maps; tell what came of it."""
    if sampler == "ladder":
        kept = islice(budgets(spec.search), trials)
        measured = [(surrogate.allocator.closed_form(fraction), "ladder") for fraction in kept]
    else:
        with tempfile.TemporaryDirectory(prefix="rs-") as folder:
            measured = simulated(surrogate, spec, f"sqlite:///{folder}/study.db", workers, trials)
    sources = Counter(source for _, source in measured)
    seeds = [count for source, count in sources.items() if source not in {sampler.partition(":")[0], "random"}]
    return {
        "hypervolume": round(found(surrogate, [rank_map for rank_map, _ in measured]), 5),
        "at_half": round(found(surrogate, [rank_map for rank_map, _ in measured[: trials // 2]]), 5),
        "repeated": trials - len({rank_map for rank_map, _ in measured}),
        "seeds": max(seeds) if sampler != "ladder" else 0,
    }  # fmt: skip


def simulated(
    surrogate: StandIn, spec: StudySpec, storage: str, workers: int, trials: int
) -> list[tuple[RankMap, str]]:
    """Rank maps and their sources, in the order in which workers were done with them."""
    random = np.random.default_rng(spec.search.seed)
    studies = [Study.open(spec, storage, surrogate.allocator, surrogate.facts) for _ in range(workers)]
    measured: list[tuple[RankMap, str]] = []
    busy: list[tuple[float, int, Proposal]] = []
    asked = 0
    for worker in range(min(workers, trials)):
        busy.append((float(random.lognormal(0.0, SPREAD)), worker, studies[worker].ask()))
        asked += 1
    heapq.heapify(busy)
    while busy:
        now, worker, proposal = heapq.heappop(busy)
        studies[worker].tell(proposal, surrogate.measure(proposal.rank_map))
        measured.append((proposal.rank_map, proposal.source))
        if asked < trials:
            heapq.heappush(busy, (now + float(random.lognormal(0.0, SPREAD)), worker, studies[worker].ask()))
            asked += 1
    for study in studies:
        study.close()
    return measured


def found(surrogate: StandIn, rank_maps: list[RankMap]) -> float:
    """Hypervolume, at the losses without noise, of what a study holds for the best within each budget."""
    space = surrogate.allocator.space
    least, most = (space.model_params - space.dense_params * (1 - kept) for kept in (0.3, 0.95))
    protocol = Protocol(
        study="", steps=0, score_blocks=0, confirm_blocks=0, gpu_seconds=0.0, budgets=BUDGETS,
        dense_loss=surrogate.loss(surrogate.allocator.closed_form(0.99)), reference_rise=REFERENCE_RISE,
        dense_params=space.model_params, least_params=int(least), most_params=int(most),
    )  # fmt: skip
    measured = [(space.num_params(rank_map), surrogate.measure(rank_map).loss, rank_map) for rank_map in rank_maps]
    points = []
    for k in range(1, BUDGETS + 1):
        budget = least + k / BUDGETS * (most - least)
        fitting = [one for one in measured if one[0] <= budget + 1]
        if fitting:
            points.append((budget, surrogate.loss(min(fitting, key=lambda one: one[1])[2])))
    return hypervolume(points, protocol)


def _print(rows: list[dict[str, object]]) -> None:
    table = Table(title="hypervolume (mean ± standard deviation over seeds)")
    for column in ("off", "sampler", "workers", "at half the trials", "at the end", "repeated", "seeds ran"):
        table.add_column(column)
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["off"], row["sampler"], row["workers"]), []).append(row)
    for key, mine in groups.items():
        cells = [_cell([float(str(row[name])) for row in mine]) for name in ("at_half", "hypervolume")]
        most = [str(max(int(str(row[name])) for row in mine)) for name in ("repeated", "seeds")]
        table.add_row(*map(str, key), *cells, *most)
    Console(width=120).print(table)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _arguments() -> argparse.Namespace:
    def texts(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", type=texts, default=["ladder", "fitted", "mutation", "tpe", "nsga2", "random"])
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-trials", type=texts, default=["closed-form"])
    parser.add_argument("--off", type=lambda text: [float(n) for n in text.split(",")], default=[1.0])
    parser.add_argument("--sliced", action="store_true")
    parser.add_argument("--diverged", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
