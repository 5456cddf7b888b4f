"""Trials without their rank maps, which are most of a table's bytes, and a cheap way to tell whether any has changed.
No Optuna.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, and_, func, select
from sqlalchemy.orm import Session, defer

from rank_search.front import Front, FrontPoint
from rank_search.ranks import RankMap
from rank_search.spec import LOSS_UNITS
from rank_search.study.engine import READ_ONLY, translated
from rank_search.study.records import MEASURED, State, StudyRecord, StudyStatus
from rank_search.study.stored import measurement_of, study_record
from rank_search.study.tables import FrontRow, MeasurementRow, StudyRow, TrialRow

Mark = tuple[object, ...]
"""Two looks at a study with equal marks show the same."""


@dataclass(frozen=True, slots=True)
class TrialSummary:
    """A trial without its rank map; what is measured is None before its end.

    ``seconds`` are those of its measurement of the highest fidelity, ``metrics`` JSON.
    """

    number: int
    state: State
    source: str
    worker: str
    started: datetime
    finished: datetime | None
    loss: float | None
    standard_error: float | None
    num_params: int | None
    kept_of_targets: float | None
    kept_of_model: float | None
    fidelity: str | None
    seconds: float | None
    reason: str | None
    same_as: int | None
    promotes: int | None


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """A worker as its trials tell of it: the one it is at, how many it has measured, and when it last began or ended
    one."""

    worker: str
    trial: int | None
    measured: int
    last: datetime


@dataclass(frozen=True, slots=True)
class StudyLine:
    """A study in a list: its record, how far it is but for failures and pruned seconds, and the points of its front."""

    record: StudyRecord
    status: StudyStatus
    front: int


def study_lines(engine: Engine) -> list[StudyLine]:
    """All prepared studies in alphabetical order, by a handful of queries.

    Raises:
        StorageError: the database cannot be reached.
    """
    t, m, f = TrialRow, MeasurementRow, FrontRow
    spent = func.sum(m.swap_seconds + m.finetune_seconds + m.score_seconds)
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        rows = session.scalars(select(StudyRow).order_by(StudyRow.name)).all()
        states: dict[int, dict[State, int]] = {}
        last: dict[int, datetime] = {}
        by_state = select(t.study_id, t.state, func.count(), func.max(t.started), func.max(t.finished))
        for study, state, count, started, finished in session.execute(by_state.group_by(t.study_id, t.state)):
            states.setdefault(study, {})[State(state)] = count
            last[study] = max(at for at in (last.get(study), started, finished) if at is not None)
        seconds = {study: value for study, value in session.execute(select(m.study_id, spent).group_by(m.study_id))}
        by_study = select(f.study, func.count(), func.min(f.loss)).group_by(f.study)
        fronts = {study: (count, loss) for study, count, loss in session.execute(by_study)}
    return [
        _line(row, states.get(row.id, {}), last.get(row.id), seconds.get(row.id), *fronts.get(row.name, (0, None)))
        for row in rows
    ]


def _line(
    row: StudyRow, states: Mapping[State, int], last: datetime | None, seconds: float | None, front: int,
    best: float | None,
) -> StudyLine:  # fmt: skip
    record = study_record(row)
    counts: dict[str, Any] = {state: states.get(state, 0) for state in State}
    status = StudyStatus(
        name=row.name, wanted=record.spec.search.trials, **counts, best_loss=best,
        dense_loss=row.dense_loss, seconds=float(seconds or 0.0), failures=(), last_activity=last,
        unit=LOSS_UNITS[record.spec.model.task], stop_reason=row.stop_reason,
    )  # fmt: skip
    return StudyLine(record, status, front)


def mark_of(engine: Engine, name: str) -> Mark | None:
    """What changes with every change of a study that is worth showing; None where there is no such study.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        study = connection.execute(
            select(StudyRow.id, StudyRow.dense_loss, StudyRow.stop_reason, StudyRow.spec_digest).where(
                StudyRow.name == name
            )
        ).first()
        if study is None:
            return None
        states = connection.execute(
            select(TrialRow.state, func.count())
            .where(TrialRow.study_id == study.id)
            .group_by(TrialRow.state)
            .order_by(TrialRow.state)
        ).all()
        last = connection.scalar(select(func.max(MeasurementRow.id)).where(MeasurementRow.study_id == study.id))
    return (*study, last, *((state, count) for state, count in states))


def trial_summaries(engine: Engine, name: str, *, after: int = -1, limit: int | None = None) -> list[TrialSummary]:
    """Trials by ascending number, those above ``after``, at most ``limit``.

    Raises:
        StorageError: the database cannot be reached.
    """
    t = TrialRow
    spent = (t.swap_seconds + t.finetune_seconds + t.score_seconds).label("seconds")
    columns = [spent if field.name == "seconds" else getattr(t, field.name) for field in fields(TrialSummary)]
    query = (
        select(*columns)
        .join(StudyRow, StudyRow.id == t.study_id)
        .where(StudyRow.name == name, t.number > after)
        .order_by(t.number)
        .limit(limit)
    )
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        return [_summary(dict(row._mapping)) for row in connection.execute(query)]


def front_outline(engine: Engine, name: str) -> Front:
    """The stored front without its rank maps, which are left empty.

    Raises:
        StorageError: the database cannot be reached.
    """
    query = (
        select(TrialRow)
        .join(StudyRow, StudyRow.id == TrialRow.study_id)
        .join(FrontRow, and_(FrontRow.trial == TrialRow.number, FrontRow.study == StudyRow.name))
        .where(StudyRow.name == name)
        .order_by(FrontRow.num_params)
        .options(defer(TrialRow.rank_map))
    )
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        rows = session.scalars(query).all()
        return Front(tuple(FrontPoint(row.number, RankMap({}), measurement_of(row), row.source) for row in rows))


def workers_of(trials: Iterable[TrialSummary]) -> list[WorkerSummary]:
    """The workers of a study, the one that was busy last first."""
    mine: dict[str, list[TrialSummary]] = {}
    for trial in trials:
        mine.setdefault(trial.worker, []).append(trial)
    found = [
        WorkerSummary(
            worker,
            next((trial.number for trial in reversed(theirs) if trial.state is State.RUNNING), None),
            sum(trial.state in MEASURED for trial in theirs),
            max(trial.finished or trial.started for trial in theirs),
        )
        for worker, theirs in mine.items()
    ]
    return sorted(found, key=lambda worker: worker.last, reverse=True)


def _summary(values: Mapping[str, Any]) -> TrialSummary:
    return TrialSummary(**{**values, "state": State(values["state"])})
