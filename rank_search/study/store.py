"""The project's own tables, read and written. No Optuna, so that reading commands start fast."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Engine, Select, func, select
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from rank_search.errors import StorageError
from rank_search.front import Front, FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap
from rank_search.spec import LOSS_UNITS, StudySpec, parse_study
from rank_search.study.engine import READ_ONLY, make_engine, shown, translated
from rank_search.study.facts import StudyFacts
from rank_search.study.records import State, StudyRecord, StudyStatus, TrialRecord
from rank_search.study.schema import check_schema, has_schema
from rank_search.study.tables import FrontRow, StudyRow, TrialRow


def find_study(storage: str | URL, name: str) -> StudyRecord | None:
    """A stored study; None where the database holds none of that name, or is only to be made.

    Raises:
        StorageError: the database cannot be reached, or is of another version. Nothing is made or changed.
    """
    engine = make_engine(storage)
    try:
        if not has_schema(engine):
            return None
    finally:
        engine.dispose()
    with StudyStore(storage) as store:
        return store.study(name) if name in store.studies() else None


class StudyStore:
    """Studies, trials and fronts of one database that exists and has the current schema.

    Every method is one transaction, and raises :class:`StorageError` when the database cannot be reached and
    when it does not hold the study; usable as a context manager.

    Args:
        storage: SQLAlchemy URL.

    Raises:
        StorageError: no such database, not reachable, or of another version. Nothing is made or changed.
    """

    def __init__(self, storage: str | URL) -> None:
        self.engine: Engine = make_engine(storage, must_exist=True)
        self._reading = self.engine.execution_options(**READ_ONLY)
        try:
            check_schema(self.engine)
        except StorageError:
            self.engine.dispose()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    # Reading

    def studies(self) -> list[str]:
        """Names of all studies, in alphabetical order."""
        with self._read() as session:
            return list(session.scalars(select(StudyRow.name).order_by(StudyRow.name)))

    def study(self, name: str) -> StudyRecord:
        """A study's file and facts."""
        with self._read() as session:
            return _study_record(self._study_row(session, name))

    def front(self, name: str) -> Front:
        """The stored front."""
        with self._read() as session:
            study = self._study_row(session, name)
            return Front(tuple(_stored_front(session, study)))

    def recompute_front(self, name: str) -> Front:
        """The front of all measured trials, for checking the stored one; nothing is written."""
        complete = (trial for trial in self.trials(name) if trial.measurement is not None)
        return Front.of(
            FrontPoint(trial.number, trial.rank_map, trial.measurement, trial.source)
            for trial in complete
            if trial.measurement is not None
        )

    def trials(self, name: str) -> list[TrialRecord]:
        """All trials by ascending number."""
        with self._read() as session:
            study = self._study_row(session, name)
            rows = session.scalars(select(TrialRow).where(TrialRow.study_id == study.id).order_by(TrialRow.number))
            return [_trial_record(row) for row in rows]

    def trial(self, name: str, number: int) -> TrialRecord | None:
        """One trial, None if there is none of this number."""
        with self._read() as session:
            row = session.scalar(_trial_query(self._study_row(session, name), number))
            return None if row is None else _trial_record(row)

    def finished(self, name: str) -> int:
        """Trials that are complete or failed."""
        with self._read() as session:
            counts = _counts(session, self._study_row(session, name))
            return counts.get(State.COMPLETE, 0) + counts.get(State.FAILED, 0)

    def status(self, name: str) -> StudyStatus:
        """How far a study is."""
        with self._read() as session:
            study = self._study_row(session, name)
            spec, counts = _spec(study), _counts(session, study)
            mine = TrialRow.study_id == study.id
            spent = TrialRow.swap_seconds + TrialRow.finetune_seconds + TrialRow.score_seconds
            failures: Select[int, str | None] = (
                select(TrialRow.number, TrialRow.reason).where(mine, TrialRow.state == State.FAILED)
            ).order_by(TrialRow.number)
            started, finished = session.execute(
                select(func.max(TrialRow.started), func.max(TrialRow.finished)).where(mine)
            ).one()
            return StudyStatus(
                name=name,
                wanted=spec.search.trials,
                running=counts.get(State.RUNNING, 0),
                complete=counts.get(State.COMPLETE, 0),
                failed=counts.get(State.FAILED, 0),
                requeued=counts.get(State.REQUEUED, 0),
                best_loss=session.scalar(select(func.min(FrontRow.loss)).where(FrontRow.study == name)),
                dense_loss=study.dense_loss,
                seconds=float(session.scalar(select(func.sum(spent)).where(mine)) or 0.0),
                failures=tuple((number, reason or "") for number, reason in session.execute(failures)),
                last_activity=max((at for at in (started, finished) if at is not None), default=None),
                unit=LOSS_UNITS[spec.model.task],
            )

    # Writing

    def add_study(self, spec: StudySpec, facts: StudyFacts) -> None:
        """Store a new study."""
        with self._write() as session:
            session.add(
                StudyRow(
                    name=spec.name,
                    spec=_spec_json(spec),
                    spec_digest=spec.digest,
                    facts=facts.to_json(),
                    created=datetime.now(UTC),
                )
            )

    def update_spec(self, spec: StudySpec) -> None:
        """Store a file that means the same but asks for another size or runs elsewhere."""
        with self._write() as session:
            self._study_row(session, spec.name, lock=True).spec = _spec_json(spec)

    def set_dense_loss(self, name: str, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Store the validation loss of the dense model, nats per token, and its metrics."""
        with self._write() as session:
            row = self._study_row(session, name, lock=True)
            row.dense_loss, row.dense_metrics = loss, json.dumps(dict(metrics or {}))

    def begin_trial(self, name: str, number: int, source: str, rank_map: RankMap, worker: str) -> None:
        """Store a proposed rank map and who measures it."""
        with self._write() as session:
            session.add(
                TrialRow(
                    study_id=self._study_row(session, name).id,
                    number=number,
                    state=State.RUNNING,
                    source=source,
                    rank_map=_to_json(rank_map),
                    rank_map_digest=rank_map.digest,
                    worker=worker,
                    started=datetime.now(UTC),
                )
            )

    def complete_trial(self, name: str, number: int, measurement: Measurement) -> Measurement:
        """Store a measurement and bring the front up to date, both or neither.

        A trial that has a measurement already keeps it, so that telling twice changes nothing. A failed trial
        stays failed.

        Returns:
            The stored measurement.

        Raises:
            StorageError: no such trial, or it has failed.
        """
        with self._write() as session:
            # The lock on the study's row makes writers update its front one after the other.
            study = self._study_row(session, name, lock=True)
            row = self._trial_row(session, study, number)
            stored = _measurement(row)
            if stored is not None:
                return stored
            if row.state == State.FAILED:
                raise StorageError(f"trial {number} of study {name!r} has failed and cannot be completed; ask again")
            _set_measurement(row, measurement)
            row.state, row.finished = State.COMPLETE, datetime.now(UTC)
            _update_front(session, study, FrontPoint(number, _from_json(row.rank_map), measurement, row.source))
            return measurement

    def fail_trial(self, name: str, number: int, reason: str) -> None:
        """Store why a trial failed; a trial that has ended already is left as it is."""
        self._end(name, number, State.FAILED, reason)

    def requeue_trial(self, name: str, number: int, reason: str) -> None:
        """Store that a trial's rank map is proposed again; a trial that has ended already is left as it is."""
        self._end(name, number, State.REQUEUED, reason)

    def _end(self, name: str, number: int, state: State, reason: str) -> None:
        with self._write() as session:
            study = self._study_row(session, name, lock=True)
            row = self._trial_row(session, study, number)
            if row.state == State.RUNNING:
                row.state, row.reason, row.finished = state, reason, datetime.now(UTC)

    # Sessions and rows

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with translated(self.engine.url), Session(self._reading) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with translated(self.engine.url), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def _study_row(self, session: Session, name: str, *, lock: bool = False) -> StudyRow:
        query = select(StudyRow).where(StudyRow.name == name)
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            names = list(session.scalars(select(StudyRow.name).order_by(StudyRow.name)))
            known = f"known studies are {', '.join(names)}" if names else "it holds none yet"
            raise StorageError(f"database {shown(self.engine.url)} has no study {name!r}; {known}")
        return row

    def _trial_row(self, session: Session, study: StudyRow, number: int) -> TrialRow:
        row = session.scalar(_trial_query(study, number))
        if row is None:
            raise StorageError(f"study {study.name!r} has no trial {number}; see `rank-search status {study.name}`")
        return row


def _trial_query(study: StudyRow, number: int) -> Select[TrialRow]:
    return select(TrialRow).where(TrialRow.study_id == study.id, TrialRow.number == number)


def _counts(session: Session, study: StudyRow) -> dict[State, int]:
    query = select(TrialRow.state, func.count()).where(TrialRow.study_id == study.id).group_by(TrialRow.state)
    return {State(state): count for state, count in session.execute(query)}


def _update_front(session: Session, study: StudyRow, point: FrontPoint) -> None:
    """Put a new point on the front if it belongs there, and take off what it dominates.

    A point that is off the front stays off, so the old front and the new point determine the new front.
    """
    stored = _stored_front(session, study)
    new = Front.of([*stored, point])
    old, kept = {p.trial for p in stored}, {p.trial for p in new}
    for row in session.scalars(select(FrontRow).where(FrontRow.study == study.name)):
        if row.trial not in kept:
            session.delete(row)
    session.add_all(_front_row(study.name, p) for p in new if p.trial not in old)


def _stored_front(session: Session, study: StudyRow) -> list[FrontPoint]:
    """The stored points, by ascending parameter count."""
    query = (
        select(TrialRow)
        .join(FrontRow, FrontRow.trial == TrialRow.number)
        .where(TrialRow.study_id == study.id, FrontRow.study == study.name)
        .order_by(FrontRow.num_params)
    )
    return [
        FrontPoint(row.number, _from_json(row.rank_map), measurement, row.source)
        for row in session.scalars(query)
        if (measurement := _measurement(row)) is not None
    ]


def _front_row(study: str, point: FrontPoint) -> FrontRow:
    measured = point.measurement
    return FrontRow(
        study=study,
        trial=point.trial,
        rank_map=_to_json(point.rank_map),
        loss=measured.loss,
        perplexity=measured.perplexity if math.isfinite(measured.perplexity) else None,
        num_params=measured.num_params,
        kept_of_targets=measured.kept_of_targets,
        kept_of_model=measured.kept_of_model,
        fidelity=measured.fidelity.label,
    )


def _to_json(rank_map: RankMap) -> str:
    return json.dumps(dict(rank_map))


def _from_json(text: str) -> RankMap:
    return RankMap(_stored_json(text, "a rank map"))


def _stored_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise StorageError(f"{what} in the database is damaged ({error}); restore the database") from None


def _spec_json(spec: StudySpec) -> str:
    """The whole file with its defaults, so that later versions read what this one meant."""
    return json.dumps(spec.model_dump(mode="json"))


def _spec(row: StudyRow) -> StudySpec:
    return parse_study(
        _stored_json(row.spec, f"the file of study {row.name!r}"), where=f"study {row.name!r} in the database"
    )


def _study_record(row: StudyRow) -> StudyRecord:
    metrics = _stored_json(row.dense_metrics or "{}", f"the metrics of study {row.name!r}")
    return StudyRecord(row.name, _spec(row), StudyFacts.from_json(row.facts), row.dense_loss, row.created, metrics)


def _trial_record(row: TrialRow) -> TrialRecord:
    return TrialRecord(
        number=row.number,
        state=State(row.state),
        source=row.source,
        rank_map=_from_json(row.rank_map),
        measurement=_measurement(row),
        reason=row.reason,
        worker=row.worker,
        started=row.started,
        finished=row.finished,
    )


_MEASURED = tuple(field.name for field in fields(Measurement))
"""The columns of a measurement have the names of its fields."""


def _measurement(row: TrialRow) -> Measurement | None:
    """The measurement of a complete trial, None of any other."""
    if row.state != State.COMPLETE:
        return None
    values = {name: getattr(row, name) for name in _MEASURED}
    values["fidelity"] = Fidelity.from_label(row.fidelity or "")
    values["metrics"] = _stored_json(row.metrics or "{}", "the metrics of a trial")
    values["fold_losses"] = tuple(_stored_json(row.fold_losses or "[]", "the losses of a trial's folds"))
    return Measurement(**values)


def _set_measurement(row: TrialRow, measured: Measurement) -> None:
    for name in _MEASURED:
        setattr(row, name, getattr(measured, name))
    row.fidelity = measured.fidelity.label
    row.metrics, row.fold_losses = json.dumps(dict(measured.metrics)), json.dumps(measured.fold_losses)
