"""Other ways to weigh a layer's error than the study's own, compared without a fine-tune.

    python scripts/bench_statistics.py STUDY.toml [--only NAME ...] [--kept 0.8 0.4] [--json FILE]

Each row is the closed form on factors from other statistics; docs/experiments.md says what came of it.

    dense                   the dense model's statistics
    two draws               G from two draws of sampled labels
    inputs by g^P           inputs weighed by the norm of their token's gradient to the power P; gradients by x^P alike
    sequences               G of the gradients' sums over each sequence, as if all of its tokens erred alike
    components              singular values replaced by E[(gᵀ outᵢ)(innᵢᵀ x)]² of each component, and sorted by it
                            (after George et al., "Fast approximate natural gradient descent in a Kronecker-factored
                            eigenbasis", 2018)
    mean of the lost part   (W - Ŵ) E[x] added as a bias
    anchor K, ...           mean with the statistics of the model compressed to the kept fraction K, predicted rises by
                            a power of measured slopes, factors by a share of a Newton step of one gain a layer
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from _bench import print_table, write_report
from _run import run_script
from torch import Tensor, nn

from rank_search.allocation import Allocator
from rank_search.compress.alignment import aligned
from rank_search.compress.low_rank import LowRankLinear, compressed
from rank_search.factors.bank import tails
from rank_search.factors.build import build_factors, factors_of
from rank_search.factors.decompose import Factors
from rank_search.factors.statistics import LayerStatistics, collect_statistics
from rank_search.model.device import autocast, deterministic
from rank_search.preparing import Prepared, prepare
from rank_search.score import score
from rank_search.spec import FactorSpec, load_study_file
from rank_search.task import Examples

Seen = Callable[[str, Tensor, Tensor], None]
"""Takes a layer's name, its inputs and the gradients at its outputs, both (sequences, tokens, d)."""
POWERS = (-1.0, 1.0, 2.0)
SETTINGS = (
    *((kept, 0.0, 0.0) for kept in (0.9, 0.8, 0.6, 0.4)),
    *((0.8, power, 0.0) for power in (0.35, 0.5, 0.7, 1.0)),
    *((0.8, 0.5, step) for step in (0.1, 0.2, 0.35)),
    *((0.9, 0.5, step) for step in (0.0, 0.2)),
)
"""Anchor, power of the slopes, share of the Newton step."""


class Bench:
    """One study, its calibration and validation on the device."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        task, splits = prepared.loaded.task, prepared.splits
        self.calibration = Examples.of(task, splits.calibration.columns).to(prepared.device)
        self.validation = Examples.of(task, splits.validation.columns).to(prepared.device)
        self.batch = prepared.spec.run.score_batch_blocks

    def statistics(self, seed: int = 0) -> dict[str, LayerStatistics]:
        """The package's own."""
        p = self.prepared
        return collect_statistics(p.model, p.targets, self.calibration, batch_blocks=self.batch, seed=seed)

    def factors(self, statistics: Mapping[str, LayerStatistics]) -> dict[str, Factors]:
        """All components that the study's storage form pays for."""
        p = self.prepared
        return factors_of(p.targets, statistics.__getitem__, p.spec.factors, p.space.storage)

    def built(self, spec: FactorSpec) -> dict[str, Factors]:
        """What the package itself builds."""
        p = self.prepared
        recalibration = Examples.of(p.loaded.task, p.splits.recalibration.columns)
        return build_factors(
            p.model, p.targets, self.calibration, spec, p.space, recalibration=recalibration, batch_blocks=self.batch
        )

    def watch(self, seen: Seen, seed: int = 0) -> None:
        """A pass over the calibration with labels sampled from the model."""
        model, generator = self.prepared.model, torch.Generator(self.prepared.device).manual_seed(seed)
        hooks = [
            target.module.register_forward_hook(
                lambda _module, args, output, name=target.name: _tell(name, args[0], output, seen)
            )
            for target in self.prepared.targets
        ]
        with deterministic(self.prepared.device):
            for batch in self.calibration.batches(self.batch, self.prepared.device):
                with torch.enable_grad(), autocast(self.prepared.device):
                    logits = self.calibration.task.logits(model, batch).flatten(0, 1).float()
                pieces = [torch.multinomial(p.softmax(-1), 1, generator=generator) for p in logits.detach().split(1024)]
                labels = torch.cat(pieces).squeeze(1)
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for hook in hooks:
            hook.remove()

    def perplexity(self, factors: Mapping[str, Factors], kept: float, means: Mapping[str, Tensor] | None) -> float:
        """Of the closed form, untrained; with ``means`` of the inputs, the mean of the lost part is added."""
        p = self.prepared
        rank_map = Allocator(p.space, tails(factors)).closed_form(kept)
        with compressed(p.targets, factors, rank_map) as layers:
            for target in p.targets:
                if means is not None and target.name in layers:
                    _add(layers[target.name], (target.matrix - layers[target.name].dense()) @ means[target.name])
            with aligned(p.model):
                return score(p.model, self.validation, batch_blocks=self.batch).perplexity


