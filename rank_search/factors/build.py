"""From a model and calibration blocks to the factors of every target layer, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rank_search.allocation import Allocator
from rank_search.factors.bank import Piece, tails
from rank_search.factors.decompose import NEEDS, Factors, Needs, Roots, decompose
from rank_search.factors.exchange import Exchange
from rank_search.factors.groups import Group, Unit, in_groups, units
from rank_search.factors.slopes import Measured, Slope, gain, measured_slopes, own_slope, rise_factors
from rank_search.factors.statistics import LayerStatistics, collect_statistics, input_owners, mean_statistics
from rank_search.model.device import free_memory, synchronize
from rank_search.model.memory import in_halves_if_needed
from rank_search.model.spread import devices_of
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankSpace, Storage
from rank_search.spec import FactorSpec
from rank_search.task import Examples

_Result = TypeVar("_Result")


@dataclass
class BuildTimes:
    """Seconds of the two steps, filled in as a build goes on."""

    statistics: float = 0.0
    decomposition: float = 0.0


def build_factors(
    model: PreTrainedModel,
    targets: Sequence[Target],
    calibration: Examples,
    spec: FactorSpec,
    space: RankSpace,
    *,
    recalibration: Examples | None = None,
    batch_blocks: int,
    memory: int | None = None,
    progress: Progress = SILENT,
    times: BuildTimes | None = None,
) -> dict[str, Factors]:
    """Factors of every target layer, all in memory. Arguments and errors are those of :class:`Build`."""
    build = Build(
        model, targets, calibration, spec, space, recalibration, batch_blocks, memory, progress, times or BuildTimes()
    )
    return gathered(build.pieces())


def gathered(pieces: Iterable[Piece]) -> dict[str, Factors]:
    """The factors that pieces make up."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, part, tensor in pieces:
        tensors.setdefault(name, {})[part] = tensor
    return {name: Factors(**parts) for name, parts in tensors.items()}


