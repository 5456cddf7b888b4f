"""The search spaces: what a sampler chooses, and which rank map that means. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from rank_search.allocation import Allocator, Floats
from rank_search.errors import BudgetError, RankMapError, StudyFileError
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.spec import Allocation, SearchSpec

DEPTH_BUCKETS = 4
"""Of the space ``groups``, where the study file names no number."""

_BLENDS = 10
"""Steps of uniformity among which a given rank map's nearest is looked for."""

Params = dict[str, float]
"""Parameter name → value, as Optuna stores them; whole numbers for ``direct``."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A rank map that a study measures first: of one allocation, at a kept fraction of the target layers."""

    kept: float
    allocation: Allocation

    @property
    def source(self) -> str:
        """How trials of this seed are labelled; no two seeds alike."""
        return f"{'closed form' if self.allocation == 'closed-form' else self.allocation} {self.kept}"

    @property
    def is_own(self) -> bool:
        """Of the allocator alone; the others have to be given."""
        return self.allocation in ("closed-form", "uniform")

    def rank_map(self, allocator: Allocator) -> RankMap:
        """The rank map itself, of a seed that is the allocator's own."""
        assert self.is_own
        return allocator.uniform(self.kept) if self.allocation == "uniform" else allocator.closed_form(self.kept)


GivenSeeds = Mapping[Seed, RankMap]
"""Rank maps of the seeds that are not the allocator's own."""


def ladder(search: SearchSpec, allocator: Allocator) -> tuple[Seed, ...]:
    """The seeds of a study: for each allocation of its seeds, each kept fraction of its ladder.

    The allocation that is named first has been measured over the whole range when the second one begins, so that a
    study which ends early has a front of it.

    Raises:
        BudgetError: a kept fraction below what the smallest ranks need.
    """
    kept = dict.fromkeys(search.ladder)
    for fraction in kept:
        allocator.space.budget(fraction)
    return tuple(Seed(fraction, allocation) for allocation in search.seeds for fraction in kept)


class SearchSpace(Protocol):
    """What a sampler chooses. Every choice within the distributions decodes to a rank map."""

    @property
    def allocator(self) -> Allocator:
        """The closed form that the space is built on."""

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Parameter name → the values it may take."""

    def decode(self, params: Mapping[str, float]) -> RankMap:
        """The rank map that ``params`` mean."""

    def encode(self, seed: Seed) -> Params:
        """The parameters that decode to the rank map of a seed that is the allocator's own."""

    def nearest(self, kept: float, rank_map: RankMap) -> Params:
        """Parameters whose rank map is near to a given one, made for a kept fraction."""


def check_range(search: SearchSpec, space: RankSpace) -> None:
    """Refuse a ladder or a range of kept fractions that the layers cannot meet, before anything is computed.

    Raises:
        BudgetError: a kept fraction below what the smallest ranks need.
        StudyFileError: a ladder that leaves the range.
    """
    _refuse_impossible(search, space)
    if not _is_whole_numbers(search):
        _kept_range(search, space)
    for kept in search.ladder:
        space.budget(kept)


def make_space(search: SearchSpec, allocator: Allocator) -> SearchSpace:
    """The space that a study file asks for.

    Raises:
        BudgetError: no kept fraction of the study's range can be met.
        StudyFileError: a ladder that leaves the range.
    """
    _refuse_impossible(search, allocator.space)
    if _is_whole_numbers(search):
        return DirectSpace(allocator)
    return MultiplierSpace(search, allocator)


def _is_whole_numbers(search: SearchSpec) -> bool:
    """Mutation hands whole rank maps over beside the parameters, which then need no number for every layer."""
    return search.space == "direct" and search.sampler != "mutation"


