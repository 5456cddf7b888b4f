"""What :mod:`bench_search` compares with a study: other ways to propose rank maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import TrialState, create_trial

from rank_search.allocation import Allocator
from rank_search.factors.decompose import Factors
from rank_search.model.targets import Target
from rank_search.ranks import RankMap
from rank_search.spec import SearchSpec
from rank_search.study.five_types import five_types
from rank_search.study.space import DirectSpace

FactorSource = Literal["bank", "svd"]
UntrainedLoss = Callable[[RankMap, int], float]
"""Loss under a rank map without a fine-tune, on so many of the first calibration blocks."""


@dataclass(frozen=True)
class Told:
    """A measured proposal: its loss, None where it was not finite, and what its competitor needs to go on from it."""

    rank_map: RankMap
    loss: float | None
    num_params: int
    state: Mapping[str, Any] = field(default_factory=dict)


class Competitor(Protocol):
    """Proposes rank maps one after the other; each is fine-tuned and scored before the next is asked for."""

    factors: FactorSource

    def propose(self) -> RankMap:
        """The next rank map; may compute on the model."""

    def tell(self, told: Told) -> dict[str, Any]:
        """What came of it; returns what ``restore`` needs beside that."""

    def restore(self, before: Sequence[Told]) -> None:
        """Go on from what an earlier process measured."""


class PlainOptuna:
    """What a user writes in an afternoon: one whole number a layer, two objectives, a sampler with its defaults."""

    def __init__(
        self, allocator: Allocator, sampler: Literal["tpe", "nsga2"], seed: int, factors: FactorSource
    ) -> None:
        self.factors = factors
        self._space = DirectSpace(allocator)
        self._sampler = sampler
        self._seed = seed
        self._study = self._new(0)
        self._trial: optuna.Trial | None = None

    def propose(self) -> RankMap:
        """The sampler's."""
        self._trial = self._study.ask(self._space.distributions)
        return self._space.decode(self._trial.params)

    def tell(self, told: Told) -> dict[str, Any]:
        """To the study."""
        assert self._trial is not None
        number = self._trial.number
        if told.loss is None:
            self._study.tell(self._trial, state=TrialState.FAIL)
        else:
            self._study.tell(self._trial, [told.loss, float(told.num_params)])
        # NSGA-II keeps a trial's generation there.
        attrs = self._study.trials[number].system_attrs
        return {name: value for name, value in attrs.items() if "generation" in name}

    def restore(self, before: Sequence[Told]) -> None:
        """Put the trials into a new study; its sampler draws on from another seed."""
        self._study = self._new(len(before))
        for told in before:
            complete = told.loss is not None
            self._study.add_trial(
                create_trial(
                    params=self._space.encode_map(told.rank_map),
                    distributions=self._space.distributions,
                    values=[told.loss, float(told.num_params)] if complete else None,
                    state=TrialState.COMPLETE if complete else TrialState.FAIL,
                    system_attrs=dict(told.state),
                )
            )

    def _new(self, start: int) -> optuna.Study:
        seed = 1000 * self._seed + start
        sampler: BaseSampler = TPESampler(seed=seed) if self._sampler == "tpe" else NSGAIISampler(seed=seed)
        return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


class Ladder:
    """The closed form alone, on a ladder that gets finer and finer."""

    factors: FactorSource = "bank"

    def __init__(self, allocator: Allocator, search: SearchSpec) -> None:
        self._allocator = allocator
        self._kept = budgets(search)

    def propose(self) -> RankMap:
        """At the next kept fraction."""
        return self._allocator.closed_form(next(self._kept))

    def tell(self, told: Told) -> dict[str, Any]:
        """Learns nothing."""
        return {}

    def restore(self, before: Sequence[Told]) -> None:
        """Skip as many kept fractions."""
        for _ in before:
            next(self._kept)


class FiveTypes:
    """Bolaco's search of kept fractions by five layer types with a Gaussian process, at one budget after the other."""

    factors: FactorSource = "bank"

    def __init__(
        self, allocator: Allocator, search: SearchSpec, loss: UntrainedLoss, seed: int, *, evaluations: int, blocks: int
    ) -> None:
        self._allocator = allocator
        self._kept = budgets(search)
        self._loss = loss
        self._seed = seed
        self._evaluations = evaluations
        self._blocks = blocks

    def propose(self) -> RankMap:
        """The best found at the next budget."""
        return five_types(
            self._allocator, next(self._kept), lambda rank_map: self._loss(rank_map, self._blocks),
            evaluations=self._evaluations, seed=self._seed,
        )  # fmt: skip

    def tell(self, told: Told) -> dict[str, Any]:
        """Budgets are searched on their own."""
        return {}

    def restore(self, before: Sequence[Told]) -> None:
        """Skip as many budgets."""
        for _ in before:
            next(self._kept)


