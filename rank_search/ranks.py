"""Layer shapes, rank maps, and the space of rank maps of one model. Pure: no torch, no Optuna."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from rank_search.errors import BudgetError, RankMapError, TargetError

Storage = Literal["two-factor", "pivoted"]
"""How a matrix of rank r is stored: two factors, r (m + n) numbers, or r kept rows and the
coefficients of the others, r (m + n - r) numbers."""


Ints = NDArray[np.int64]
_Whole = TypeVar("_Whole", int, Ints)


def _factored(rank: _Whole, sides: _Whole, storage: Storage) -> _Whole:
    """Numbers stored at a rank of a layer, or of many, whose m + n are ``sides``."""
    return rank * (sides - rank) if storage == "pivoted" else rank * sides


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A target layer ``y = W x`` with ``W`` of shape (m, n), without its bias.

    ``group`` is the layer's type (its module name inside the block), ``depth`` the index of its block.
    """

    name: str
    m: int
    n: int
    group: str = ""
    depth: int = 0

    def __post_init__(self) -> None:
        if self.m < 1 or self.n < 1:
            raise ValueError(f"layer {self.name}: shape ({self.m}, {self.n}) is empty")

    @property
    def dense_params(self) -> int:
        """Numbers in the dense matrix, m n."""
        return self.m * self.n

    def params(self, rank: int | None, storage: Storage = "two-factor") -> int:
        """Numbers stored at ``rank``; ``None`` is dense."""
        if rank is None:
            return self.dense_params
        return _factored(rank, self.m + self.n, storage)

    def max_rank(self, storage: Storage = "two-factor") -> int:
        """Largest rank that stores fewer numbers than the dense matrix; 0 if there is none."""
        if storage == "pivoted":
            return min(self.m, self.n) - 1
        return (self.dense_params - 1) // (self.m + self.n)


def frozen_ranks(
    shapes: Sequence[LayerShape], patterns: Mapping[str, int | Literal["dense"]], storage: Storage
) -> tuple[tuple[str, int | None], ...]:
    """The layers that ``patterns`` on their names freeze, each with its rank, None for dense; the last one counts.

    Raises:
        TargetError: a pattern that fits no layer, or a rank at which a layer is smaller dense.
    """
    frozen: dict[str, int | None] = {}
    for pattern, choice in patterns.items():
        fitting = [shape for shape in shapes if fnmatchcase(shape.name, pattern)]
        if not fitting:
            raise TargetError(
                f"targets.frozen pattern {pattern!r} fits no target layer; see `rank-search layers MODEL`"
            )
        for shape in fitting:
            top = shape.max_rank(storage)
            if choice != "dense" and choice > top:
                raise TargetError(
                    f"targets.frozen gives {shape.name} rank {choice}, but above {top} its ({shape.m}, {shape.n}) "
                    f'matrix is smaller dense ({storage} storage); write "dense" or a smaller rank'
                )
            frozen[shape.name] = None if choice == "dense" else choice
    return tuple(frozen.items())


