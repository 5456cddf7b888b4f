"""The two search spaces: what a sampler chooses, and which rank map that means. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from rank_search.allocation import Allocator
from rank_search.errors import BudgetError, RankMapError, StudyFileError
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.spec import Allocation, SearchSpec

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
    """The seeds of a study: for each kept fraction of its ladder, each allocation of its seeds.

    Raises:
        BudgetError: a kept fraction below what the smallest ranks need.
    """
    kept = dict.fromkeys(search.ladder)
    for fraction in kept:
        allocator.space.budget(fraction)
    return tuple(Seed(fraction, allocation) for fraction in kept for allocation in search.seeds)


class SearchSpace(Protocol):
    """What a sampler chooses. Every choice within the distributions decodes to a rank map."""

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
    if search.space == "multipliers":
        _kept_range(search, space)
    for kept in search.ladder:
        space.budget(kept)


def make_space(search: SearchSpec, allocator: Allocator) -> SearchSpace:
    """The space that a study file asks for.

    Raises:
        BudgetError: no kept fraction of the study's range can be met.
        StudyFileError: a ladder that leaves the range.
    """
    if search.space == "direct":
        return DirectSpace(allocator)
    return MultiplierSpace(search, allocator)


class MultiplierSpace:
    """The budget, and multipliers u by layer type and depth around the closed form.

    ``kept`` is the kept fraction of the target layers and ``uniformity`` goes from the closed form (0) to uniform
    (1); its cube is what rank maps are blended by, so that half of all proposals lie within an eighth of the way from
    the closed form, which is the far better end. A layer's predicted rise is scaled by exp(u) before allocation; its
    u is the sum of ``u.<group>`` of its layer type, and of ``u.depth.linear`` and ``u.depth.quadratic`` times the
    Legendre polynomials P1(x) = x and P2(x) = (3x² - 1) / 2 of its depth x, scaled to [-1, 1] over the model. Terms
    that would scale all layers alike change nothing and are left out: a single layer type's, the linear one at a
    single depth, the quadratic one at fewer
    than three.
    """

    def __init__(self, search: SearchSpec, allocator: Allocator) -> None:
        self._search = search
        self._allocator = allocator
        self._kept = _kept_range(search, allocator.space)
        shapes = allocator.space.shapes
        groups = sorted({shape.group for shape in shapes})
        self._groups = groups if len(groups) > 1 else []
        depths = {shape.depth for shape in shapes}
        self._shallow, self._deep = min(depths), max(depths)
        self._depth_terms = ["u.depth.linear", "u.depth.quadratic"][: max(0, len(depths) - 1)]

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """``kept``, ``uniformity`` and the multipliers."""
        reach = self._search.multiplier_range
        names = [*(f"u.{group}" for group in self._groups), *self._depth_terms]
        return {
            "kept": FloatDistribution(*self._kept),
            "uniformity": FloatDistribution(0.0, 1.0),
            **{name: FloatDistribution(-reach, reach) for name in names},
        }

    def decode(self, params: Mapping[str, float]) -> RankMap:
        """Allocate the budget under the multipliers."""
        multipliers = {shape.name: self._multiplier(shape, params) for shape in self._allocator.space.shapes}
        return self._allocator.blend(params["kept"], params["uniformity"] ** 3, multipliers)

    def encode(self, seed: Seed) -> Params:
        """All multipliers zero: exactly the seed's rank map."""
        zeros = dict.fromkeys(self.distributions, 0.0)
        return {**zeros, "kept": seed.kept, "uniformity": float(seed.allocation == "uniform")}

    def nearest(self, kept: float, rank_map: RankMap) -> Params:
        """The same kept fraction, all multipliers zero, and of a few blends with uniform the one that differs by the
        fewest parameters, layer by layer."""
        zeros = dict.fromkeys(self.distributions, 0.0)
        blends = [{**zeros, "kept": kept, "uniformity": step / _BLENDS} for step in range(_BLENDS + 1)]
        return min(blends, key=lambda params: self._distance(self.decode(params), rank_map))

    def _distance(self, one: RankMap, other: RankMap) -> int:
        space = self._allocator.space
        return sum(
            abs(shape.params(one.get(shape.name), space.storage) - shape.params(other.get(shape.name), space.storage))
            for shape in space.shapes
        )

    def _multiplier(self, shape: LayerShape, params: Mapping[str, float]) -> float:
        u = params[f"u.{shape.group}"] if self._groups else 0.0
        if self._depth_terms:
            x = 2 * (shape.depth - self._shallow) / (self._deep - self._shallow) - 1
            for name, polynomial in zip(self._depth_terms, (x, (3 * x * x - 1) / 2), strict=False):
                u += params[name] * polynomial
        return u


class DirectSpace:
    """One whole number a target layer: the index of its rank among the allowed ones, ascending, dense last.

    A layer that can only be dense has no parameter.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        space = allocator.space
        self._ranks = {shape.name: space.ranks(shape) for shape in space.shapes if space.ranks(shape)}

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Module name → 0 .. number of allowed ranks."""
        return {name: IntDistribution(0, len(ranks)) for name, ranks in self._ranks.items()}

    def decode(self, params: Mapping[str, float]) -> RankMap:
        """Look the ranks up."""
        chosen = ((name, ranks, int(params[name])) for name, ranks in self._ranks.items())
        return RankMap((name, ranks[index]) for name, ranks, index in chosen if index < len(ranks))

    def encode(self, seed: Seed) -> Params:
        """The indices of the seed's ranks."""
        return self.encode_map(seed.rank_map(self._allocator))

    def nearest(self, kept: float, rank_map: RankMap) -> Params:
        """The indices of its ranks, exactly."""
        return self.encode_map(rank_map)

    def encode_map(self, rank_map: RankMap) -> Params:
        """The indices of a rank map's ranks.

        Raises:
            RankMapError: a rank that is not allowed.
        """
        for name, rank in rank_map.items():
            if rank not in self._ranks.get(name, ()):
                raise RankMapError(f"{name} may not have rank {rank} in this study; see its [targets] table")
        return {
            name: ranks.index(rank_map[name]) if name in rank_map else len(ranks) for name, ranks in self._ranks.items()
        }


def _kept_range(search: SearchSpec, space: RankSpace) -> tuple[float, float]:
    """The study's range of kept fractions, its lower end raised to what the smallest ranks need."""
    least = _least_kept(space)
    low, high = max(search.min_kept, least), search.max_kept
    if high < low:
        raise BudgetError(
            f"search.max_kept is {high:g}, but the smallest ranks need {least:.4g} of the target layers; raise it"
        )
    for kept in search.ladder:
        space.budget(kept)
        if not low <= kept <= high:
            raise StudyFileError(
                f"search.ladder holds {kept:g}, outside search.min_kept to search.max_kept ({low:.4g} to {high:g}); "
                "change one of them"
            )
    return low, high


def _least_kept(space: RankSpace) -> float:
    """The smallest kept fraction that has a budget."""
    kept = space.min_params / space.dense_params
    # Rounding the quotient down may lose the last parameter; RankSpace.budget rounds to the nearest millionth.
    while int(kept * space.dense_params + 1e-6) < space.min_params:
        kept = math.nextafter(kept, 2.0)
    return kept
