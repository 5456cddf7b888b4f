"""What a study found out about its model, from its measurements alone. Pure: no torch, no Optuna."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rank_search.front import FrontPoint
from rank_search.ranks import LayerShape, RankMap, RankSpace

PLACES = ("first", "middle", "last")
"""Thirds of the model's blocks."""
LEAST_PAIRS = 4
"""Pairs below which no correlation is told."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tendency:
    """What the front gives to the layers of one type in one third of the blocks, against the closed form.

    Attributes:
        group: the layer type.
        place: one of :data:`PLACES`.
        kept: kept fraction of these layers, the mean over the front.
        closed_form: the same under the closed form at the same sizes.
        points: of the front that could be compared.
    """

    group: str
    place: str
    kept: float
    closed_form: float
    points: int

    @property
    def difference(self) -> float:
        """Above 0: the front gives more."""
        return self.kept - self.closed_form


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well one way to obtain a loss tells the order of those of the highest fidelity.

    Attributes:
        label: ``predicted`` or ``sliced 2048 tokens``, say.
        lower, higher: losses of the same rank maps, nats per token, in equal order.
        spearman: rank correlation over all of them; mostly that of sizes.
        at_equal_size: rank correlation of what is left of both when their dependence on size is taken out; None where
            nothing is left of one.
    """

    label: str
    lower: tuple[float, ...]
    higher: tuple[float, ...]
    spearman: float
    at_equal_size: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """Kept fractions of single layers along the front.

    Attributes:
        layers: by type, then by depth.
        trials: of the front, by ascending parameters.
        kept: kept fraction of every layer (row) at every point (column).
    """

    layers: tuple[LayerShape, ...]
    trials: tuple[int, ...]
    kept: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Insight:
    """All of it, for one study.

    Attributes:
        study: its name.
        trials: measurements of the highest fidelity.
        tendencies: empty where the study has measured no closed form.
        importances: parameter → share of the differences in loss at equal size that it explains; empty where the
            space has no multipliers, or trials are too few.
        agreements: one for each way in which losses were obtained, the highest fidelity apart.
        profile: of the front.
        unit: what losses are a mean over.
    """

    study: str
    trials: int
    tendencies: tuple[Tendency, ...]
    importances: Mapping[str, float]
    agreements: tuple[Agreement, ...]
    profile: Profile
    unit: str


def tendencies(
    front: Iterable[FrontPoint], closed_form: Sequence[FrontPoint], space: RankSpace
) -> tuple[Tendency, ...]:
    """What layer types and depths want beside what the closed form gives them, the largest difference first.

    The closed form at a point's size is interpolated, layer by layer, between the study's own points of it and the
    dense model; smaller points than its smallest one are left out.
    """
    shapes = space.shapes
    known = {space.target_params(point.rank_map): _params(point.rank_map, space) for point in closed_form}
    if not known:
        return ()
    known[space.dense_params] = _params(RankMap(), space)
    sizes = sorted(known)
    table = np.array([known[size] for size in sizes])
    pairs = []
    for point in front:
        size = space.target_params(point.rank_map)
        if size >= sizes[0]:
            closed = np.array([np.interp(size, sizes, table[:, layer]) for layer in range(len(shapes))])
            pairs.append((_params(point.rank_map, space), closed))
    found = []
    for (group, place), layers in _places(shapes).items():
        dense = sum(shapes[layer].dense_params for layer in layers)
        ours, theirs = (np.array([pair[side][layers].sum() for pair in pairs]) / dense for side in (0, 1))
        if pairs:
            found.append(Tendency(group, place, float(ours.mean()), float(theirs.mean()), len(pairs)))
    return tuple(sorted(found, key=lambda tendency: -abs(tendency.difference)))


def agreement(label: str, pairs: Sequence[tuple[float, float, float]]) -> Agreement | None:
    """Of pairs (kept fraction, lower loss, higher loss); None where they are too few."""
    if len(pairs) < LEAST_PAIRS:
        return None
    kept, lower, higher = np.array(pairs).T
    rest = [_without_size(kept, losses) for losses in (lower, higher)]
    return Agreement(
        label, tuple(lower.tolist()), tuple(higher.tolist()), _spearman(lower, higher) or 0.0, _spearman(*rest)
    )


def profile(front: Sequence[FrontPoint], space: RankSpace) -> Profile:
    """Kept fractions of every layer along the front."""
    layers = sorted(range(len(space.shapes)), key=lambda k: (space.shapes[k].group, space.shapes[k].depth))
    columns = [_params(point.rank_map, space) for point in front]
    kept = tuple(tuple(float(c[k]) / space.shapes[k].dense_params for c in columns) for k in layers)
    return Profile(tuple(space.shapes[k] for k in layers), tuple(point.trial for point in front), kept)


def above_others(points: Sequence[FrontPoint]) -> dict[int, float]:
    """Trial → its loss above what trials of its size have, by a cubic in the kept fraction through all."""
    if not points:
        return {}
    kept = np.array([point.measurement.kept_of_targets for point in points])
    losses = np.array([point.loss for point in points])
    rest = _without_size(kept, losses)
    return {point.trial: float(above) for point, above in zip(points, rest, strict=True)}


def _params(rank_map: RankMap, space: RankSpace) -> Floats:
    return np.array([float(shape.params(rank_map.get(shape.name), space.storage)) for shape in space.shapes])


def _places(shapes: Sequence[LayerShape]) -> dict[tuple[str, str], list[int]]:
    """Layer type and third of the model → indices of its layers."""
    first, last = min(shape.depth for shape in shapes), max(shape.depth for shape in shapes)
    found: dict[tuple[str, str], list[int]] = {}
    for index, shape in enumerate(shapes):
        place = PLACES[(shape.depth - first) * len(PLACES) // (last - first + 1)]
        found.setdefault((shape.group, place), []).append(index)
    return found


def _without_size(kept: Floats, losses: Floats) -> Floats:
    """What a cubic in the kept fraction (of lower degree where points are few) leaves of losses."""
    degree = min(3, len(set(kept.tolist())) - 1, len(losses) // 4)
    scaled = kept - kept.mean()
    return losses - np.polyval(np.polyfit(scaled, losses, degree), scaled)


def _spearman(a: Floats, b: Floats) -> float | None:
    """Rank correlation (Spearman, 1904), ties by their mean rank; None where one side is constant."""
    x, y = (_ranked(values) for values in (a, b))
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranked(values: Floats) -> Floats:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[places]
    return ranks
