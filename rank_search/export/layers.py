"""The target layers of a study as people think of them: by type and by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rank_search.ranks import LayerShape, RankMap, RankSpace


@dataclass(frozen=True, slots=True)
class TypeSummary:
    """What a rank map does to the layers of one type.

    Attributes:
        group: the type.
        layers: how many there are.
        dense: how many of them are left dense.
        kept: kept fraction of their parameters.
        ranks: of the others, ascending.
        highest: largest rank that would store fewer numbers than a dense matrix, over all of them.
    """

    group: str
    layers: int
    dense: int
    kept: float
    ranks: tuple[int, ...]
    highest: int


def groups(space: RankSpace) -> tuple[str, ...]:
    """The layer types, in the order of a block."""
    return tuple(dict.fromkeys(shape.group for shape in space.shapes))


def depths(space: RankSpace) -> tuple[int, ...]:
    """The blocks that have target layers, ascending."""
    return tuple(sorted({shape.depth for shape in space.shapes}))


def by_place(space: RankSpace) -> dict[tuple[str, int], list[LayerShape]]:
    """Layer type and block → the layers there: one, but for matrices that are factorised in parts."""
    places: dict[tuple[str, int], list[LayerShape]] = {}
    for shape in space.shapes:
        places.setdefault((shape.group, shape.depth), []).append(shape)
    return places


def kept_of(shapes: Sequence[LayerShape], rank_map: RankMap, space: RankSpace) -> float:
    """Kept fraction of some layers."""
    stored = sum(shape.params(rank_map.get(shape.name), space.storage) for shape in shapes)
    return stored / sum(shape.dense_params for shape in shapes)


def type_summaries(rank_map: RankMap, space: RankSpace) -> list[TypeSummary]:
    """One for every layer type."""
    found = []
    for group in groups(space):
        shapes = [shape for shape in space.shapes if shape.group == group]
        ranks = sorted(rank_map[shape.name] for shape in shapes if shape.name in rank_map)
        highest = max(shape.max_rank(space.storage) for shape in shapes)
        kept = kept_of(shapes, rank_map, space)
        found.append(TypeSummary(group, len(shapes), len(shapes) - len(ranks), kept, tuple(ranks), highest))
    return found


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