class RankMap(Mapping[str, int]):
    """Module name → rank. A target layer that is absent is left dense. Immutable and hashable."""

    __slots__ = ("_hash", "_ranks")

    def __init__(self, ranks: Mapping[str, int] | Iterable[tuple[str, int]] = ()) -> None:
        self._ranks: dict[str, int] = dict(ranks)
        for name, rank in self._ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise RankMapError(f"rank of {name} must be a whole number of at least 1, not {rank!r}")
        self._hash = hash(frozenset(self._ranks.items()))

    def __getitem__(self, name: str) -> int:
        return self._ranks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankMap) and self._ranks == other._ranks

    def __repr__(self) -> str:
        return f"RankMap({self._ranks!r})"

    @property
    def digest(self) -> str:
        """SHA-256 of the sorted JSON form: equal rank maps have equal digests."""
        text = json.dumps(self._ranks, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RankSpace:
    """All rank maps of one model: the target layers, how ranks are stored, and which ranks are allowed.

    ``model_params`` counts the whole dense model, tied weights once. ``multiple`` allows only ranks that
    are multiples of it (a layer whose largest useful rank is below it keeps that rank as its only one).
    ``frozen`` gives single layers one rank each, whatever ``multiple`` is, or dense (None).
    """

    shapes: tuple[LayerShape, ...]
    model_params: int
    storage: Storage = "two-factor"
    multiple: int = 1
    frozen: tuple[tuple[str, int | None], ...] = ()
    _by_name: dict[str, LayerShape] = field(init=False, repr=False, compare=False)
    _frozen: dict[str, int | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {shape.name: shape for shape in self.shapes}
        if len(by_name) != len(self.shapes):
            raise ValueError("two target layers have the same name")
        if self.multiple < 1:
            raise ValueError(f"ranks must be multiples of at least 1, not {self.multiple}")
        object.__setattr__(self, "_by_name", by_name)
        object.__setattr__(self, "_frozen", dict(self.frozen))

    def __getitem__(self, name: str) -> LayerShape:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def dense_params(self) -> int:
        """Parameters of all target layers when dense."""
        return sum(shape.dense_params for shape in self.shapes)

    @cached_property
    def min_params(self) -> int:
        """Parameters of all target layers at their smallest allowed ranks."""
        return sum(
            shape.params(ranks[0], self.storage) if ranks else shape.dense_params
            for shape in self.shapes
            for ranks in [self.ranks(shape)]
        )

    @property
    def is_bounded(self) -> bool:
        """Whether a study leaves layers less choice than their shapes do."""
        return self.multiple > 1 or bool(self.frozen)

    def max_rank(self, shape: LayerShape) -> int:
        """Largest allowed rank of a layer below dense; 0 if it can only be dense."""
        return max(self.ranks(shape), default=0)

    def ranks(self, shape: LayerShape) -> range:
        """The allowed ranks of a layer, ascending, dense not among them."""
        if shape.name in self._frozen:
            rank = self._frozen[shape.name]
            return range(0) if rank is None else range(rank, rank + 1)
        top = shape.max_rank(self.storage)
        step = max(1, min(self.multiple, top))
        return range(step, top + 1, step)

    def may_be_dense(self, shape: LayerShape) -> bool:
        """Whether a layer may be left dense: it may, unless it is frozen at a rank."""
        return self._frozen.get(shape.name) is None

    def target_params(self, rank_map: RankMap) -> int:
        """Parameters of the target layers under ``rank_map``, in this space's storage form."""
        names, sides, dense = self._sizes
        ranks = np.array([rank_map.get(name, 0) for name in names], dtype=np.int64)
        return int(np.where(ranks > 0, _factored(ranks, sides, self.storage), dense).sum())

    @cached_property
    def _sizes(self) -> tuple[list[str], Ints, Ints]:
        """Name, m + n and m n of every layer: parameters are counted several times in every trial."""
        sides = np.array([(shape.m, shape.n) for shape in self.shapes], dtype=np.int64).reshape(-1, 2)
        return [shape.name for shape in self.shapes], sides.sum(axis=1), sides.prod(axis=1)

    def num_params(self, rank_map: RankMap) -> int:
        """Parameters of the whole model under ``rank_map``."""
        return self.model_params - self.dense_params + self.target_params(rank_map)

    @cached_property
    def max_params(self) -> int:
        """Parameters of all target layers at their largest choices."""
        return sum(
            shape.dense_params if self.may_be_dense(shape) else shape.params(self.max_rank(shape), self.storage)
            for shape in self.shapes
        )

    def kept_of_targets(self, rank_map: RankMap) -> float:
        """Kept fraction of the target layers."""
        return self.target_params(rank_map) / self.dense_params

    def kept_of_model(self, rank_map: RankMap) -> float:
        """Kept fraction of the whole model."""
        return self.num_params(rank_map) / self.model_params

    def with_storage(self, storage: Storage) -> RankSpace:
        """The same layers counted in another storage form."""
        return RankSpace(self.shapes, self.model_params, storage, self.multiple, self.frozen)

    def budget(self, kept: float) -> int:
        """Parameters of the target layers that a kept fraction of them allows.

        Raises:
            BudgetError: outside (0, 1], or below what the smallest ranks need.
        """
        if not 0 < kept <= 1:
            raise BudgetError(f"kept fraction of the target layers must be in (0, 1], not {kept:g}")
        # The small addend undoes binary rounding such as 0.29 * 100 = 28.999999999999996.
        budget = int(kept * self.dense_params + 1e-6)
        if budget < self.min_params:
            raise BudgetError(
                f"kept fraction {kept:g} of the target layers allows {budget} parameters, but their smallest ranks "
                f"need {self.min_params}; keep at least {self.min_params / self.dense_params:.4g}"
            )
        return budget

    def validate(self, rank_map: RankMap) -> None:
        """Check that every rank belongs to a target layer and is at most its largest useful rank.

        Raises:
            RankMapError: naming the first module that does not fit.
        """
        for name, rank in rank_map.items():
            shape = self._by_name.get(name)
            if shape is None:
                raise RankMapError(f"{name} is not a target layer of this model; make a rank map for this model")
            top = shape.max_rank(self.storage)
            if rank > top:
                raise RankMapError(
                    f"{name} has rank {rank}, but above {top} its ({shape.m}, {shape.n}) matrix is smaller dense "
                    f"({self.storage} storage); leave it out of the rank map"
                )
