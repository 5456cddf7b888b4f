"""The project's own sampler: evolution of whole rank maps, as an Optuna sampler. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from rank_search.allocation import Allocator
from rank_search.ranks import RankMap
from rank_search.study.moves import Moves

_NEAREST = 3
"""Parents are drawn among so many points that are nearest to the wanted size."""
_FRONTS = 2
"""Parents lie on the front, or on the next one, which is the front once the first is taken away."""
_RESIZED = 0.35
"""How often a child has another size than its parent."""
_UNTRADED = 0.5
"""How often a child of another size is its parent's deviations from the closed form and nothing else."""
_AGAIN = 0.3
"""How often another trade follows a trade."""
_TRIES = 20
"""Draws after which a child may be a rank map that another trial has already."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A measured rank map: its parameters and its loss, and its JSON form as trials hold it."""

    params: float
    loss: float
    text: str


class MutationSampler(BaseSampler):
    """Proposes small changes of rank maps that are on the front, or near it, anywhere on the axis of budgets.

    A size is drawn evenly over the kept fractions of the study. One of the good rank maps nearest to it trades ranks
    among a few of its layers (:meth:`Moves.trade`), or takes its deviations from the closed form to that size
    (:meth:`Moves.resize`), or both. Few changes a step are what evolution of compressed models lives on (EvoPress,
    Sieberling et al., 2024).

    The rank map itself is handed to ``keep``; Optuna's own parameters only stand near it. A proposal depends on the
    seed and the trials alone, and is no rank map that another trial has, running ones included.

    Args:
        allocator: the closed form, whose hulls are walked.
        distributions: of the space: ``kept``, and others that are proposed as 0.
        seed: of this proposal.
        keep: told the trial and its rank map.
    """

    def __init__(
        self,
        allocator: Allocator,
        moves: Moves,
        distributions: dict[str, BaseDistribution],
        seed: int,
        keep: Callable[[FrozenTrial, RankMap], None],
    ) -> None:
        self._allocator = allocator
        self._moves = moves
        self._distributions = distributions
        self._random = np.random.default_rng(seed)
        self._keep = keep

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of the space at once."""
        return self._distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a rank map and the parameters that stand near it."""
        allowed = search_space["kept"]
        assert isinstance(allowed, FloatDistribution)
        trials = study.get_trials(deepcopy=False)
        taken = {other.user_attrs["rank_map"] for other in trials if "rank_map" in other.user_attrs}
        rank_map = self._proposal(good_parents(trials), taken, allowed)
        self._keep(trial, rank_map)
        kept = self._allocator.space.kept_of_targets(rank_map)
        return {**dict.fromkeys(search_space, 0.0), "kept": min(max(kept, allowed.low), allowed.high)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked: no parameter is outside of the space."""
        raise NotImplementedError(f"{param_name} is not a parameter of the space")

    def _proposal(self, parents: list[Parent], taken: set[str], allowed: FloatDistribution) -> RankMap:
        for _ in range(_TRIES):
            child = self._child(parents, float(self._random.uniform(allowed.low, allowed.high)))
            if rank_map_text(child) not in taken:
                break
        return child

    def _child(self, parents: list[Parent], kept: float) -> RankMap:
        random, moves = self._random, self._moves
        if not parents:
            return moves.trade(self._allocator.closed_form(kept), random)
        space = self._allocator.space
        wanted = space.model_params - space.dense_params + kept * space.dense_params
        nearest = sorted(parents, key=lambda parent: abs(parent.params - wanted))[:_NEAREST]
        child = RankMap(json.loads(nearest[int(random.integers(len(nearest)))].text))
        if random.random() < _RESIZED:
            child = moves.resize(child, kept)
            if random.random() < _UNTRADED:
                return child
        child = moves.trade(child, random)
        while random.random() < _AGAIN:
            child = moves.trade(child, random)
        return child


def rank_map_text(rank_map: RankMap) -> str:
    """The form in which trials hold rank maps; equal for equal ones that an allocator has made."""
    return json.dumps(dict(rank_map))


def good_parents(trials: Iterable[FrozenTrial]) -> list[Parent]:
    """The measured trials of the first fronts, by ascending parameters."""
    left = sorted(
        (
            Parent(trial.values[1], trial.values[0], trial.user_attrs["rank_map"])
            for trial in trials
            if trial.state is TrialState.COMPLETE and "rank_map" in trial.user_attrs
        ),
        key=lambda parent: (parent.params, parent.loss),
    )
    found: list[Parent] = []
    for _ in range(_FRONTS):
        lowest, front, others = float("inf"), [], []
        for parent in left:
            if parent.loss < lowest:
                lowest = parent.loss
                front.append(parent)
            else:
                others.append(parent)
        found, left = found + front, others
    return found