@dataclass(frozen=True)
class Build:
    """Factors of every target layer, up to the largest rank that the storage form makes smaller than dense.

    With ``spec.anchor`` below 1 the statistics are the mean of those of the dense model and of one that is compressed
    to it: the rise of the loss from one model to the other is about the integral of its curvature between them, of
    which this is the trapezoid rule. Predicted rises are multiplied by what the compressed model's slopes say
    (:func:`rise_factors`), and the factors by a gain each (:func:`gain`).

    Statistics are held for one group of target layers at a time. In the second round a group needs those of the dense
    model again, which are collected again rather than kept on disk. For a Llama of 7 billion parameters, 131 thousand
    calibration tokens and 9 GiB a collection there are 16 groups; at 400 TFLOP/s, 16 more passes of 6.5 s (the backward
    pass ends at the group's first layer: half of it on average) and the products' 14 s make 2 minutes, and going from
    one model to the other 32 times, with 24 GiB up and 24 down at 8 GB/s, 3.5 more. 119 GiB written and read back at 1
    GB/s would take 4, at 3 GB/s 1.5: somewhat less, but three times the disk space of the bank on top of it. Of the
    first round's factors only sigmas are needed at first, but ranks need those of all layers: so the factors are on the
    host until then (38 GiB) and go as their products come (24 GiB).

    Attributes:
        recalibration: what a compressed model is looked at on; None: ``calibration`` again.
        memory: bytes for statistics; None: a third of what is free on the model's device.
    """

    model: PreTrainedModel
    targets: Sequence[Target]
    calibration: Examples
    spec: FactorSpec
    space: RankSpace
    recalibration: Examples | None = None
    batch_blocks: int = 8
    memory: int | None = None
    progress: Progress = SILENT
    times: BuildTimes = field(default_factory=BuildTimes)

    def pieces(self) -> Iterator[Piece]:
        """The factors, each as soon as it is known; predicted rises may come after all others.

        Raises:
            BudgetError: the anchor is below what the smallest ranks need.
            DecompositionError: naming the layer.
            NonFiniteLossError: the model's output on the calibration blocks is not finite.
            TargetError: a target layer that the model does not use.
        """
        if self._collections == 2:
            yield from self._anchored()
            return
        for group in self._groups(1):
            # Popped: the statistics of a layer are freed as soon as its factors are there.
            for name, made in self._decomposed(group, self._dense(group).pop):
                yield name, "out", made.out
                yield name, "inn", made.inn
                yield name, "sigma", made.sigma

    def _anchored(self) -> Iterator[Piece]:
        groups = self._groups(2)
        exchange, held = self._compressed(keep=len(groups) == 1)
        sigmas: dict[str, Tensor] = {}
        slopes: dict[str, Slope] = {}
        gains: dict[str, float] = {}
        for group in groups:
            dense = held.pop() if held else self._dense(group)
            with exchange.compressed() as lost:
                measured = self._measured_slopes(group, lost)
                with self._timing("statistics"):
                    at_anchor = self._collected(group, self.recalibration or self.calibration, self.spec.seed + 1)
                    mean = mean_statistics(dense, at_anchor)
                for target in group:
                    name = target.name
                    if (found := measured.get(name)) is None:
                        continue
                    if found.lost is not None:
                        slopes[name] = Slope(found.lost, own_slope(mean[name], lost[name]))
                    if self.spec.gain_step:
                        along = Slope(found.matrix, own_slope(mean[name], target.matrix.detach()))
                        gains[name] = gain(along, self.spec.gain_step)
            for name, made in self._decomposed(group, mean.pop):
                yield name, "out", made.out * gains.get(name, 1.0)
                yield name, "inn", made.inn
                sigmas[name] = made.sigma
        types = {target.name: target.shape.group for target in self.targets}
        by = rise_factors(slopes, types, self.spec.slope_power) if slopes else {}
        for name, sigma in sigmas.items():
            yield name, "sigma", sigma * by.get(name, 1.0) ** 0.5

    def _compressed(self, *, keep: bool) -> tuple[Exchange, list[dict[str, LayerStatistics]]]:
        """The model at the anchor; and the dense model's statistics, of one group, for :attr:`keep`."""
        first: dict[str, Factors] = {}
        held: list[dict[str, LayerStatistics]] = []
        for group in self._groups(1):
            statistics = self._dense(group)
            first.update(self._decomposed(group, statistics.__getitem__ if keep else statistics.pop))
            if keep:
                held.append(statistics)
        with self._timing("decomposition"):
            # Among all ranks, so that studies with other rank multiples or frozen layers share the bank.
            allocator = Allocator(replace(self.space, multiple=1, frozen=()), tails(first))
            return Exchange(self.targets, first, allocator.closed_form(self.spec.anchor)), held

    def _dense(self, group: Group) -> dict[str, LayerStatistics]:
        with self._timing("statistics"):
            return self._collected(group, self.calibration, self.spec.seed)

    def _collected(self, group: Group, examples: Examples, seed: int) -> dict[str, LayerStatistics]:
        def collect(batch_blocks: int) -> dict[str, LayerStatistics]:
            return collect_statistics(
                self.model, group, examples, batch_blocks=batch_blocks, seed=seed,
                inputs=self._needs.inputs, gradients=self._needs.gradients, progress=self.progress,
            )  # fmt: skip

        return self._fitting(collect)

    def _measured_slopes(self, group: Group, lost: Mapping[str, Tensor]) -> dict[str, Measured]:
        wanted = self.spec.slope_power or self.spec.gain_step
        if not (wanted and self._needs.inputs and self._needs.gradients):
            return {}
        chosen = [target for target in group if self.spec.gain_step or target.name in lost]
        if not chosen:
            return {}
        examples = self.recalibration or self.calibration
        # A slope is one number a layer; it needs fewer examples than a layer's second moments.
        half = examples[torch.arange((len(examples) + 1) // 2)]

        def measure(batch_blocks: int) -> dict[str, Measured]:
            return measured_slopes(self.model, chosen, lost, half, batch_blocks=batch_blocks, progress=self.progress)

        with self._timing("statistics"):
            return self._fitting(measure)

    def _fitting(self, work: Callable[[int], _Result]) -> _Result:
        """``work`` by batches of so many blocks, from now on of half as many whenever memory runs out."""
        size = self._sizes[-1]

        def halve() -> None:
            self._sizes.append(-(-size // 2))
            self.progress.say(
                f"out of memory in calibration; once more, {self._sizes[-1]} blocks at a time "
                "(run.calibration_batch_blocks)"
            )

        return in_halves_if_needed(lambda parts: work(size) if parts == 1 else self._fitting(work), size, halve)

    @cached_property
    def _sizes(self) -> list[int]:
        """Of batches, in blocks; the last one holds."""
        return [self.batch_blocks]

    def _decomposed(
        self, group: Group, statistics_of: Callable[[str], LayerStatistics]
    ) -> Iterator[tuple[str, Factors]]:
        made = decomposed(group, statistics_of, self.spec, self.space.storage, progress=self.progress)
        while True:
            with self._timing("decomposition"):
                layer = next(made, None)
            if layer is None:
                return
            yield layer

    @contextmanager
    def _timing(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        synchronize(*self._devices)
        setattr(self.times, step, getattr(self.times, step) + time.perf_counter() - started)

    def _groups(self, collections: int) -> tuple[Group, ...]:
        """Groups of target layers of which so many collections of statistics fit into memory."""
        return in_groups(self._units, self._limit // collections)

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        limit = self._limit // self._collections
        apart = units(self.targets, self._needs, {})
        if sum(unit.nbytes for unit in apart) <= limit:
            return apart  # all in one group, however much of it is shared
        shared = units(self.targets, self._needs, input_owners(self.model, self.targets, self.calibration))
        whole, largest = sum(unit.nbytes for unit in shared), max(shared, key=lambda unit: unit.nbytes)
        if whole > limit:
            twice = " for each of two models" if self._collections == 2 else ""
            self.progress.say(
                f"statistics of all target layers take {_gib(whole)}{twice}, and {_gib(self._limit)} are theirs "
                "(run.statistics_memory): calibrating group by group"
            )
        if largest.nbytes > limit:
            self.progress.say(
                f"{largest.targets[0].name} and what shares its input or its matrix need "
                f"{_gib(self._collections * largest.nbytes)} of statistics at once, more than run.statistics_memory"
            )
        return shared

    @cached_property
    def _collections(self) -> int:
        """Of statistics that are held at once: the dense model's, and a compressed one's."""
        return 2 if self.spec.anchor < 1 and (self._needs.inputs or self._needs.gradients) else 1

    @cached_property
    def _limit(self) -> int:
        # The passes need room, too: for activations, and for copies of the matrices in their own precision.
        return min(map(free_memory, self._devices)) // 3 if self.memory is None else self.memory

    @cached_property
    def _devices(self) -> tuple[torch.device, ...]:
        return devices_of(self.model)

    @property
    def _needs(self) -> Needs:
        return NEEDS[self.spec.method]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"


def factors_of(
    targets: Sequence[Target], statistics_of: Callable[[str], LayerStatistics], spec: FactorSpec, storage: Storage,
    *, progress: Progress = SILENT,
) -> dict[str, Factors]:  # fmt: skip
    """Factors of every target layer from its statistics, which ``statistics_of`` gives by module name.

    Raises:
        DecompositionError: naming the layer.
    """
    return dict(decomposed(targets, statistics_of, spec, storage, progress=progress))


@torch.no_grad()
def decomposed(
    targets: Sequence[Target], statistics_of: Callable[[str], LayerStatistics], spec: FactorSpec, storage: Storage,
    *, progress: Progress = SILENT,
) -> Iterator[tuple[str, Factors]]:  # fmt: skip
    """As :func:`factors_of`, one after the other, on the host."""
    roots = Roots(spec.method, spec.damping, progress)
    with progress.step("decomposition", len(targets)) as step:
        for target in targets:
            layer = statistics_of(target.name)
            made = decompose(
                target.name, target.matrix, roots.columns(target.name, layer),
                roots.rows(target.name, layer), target.shape.max_rank(storage),
            )  # fmt: skip
            del layer  # nobody else may hold it, and what follows may take long
            step.advance(note=target.name)
            yield target.name, Factors(made.out.cpu(), made.inn.cpu(), made.sigma.cpu())
