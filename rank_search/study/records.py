"""What the database tells: studies, trials, and how far a study is. Pure: no torch, no Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from rank_search.measurement import Measurement
from rank_search.ranks import RankMap
from rank_search.spec import StudySpec
from rank_search.study.facts import StudyFacts


class State(StrEnum):
    """The state of a trial."""

    RUNNING = "running"
    COMPLETE = "complete"
    """It has a measurement of the study's highest fidelity."""
    PRUNED = "pruned"
    """It has a measurement, which promised too little to go on to a higher fidelity."""
    INFEASIBLE = "infeasible"
    """It has a measurement, which misses a goal of the study: it cannot be on the front."""
    FAILED = "failed"
    """It has a reason, and will not be tried again."""
    REQUEUED = "requeued"
    """Its worker stopped before it was measured; the same rank map is proposed again under another number."""
    SKIPPED = "skipped"
    """It was not measured, for another trial has its rank map or it is too large; it does not count as tried."""


MEASURED = frozenset({State.COMPLETE, State.PRUNED, State.INFEASIBLE})
"""Trials that have a measurement."""

FINISHED = MEASURED | {State.FAILED}
"""Trials that count towards the number wanted."""

PREDICTED_RISE = "predicted_rise"
"""The attribute of a measured trial in Optuna that holds the closed form's own prediction, in nats."""


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """A study as stored.

    ``dense_loss`` is the validation loss of the dense model, nats per token, once known, ``dense_metrics`` its metrics.
    """

    name: str
    spec: StudySpec
    facts: StudyFacts
    dense_loss: float | None
    created: datetime
    dense_metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A trial as stored.

    Attributes:
        measurement: of the highest fidelity it reached; None before and without its end.
        reason: why it failed, was requeued or skipped, or is infeasible.
        same_as: of a skipped trial, the number of the one that has its rank map.
        promotes: the number of the pruned trial that it continues.
    """

    number: int
    state: State
    source: str
    rank_map: RankMap
    measurement: Measurement | None
    reason: str | None
    worker: str
    started: datetime
    finished: datetime | None
    same_as: int | None = None
    promotes: int | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """What a study has cost so far: finished and running trials, and the seconds of all measurements, 0 where they were
    not asked for."""

    finished: int
    running: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    """A worker of a study.

    Attributes:
        worker: its identity.
        trial: number of the trial that it measures, None between two.
        age: seconds since its last sign of life, by the database's clock.
        is_silent: its lease has run out; what it holds is proposed again.
    """

    worker: str
    trial: int | None
    age: float
    is_silent: bool


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """How far a study is.

    Attributes:
        name: of the study.
        wanted: trials its file asks for.
        running, complete, failed, requeued, pruned, infeasible, skipped: trials per state.
        best_loss: lowest loss of the front, nats per token.
        dense_loss: of the dense model, nats per token.
        seconds: time spent in measurements, all workers together.
        pruned_seconds: that of pruned trials which were not promoted.
        failures: number and reason of every failed trial.
        last_activity: when a trial last started or ended.
        unit: what losses are a mean over.
        stop_reason: why the last run stopped; None while one is at work or after an interrupt.
        workers: those that are at work, or have not given back what they hold.
    """

    name: str
    wanted: int
    running: int
    complete: int
    failed: int
    requeued: int
    best_loss: float | None
    dense_loss: float | None
    seconds: float
    failures: tuple[tuple[int, str], ...]
    last_activity: datetime | None
    unit: str = "token"
    pruned: int = 0
    infeasible: int = 0
    skipped: int = 0
    pruned_seconds: float = 0.0
    stop_reason: str | None = None
    workers: tuple[WorkerBeat, ...] = ()

    @property
    def finished(self) -> int:
        """Trials that count towards ``wanted``."""
        return self.complete + self.failed + self.pruned + self.infeasible
