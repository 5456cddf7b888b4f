"""Ways to compress and to fine-tune that the package does not have, against its own at the same fine-tune tokens.

    python scripts/bench_tries.py STUDY.toml [--only NAME ...] [--padding TOKENIZER TABLE] [--json FILE]

Validation perplexity; docs/experiments.md says what came of it. Every way has the tokens of ``--steps`` steps in all,
unless its row names another number.

    at once       the package's own: closed form, then all steps
    sequential    statistics of every block of layers on what the compressed blocks before it give, beside those of the
                  dense model alone
    stages        half of the steps at a kept fraction half way, multiplied out, statistics anew, allocated and
                  truncated again, the other half; refreshed: the same with the first half at the final fraction
    adapted       all (or half) of the steps over all parameters of the dense model, then statistics and compression,
                  the other half over all parameters; beside it, at once over all parameters
    stopped       three times the steps on 32 blocks of text: at their end, and where held-out loss was least
    distilled     divergence from the dense model's predictions, alone or by half
    batches       larger batches, at the same rate or a larger one
    padding       share of padding in a table of texts (TSV, first column), at the lengths of studies/snips-minilm
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from _bench import print_table, write_report
from _run import run_script
from _tries import Bench, Distilling
from torch import Tensor
from transformers import AutoTokenizer

from rank_search.compress.low_rank import LowRankLinear, compressed
from rank_search.factors.build import factors_of
from rank_search.factors.decompose import Factors
from rank_search.factors.statistics import collect_statistics
from rank_search.model.gradients import put_back, requiring_grad
from rank_search.model.targets import Target
from rank_search.preparing import prepare
from rank_search.ranks import RankMap
from rank_search.spec import FinetuneSpec, load_study_file
from rank_search.task import Examples, Task
from rank_search.train.finetune import factor_groups, finetune, train_steps

Row = dict[str, object]
FEW_BLOCKS, HELD_OUT_BLOCKS = 32, 32
LOOKS = 8
"""At held-out loss, evenly over the steps."""


def at_once(bench: Bench, kept: float, seed: int) -> Iterator[Row]:
    rank_map = bench.closed_form(bench.bank, kept)
    if seed == 0:
        yield {"way": "no fine-tune", "perplexity": bench.after(bench.bank, rank_map, bench.spec(kept, steps=0), 0)}
    yield {"way": "all steps", "perplexity": bench.after(bench.bank, rank_map, bench.spec(kept), seed)}


def sequential(bench: Bench, kept: float, seed: int) -> Iterator[Row]:
    plain = _plain_factors(bench, bench.targets, seed)
    rank_map = bench.closed_form(plain, kept)
    for way, factors in (("dense", plain), ("sequential", _sequential_factors(bench, rank_map, seed))):
        for steps in (0, bench.steps):
            found = bench.after(factors, rank_map, bench.spec(kept, steps=steps), seed)
            yield {"way": f"{way}, {steps} steps", "perplexity": found}


def _plain_factors(bench: Bench, targets: Sequence[Target], seed: int) -> dict[str, Factors]:
    statistics = collect_statistics(bench.model, targets, bench.calibration, batch_blocks=bench.batch, seed=seed)
    return factors_of(targets, statistics.__getitem__, bench.prepared.spec.factors, bench.prepared.space.storage)


def _sequential_factors(bench: Bench, rank_map: RankMap, seed: int) -> dict[str, Factors]:
    made: dict[str, Factors] = {}
    with put_back(bench.model):
        for _, block in itertools.groupby(bench.targets, lambda target: _block(target.name)):
            targets = list(block)
            made |= _plain_factors(bench, targets, seed)
            for target in targets:
                if target.name in rank_map:
                    rank, layer = rank_map[target.name], made[target.name]
                    target.write(layer.out[:rank].T @ layer.inn[:rank])
    return made


def _block(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


def stages(bench: Bench, kept: float, seed: int) -> Iterator[Row]:
    yield {"way": "half way first", "perplexity": _in_stages(bench, (1 + kept) / 2, kept, seed)}


def refreshed(bench: Bench, kept: float, seed: int) -> Iterator[Row]:
    yield {"way": "final fraction first", "perplexity": _in_stages(bench, kept, kept, seed)}


def _in_stages(bench: Bench, first: float, kept: float, seed: int) -> float:
    with put_back(bench.model):
        _tuned_in_place(bench, first, seed)
        factors = bench.built()
        spec = bench.spec(kept, steps=bench.steps // 2)
        return bench.after(factors, bench.closed_form(factors, kept), spec, seed + 100)


def _tuned_in_place(bench: Bench, kept: float, seed: int) -> None:
    """Compressed, fine-tuned for half of the steps, and multiplied out into the dense layers."""
    with compressed(bench.targets, bench.bank, bench.closed_form(bench.bank, kept)) as layers:
        spec = bench.spec(kept, steps=bench.steps // 2)
        finetune(bench.model, list(layers.values()), bench.train, spec, seed=seed)
    for target in bench.targets:
        if target.name in layers:
            target.write(layers[target.name].dense())


def adapted(bench: Bench, keeps: Sequence[float], seed: int) -> Iterator[Row]:
    """Of all kept fractions: the model is adapted once for all of them."""
    everything = bench.spec(1.0, train="all")
    for kept in keeps:
        rank_map, spec = bench.closed_form(bench.bank, kept), bench.spec(kept, train="all")
        found = bench.after(bench.bank, rank_map, spec, seed)
        yield {"way": "at once, everything trained", "kept_of_targets": kept, "perplexity": found}
    for way, first in (("adapted by all", bench.steps), ("adapted by half, then half", bench.steps // 2)):
        with put_back(bench.model):
            finetune(bench.model, [], bench.train, everything.model_copy(update={"steps": first}), seed=seed)
            yield {"way": way, "kept_of_targets": 1.0, "perplexity": bench.perplexity()}
            factors = bench.built()
            for kept in keeps:
                spec = bench.spec(kept, train="all", steps=bench.steps - first)
                found = bench.after(factors, bench.closed_form(factors, kept), spec, seed + 100)
                yield {"way": way, "kept_of_targets": kept, "perplexity": found}


def stopped(bench: Bench, kept: float, seed: int) -> Iterator[Row]:
    few, held = bench.train[:FEW_BLOCKS], bench.train[FEW_BLOCKS : FEW_BLOCKS + HELD_OUT_BLOCKS]
    rank_map, steps = bench.closed_form(bench.bank, kept), 3 * bench.steps
    found = bench.after(bench.bank, rank_map, bench.spec(kept), seed, few)
    yield {"way": f"{FEW_BLOCKS} blocks, {bench.steps} steps", "perplexity": found}
    spec = bench.spec(kept, steps=steps)
    with compressed(bench.targets, bench.bank, rank_map) as layers:
        looks = _watched(bench, list(layers.values()), few, held, spec, seed)
        yield {"way": f"{FEW_BLOCKS} blocks, {steps} steps", "perplexity": bench.perplexity()}
        _, stop, factors = min(looks, key=lambda look: look[0])
        with torch.no_grad():
            for layer, saved in zip(layers.values(), factors, strict=True):
                layer.inner.weight.copy_(saved[0])
                layer.outer.weight.copy_(saved[1])
        yield {"way": f"{FEW_BLOCKS} blocks, best of {steps} steps", "stop": stop, "perplexity": bench.perplexity()}


Look = tuple[float, int, list[list[Tensor]]]
"""Held-out perplexity, step, copies of every layer's factors."""


