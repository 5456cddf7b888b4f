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
    """It has a measurement."""
    FAILED = "failed"
    """It has a reason, and will not be tried again."""
    REQUEUED = "requeued"
    """Its worker stopped before it was measured; the same rank map is proposed again under another number."""


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
    """A trial as stored; a measurement if it is complete, a reason if it failed."""

    number: int
    state: State
    source: str
    rank_map: RankMap
    measurement: Measurement | None
    reason: str | None
    worker: str
    started: datetime
    finished: datetime | None


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """How far a study is.

    Attributes:
        name: of the study.
        wanted: trials its file asks for.
        running, complete, failed, requeued: trials per state.
        best_loss: lowest loss of the front, nats per token.
        dense_loss: of the dense model, nats per token.
        seconds: time spent in measured trials, all workers together.
        failures: number and reason of every failed trial.
        last_activity: when a trial last started or ended.
        unit: what losses are a mean over.
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

    @property
    def finished(self) -> int:
        """Trials that count towards ``wanted``."""
        return self.complete + self.failed