def _tell(name: str, x: Tensor, output: Tensor, seen: Seen) -> Tensor:
    output = output.requires_grad_().clone() if output.is_leaf else output.clone()

    def on_gradient(g: Tensor) -> None:
        with torch.autocast(g.device.type, enabled=False):
            seen(name, x.detach().float(), g.float())

    output.register_hook(on_gradient)
    return output


def _add(layer: LowRankLinear, shift: Tensor) -> None:
    layer.register_forward_hook(lambda _module, _args, output: output + shift.to(output.dtype))


def weighed(bench: Bench, plain: Mapping[str, LayerStatistics], side: str, power: float) -> dict[str, LayerStatistics]:
    """A (or G) of tokens weighed by the other side's norm to a power, at the plain trace."""
    sums: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor, g: Tensor) -> None:
        own, other = (x.flatten(0, 1), g.flatten(0, 1)) if side == "A" else (g.flatten(0, 1), x.flatten(0, 1))
        weights = other.norm(dim=1).clamp(min=1e-12) ** power
        product = ((own * weights[:, None]).T @ own).double()
        sums[name] = sums[name] + product if name in sums else product

    bench.watch(seen)
    made = {}
    for name, layer in plain.items():
        before = layer.A if side == "A" else layer.G
        assert before is not None
        now = sums[name] * (before.trace() / sums[name].trace())
        made[name] = LayerStatistics(now, layer.G) if side == "A" else LayerStatistics(layer.A, now)
    return made


def of_sequences(bench: Bench, plain: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
    """G of gradients summed over a sequence."""
    sums: dict[str, Tensor] = {}

    def seen(name: str, _x: Tensor, g: Tensor) -> None:
        total = g.sum(1)
        product = (total.T @ total).double() / g.shape[1]
        sums[name] = sums[name] + product if name in sums else product

    bench.watch(seen)
    return {name: LayerStatistics(layer.A, sums[name] / len(bench.calibration)) for name, layer in plain.items()}


def by_components(bench: Bench, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Each component at its measured second-order rise, most important first."""
    device = bench.prepared.device
    sums: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor, g: Tensor) -> None:
        out, inn = factors[name].out.to(device), factors[name].inn.to(device)
        found = ((x @ inn.T) * (g @ out.T)).square().sum((0, 1)).double()
        sums[name] = sums[name] + found if name in sums else found

    bench.watch(seen, seed=7)
    tokens = len(bench.calibration) * bench.calibration.sequence_length
    made = {}
    for name, layer in factors.items():
        rises = (sums[name] / tokens).cpu()
        order = rises.argsort(descending=True)
        sigma = layer.sigma.clone()
        sigma[: len(order)] = rises[order].sqrt()
        sigma[len(order) :] = sigma[len(order) :].clamp(max=float(sigma[len(order) - 1]))
        made[name] = Factors(layer.out[order], layer.inn[order], sigma)
    return made


def means_of_inputs(bench: Bench) -> dict[str, Tensor]:
    """E[x] of every target layer."""
    sums: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor, _g: Tensor) -> None:
        total = x.flatten(0, 1).sum(0)
        sums[name] = sums[name] + total if name in sums else total

    bench.watch(seen)
    tokens = len(bench.calibration) * bench.calibration.sequence_length
    return {name: total / tokens for name, total in sums.items()}


def ways(bench: Bench) -> Iterator[tuple[str, Callable[[], tuple[Mapping[str, Factors], Mapping[str, Tensor] | None]]]]:
    """Name, and what makes the factors."""
    p, plain = bench.prepared, bench.statistics()
    yield "dense", lambda: (bench.factors(plain), None)

    def two_draws() -> dict[str, LayerStatistics]:
        other = bench.statistics(1)
        return {n: LayerStatistics(s.A, (s.G + other[n].G) / 2) for n, s in plain.items()}  # type: ignore[operator]

    yield "two draws", lambda: (bench.factors(two_draws()), None)
    for power in POWERS:
        yield f"inputs by g^{power:g}", lambda power=power: (bench.factors(weighed(bench, plain, "A", power)), None)
        yield f"gradients by x^{power:g}", lambda power=power: (bench.factors(weighed(bench, plain, "G", power)), None)
    yield "sequences", lambda: (bench.factors(of_sequences(bench, plain)), None)
    yield "components", lambda: (by_components(bench, bench.factors(plain)), None)
    yield "mean of the lost part", lambda: (bench.factors(plain), means_of_inputs(bench))
    for kept, power, step in SETTINGS:
        spec = p.spec.factors.model_copy(update={"anchor": kept, "slope_power": power, "gain_step": step})
        yield f"anchor {kept:g}, slopes {power:g}, gains {step:g}", lambda spec=spec: (bench.built(spec), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--kept", nargs="+", type=float)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study), nested=False)
    bench, rows = Bench(prepared), []
    for name, make in ways(bench):
        if name.startswith(tuple(args.only)):
            factors, means = make()
            found = {
                str(kept): round(bench.perplexity(factors, kept, means), 3)
                for kept in args.kept or prepared.spec.search.ladder
            }
            rows.append({"statistics": name, "storage": prepared.space.storage, **found})
    print_table(rows)
    write_report(args.json, prepared.device, prepared.spec.name, rows)


if __name__ == "__main__":
    run_script(main)