def _terms(search: SearchSpec, shapes: Sequence[LayerShape]) -> dict[str, Floats]:
    """Name of every multiplier → what it adds to the u of each layer at 1. Terms that would scale all layers alike
    change nothing and are left out."""
    if search.space == "direct":
        return {}
    depths = {shape.depth for shape in shapes}
    first, last = min(depths), max(depths)
    buckets = min(search.depth_buckets or DEPTH_BUCKETS, last - first + 1)
    stretches = [(shape.depth - first) * buckets // (last - first + 1) for shape in shapes]
    if search.space == "groups":
        return _one_for_each([(shape.group, at) for shape, at in zip(shapes, stretches, strict=True)])
    terms = _one_for_each([(shape.group,) for shape in shapes])
    x = np.array([2 * (shape.depth - first) / max(1, last - first) - 1 for shape in shapes])
    polynomials = {"u.depth.linear": x, "u.depth.quadratic": (3 * x * x - 1) / 2}
    terms |= dict(list(polynomials.items())[: len(depths) - 1])
    return terms if search.depth_buckets is None else terms | _one_for_each([("depth", at) for at in stretches])


def _one_for_each(places: Sequence[tuple[str | int, ...]]) -> dict[str, Floats]:
    """A multiplier for the layers of every place; none where all are in one."""
    found = {
        ".".join(map(str, ("u", *place))): np.array([float(place == other) for other in places])
        for place in sorted(set(places))
    }
    return found if len(found) > 1 else {}


class MultiplierSpace:
    """The budget, and multipliers u of groups of layers around the closed form.

    ``kept`` is the kept fraction of the target layers and ``uniformity`` goes from the closed form (0) to uniform
    (1); its cube is what rank maps are blended by, so that half of all proposals lie within an eighth of the way from
    the closed form, which is the far better end. A layer's predicted rise is scaled by exp(u) before allocation.

    In the space ``multipliers`` a layer's u is the sum of ``u.<type>`` of its layer type, and of ``u.depth.linear``
    and ``u.depth.quadratic`` times the Legendre polynomials P1(x) = x and P2(x) = (3x² - 1) / 2 of its depth x, scaled
    to [-1, 1] over the model; a single depth has no linear term, fewer than three no quadratic one. ``depth_buckets``
    cuts the model's blocks into as many buckets of about equal depth and adds a ``u.depth.<bucket>`` for each. In
    ``groups`` u is ``u.<type>.<bucket>``. Where there are no multipliers, rank maps stand near the blends of closed
    form and uniform.
    """

    def __init__(self, search: SearchSpec, allocator: Allocator) -> None:
        self._search = search
        self.allocator = allocator
        self._kept = _kept_range(search, allocator.space)
        self._terms = _terms(search, allocator.space.shapes)
        self._last: tuple[tuple[float, ...], RankMap] | None = None

    @property
    def reach(self) -> float:
        """Multipliers are within ± this."""
        return self._search.multiplier_range

    @property
    def terms(self) -> Mapping[str, Floats]:
        """Name of every multiplier → what it adds to the u of each layer (layers,) at 1."""
        return self._terms

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """``kept``, ``uniformity`` and the multipliers."""
        reach = self._search.multiplier_range
        return {
            "kept": FloatDistribution(*self._kept),
            "uniformity": FloatDistribution(0.0, 1.0),
            **{name: FloatDistribution(-reach, reach) for name in self._terms},
        }

    def decode(self, params: Mapping[str, float]) -> RankMap:
        """Allocate the budget under the multipliers; what a sampler has just tried is not computed again."""
        kept, uniformity, *values = wanted = tuple(params[name] for name in ("kept", "uniformity", *self._terms))
        last = self._last
        if last is None or last[0] != wanted:
            shapes = self.allocator.space.shapes
            total = sum((u * term for u, term in zip(values, self._terms.values(), strict=True)), np.zeros(len(shapes)))
            multipliers = {shape.name: float(u) for shape, u in zip(shapes, total, strict=True)}
            self._last = last = wanted, self.allocator.blend(kept, uniformity**3, multipliers)
        return last[1]

    def encode(self, seed: Seed) -> Params:
        """All multipliers zero: exactly the seed's rank map."""
        zeros = dict.fromkeys(self.distributions, 0.0)
        return {**zeros, "kept": seed.kept, "uniformity": float(seed.allocation == "uniform")}

    def nearest(self, kept: float, rank_map: RankMap) -> Params:
        """The same kept fraction (or the nearest of the study's range), all multipliers zero, and of a few blends with
        uniform the one that differs by the fewest parameters, layer by layer."""
        zeros, (low, high) = dict.fromkeys(self.distributions, 0.0), self._kept
        kept = min(max(kept, low), high)
        blends = [{**zeros, "kept": kept, "uniformity": step / _BLENDS} for step in range(_BLENDS + 1)]
        return min(blends, key=lambda params: self._distance(self.decode(params), rank_map))

    def _distance(self, one: RankMap, other: RankMap) -> int:
        space = self.allocator.space
        return sum(
            abs(shape.params(one.get(shape.name), space.storage) - shape.params(other.get(shape.name), space.storage))
            for shape in space.shapes
        )


class DirectSpace:
    """One whole number a target layer: the index of its rank among the allowed ones, ascending, dense last.

    A layer that has no choice, dense or frozen at a rank, has no parameter.
    """

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        space = allocator.space
        ranks = {shape.name: space.ranks(shape) for shape in space.shapes if space.ranks(shape)}
        self._fixed = {name: ranks[name][0] for name in ranks if not space.may_be_dense(space[name])}
        self._ranks = {name: allowed for name, allowed in ranks.items() if name not in self._fixed}

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Module name → 0 .. number of allowed ranks."""
        return {name: IntDistribution(0, len(ranks)) for name, ranks in self._ranks.items()}

    def decode(self, params: Mapping[str, float]) -> RankMap:
        """Look the ranks up."""
        chosen = ((name, ranks, int(params[name])) for name, ranks in self._ranks.items())
        found = self._fixed | {name: ranks[index] for name, ranks, index in chosen if index < len(ranks)}
        # In the order of the layers, as allocations are.
        return RankMap((shape.name, found[shape.name]) for shape in self.allocator.space.shapes if shape.name in found)

    def encode(self, seed: Seed) -> Params:
        """The indices of the seed's ranks."""
        return self.encode_map(seed.rank_map(self.allocator))

    def nearest(self, kept: float, rank_map: RankMap) -> Params:
        """The indices of its ranks, exactly."""
        return self.encode_map(rank_map)

    def encode_map(self, rank_map: RankMap) -> Params:
        """The indices of a rank map's ranks.

        Raises:
            RankMapError: a rank that is not allowed.
        """
        for name, rank in rank_map.items():
            if rank != self._fixed.get(name) and rank not in self._ranks.get(name, ()):
                raise RankMapError(f"{name} may not have rank {rank} in this study; see its [targets] table")
        return {
            name: ranks.index(rank_map[name]) if name in rank_map else len(ranks) for name, ranks in self._ranks.items()
        }


def random_params(distributions: Mapping[str, BaseDistribution], seed: str) -> Params:
    """A point of a space, drawn evenly."""
    random = np.random.default_rng(list(seed.encode()))
    drawn: Params = {}
    for name, allowed in distributions.items():
        assert isinstance(allowed, FloatDistribution | IntDistribution)
        whole = isinstance(allowed, IntDistribution)
        drawn[name] = (
            int(random.integers(int(allowed.low), int(allowed.high) + 1))
            if whole
            else float(random.uniform(allowed.low, allowed.high))
        )
    return drawn


def _kept_range(search: SearchSpec, space: RankSpace) -> tuple[float, float]:
    """The study's range of kept fractions, its lower end raised to what the smallest ranks need, its upper end lowered
    to what frozen layers and the goal for parameters leave."""
    least, most = _least_kept(space), _most_kept(search, space)
    low, high = max(search.min_kept, least), min(search.max_kept, most)
    upper = "search.max_kept" if high == search.max_kept else _most_kept_by(search, space)
    if high < low:
        told = f"{upper} is {high:g}" if upper == "search.max_kept" else f"{upper} allows a kept fraction of {high:.4g}"
        if least >= search.min_kept:
            by = "targets.rank_multiple and targets.frozen leave" if space.is_bounded else "there are"
            raise BudgetError(
                f"{told}, but the smallest ranks that {by} need {least:.4g} of the target layers; change one of them"
            )
        raise BudgetError(f"{told}, below search.min_kept = {search.min_kept:g}; change one of them")
    for kept in search.ladder:
        if not low <= kept <= high:
            raise StudyFileError(
                f"search.ladder holds {kept:g}, outside search.min_kept to {upper} ({low:.4g} to {high:.4g}); "
                "change one of them"
            )
    if search.interest is not None and not max(low, search.interest[0]) < min(high, search.interest[1]):
        raise StudyFileError(
            f"search.interest ({search.interest[0]:g} to {search.interest[1]:g}) lies outside of what the layers allow "
            f"({low:.4g} to {high:.4g}); change it"
        )
    return low, high


def _refuse_impossible(search: SearchSpec, space: RankSpace) -> None:
    """Refuse a goal for parameters that no rank map meets."""
    least = space.model_params - space.dense_params + space.min_params
    if search.max_params is not None and search.max_params < least:
        raise BudgetError(
            f"search.max_params is {search.max_params:,}, but the smallest ranks leave {least:,} parameters; raise it"
        )


def _most_kept(search: SearchSpec, space: RankSpace) -> float:
    """The largest kept fraction that frozen layers and the goal for parameters leave."""
    most = space.max_params
    if search.max_params is not None:
        most = min(most, search.max_params - (space.model_params - space.dense_params))
    return most / space.dense_params


def _most_kept_by(search: SearchSpec, space: RankSpace) -> str:
    """The key that lowers the largest kept fraction."""
    return (
        "targets.frozen" if _most_kept(search, space) * space.dense_params >= space.max_params else "search.max_params"
    )


def _least_kept(space: RankSpace) -> float:
    """The smallest kept fraction that has a budget."""
    kept = space.min_params / space.dense_params
    # Rounding the quotient down may lose the last parameter; RankSpace.budget rounds to the nearest millionth.
    while int(kept * space.dense_params + 1e-6) < space.min_params:
        kept = math.nextafter(kept, 2.0)
    return kept
