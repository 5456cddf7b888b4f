"""When a search stops. Pure: no torch, no Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rank_search.front import Front
from rank_search.spec import SearchSpec

Outcomes = Sequence[tuple[int, float]]
"""Parameters and loss of complete trials, the first that ended first."""


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a search stops before its trials are done; the first rule that is met decides. None: no such rule.

    Attributes:
        wall_time: seconds that one run has searched.
        gpu_seconds: seconds of all measurements of the study.
        flat_trials: complete trials in which the hypervolume has not grown, but for ``flat_tolerance`` of it.
        target_loss, target_kept: the front has a point of at most this loss at at most this kept fraction of the target
            layers.
    """

    wall_time: float | None = None
    gpu_seconds: float | None = None
    flat_trials: int | None = None
    flat_tolerance: float = 1e-3
    target_loss: float | None = None
    target_kept: float | None = None

    @classmethod
    def of(cls, search: SearchSpec) -> StopRules:
        """The rules of a study file."""
        return cls(**{name: getattr(search, name) for name in cls.__slots__})

    @property
    def needs_outcomes(self) -> bool:
        """Whether :meth:`of_outcomes` may find anything."""
        return self.flat_trials is not None

    @property
    def needs_front(self) -> bool:
        """Whether :meth:`of_front` may find anything."""
        return self.target_loss is not None

    def of_times(self, wall: float, spent: float) -> str | None:
        """Why to stop, by the seconds this run has searched and the study has measured."""
        if self.wall_time is not None and wall >= self.wall_time:
            return f"the run has searched for {wall:.0f} s (search.wall_time = {self.wall_time:g})"
        if self.gpu_seconds is not None and spent >= self.gpu_seconds:
            return f"measurements have taken {spent:.0f} s (search.gpu_seconds = {self.gpu_seconds:g})"
        return None

    def of_outcomes(self, outcomes: Outcomes, dense_params: int) -> str | None:
        """Why to stop, by all complete trials; ``dense_params`` counts the dense model."""
        count = self.flat_trials
        if count is None or len(outcomes) <= count:
            return None
        grown = growth(outcomes, count, dense_params)
        if grown > self.flat_tolerance:
            return None
        return f"in {count} trials the hypervolume has grown by {grown:.3%} (search.flat_trials = {count})"

    def of_front(self, front: Front) -> str | None:
        """Why to stop, by the front."""
        if self.target_loss is None or self.target_kept is None:
            return None
        for point in front:
            if point.loss <= self.target_loss and point.measurement.kept_of_targets <= self.target_kept + 1e-12:
                return (
                    f"trial {point.trial} has a loss of {point.loss:.4f} at {point.measurement.kept_of_targets:.4f} of "
                    f"the target layers (search.target_loss = {self.target_loss:g})"
                )
        return None


def all_finished(trials: int) -> str:
    """Why a search stops that has as many as it wants."""
    return f"{trials} trials are finished"


def growth(outcomes: Outcomes, last: int, dense_params: int) -> float:
    """Share of the hypervolume that the last so many outcomes have added.

    Both areas are measured from the dense model's size, and from a loss as far above the front as the front is high: a
    fixed distance of what is compared, so that the front's own ends count, and single bad trials do not.
    """
    front = _lower_left(outcomes)
    highest, lowest = front[0][1], front[-1][1]
    reference = highest + max(highest - lowest, 0.1 * abs(highest))
    now, before = (_area(points, reference, dense_params) for points in (front, _lower_left(outcomes[:-last])))
    return (now - before) / now if now > 0 else 0.0


def _lower_left(outcomes: Outcomes) -> list[tuple[int, float]]:
    best: list[tuple[int, float]] = []
    for params, loss in sorted(outcomes):
        if not best or loss < best[-1][1]:
            best.append((params, loss))
    return best


def _area(front: Outcomes, reference: float, right: int) -> float:
    area = 0.0
    for params, loss in reversed(front):
        if loss < reference and params < right:
            area += (right - params) * (reference - loss)
            right = params
    return area
