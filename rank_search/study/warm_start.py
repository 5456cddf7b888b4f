"""Fronts of other studies as seeds: the same model under another text, or a sibling of another size. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from rank_search.allocation import Allocator
from rank_search.errors import BudgetError, StudyFileError
from rank_search.front import FrontPoint
from rank_search.ranks import LayerShape, RankMap, Storage
from rank_search.spec import SearchSpec, load_study_file
from rank_search.study.store import StudyStore

SOURCE = "warm-start"
"""Start of the source of such seeds."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A rank map that a point of another study's front became, and its kept fraction of the target layers."""

    source: str
    kept: float
    rank_map: RankMap


@dataclass(frozen=True, slots=True)
class OtherFront:
    """The front of another study: its name, its target layers, how it counts them, and the points."""

    study: str
    shapes: tuple[LayerShape, ...]
    storage: Storage
    points: tuple[FrontPoint, ...]

    @classmethod
    def read(cls, told: str, own_database: str, own_name: str) -> Self:
        """Read a front as ``--warm-start`` names it.

        Args:
            told: a study file, whose database is the SQLite file beside it; ``URL#NAME``; or a name in the database of
                the study that is to begin with it.
            own_database, own_name: of that one.

        Raises:
            StudyFileError: no such study file, a database without a study's name, or the study itself.
            StorageError: no such database, or no such study in it.
        """
        if Path(told).suffix == ".toml":
            file = load_study_file(told)
            database, name = file.default_storage, file.spec.name
        elif "#" in told:
            database, _, name = told.rpartition("#")
        elif "://" in told:
            raise StudyFileError(f"--warm-start {told} names a database but no study; append #NAME")
        else:
            database, name = own_database, told
        if (database, name) == (own_database, own_name):
            raise StudyFileError(f"--warm-start {told} is the study itself, which goes on anyway; name another one")
        with StudyStore(database) as store:
            record, front = store.study(name), store.front(name)
        return cls(name, record.facts.shapes, record.spec.targets.storage, front.points)

    def carried_to(self, allocator: Allocator, search: SearchSpec) -> tuple[Carried, ...]:
        """The points as rank maps of a study's own layers, within its range of kept fractions.

        Raises:
            BudgetError: no point lies in the range.
        """
        kept_range = search.min_kept, search.max_kept
        return carried_over(self.points, self.study, self.shapes, self.storage, allocator, kept_range)


def carried_over(
    points: Iterable[FrontPoint], study: str, shapes: Sequence[LayerShape], storage: Storage, allocator: Allocator,
    kept_range: tuple[float, float],
) -> tuple[Carried, ...]:  # fmt: skip
    """Points of another study's front as rank maps of this study's layers, at their own kept fractions.

    A layer takes the kept fraction of the other model's layers of its type at its relative depth, interpolated between
    two where the models differ in depth, and a layer whose type the other model lacks that of the whole. So a point of
    the same model is carried over as it is. Points outside of ``kept_range`` are left out.

    Args:
        study: the other study's name.
        shapes: its target layers.
        storage: how its matrices are counted.
        allocator: of this study's layers.

    Raises:
        BudgetError: no point lies in the range.
    """
    low, high = kept_range
    found = []
    for point in points:
        kept = point.measurement.kept_of_targets
        if low <= kept <= high:
            wanted = _wanted(point.rank_map, shapes, storage, allocator.space.shapes, kept)
            rank_map = allocator.towards(kept, wanted)
            found.append(Carried(f"{SOURCE} {study} {point.trial}", kept, rank_map))
    if not found:
        raise BudgetError(
            f"no point of the front of study {study!r} keeps between {low:g} and {high:g} of its target layers; "
            "widen search.min_kept and search.max_kept, or start without it"
        )
    return tuple(found)


def _wanted(
    rank_map: RankMap, theirs: Sequence[LayerShape], storage: Storage, ours: Sequence[LayerShape], kept: float
) -> dict[str, float]:
    """Parameters that each of our layers is to hold."""
    profiles = _profiles(rank_map, theirs, storage)
    depth = _relative_depths(ours)
    wanted = {}
    for shape in ours:
        profile = profiles.get(shape.group)
        fraction = kept if profile is None else float(np.interp(depth[shape.depth], *profile))
        # Of the same model, what comes back is what was there, but for rounding.
        wanted[shape.name] = round(fraction * shape.dense_params, 3)
    return wanted


def _profiles(
    rank_map: RankMap, shapes: Sequence[LayerShape], storage: Storage
) -> dict[str, tuple[list[float], list[float]]]:
    """Layer type → relative depths, ascending, and the kept fraction of its layers at each."""
    depth = _relative_depths(shapes)
    held: dict[str, dict[float, tuple[int, int]]] = {}
    for shape in shapes:
        of_type, at = held.setdefault(shape.group, {}), depth[shape.depth]
        params, dense = of_type.get(at, (0, 0))
        of_type[at] = params + shape.params(rank_map.get(shape.name), storage), dense + shape.dense_params
    return {
        group: (sorted(of_type), [of_type[at][0] / of_type[at][1] for at in sorted(of_type)])
        for group, of_type in held.items()
    }


def _relative_depths(shapes: Sequence[LayerShape]) -> Mapping[int, float]:
    """Depth → 0 for the first block of the model to 1 for its last."""
    first, last = min(shape.depth for shape in shapes), max(shape.depth for shape in shapes)
    return {depth: (depth - first) / max(1, last - first) for depth in range(first, last + 1)}
