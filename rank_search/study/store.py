"""The project's own tables, read and written. No Optuna, so that reading commands start fast."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, Engine, Select, and_, bindparam, case, func, literal, or_, select
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from rank_search.climbing import Step
from rank_search.errors import StorageError
from rank_search.front import Front, FrontPoint
from rank_search.measurement import Measurement
from rank_search.ranks import RankMap
from rank_search.spec import LOSS_UNITS, StudySpec
from rank_search.study.engine import READ_ONLY, make_engine, shown, translated
from rank_search.study.facts import StudyFacts
from rank_search.study.front_rows import stored_front, update_front
from rank_search.study.leases import LEASE_SECONDS, add_lease, beats_of
from rank_search.study.records import (
    FINISHED,
    MEASURED,
    Effort,
    State,
    StudyRecord,
    StudyStatus,
    TrialRecord,
)
from rank_search.study.schema import check_schema, has_schema
from rank_search.study.stored import (
    block_losses_of,
    measurement_of,
    rank_map_json,
    rank_map_of,
    set_measurement,
    spec_json,
    spec_of,
    study_record,
    trial_record,
)
from rank_search.study.tables import FrontRow, MeasurementRow, StudyRow, TrialRow
from rank_search.study.trial_rows import (
    RUNGS,
    TRIAL,
    HeldTrial,
    StudyKey,
    equal_trial,
    promoted,
    take_over_rungs,
)

_SPENT = MeasurementRow.swap_seconds + MeasurementRow.finetune_seconds + MeasurementRow.score_seconds


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
        keeps: so many connections stay open when nobody uses them.

    Raises:
        StorageError: no such database, not reachable, or of another version. Nothing is made or changed.
    """

    def __init__(self, storage: str | URL, *, keeps: int = 5) -> None:
        self.engine: Engine = make_engine(storage, must_exist=True, keeps=keeps)
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
            return study_record(self._study_row(session, name))

    def front(self, name: str) -> Front:
        """The stored front."""
        with self._read() as session:
            study = self._key(session, name)
            return Front(tuple(stored_front(session, study)))

    def recompute_front(self, name: str) -> Front:
        """The front of all complete trials, for checking the stored one; nothing is written."""
        return Front.of(
            FrontPoint(trial.number, trial.rank_map, trial.measurement, trial.source)
            for trial in self.trials(name)
            if trial.state is State.COMPLETE and trial.measurement is not None
        )

    def trials(self, name: str) -> list[TrialRecord]:
        """All trials by ascending number."""
        with self._read() as session:
            study = self._key(session, name)
            rows = session.scalars(select(TrialRow).where(TrialRow.study_id == study.id).order_by(TrialRow.number))
            return [trial_record(row) for row in rows]

    def trial(self, name: str, number: int) -> TrialRecord | None:
        """One trial, None if there is none of this number."""
        with self._read() as session:
            row = session.scalar(TRIAL, self._key(session, name).trial(number))
            return None if row is None else trial_record(row)

    def finished(self, name: str) -> int:
        """Trials that count towards the number wanted."""
        return self.effort(name, with_seconds=False).finished

    def effort(self, name: str, *, with_seconds: bool = True) -> Effort:
        """What the study has cost so far; its seconds, for which all measurements are read, only if asked for."""
        this = StudyRow.name == name
        measured = MeasurementRow.study_id == select(StudyRow.id).where(this).scalar_subquery()
        spent = select(func.sum(_SPENT)).where(measured).scalar_subquery() if with_seconds else literal(0.0)
        query = (
            select(TrialRow.state, func.count(TrialRow.id), spent)
            .select_from(StudyRow)
            .outerjoin(TrialRow, TrialRow.study_id == StudyRow.id)
            .where(this)
            .group_by(TrialRow.state)
        )
        with self._read() as session:
            rows = session.execute(query).all()
            if not rows:
                raise no_study(session, self.engine.url, name)
            counts = {state: count for state, count, _ in rows}
            finished = sum(counts.get(state, 0) for state in FINISHED)
            return Effort(finished, counts.get(State.RUNNING, 0), float(rows[0][2] or 0.0))

    def outcomes(self, name: str) -> list[tuple[int, float]]:
        """Parameters and loss of every complete trial, the first that ended first."""
        with self._read() as session:
            mine = TrialRow.study_id == self._key(session, name).id
            query = (
                select(TrialRow.num_params, TrialRow.loss)
                .where(mine, TrialRow.state == State.COMPLETE)
                .order_by(TrialRow.finished, TrialRow.number)
            )
            return [(params or 0, loss or 0.0) for params, loss in session.execute(query)]

    def steps(self, name: str, after: int = 0) -> tuple[list[Step], int]:
        """Measurements on all rungs that were stored after the one with the row id ``after``, and the last id."""
        query = select(
            MeasurementRow.id, MeasurementRow.rung, MeasurementRow.loss, MeasurementRow.kept_of_targets,
            MeasurementRow.num_params, TrialRow.number, TrialRow.promotes, TrialRow.state,
        ).join(
            TrialRow, and_(TrialRow.study_id == MeasurementRow.study_id, TrialRow.number == MeasurementRow.trial)
        )  # fmt: skip
        with self._read() as session:
            mine = MeasurementRow.study_id == self._key(session, name).id
            rows = session.execute(query.where(mine, MeasurementRow.id > after).order_by(MeasurementRow.id)).all()
        # A trial's rows come in the order of rungs, so its last one here is its highest.
        highest = {row.number: row.rung for row in rows}
        found = [
            Step(
                trial=row.number if row.promotes is None else row.promotes,
                rung=row.rung, loss=row.loss, kept=row.kept_of_targets, num_params=row.num_params,
                top=row.state in {State.COMPLETE, State.INFEASIBLE} and row.rung == highest[row.number],
                feasible=row.state != State.INFEASIBLE,
            )
            for row in rows
        ]  # fmt: skip
        return found, rows[-1].id if rows else after

    def measurements(self, name: str, number: int) -> tuple[Measurement, ...]:
        """What is stored of a trial, rung by rung."""
        with self._read() as session:
            study = self._key(session, name)
            return tuple(map(measurement_of, session.scalars(RUNGS, study.trial(number))))

    def rungs(self, name: str) -> dict[int, tuple[Measurement, ...]]:
        """Trial → what is stored of it, rung by rung."""
        with self._read() as session:
            study = self._key(session, name)
            query = select(MeasurementRow).where(MeasurementRow.study_id == study.id).order_by(MeasurementRow.rung)
            found: dict[int, list[Measurement]] = {}
            for row in session.scalars(query):
                found.setdefault(row.trial, []).append(measurement_of(row))
            return {number: tuple(measured) for number, measured in found.items()}

    def block_losses(self, name: str, number: int, rung: int) -> tuple[float, ...]:
        """Losses of the validation blocks of one trial on one rung, or of the trial that continues it; empty where none
        are stored."""
        with self._read() as session:
            study = self._key(session, name).id
            its_own = select(TrialRow.number).where(
                TrialRow.study_id == study, or_(TrialRow.number == number, TrialRow.promotes == number)
            )
            query = (
                select(MeasurementRow.block_losses)
                .where(MeasurementRow.study_id == study, MeasurementRow.rung == rung)
                .where(MeasurementRow.trial.in_(its_own), MeasurementRow.block_losses.is_not(None))
                .order_by(MeasurementRow.trial)
            )
            return block_losses_of(session.scalars(query).first())

    def unpromoted(self, name: str) -> list[int]:
        """Numbers of the pruned trials that no other trial continues."""
        with self._read() as session:
            mine = TrialRow.study_id == self._key(session, name).id
            pruned = select(TrialRow.number).where(mine, TrialRow.state == State.PRUNED)
            return list(session.scalars(pruned.where(~promoted(mine)).order_by(TrialRow.number)))

    def status(self, name: str) -> StudyStatus:
        """How far a study is."""
        with self._read() as session:
            study = self._study_row(session, name)
            spec, counts = spec_of(study), _counts(session, study)
            mine = TrialRow.study_id == study.id
            failures: Select[int, str | None] = (
                select(TrialRow.number, TrialRow.reason).where(mine, TrialRow.state == State.FAILED)
            ).order_by(TrialRow.number)
            started, finished = session.execute(
                select(func.max(TrialRow.started), func.max(TrialRow.finished)).where(mine)
            ).one()
            wasted = and_(TrialRow.state == State.PRUNED, ~promoted(mine))
            seconds, pruned = session.execute(
                select(func.sum(_SPENT), func.sum(case((wasted, _SPENT), else_=0.0)))
                .join(TrialRow, and_(mine, TrialRow.number == MeasurementRow.trial))
                .where(MeasurementRow.study_id == study.id)
            ).one()
            return StudyStatus(
                name=name,
                wanted=spec.search.trials,
                **{state: counts.get(state, 0) for state in State},
                best_loss=session.scalar(select(func.min(FrontRow.loss)).where(FrontRow.study == name)),
                dense_loss=study.dense_loss,
                seconds=float(seconds or 0.0),
                pruned_seconds=float(pruned or 0.0),
                failures=tuple((number, reason or "") for number, reason in session.execute(failures)),
                last_activity=max((at for at in (started, finished) if at is not None), default=None),
                unit=LOSS_UNITS[spec.model.task],
                stop_reason=study.stop_reason,
                workers=beats_of(session, study.id),
            )

    # Writing

    def add_study(self, spec: StudySpec, facts: StudyFacts) -> None:
        """Store a new study."""
        with self._write() as session:
            session.add(
                StudyRow(
                    name=spec.name,
                    spec=spec_json(spec),
                    spec_digest=spec.digest,
                    facts=facts.to_json(),
                    created=datetime.now(UTC),
                )
            )

    def update_spec(self, spec: StudySpec) -> None:
        """Store a file that means the same but asks for another size or runs elsewhere."""
        with self._write() as session:
            self._study_row(session, spec.name, lock=True).spec = spec_json(spec)

    def set_dense_loss(self, name: str, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Store the validation loss of the dense model, nats per token, and its metrics."""
        with self._write() as session:
            row = self._study_row(session, name, lock=True)
            row.dense_loss, row.dense_metrics = loss, json.dumps(dict(metrics or {}))

    def set_stop_reason(self, name: str, reason: str | None) -> None:
        """Store why a run has stopped; None while one is at work."""
        with self._write() as session:
            self._study_row(session, name, lock=True).stop_reason = reason

    def begin_trial(
        self,
        name: str,
        number: int,
        source: str,
        rank_map: RankMap,
        worker: str,
        *,
        lease_seconds: float = LEASE_SECONDS,
        attempt: int = 1,
        continues: int | None = None,
        promotes: int | None = None,
        refused: str | None = None,
    ) -> TrialRecord:
        """Store a proposed rank map and who measures it; or, where another trial has it, that it is skipped.

        The trial begins with a lease.

        Args:
            lease_seconds: how long its worker may be silent before it is taken from it.
            attempt: 1, and one more for every worker that died over its rank map.
            continues: number of the requeued trial whose measurements, if it has any, become this one's.
            promotes: number of the pruned trial that this one continues.
            refused: why it is not to be measured.
        """
        with self._write() as session:
            # The lock on the study's row: of two workers with one rank map, the second sees the first one's.
            study = self._key(session, name, lock=True)
            row = TrialRow(
                study_id=study.id,
                number=number,
                state=State.RUNNING,
                source=source,
                rank_map=rank_map_json(rank_map),
                rank_map_digest=rank_map.digest,
                promotes=promotes,
                worker=worker,
                started=datetime.now(UTC),
            )
            # The trial that this one is a second attempt of may not have been requeued yet.
            row.same_as = equal_trial(session, row, [of for of in (continues, promotes) if of is not None])
            if row.same_as is not None:
                refused = f"trial {row.same_as} has the same rank map"
            if refused is not None:
                row.state, row.reason, row.finished = State.SKIPPED, refused, row.started
            elif continues is not None:
                take_over_rungs(session, study, continues, number)
            session.add(row)
            if refused is None:
                add_lease(session, study.id, number, worker, lease_seconds, attempt)
            return trial_record(row)

    def add_measurement(self, name: str, number: int, rung: int, measurement: Measurement) -> None:
        """Store what a trial has on a rung below the top; it goes on. Storing it twice keeps the first.

        Raises:
            LeaseLostError: the trial was taken from its worker; so, too, by the other ends of a trial.
        """
        with self._held(name, number, rung) as (session, _, trial):
            trial.refuse_lost()
            if trial.runs:
                trial.add(session, rung, measurement)

    def prune_trial(self, name: str, number: int, rung: int, measurement: Measurement) -> None:
        """Store what a trial has on a rung, with which it ends."""
        with self._held(name, number, rung) as (session, _, trial):
            trial.refuse_lost()
            if trial.runs:
                trial.add(session, rung, measurement)
                set_measurement(trial.row, measurement)
                trial.row.state, trial.row.finished = State.PRUNED, datetime.now(UTC)
                trial.drop_lease(session)

    def complete_trial(
        self, name: str, number: int, measurement: Measurement, *, rung: int = 0, infeasible: str | None = None
    ) -> Measurement:
        """Store a measurement and bring the front up to date, both or neither.

        A trial that has a measurement already keeps it, so that telling twice changes nothing. A failed trial
        stays failed, and one that was taken from its worker stays with the next one.

        Args:
            infeasible: which goal of the study it misses; it is then kept off the front.

        Returns:
            The stored measurement.

        Raises:
            StorageError: no such trial, or it was skipped.
            LeaseLostError: it has failed, or was taken from its worker.
        """
        with self._held(name, number, rung) as (session, study, trial):
            row = trial.row
            if row.state in MEASURED:
                return measurement_of(row)
            if row.state == State.SKIPPED:
                raise StorageError(f"trial {number} of study {name!r} was skipped and cannot be completed; ask again")
            trial.refuse_lost()
            trial.add(session, rung, measurement)
            set_measurement(row, measurement)
            row.finished, row.reason = datetime.now(UTC), infeasible
            row.state = State.COMPLETE if infeasible is None else State.INFEASIBLE
            trial.drop_lease(session)
            if infeasible is None:
                update_front(session, study, FrontPoint(number, rank_map_of(row.rank_map), measurement, row.source))
            return measurement

    def fail_trial(self, name: str, number: int, reason: str) -> None:
        """Store why a trial failed; a trial that has ended already is left as it is."""
        self._end(name, number, State.FAILED, reason)

    def requeue_trial(self, name: str, number: int, reason: str) -> None:
        """Store that a trial's rank map is proposed again; a trial that has ended already is left as it is."""
        self._end(name, number, State.REQUEUED, reason)

    def _end(self, name: str, number: int, state: State, reason: str) -> None:
        with self._held(name, number) as (session, _, trial):
            if trial.runs:
                trial.row.state, trial.row.reason, trial.row.finished = state, reason, datetime.now(UTC)
                trial.drop_lease(session)

    # Sessions and rows

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with translated(self.engine.url), Session(self._reading) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with translated(self.engine.url), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _held(self, name: str, number: int, rung: int = 0) -> Iterator[tuple[Session, StudyKey, HeldTrial]]:
        """A transaction that changes a trial. The lock on the study's row makes writers update its front, too, one
        after the other."""
        with self._write() as session:
            study = self._key(session, name, lock=True)
            trial = HeldTrial.find(session, study, number, rung)
            if trial is None:
                raise StorageError(f"study {name!r} has no trial {number}; see `rank-search status {name}`")
            yield session, study, trial

    def _key(self, session: Session, name: str, *, lock: bool = False) -> StudyKey:
        found = session.scalar(_LOCKED_KEY if lock else _KEY, {"name": name})
        if found is None:
            raise no_study(session, self.engine.url, name)
        return StudyKey(found, name)

    def _study_row(self, session: Session, name: str, *, lock: bool = False) -> StudyRow:
        query = select(StudyRow).where(StudyRow.name == name)
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            raise no_study(session, self.engine.url, name)
        return row


# Every trial's, so made once.
_KEY = select(StudyRow.id).where(StudyRow.name == bindparam("name"))
_LOCKED_KEY = _KEY.with_for_update()


def no_study(session: Session | Connection, url: URL, name: str) -> StorageError:
    """The error of a study that is not in the database, with those that are."""
    names = list(session.scalars(select(StudyRow.name).order_by(StudyRow.name)))
    known = f"known studies are {', '.join(names)}" if names else "it holds none yet"
    return StorageError(f"database {shown(url)} has no study {name!r}; {known}")


def _counts(session: Session, study: StudyRow) -> dict[State, int]:
    query = select(TrialRow.state, func.count()).where(TrialRow.study_id == study.id).group_by(TrialRow.state)
    return {State(state): count for state, count in session.execute(query)}
