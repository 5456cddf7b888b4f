"""What people ask of a study from elsewhere: to run, pause or stop, and rank maps to measure. No Optuna.

Workers look here between two trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rank_search.errors import ConflictError, RankMapError, StorageError
from rank_search.ranks import RankMap, RankSpace
from rank_search.study.engine import READ_ONLY, shown, translated
from rank_search.study.overview import space_of
from rank_search.study.states import Action as Action
from rank_search.study.stored import rank_map_json, rank_map_of, study_record
from rank_search.study.tables import QueueRow, RequestRow, StudyRow

MOST_QUEUED = 1000
"""Rank maps of one study that may wait to be taken."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A rank map that somebody wants measured, and the number it waits under."""

    number: int
    rank_map: RankMap

    @property
    def source(self) -> str:
        """Source of its trial; by it a worker knows that it has been taken already. In a database that the study was
        imported into, numbers begin anew, so the rank map tells them apart."""
        return f"by hand {self.number} {self.rank_map.digest[:8]}"


def ask_for(engine: Engine, study: str, action: Action, asked_by: str) -> None:
    """Store what the workers of a study are to do from now on; in place of what was asked before.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    with translated(engine.url):
        try:
            _ask_for(engine, study, action, asked_by)
        except IntegrityError:  # of two that ask first at once, the unique name refuses one; now there is a row
            _ask_for(engine, study, action, asked_by)


def _ask_for(engine: Engine, study: str, action: Action, asked_by: str) -> None:
    with Session(engine) as session, session.begin():
        set_action(session, study, action, asked_by)


def set_action(session: Session, study: str, action: Action, asked_by: str) -> None:
    """As :func:`ask_for`, in a transaction of the caller's."""
    row = session.get(RequestRow, study)  # not locked: MySQL would lock the gap of one that is missing, and deadlock
    if row is None:
        session.add(RequestRow(study=study, action=action, asked_by=asked_by, created=datetime.now(UTC)))
    else:
        row.action, row.asked_by, row.created = action, asked_by, datetime.now(UTC)


def asked_of_workers(engine: Engine, study: str) -> tuple[Action, list[Queued]]:
    """What the workers of a study are to do, and the rank maps that none of them has taken yet, the first one first.

    Raises:
        StorageError: the database cannot be reached.
    """
    waiting = (
        select(QueueRow.id, QueueRow.rank_map)
        .join(StudyRow, StudyRow.id == QueueRow.study_id)
        .where(StudyRow.name == study, QueueRow.taken.is_(None))
        .order_by(QueueRow.id)
    )
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        action = connection.scalar(select(RequestRow.action).where(RequestRow.study == study))
        rows = connection.execute(waiting).all()
    return Action(action or Action.RUN), [Queued(number, rank_map_of(text)) for number, text in rows]


def asked_for(engine: Engine, study: str) -> Action:
    """What the workers of a study are to do."""
    return asked_of_workers(engine, study)[0]


def all_asked_for(engine: Engine) -> dict[str, Action]:
    """Study → what its workers were asked to do last; studies that nobody asked anything of are left out.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        rows = connection.execute(select(RequestRow.study, RequestRow.action)).all()
    return {study: Action(action) for study, action in rows}


def queue_rank_map(engine: Engine, study: str, rank_map: RankMap, asked_by: str) -> Queued:
    """Have a rank map measured by the next worker that is free, before anything new is sampled.

    Raises:
        RankMapError: it names a layer, or a rank, that the study could not propose; names the first one.
        ConflictError: too many wait already.
        StorageError: the database cannot be reached or written, or lacks the study.
    """
    with translated(engine.url), Session(engine) as session, session.begin():
        row = session.scalar(select(StudyRow).where(StudyRow.name == study).with_for_update())
        if row is None:
            raise StorageError(f"database {shown(engine.url)} has no study {study!r}")
        check_allowed(space_of(study_record(row)), rank_map)
        waiting = select(QueueRow.id).where(QueueRow.study_id == row.id, QueueRow.taken.is_(None))
        if len(session.scalars(waiting).all()) >= MOST_QUEUED:
            raise ConflictError(f"{MOST_QUEUED} rank maps wait in study {study!r} already; let workers measure them")
        queued = QueueRow(
            study_id=row.id, rank_map=rank_map_json(rank_map), asked_by=asked_by, created=datetime.now(UTC)
        )
        session.add(queued)
        session.flush()
        return Queued(queued.id, rank_map)


def queued_rank_maps(engine: Engine, study: str) -> list[Queued]:
    """The rank maps that no worker has taken yet."""
    return asked_of_workers(engine, study)[1]


def mark_taken(engine: Engine, queued: list[Queued]) -> None:
    """Store that rank maps are among the trials that wait.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    numbers = [one.number for one in queued]
    with translated(engine.url), engine.begin() as connection:
        connection.execute(update(QueueRow).where(QueueRow.id.in_(numbers)).values(taken=datetime.now(UTC)))


def check_allowed(space: RankSpace, rank_map: RankMap) -> None:
    """Refuse a rank map that is not in a study's space.

    Raises:
        RankMapError: naming the first layer that does not fit.
    """
    space.validate(rank_map)
    for shape in space.shapes:
        rank, allowed = rank_map.get(shape.name), space.ranks(shape)
        if rank is None and not space.may_be_dense(shape):
            raise RankMapError(f"{shape.name} may not be dense in this study; give it rank {allowed[0]}")
        if rank is not None and rank not in allowed:
            raise RankMapError(
                f"{shape.name} may not have rank {rank} in this study; "
                + (
                    f"it may have {allowed[0]} to {allowed[-1]} in steps of {allowed.step}"
                    if allowed
                    else "leave it out"
                )
            )
