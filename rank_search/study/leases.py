"""Leases: who holds a trial, or the right to make something once, and until when. By the database's clock. No Optuna.

A lease that its holder does not renew runs out, and then others may take what it was on. Durations are told by the
database too, so that no two clocks are ever compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Engine, ScalarSelect, Select, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rank_search.study.clock import Now, database_now
from rank_search.study.engine import READ_ONLY, translated
from rank_search.study.liveness import WorkerId
from rank_search.study.records import State, WorkerBeat
from rank_search.study.tables import LeaseRow, StudyRow, TrialRow

LEASE_SECONDS = 120.0
"""How long a worker may be silent before its trial is taken from it, where the study's file says nothing."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as it is now.

    Attributes:
        holder: identity of the worker.
        trial: number of the trial it is on; None of a worker's own lease.
        attempt: 1, and one more for every holder that lost it.
        age: seconds since it was renewed.
        left: seconds until it runs out; negative once it has.
    """

    holder: str
    trial: int | None
    attempt: int
    age: float
    left: float

    @property
    def seconds(self) -> float:
        """How long it lasts that is not renewed."""
        return self.age + self.left

    @property
    def has_run_out(self) -> bool:
        """Whether nobody has renewed it in time."""
        return self.left < 0


# Within a transaction of the caller's

# Statements of every trial, made once: to make one takes about as long as to execute it.
LEASE_ID: ScalarSelect[int] = (
    select(LeaseRow.id)
    .where(LeaseRow.study_id == bindparam("study_id"), LeaseRow.trial == bindparam("trial"))
    .scalar_subquery()
)
"""The row id of the lease on a trial, to be asked for along with something else, with the two as parameters."""
_NOW_AND_LEASE = select(Now(), LEASE_ID)


def add_lease(session: Session, study_id: int, trial: int, holder: str, seconds: float, attempt: int = 1) -> None:
    """Give a lease on a trial, in place of the one that a trial which nobody seemed to hold was given.

    The transaction holds the lock on the study's row; so, too, for :func:`drop_lease`.
    """
    now, old = session.execute(_NOW_AND_LEASE, {"study_id": study_id, "trial": trial}).one()
    if old is not None:
        drop_leases(session, [old])
    given = {
        "study_id": study_id, "trial": trial, "holder": holder, "attempt": attempt, "acquired": now, "renewed": now,
        "expires": now + timedelta(seconds=seconds),
    }  # fmt: skip
    session.execute(insert(LeaseRow), given)


def drop_lease(session: Session, study_id: int, trial: int) -> None:
    """End the lease on a trial, if there is one."""
    _delete(session, LeaseRow.study_id == study_id, LeaseRow.trial == trial)


def drop_leases(session: Session, ids: Sequence[int]) -> None:
    """End leases of known row ids."""
    session.execute(delete(LeaseRow).where(LeaseRow.id.in_(ids)), execution_options={"synchronize_session": False})


def leases_of(session: Session, study_id: int) -> list[Lease]:
    """All leases of a study, those of its workers and of its trials."""
    now = database_now(session)
    rows = session.scalars(select(LeaseRow).where(LeaseRow.study_id == study_id).order_by(LeaseRow.id))
    return [
        Lease(row.holder, row.trial, row.attempt, _seconds(now - row.renewed), _seconds(row.expires - now))
        for row in rows
    ]


def beats_of(session: Session, study_id: int) -> tuple[WorkerBeat, ...]:
    """The workers of a study, in the order in which they came."""
    leases = leases_of(session, study_id)
    trials = {lease.holder: lease.trial for lease in leases if lease.trial is not None}
    first: dict[str, Lease] = {}
    for lease in leases:
        first.setdefault(lease.holder, lease)
    return tuple(
        WorkerBeat(lease.holder, trials.get(lease.holder), lease.age, lease.has_run_out) for lease in first.values()
    )


def _seconds(span: timedelta) -> float:
    return span.total_seconds()


# In transactions of their own


class Leases:
    """The leases of one holder in one database.

    Every method is one transaction, and raises :class:`StorageError` when the database cannot be reached.

    Args:
        seconds: how long a lease lasts that is not renewed.
    """

    def __init__(self, engine: Engine, holder: str, seconds: float) -> None:
        self._engine = engine
        self.holder = holder
        self.seconds = seconds

    def of_study(self, study: str) -> list[Lease]:
        """All leases of a study."""
        with translated(self._engine.url), Session(self._engine.execution_options(**READ_ONLY)) as session:
            study_id = session.scalar(_id_of(study))
            return [] if study_id is None else leases_of(session, study_id)

    def join(self, study: str) -> None:
        """Take the worker's own lease on a study, or renew it."""
        with translated(self._engine.url), Session(self._engine) as session, session.begin():
            study_id = session.scalars(_id_of(study)).one()
            self._take(session, _own_name(study_id, self.holder), study_id)

    def leave(self, study: str, holder: str | None = None) -> None:
        """End the own lease of this worker, or of one that is gone."""
        with translated(self._engine.url), Session(self._engine) as session, session.begin():
            study_id = session.scalars(_id_of(study)).one()
            _delete(session, LeaseRow.name == _own_name(study_id, holder or self.holder))

    def grant(self, study: str, trial: int, holder: str) -> None:
        """Give a trial that runs without a lease one, which its worker may renew or not."""
        with translated(self._engine.url), Session(self._engine) as session, session.begin():
            study_id = session.scalars(_id_of(study).with_for_update()).one()
            has_one = _ids(session, LeaseRow.study_id == study_id, LeaseRow.trial == trial)
            state = session.scalar(
                select(TrialRow.state).where(TrialRow.study_id == study_id, TrialRow.number == trial)
            )
            if not has_one and state in {None, State.RUNNING}:  # it may have changed since it was looked at
                add_lease(session, study_id, trial, holder, self.seconds)

    def drop(self, study: str, trial: int) -> None:
        """End the lease on a trial."""
        with translated(self._engine.url), Session(self._engine) as session, session.begin():
            drop_lease(session, session.scalars(_id_of(study).with_for_update()).one(), trial)

    def renew(self, study: str) -> None:
        """Renew the worker's own lease, made anew if somebody has ended it, and those on its trials."""
        with translated(self._engine.url), Session(self._engine) as session, session.begin():
            study_id = session.scalars(_id_of(study)).one()
            # First, for it may wait for the lock on the study's row, whose holder may want one of the trials' leases.
            self._take(session, _own_name(study_id, self.holder), study_id)
            now = database_now(session)
            of_trials = LeaseRow.study_id == study_id, LeaseRow.holder == self.holder, LeaseRow.trial.is_not(None)
            if ids := _ids(session, *of_trials):
                renewed = update(LeaseRow).where(LeaseRow.id.in_(ids)).values(renewed=now, expires=self._end(now))
                session.execute(renewed)

    def try_name(self, name: str) -> int | None:
        """Take a named lease that nobody holds, that has run out, or whose holder was a process of this host and has
        ended: its attempt, or None where another holds it."""
        with translated(self._engine.url):
            try:
                with Session(self._engine) as session, session.begin():
                    return self._take(session, name, None)
            except IntegrityError:
                return None  # another one was quicker

    def renew_name(self, name: str, attempt: int) -> bool:
        """Renew a named lease; False where another has taken it since."""
        with translated(self._engine.url), Session(self._engine) as session, session.begin():
            now = database_now(session)
            mine = LeaseRow.name == name, LeaseRow.holder == self.holder, LeaseRow.attempt == attempt
            changed = session.execute(update(LeaseRow).where(*mine).values(renewed=now, expires=self._end(now)))
            return changed.rowcount == 1  # type: ignore[attr-defined, no-any-return]

    def end_name(self, name: str, attempt: int) -> None:
        """Let the next one have a named lease at once; its row stays, with the number of attempts."""
        with translated(self._engine.url), Session(self._engine) as session, session.begin():
            over = database_now(session) - timedelta(seconds=1)
            mine = LeaseRow.name == name, LeaseRow.holder == self.holder, LeaseRow.attempt == attempt
            session.execute(update(LeaseRow).where(*mine).values(expires=over))

    def _take(self, session: Session, name: str, study_id: int | None) -> int | None:
        ids = _ids(session, LeaseRow.name == name)
        row = session.scalar(select(LeaseRow).where(LeaseRow.id.in_(ids)).with_for_update()) if ids else None
        now = database_now(session)
        if row is None:
            # Of two that come at once, the unique name refuses one.
            session.add(
                LeaseRow(
                    study_id=study_id, name=name, holder=self.holder, attempt=1, acquired=now, renewed=now,
                    expires=self._end(now),
                )
            )  # fmt: skip
            session.flush()
            return 1
        if study_id is not None:  # a worker's own
            row.renewed, row.expires = now, self._end(now)
            return row.attempt
        if row.expires >= now and not WorkerId.parse(row.holder).is_dead():
            return None
        row.holder, row.attempt, row.acquired, row.renewed = self.holder, row.attempt + 1, now, now
        row.expires = self._end(now)
        return row.attempt

    def _end(self, now: datetime) -> datetime:
        return now + timedelta(seconds=self.seconds)


def _ids(session: Session, *conditions: ColumnElement[bool]) -> list[int]:
    """The rows to be changed. By their ids, since MySQL otherwise locks the gaps between them too, and deadlocks."""
    return list(session.scalars(select(LeaseRow.id).where(*conditions)))


def _delete(session: Session, *conditions: ColumnElement[bool]) -> None:
    if ids := _ids(session, *conditions):
        drop_leases(session, ids)


def _id_of(study: str) -> Select[int]:
    return select(StudyRow.id).where(StudyRow.name == study)


def _own_name(study_id: int, holder: str) -> str:
    return f"worker {study_id} {holder}"
