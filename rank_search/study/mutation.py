"""The project's own sampler: evolution of whole rank maps, as an Optuna sampler. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from rank_search.ranks import RankMap
from rank_search.study.bounded import is_feasible
from rank_search.study.moves import Moves
from rank_search.study.sizes import LossCurve, draw_size, size_gains, size_grid
from rank_search.study.space import SearchSpace
from rank_search.study.whole_space import WholeSpaceSampler

RANK_MAP = "rank_search:rank_map"
"""The attribute under which trials hold rank maps; not one of those that dashboards show, which have no room for it."""
_NEAREST = 3
"""Parents are drawn from so many good points that are nearest to the wanted size: the best of two draws."""
_FRONTS = 2
"""Good points lie on the front, or on the next one, which is the front once the first is taken away."""
_UNTRADED = 8.0
"""Points on a front that is so sparse that filling it is all there is to do; ..."""
_MOST_TRADED = 0.75
"""... and how often a child is more than its parent at another size when the front is dense."""
_AGAIN = 0.3
"""How often another trade follows a trade."""
_NEIGHBOURS = 8
"""Good points around one that say which loss is to be expected at its size."""
_TRIES = 20
"""Draws after which a child may be a rank map that another trial has already."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A good rank map.

    Attributes:
        params: of the whole model.
        loss: its measured one.
        text: its JSON form, as trials hold it.
        rank: 0 on the front, 1 on the next one.
        above: its loss above what its neighbours make one expect at its size.
    """

    params: float
    loss: float
    text: str
    rank: int = 0
    above: float = 0.0


class MutationSampler(WholeSpaceSampler):
    """Proposes small changes of good rank maps, at sizes where they are worth most.

    A size is drawn by the hypervolume that a measurement there is expected to add to the front. One of the good rank
    maps nearest to it, by its loss for its size, takes its deviations from the closed form there
    (:meth:`Moves.resize`). The denser the front, the more often the child also trades ranks among a few of its layers
    (:meth:`Moves.trade`); few changes a step are what evolution of compressed models lives on (EvoPress, Sieberling et
    al., 2024).

    The rank map itself is handed to ``keep``; Optuna's own parameters only stand near it. A proposal depends on the
    seed and the trials alone, and is no rank map that another trial has, running ones included.

    Args:
        space: has ``kept`` among its parameters; the others are proposed as 0.
        moves: on the space's layers.
        seed: of this proposal.
        keep: told the trial and its rank map.
        max_loss: above it a measurement is worth nothing.
    """

    def __init__(
        self,
        space: SearchSpace,
        moves: Moves,
        seed: int,
        keep: Callable[[FrozenTrial, RankMap], None],
        max_loss: float | None,
        cuts: Sequence[float],
    ) -> None:
        super().__init__(space)
        self._space = space
        self._allocator = space.allocator
        self._moves = moves
        self._random = np.random.default_rng(seed)
        self._keep = keep
        self._max_loss = max_loss
        self._cuts = cuts

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a rank map and the parameters that stand near it."""
        allowed = search_space["kept"]
        assert isinstance(allowed, FloatDistribution)
        trials = study.get_trials(deepcopy=False)
        running = [t.params["kept"] for t in trials if t.state is TrialState.RUNNING and "kept" in t.params]
        rank_map = self._proposal(good_parents(trials), self._taken(trials), running, allowed)
        self._keep(trial, rank_map)
        kept = self._allocator.space.kept_of_targets(rank_map)
        return {**dict.fromkeys(search_space, 0.0), "kept": min(max(kept, allowed.low), allowed.high)}

    def _taken(self, trials: Iterable[FrozenTrial]) -> set[str]:
        """Rank maps of all trials; of a seed that has not ended its parameters alone are known."""
        found = set()
        for trial in trials:
            params = trial.system_attrs.get("fixed_params")
            if (told := told_rank_map(trial)) is not None:
                found.add(told)
            elif params and not trial.state.is_finished():
                found.add(rank_map_text(self._space.decode(params)))
        return found

    def _proposal(
        self, parents: list[Parent], taken: set[str], running: Sequence[float], allowed: FloatDistribution
    ) -> RankMap:
        sizes = size_grid(allowed.low, allowed.high)
        kept = np.array([self._kept_by(parent.params) for parent in parents])
        losses = np.array([parent.loss for parent in parents])
        curve, _ = LossCurve.of_undiverged(kept, losses, np.ones(len(parents)), self._cuts)
        gains = size_gains(curve, sizes, running, self._max_loss)
        for _ in range(_TRIES):
            child = self._child(parents, draw_size(sizes, gains, self._random))
            if rank_map_text(child) not in taken:
                break
        return child

    def _child(self, parents: Sequence[Parent], kept: float) -> RankMap:
        random, moves = self._random, self._moves
        if not parents:
            return moves.trade(self._allocator.closed_form(kept), random)
        nearest = sorted(parents, key=lambda parent: abs(self._kept_by(parent.params) - kept))[:_NEAREST]
        drawn = [nearest[int(k)] for k in random.integers(len(nearest), size=2)]
        parent = min(drawn, key=lambda parent: parent.above)
        child = moves.resize(RankMap(json.loads(parent.text)), kept)
        on_front = sum(parent.rank == 0 for parent in parents)
        if random.random() < min(_MOST_TRADED, 1 - _UNTRADED / max(on_front, _UNTRADED)):
            child = moves.trade(child, random)
            while random.random() < _AGAIN:
                child = moves.trade(child, random)
        return child

    def _kept_by(self, params: float) -> float:
        """Kept fraction of the target layers of a whole model of so many parameters."""
        space = self._allocator.space
        return (params - (space.model_params - space.dense_params)) / space.dense_params


def rank_map_text(rank_map: RankMap) -> str:
    """The form in which trials hold rank maps; equal for equal ones that an allocator has made."""
    return json.dumps(dict(rank_map))


def told_rank_map(trial: FrozenTrial) -> str | None:
    """The rank map that a trial holds: among the attributes that dashboards do not show, or, in studies of earlier
    versions, among those that they do."""
    told = trial.system_attrs.get(RANK_MAP, trial.user_attrs.get("rank_map"))
    return None if told is None else str(told)


def good_parents(trials: Iterable[FrozenTrial]) -> list[Parent]:
    """The measured trials of the first fronts, each front by ascending parameters."""
    left = sorted(
        (
            Parent(trial.values[1], trial.values[0], told)
            for trial in trials
            if trial.state is TrialState.COMPLETE and is_feasible(trial) and (told := told_rank_map(trial)) is not None
        ),
        key=lambda parent: (parent.params, parent.loss),
    )
    found: list[Parent] = []
    for rank in range(_FRONTS):
        lowest, others = float("inf"), []
        for parent in left:
            if parent.loss < lowest:
                lowest = parent.loss
                found.append(replace(parent, rank=rank))
            else:
                others.append(parent)
        left = others
    return _compared(found)


def _compared(parents: list[Parent]) -> list[Parent]:
    """With the residuals of a parabola through each one's neighbours in size."""
    if len(parents) < _NEIGHBOURS:
        return parents
    params, losses = (np.array([getattr(parent, name) for parent in parents]) for name in ("params", "loss"))
    compared = []
    for parent in parents:
        near = np.argsort(np.abs(params - parent.params), kind="stable")[:_NEIGHBOURS]
        x = (params[near] - parent.params) / max(float(np.ptp(params[near])), 1.0)
        expected = np.linalg.lstsq(np.vander(x, 3), losses[near], rcond=None)[0][-1]
        compared.append(replace(parent, above=parent.loss - float(expected)))
    return compared
