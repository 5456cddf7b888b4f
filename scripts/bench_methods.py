"""All published methods and the default at several kept fractions, without and with the short fine-tune, over seeds.

    python scripts/bench_methods.py STUDY.toml [--seeds 0,1,2] [--methods asvd,kfac] [--kept 0.9,0.8,0.6,0.4]
        [--rows ROWS.jsonl] [--json FILE] [--plot FILE] [--second-text FILE]
    python scripts/bench_methods.py --merge ROWS.jsonl ... [--json FILE] [--plot FILE]

A seed draws the calibration blocks out of the study's calibration and training blocks (the others train), the labels
sampled from the model, and the order of the training blocks. One pass over a seed's calibration serves all methods.
Published methods are counted in two-factor storage, as they were published; `kfac` is the package's own factorisation.
The dense model stands beside them, as it is and after the same steps over all of its parameters.

Every finished row is appended to ROWS.jsonl at once, and rows found there are not measured again. Several processes,
each with its own seeds or methods and its own file, share the work; --merge brings their files together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import environment, evaluator_with
from _methods import NAMES, VARIANTS, Base, Seeded, Variant
from _rows import RowFile, read_rows, report
from _run import run_script

from rank_search.baselines.methods import Allocations
from rank_search.errors import NonFiniteLossError
from rank_search.factors.decompose import Factors
from rank_search.model.device import synchronize
from rank_search.preparing import Prepared
from rank_search.ranks import RankMap, Storage
from rank_search.score import score
from rank_search.spec import FinetuneSpec, StudySpec, load_study_file


def main() -> None:
    args = _arguments()
    if args.merge:
        report(*read_rows(args.merge), args.json, args.plot)
        return
    study = load_study_file(args.study)
    if study.spec.run.threads is not None:
        torch.set_num_threads(study.spec.run.threads)
    base = Base.of(study, args.second_text)
    kept_fractions = args.kept or study.spec.search.ladder
    for kept in kept_fractions:
        for storage in ("two-factor", "pivoted"):
            base.space.with_storage(storage).budget(kept)
    file = RowFile(args.rows, study.spec.digest[:12], environment(base.device))
    variants = [variant for variant in VARIANTS if variant.method in args.methods]
    for seed in args.seeds:
        seeded = Seeded(base, seed)
        if "dense" in args.methods:
            _measure_dense(base, seeded, seed, file)
        for kind in dict.fromkeys((variant.factors, variant.is_own) for variant in variants):
            _measure_method(
                [v for v in variants if (v.factors, v.is_own) == kind], kept_fractions, base, seeded, seed, file, args
            )
    report(file.rows, [file.environment], args.json, args.plot)


def _measure_dense(base: Base, seeded: Seeded, seed: int, file: RowFile) -> None:
    prepared = seeded.prepared("svd", {}, "two-factor")
    for name, finetune in _finetunes(seeded.spec, dense=True):
        key = ("dense", "none", "dense", 1.0, name, seed)
        if not file.has(key):
            file.add(_row(key, prepared, finetune, RankMap(), base, 0.0))


def _measure_method(
    variants: Iterable[Variant], kept_fractions: Iterable[float], base: Base, seeded: Seeded, seed: int, file: RowFile,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """All rows of one factorisation."""
    finetunes = list(_finetunes(seeded.spec))
    factors: dict[str, Factors] | None = None
    rules: dict[Storage, tuple[Prepared, Allocations]] = {}
    for v in variants:
        wanted = [
            (kept, name, finetune)
            for kept in kept_fractions
            for name, finetune in finetunes
            if not file.has((v.method, v.allocation, v.storage, kept, name, seed))
        ]
        if not wanted:
            continue
        factors = seeded.factors(v.factors, own=v.is_own) if factors is None else factors
        if v.storage not in rules:
            made = seeded.prepared(v.factors, factors, v.storage)
            rules[v.storage] = (
                made,
                Allocations.of(made, evaluations=args.evaluations, search_blocks=args.search_blocks),
            )
        prepared, allocations = rules[v.storage]
        started = time.perf_counter()
        allocations.prepare(v.allocation)
        shared = time.perf_counter() - started
        maps: dict[float, tuple[RankMap, float]] = {}
        for kept, name, finetune in wanted:
            if kept not in maps:
                started = time.perf_counter()
                rank_map = allocations.rank_map(v.allocation, kept)
                maps[kept] = rank_map, shared + time.perf_counter() - started
            key = (v.method, v.allocation, v.storage, kept, name, seed)
            file.add(_row(key, prepared, finetune, maps[kept][0], base, maps[kept][1]))


def _row(
    key: tuple[object, ...], prepared: Prepared, finetune: FinetuneSpec, rank_map: RankMap, base: Base,
    allocation_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    evaluator = evaluator_with(prepared, finetune)
    started = time.perf_counter()
    first = other = None
    try:
        with evaluator.applied(rank_map):
            first = evaluator.score()
            synchronize(base.device)
            seconds = time.perf_counter() - started
            if base.second is not None:
                other = score(prepared.model, base.second, batch_blocks=prepared.spec.run.score_batch_blocks)
    except NonFiniteLossError as error:
        seconds = time.perf_counter() - started
        print(f"{key}: {error}")
    method, allocation, storage, kept, name, seed = key
    row: dict[str, Any] = {
        "study": base.study.spec.digest[:12],
        "method": method,
        "allocation": allocation,
        "storage": storage,
        "kept": kept,
        "finetune": name,
        "seed": seed,
        "val_loss": None if first is None else round(first.loss, 5),
        "standard_error": None if first is None else round(first.standard_error, 5),
        "perplexity": None if first is None else _finite(first.perplexity),
        "second_text_perplexity": None if other is None else _finite(other.perplexity),
        "num_params": prepared.space.num_params(rank_map),
        "seconds": round(seconds, 3),
        "allocation_seconds": round(allocation_seconds, 3),
    }
    print(*(f"{value:.5g}" if isinstance(value, float) else value for value in list(row.values())[1:]), flush=True)
    return row


def _finetunes(spec: StudySpec, *, dense: bool = False) -> Iterator[tuple[str, FinetuneSpec]]:
    """Name and settings: none, and the study's own short fine-tune (of a nested study as many steps)."""
    own = spec.finetune
    untrained = own.model_copy(update={"mode": "own", "steps": 0, "tokens": None})
    yield "none", untrained
    steps = own.steps_for(spec.data.sequence_length) or own.nested_steps
    yield f"{steps} steps", untrained.model_copy(update={"steps": steps, **({"train": "all"} if dense else {})})


def _finite(value: float) -> float | None:
    return round(value, 3) if np.isfinite(value) else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="ROWS")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(NAMES), help=",".join(NAMES))
    parser.add_argument("--kept", type=lambda text: [float(kept) for kept in text.split(",")])
    parser.add_argument("--rows", type=Path, help="JSON lines to append to and to go on from")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--second-text", type=Path)
    parser.add_argument("--evaluations", type=int, default=50, help="of Bolaco's search, at each kept fraction")
    parser.add_argument("--search-blocks", type=int, default=4, help="calibration blocks that ASVD and Bolaco score on")
    args = parser.parse_args()
    if (args.study is None) == (args.merge is None):
        parser.error("give a study file, or files of rows after --merge")
    unknown = set(args.methods) - set(NAMES)
    if unknown:
        parser.error(f"--methods: {unknown.pop()!r} is none of {', '.join(NAMES)}")
    return args


if __name__ == "__main__":
    run_script(main)
