"""How fast the short fine-tune's steps are: as they come, recorded and replayed, and compiled as well.

    python scripts/bench_finetune.py STUDY.toml [--steps 60] [--kept 0.8 0.6] [--nested] [--json FILE]

Every row trains the closed form's factors twice: a few steps, and ``--steps`` more. The time of a step is that of the
difference, so that the recording, which happens once a trial, stands in a column of its own, and so does the first
compilation of the process. `until_step` tells what the few are made of: seconds from the start until the first step is
done, until the second, and so on. All ways end at about the same training loss. ``--nested``: of the nested fine-tune
of the range that holds each kept fraction, whose losses are those of other ranks at every step and not told.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _bench import peak_memory, print_table, write_report
from _run import run_script

from rank_search.compress.low_rank import compressed
from rank_search.factors.bank import TrialBanks
from rank_search.factors.decompose import Factors
from rank_search.model.device import synchronize
from rank_search.preparing import Prepared, prepare
from rank_search.progress import Progress, Step
from rank_search.ranges import ranges_of
from rank_search.spec import FinetuneSpec, load_study_file
from rank_search.task import Examples
from rank_search.train.capture import EAGER_STEPS
from rank_search.train.finetune import finetune
from rank_search.train.nested import nested_finetune, sampled_rank_maps

FEW = EAGER_STEPS + 2


@dataclass
class Stamps(Progress):
    """Notes when each of the first steps was done, which the device is waited for."""

    device: torch.device
    few: int = FEW
    started: float = field(default_factory=time.perf_counter)
    seconds: list[float] = field(default_factory=list)
    last_loss: float | None = None

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        if amount and len(self.seconds) < self.few:
            synchronize(self.device)
            self.seconds.append(round(time.perf_counter() - self.started, 3))

    def say(self, message: str) -> None:
        """Nothing: what is said here is in the columns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kept", nargs="+", type=float)
    parser.add_argument("--nested", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study), nested=False)
    rows = []
    for kept in args.kept or prepared.spec.search.ladder:
        on_gpu = prepared.device.type == "cuda"
        for compiled, capture in ((False, False), (False, True), (True, True)) if on_gpu else ((False, False),):
            if args.nested and compiled != capture:
                continue  # on a GPU its steps are always recorded
            rows.append(_row(prepared, kept, args.steps, nested=args.nested, compiled=compiled, capture=capture))
            write_report(args.json, prepared.device, prepared.spec.name, rows)
    print_table(rows)


def _row(
    prepared: Prepared, kept: float, steps: int, *, nested: bool, compiled: bool, capture: bool
) -> dict[str, object]:
    if prepared.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    how = {"nested": nested, "compiled": compiled, "capture": capture}
    first, _ = _train(prepared, kept, FEW, **how)
    few, stamps = _train(prepared, kept, FEW, **how)
    many, whole = _train(prepared, kept, FEW + steps, **how)
    spec = prepared.spec
    tokens = spec.finetune.batch_blocks * spec.data.sequence_length
    return {
        "kept_of_targets": kept,
        "storage": spec.targets.storage,
        "nested": nested,
        "recorded": capture or (nested and prepared.device.type == "cuda"),
        "compiled": compiled,
        "tokens_in_a_step": tokens,
        "step_milliseconds": round(1000 * (many - few) / steps, 2),
        "tokens_per_second": round(tokens * steps / (many - few)),
        "first_steps_seconds": round(few, 3),
        "first_steps_of_the_process_seconds": round(first, 3),
        "until_step": stamps.seconds,
        "last_loss": whole.last_loss,
        "peak_memory_mib": peak_memory(prepared.device) // 2**20,
    }


def _train(
    prepared: Prepared, kept: float, steps: int, *, nested: bool, compiled: bool, capture: bool
) -> tuple[float, Stamps]:
    told: dict[str, object] = {"mode": "nested", "nested_steps": steps} if nested else {"mode": "own", "steps": steps}
    spec = prepared.spec.finetune.model_copy(update={**told, "tokens": None, "compiled": compiled})
    examples = Examples.of(prepared.loaded.task, prepared.splits.train.columns).to(prepared.device)
    factors = prepared.bank.on(prepared.device)
    synchronize(prepared.device)
    stamps = Stamps(prepared.device)
    if nested:
        _train_nested(prepared, kept, spec, factors, examples, stamps)
    else:
        with compressed(prepared.targets, factors, prepared.allocator.closed_form(kept)) as layers:
            result = finetune(
                prepared.model, list(layers.values()), examples, spec.at(kept, prepared.space.storage),
                seed=prepared.spec.search.seed, targets=prepared.targets, capture=capture, progress=stamps,
            )  # fmt: skip
        stamps.last_loss = result.losses[-1]
    synchronize(prepared.device)
    return time.perf_counter() - stamps.started, stamps


def _train_nested(
    prepared: Prepared, kept: float, spec: FinetuneSpec, factors: Mapping[str, Factors], examples: Examples,
    stamps: Stamps,
) -> None:  # fmt: skip
    """In the range that holds ``kept``."""
    search, ranges = prepared.spec.search, ranges_of(prepared.spec, prepared.space)
    drawn = ranges[TrialBanks.place([high for _, high in ranges], kept)]
    nested_finetune(
        prepared.model, prepared.targets, factors,
        sampled_rank_maps(prepared.allocator, search, drawn), examples, spec.at(sum(drawn) / 2, prepared.space.storage),
        seed=search.seed, progress=stamps,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
