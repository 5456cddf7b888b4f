"""The Pareto front of validation loss against parameter count. Pure: no torch, no Optuna."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, overload

from rank_search.errors import BudgetError
from rank_search.measurement import Fidelity, Measurement
from rank_search.notebook import Row, front_html
from rank_search.ranks import RankMap

EMPTY = (
    "the front is empty: no trial has ended that meets the study's goals; run it, let it go on, or loosen its goals "
    "(`rank-search status` counts the trials)"
)


class Outcome(NamedTuple):
    """What decides whether a trial is on the front."""

    trial: int
    fidelity: Fidelity
    num_params: int
    loss: float


class _HasOutcome(Protocol):
    @property
    def trial(self) -> int: ...
    @property
    def fidelity(self) -> Fidelity: ...
    @property
    def num_params(self) -> int: ...
    @property
    def loss(self) -> float: ...


P = TypeVar("P", bound=_HasOutcome)


def non_dominated(points: Iterable[P]) -> list[P]:
    """Those of the highest fidelity that no other one dominates, by ascending parameter count: one sort, one sweep."""
    candidates = list(points)
    top = max((p.fidelity for p in candidates), default=Fidelity.PREDICTED)
    best: list[P] = []
    ranked = [p for p in candidates if p.fidelity == top]
    for point in sorted(ranked, key=lambda p: (p.num_params, p.loss, p.trial)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A measured rank map: which trial proposed it, from what source, and what came of it."""

    trial: int
    rank_map: RankMap
    measurement: Measurement
    source: str = ""

    @property
    def loss(self) -> float:
        """Validation loss, nats per token."""
        return self.measurement.loss

    @property
    def num_params(self) -> int:
        """Parameters of the whole compressed model."""
        return self.measurement.num_params

    @property
    def fidelity(self) -> Fidelity:
        """How the loss was obtained."""
        return self.measurement.fidelity

    def dominates(self, other: FrontPoint) -> bool:
        """At most the loss and at most the parameters of ``other``, and less of one.

        Of two points equal in both, the earlier trial dominates, so that a front holds each outcome once
        and does not depend on the order in which points arrive.
        """
        if (self.loss, self.num_params) == (other.loss, other.num_params):
            return self.trial < other.trial
        return self.loss <= other.loss and self.num_params <= other.num_params


@dataclass(frozen=True)
class Front(Sequence[FrontPoint]):
    """The non-dominated points of the highest fidelity, by ascending parameter count.

    Loss falls strictly as parameters rise along it.
    """

    points: tuple[FrontPoint, ...] = ()

    @classmethod
    def of(cls, points: Iterable[FrontPoint]) -> Front:
        """The front of any measured points."""
        return cls(tuple(non_dominated(points)))

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self.points)

    @overload
    def __getitem__(self, index: int) -> FrontPoint: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[FrontPoint, ...]: ...
    def __getitem__(self, index: int | slice) -> FrontPoint | tuple[FrontPoint, ...]:
        return self.points[index]

    def at_most_kept(self, kept: float) -> FrontPoint:
        """Lowest loss among the points that keep at most ``kept`` of the target layers."""
        if not 0 < kept <= 1:
            raise BudgetError(f"kept fraction of the target layers must be in (0, 1], not {kept:g}")
        self._refuse_empty()
        fitting = [p for p in self.points if p.measurement.kept_of_targets <= kept + 1e-12]
        if not fitting:
            least = min(p.measurement.kept_of_targets for p in self.points)
            raise BudgetError(
                f"no point of the front keeps at most {kept:g} of the target layers; the smallest keeps "
                f"{_rounded_up(least)}: ask for that or more, or run more trials"
            )
        return min(fitting, key=lambda p: p.loss)

    def at_most_params(self, num_params: int) -> FrontPoint:
        """Lowest loss among the points of at most ``num_params`` parameters in the whole model."""
        self._refuse_empty()
        fitting = [p for p in self.points if p.num_params <= num_params]
        if not fitting:
            least = min(p.num_params for p in self.points)
            raise BudgetError(
                f"no point of the front has at most {num_params} parameters; the smallest has {least}: "
                "ask for that or more, or run more trials"
            )
        return min(fitting, key=lambda p: p.loss)

    def at_most_loss(self, loss: float) -> FrontPoint:
        """Fewest parameters among the points of at most ``loss`` nats per token."""
        self._refuse_empty()
        fitting = [p for p in self.points if p.loss <= loss]
        if not fitting:
            least = min(p.loss for p in self.points)
            raise BudgetError(
                f"no point of the front has a validation loss of at most {loss:g}; the lowest is "
                f"{_rounded_up(least)}: ask for that or more, or run more trials"
            )
        return min(fitting, key=lambda p: p.num_params)

    def knee(self) -> FrontPoint:
        """The point farthest below the straight line between the front's ends, both axes scaled to [0, 1]
        (Das, "On characterizing the 'knee' of the Pareto curve", 1999)."""
        self._refuse_empty()
        first, last = self.points[0], self.points[-1]
        width = last.num_params - first.num_params
        height = first.loss - last.loss

        def below_line(point: FrontPoint) -> float:
            if width == 0 or height == 0:
                return 0.0
            return (first.loss - point.loss) / height - (point.num_params - first.num_params) / width

        return max(self.points, key=lambda p: (below_line(p), -p.num_params))

    @property
    def rows(self) -> list[Row]:
        """What a notebook tells of every point."""
        return [
            (
                point.trial, point.source, point.num_params, told.kept_of_targets, told.loss, told.standard_error,
                told.perplexity,
            )
            for point in self.points for told in [point.measurement]
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return front_html(self.rows)

    def _refuse_empty(self) -> None:
        if not self.points:
            raise BudgetError(EMPTY)

    def hypervolume(self, reference_loss: float, reference_params: int) -> float:
        """Area that the front dominates below the reference point, in nats · parameters."""
        area = 0.0
        right = float(reference_params)
        for point in reversed(self.points):
            if point.loss >= reference_loss or point.num_params >= right:
                continue
            area += (right - point.num_params) * (reference_loss - point.loss)
            right = float(point.num_params)
        return area


def _rounded_up(value: float) -> str:
    """Four decimals that are never below the value: who asks for them gets the point."""
    return f"{math.ceil(value * 1e4) / 1e4:.4f}"