class Evolution:
    """In the form of EvoPress (Sieberling et al., 2024): at each of a few budgets a parent, uniform at first, offspring
    by one to three switches of a level between two layers, and selection in rounds on more and more text.

    Here a level is a twentieth of the smaller of the two layers, fitness is the model's loss on calibration blocks
    (the paper's is the divergence from the dense model), and the parents are fine-tuned and scored in turn, some
    generations apart.
    """

    factors: FactorSource = "bank"
    _LEVEL = 0.05
    _SWITCHES = 3

    def __init__(
        self, allocator: Allocator, search: SearchSpec, loss: UntrainedLoss, seed: int, *,
        generations: int, offspring: int, blocks: int,
    ) -> None:  # fmt: skip
        self._allocator = allocator
        self._budgets = search.ladder
        self._parents = [allocator.uniform(kept) for kept in self._budgets]
        self._loss = loss
        self._seed = seed
        self._generations = generations
        self._offspring = offspring
        self._blocks = blocks
        self._step = 0

    def propose(self) -> RankMap:
        """The parent of the next budget after some generations; the very first ones are uniform."""
        place = self._step % len(self._budgets)
        if self._step >= len(self._budgets):
            random = np.random.default_rng([self._seed, self._step])
            for _ in range(self._generations):
                self._parents[place] = self._selected(self._parents[place], self._budgets[place], random)
        self._step += 1
        return self._parents[place]

    def tell(self, told: Told) -> dict[str, Any]:
        """Fitness is a loss without a fine-tune."""
        return {}

    def restore(self, before: Sequence[Told]) -> None:
        """The parents are the last proposals."""
        for index, told in enumerate(before):
            self._parents[index % len(self._budgets)] = told.rank_map
        self._step = len(before)

    def _selected(self, parent: RankMap, kept: float, random: np.random.Generator) -> RankMap:
        """All offspring on an eighth of the blocks, then a quarter of them and the parent on all."""
        children = [self._child(parent, kept, random) for _ in range(self._offspring)]
        few = max(1, self._blocks // 8)
        children.sort(key=lambda child: self._loss(child, few))
        return min([parent, *children[: max(1, len(children) // 4)]], key=lambda child: self._loss(child, self._blocks))

    def _child(self, parent: RankMap, kept: float, random: np.random.Generator) -> RankMap:
        space = self._allocator.space
        params = {s.name: float(s.params(parent.get(s.name), space.storage)) for s in space.shapes}
        for _ in range(int(random.integers(1, self._SWITCHES + 1, 2).min())):
            giver, taker = (space.shapes[k] for k in random.choice(len(space.shapes), 2, replace=False))
            level = self._LEVEL * min(giver.dense_params, taker.dense_params)
            params[giver.name] = max(params[giver.name] - level, 1.0)
            params[taker.name] = min(params[taker.name] + level, float(taker.dense_params))
        return self._allocator.towards(kept, params)


def budgets(search: SearchSpec) -> Iterator[float]:
    """Kept fractions: the study's ladder, then its range ever more finely (van der Corput's sequence)."""
    yield from search.ladder
    number = 1
    while True:
        share, scale, digits = 0.0, 0.5, number
        while digits:
            share, scale, digits = share + scale * (digits % 2), scale / 2, digits // 2
        yield round(search.min_kept + share * (search.max_kept - search.min_kept), 6)
        number += 1


@torch.no_grad()
def plain_svd(targets: Sequence[Target]) -> dict[str, Factors]:
    """Factors of every target layer by the singular values of its weights alone, on the device where they are."""
    made = {}
    for target in targets:
        U, S, Vt = torch.linalg.svd(target.matrix.float(), full_matrices=False)
        root = S.sqrt()[:, None]
        made[target.name] = Factors((root * U.T).contiguous(), (root * Vt).contiguous(), S.double())
    return made
