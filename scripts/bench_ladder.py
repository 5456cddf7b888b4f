"""The closed form at every kept fraction of a study's ladder, before and after the short fine-tune.

    python scripts/bench_ladder.py STUDY.toml [--second-text FILE] [--json FILE]

Perplexity on the study's validation text and on a second text that nothing was tuned on. The dense model stands
beside it, as it is and after the same number of steps over all of its parameters: what it gains is adaptation to the
text, not repair of what truncation broke.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from _bench import evaluator_with, print_table, text_examples, write_report
from _run import run_script

from rank_search.preparing import Prepared, prepare
from rank_search.ranks import RankMap
from rank_search.score import score
from rank_search.spec import FinetuneSpec, load_study_file
from rank_search.task import Examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--second-text", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study))
    second = None if args.second_text is None else _blocks(prepared, args.second_text)
    rows = [_row(*variant, prepared, second) for variant in _variants(prepared)]
    print_table(rows)
    times = {step: round(seconds, 3) for step, seconds in asdict(prepared.times).items()}
    write_report(args.json, prepared.device, prepared.spec.name, rows, prepare_seconds=times)


def _variants(prepared: Prepared) -> Iterator[tuple[str, str, float, RankMap, FinetuneSpec]]:
    """Allocation, what was trained, kept fraction, rank map, fine-tune; ``none`` slices the untrained factors."""
    finetune = prepared.spec.finetune
    own = finetune.steps_for(prepared.spec.data.sequence_length)
    untrained = finetune.model_copy(update={"mode": "own", "steps": 0, "tokens": None})
    steps = own or finetune.nested_steps
    adapted = untrained.model_copy(update={"steps": steps, "train": "all"})
    yield "dense", "none", 1.0, RankMap(), untrained
    yield "dense", f"all, {steps} steps", 1.0, RankMap(), adapted
    for kept in prepared.spec.search.ladder:
        rank_map = prepared.allocator.closed_form(kept)
        yield "closed form", "none", kept, rank_map, untrained
        if finetune.mode == "nested":
            sliced = finetune.model_copy(update={"steps": 0, "tokens": None})
            trained = f"nested, {finetune.nested_ranges} × {finetune.nested_steps} steps"
            yield "closed form", trained, kept, rank_map, sliced
        if own:
            after = "nested, then " if finetune.mode == "nested" else ""
            yield "closed form", f"{after}{finetune.train}, {own} steps", kept, rank_map, finetune


def _blocks(prepared: Prepared, text: Path) -> Examples:
    return text_examples(text, prepared.loaded, prepared.spec.data.sequence_length, prepared.study.work_dir)


def _row(
    allocation: str,
    trained: str,
    kept: float,
    rank_map: RankMap,
    finetune: FinetuneSpec,
    prepared: Prepared,
    second: Examples | None,
) -> dict[str, object]:
    evaluator = evaluator_with(prepared, finetune)
    with evaluator.applied(rank_map):
        first = evaluator.score()
        other = (
            None if second is None else score(prepared.model, second, batch_blocks=prepared.spec.run.score_batch_blocks)
        )
    return {
        "allocation": allocation,
        "kept_of_targets": kept,
        "trained": trained,
        "num_params": prepared.space.num_params(rank_map),
        "val_loss": round(first.loss, 5),
        "standard_error": round(first.standard_error, 5),
        "perplexity": round(first.perplexity, 3),
        "second_text_perplexity": None if other is None else round(other.perplexity, 3),
        **{name: round(value, 5) for name, value in first.metrics.items()},
    }


if __name__ == "__main__":
    run_script(main)