def _watched(
    bench: Bench, layers: Sequence[LowRankLinear], train: Examples, held: Examples, spec: FinetuneSpec, seed: int
) -> list[Look]:
    looks: list[Look] = []
    steps = spec.steps_for(train.sequence_length)

    def look(step: int) -> None:
        if step and step % max(1, steps // LOOKS) == 0:
            copies = [[factor.detach().clone() for factor in layer.factors] for layer in layers]
            looks.append((bench.perplexity(held), step, copies))

    groups = factor_groups(((layer.factors, layer.rank, layer.full_rank) for layer in layers), spec)
    with requiring_grad([factor for layer in layers for factor in layer.factors]):
        train_steps(bench.model, groups, train, spec, steps, seed=seed, title="watched", before_step=look)
    look(steps)
    return looks


def distilled(bench: Bench, kept: float, seed: int) -> Iterator[Row]:
    teacher, rank_map = copy.deepcopy(bench.model), bench.closed_form(bench.bank, kept)
    plain = {field.name: getattr(bench.train.task, field.name) for field in fields(Task)}
    for share in (0.5, 1.0):
        task = Distilling(**plain, teacher=teacher, share=share)
        found = bench.after(bench.bank, rank_map, bench.spec(kept), seed, Examples(task, bench.train.tensors))
        yield {"way": f"divergence by {share}", "perplexity": found}


def batches(bench: Bench, kept: float, seed: int) -> Iterator[Row]:
    plain = bench.spec(kept)
    assert plain.learning_rate is not None
    for by, rate in ((2, 1.0), (2, 1.4), (4, 2.0)):
        size, steps = round(by * plain.batch_blocks), round(bench.steps / by)
        changes = {"batch_blocks": size, "steps": steps, "learning_rate": rate * plain.learning_rate}
        spec = plain.model_copy(update=changes)
        found = bench.after(bench.bank, bench.closed_form(bench.bank, kept), spec, seed)
        yield {"way": f"{steps} steps of {size} blocks, rate x {rate:g}", "perplexity": found}


Try = Callable[[Bench, float, int], Iterator[Row]]
TRIES: Mapping[str, tuple[Try, int]] = {
    "at once": (at_once, 2), "sequential": (sequential, 1), "stages": (stages, 2), "refreshed": (refreshed, 2),
    "stopped": (stopped, 1), "distilled": (distilled, 2), "batches": (batches, 1),
}  # fmt: skip
"""What makes the rows of one kept fraction and one seed, and how many seeds it is given."""
NAMES = (*TRIES, "adapted")
ADAPTED_SEEDS = 1


def rows_of(bench: Bench, name: str, keeps: Sequence[float]) -> Iterator[Row]:
    """All rows of one try."""
    if name == "adapted":
        for seed in range(ADAPTED_SEEDS):
            yield from (_row(name, seed, row) for row in adapted(bench, keeps, seed))
        return
    make, seeds = TRIES[name]
    for kept, seed in itertools.product(keeps, range(seeds)):
        yield from (_row(name, seed, {"kept_of_targets": kept, **row}) for row in make(bench, kept, seed))


def _row(name: str, seed: int, row: Row) -> Row:
    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    return {"tried": name, "seed": seed, **shown}


def padding(tokenizer: str, table: str, length: int = 24, batch: int = 32) -> Iterator[Row]:
    """Share of tokens that are padding: all texts padded to one length, or batches in random order to their longest."""
    texts = [line.split("\t")[0] for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]]
    encoded = AutoTokenizer.from_pretrained(tokenizer)(list(dict.fromkeys(texts)), truncation=True, max_length=length)
    lengths = torch.tensor([len(ids) for ids in encoded["input_ids"]])
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    cut = sum(int(part.max()) * len(part) for part in lengths[order].split(batch))
    for way, tokens in ((f"padded to {length}", length * len(lengths)), (f"batches of {batch} cut", cut)):
        yield {"tried": "padding", "way": way, "padding": round(1 - int(lengths.sum()) / tokens, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--kept", nargs="+", type=float, default=[0.8, 0.6, 0.4])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--padding", nargs=2, metavar=("TOKENIZER", "TABLE"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study), nested=False)
    bench = Bench(prepared, args.steps)
    rows: list[Row] = []
    padded = () if args.padding is None else padding(*args.padding)
    for row in itertools.chain(padded, *(rows_of(bench, name, args.kept) for name in args.only)):
        rows.append(row)
        # After every row: all of them take a quarter of an hour.
        write_report(args.json, prepared.device, prepared.spec.name, rows, steps=args.steps)
    for _, group in itertools.groupby(rows, lambda row: (row["tried"], tuple(row))):  # of a table, keys are equal
        print_table(list(group))


if __name__ == "__main__":
    run_script(main)
