"""What is worth watching of a study while workers are at it, read in one go. No Optuna."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select

from rank_search.front import Front
from rank_search.study.engine import READ_ONLY, translated
from rank_search.study.liveness import WorkerId
from rank_search.study.records import FINISHED, MEASURED, State
from rank_search.study.store import StudyStore
from rank_search.study.tables import StudyRow, TrialRow

WORST_LOSS = 2.0
"""Nats above the dense model's loss: where the area under a front ends."""
_PACE = 30
"""The pace is that of so many trials at the end."""
_OF_A_WORKER = 5
"""A worker's seconds a trial are the median of so many."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the database tells of one worker.

    Attributes:
        trial: number of the trial it measures now, None between two.
        measured: trials it has measured.
        loss, fidelity, peak_memory: of its last measured trial.
        seconds: of a trial, the median of its last ones.
    """

    trial: int | None = None
    measured: int = 0
    loss: float | None = None
    fidelity: str | None = None
    peak_memory: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class StudyView:
    """What the database tells of a study.

    Attributes:
        finished: trials that count towards the number wanted.
        wanted: by the study's file.
        workers: by their identity.
        hypervolume: area that the front dominates below :data:`WORST_LOSS` nats above the dense model, over the
            parameters of the dense model: nats. None before the dense model is scored.
        per_minute: trials, all workers together; None until there are two.
    """

    finished: int
    wanted: int
    workers: Mapping[str, WorkerView]
    hypervolume: float | None
    per_minute: float | None

    def worker(self, identity: str) -> WorkerView:
        """What is told of a worker by its identity, or by its host alone, where that is all that is known of it."""
        if ":" in identity:
            return self.workers.get(identity, WorkerView())
        there = [view for worker, view in self.workers.items() if WorkerId.parse(worker).host == identity]
        return there[-1] if there else WorkerView()

    def seconds_left(self, wanted: int | None = None) -> float | None:
        """Seconds until the study has its trials, None where that cannot be told."""
        remaining = max(0, (self.wanted if wanted is None else wanted) - self.finished)
        return 60.0 * remaining / self.per_minute if self.per_minute else None


def watch(store: StudyStore, name: str) -> StudyView | None:
    """A study as it is now, None before it is made.

    Raises:
        StorageError: the database cannot be reached.
    """
    if name not in store.studies():
        return None
    record, front = store.study(name), store.front(name)
    rows = _trials(store, name)
    finished = [row for row in rows if row.state in FINISHED]
    return StudyView(
        finished=len(finished),
        wanted=record.spec.search.trials,
        workers=_by_worker(rows),
        hypervolume=area(front, record.dense_loss, record.facts.model_params),
        per_minute=_pace([row.finished for row in finished if row.finished is not None]),
    )


def measured_by(store: StudyStore, name: str, worker: str) -> int:
    """How many trials a worker has measured, by its identity.

    Raises:
        StorageError: the database cannot be reached.
    """
    return sum(row.worker == worker and row.state in MEASURED for row in _trials(store, name))


def area(front: Front, dense_loss: float | None, dense_params: int) -> float | None:
    """Area that a front dominates, in nats: parameters count as a part of the dense model's."""
    if dense_loss is None:
        return None
    return front.hypervolume(dense_loss + WORST_LOSS, dense_params) / dense_params


def _trials(store: StudyStore, name: str) -> Sequence[Any]:
    """The columns that are needed, without rank maps, which are most of a table's bytes."""
    t = TrialRow
    spent = (t.swap_seconds + t.finetune_seconds + t.score_seconds).label("seconds")
    query = (
        select(t.number, t.state, t.worker, t.loss, t.fidelity, t.peak_memory, t.finished, spent)
        .join(StudyRow, StudyRow.id == t.study_id)
        .where(StudyRow.name == name)
        .order_by(t.number)
    )
    with translated(store.engine.url), store.engine.connect().execution_options(**READ_ONLY) as connection:
        return connection.execute(query).all()


def _by_worker(rows: Sequence[Any]) -> dict[str, WorkerView]:
    mine: dict[str, list[Any]] = {}
    for row in rows:
        mine.setdefault(row.worker, []).append(row)
    return {worker: _view(trials) for worker, trials in mine.items()}


def _view(trials: Sequence[Any]) -> WorkerView:
    running = next((row.number for row in reversed(trials) if row.state == State.RUNNING), None)
    measured = [row for row in trials if row.state in MEASURED]
    if not measured:
        return WorkerView(running)
    last = measured[-1]
    seconds = [row.seconds for row in measured[-_OF_A_WORKER:] if row.seconds is not None]
    return WorkerView(
        running, len(measured), last.loss, last.fidelity, last.peak_memory,
        statistics.median(seconds) if seconds else None,
    )  # fmt: skip


def _pace(ends: Sequence[datetime]) -> float | None:
    latest = sorted(ends)[-_PACE:]
    spent = (latest[-1] - latest[0]).total_seconds() if len(latest) > 1 else 0.0
    return 60.0 * (len(latest) - 1) / spent if spent > 0 else None
