"""Losses on the confirmation blocks of :mod:`bench_search`, where its competitors' fronts are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from _laps import Clock

from rank_search.errors import NonFiniteLossError
from rank_search.model.device import synchronize
from rank_search.preparing import Prepared
from rank_search.ranks import RankMap
from rank_search.score import score
from rank_search.task import Examples

Point = tuple[float, int]
"""Loss on the score blocks, nats, and parameters of the whole model."""


class Confirmed(NamedTuple):
    """What a record tells of it, and the seconds that it took."""

    told: dict[str, float | None]
    seconds: float


class Confirmation:
    """Scores a trial's model while it stands (an evaluator's ``look``), if the trial could be on a front: no earlier
    one is as small and as good. What that takes is none of a competitor's seconds.

    Args:
        measured: trials of the same run that an earlier process has measured.
    """

    def __init__(self, prepared: Prepared, unseen: Examples, clock: Clock, measured: Iterable[Point]) -> None:
        self._prepared = prepared
        self._unseen = unseen
        self._clock = clock
        self._front: list[Point] = []
        for point in measured:
            self._is_beaten(point)
        self._last = Confirmed({}, 0.0)

    def __call__(self, rank_map: RankMap, loss: float) -> None:
        """Of the rank map that stands in the model."""
        if self._is_beaten((loss, self._prepared.space.num_params(rank_map))):
            return
        synchronize(self._prepared.device)
        started = self._clock()
        told = {"confirmed": self._loss()}
        self._last = Confirmed(told, self._clock() - started)

    def take(self) -> Confirmed:
        """Of the last trial; nothing where it was not looked at."""
        last, self._last = self._last, Confirmed({}, 0.0)
        return last

    def _is_beaten(self, point: Point) -> bool:
        """By what came before it; otherwise it counts from now on."""
        if any(loss <= point[0] and params <= point[1] for loss, params in self._front):
            return True
        self._front.append(point)
        return False

    def _loss(self) -> float | None:
        """None where it is not finite."""
        try:
            blocks = self._prepared.spec.run.score_batch_blocks
            return round(score(self._prepared.model, self._unseen, batch_blocks=blocks).loss, 6)
        except NonFiniteLossError:
            return None
