"""Rows of a study's trials, found and changed within a transaction of the caller's. No Optuna.

A trial's beginning and end are what all workers of a study wait for, one after the other, so they take few statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, bindparam, case, exists, select
from sqlalchemy.orm import Session

from rank_search.errors import LeaseLostError
from rank_search.measurement import Measurement
from rank_search.study.leases import LEASE_ID, drop_leases
from rank_search.study.records import FINISHED, State
from rank_search.study.stored import measurement_of, set_measurement
from rank_search.study.tables import MeasurementRow, TrialRow


@dataclass(frozen=True, slots=True)
class StudyKey:
    """What the rows of a study refer to it by."""

    id: int
    name: str

    def trial(self, number: int) -> dict[str, int]:
        """One of its trials, as the parameters of a statement."""
        return {"study_id": self.id, "trial": number}


# Statements of one trial, made once: to make one takes about as long as to execute it.
TRIAL: Select[TrialRow] = select(TrialRow).where(
    TrialRow.study_id == bindparam("study_id"), TrialRow.number == bindparam("trial")
)
RUNGS: Select[MeasurementRow] = (
    select(MeasurementRow)
    .where(MeasurementRow.study_id == bindparam("study_id"), MeasurementRow.trial == bindparam("trial"))
    .order_by(MeasurementRow.rung)
)
"""Its measurements, rung by rung."""
_HELD = TRIAL.add_columns(exists(RUNGS.where(MeasurementRow.rung == bindparam("rung"))), LEASE_ID)
_EQUAL = (
    select(TrialRow.number)
    .where(
        TrialRow.study_id == bindparam("study_id"),
        TrialRow.rank_map_digest == bindparam("digest"),
        TrialRow.state.in_([*FINISHED, State.RUNNING]),
        TrialRow.number.not_in(bindparam("but", expanding=True)),
    )
    .order_by(
        case(
            {State.COMPLETE: 0, State.INFEASIBLE: 1, State.RUNNING: 2, State.PRUNED: 3}, value=TrialRow.state, else_=4
        ),
        TrialRow.number,
    )
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class HeldTrial:
    """A trial of a study whose row the transaction has locked.

    Attributes:
        row: of the trial.
        has_rung: whether the rung that was asked for is measured already.
    """

    row: TrialRow
    has_rung: bool
    _study: StudyKey
    _lease: int | None

    @classmethod
    def find(cls, session: Session, study: StudyKey, number: int, rung: int) -> HeldTrial | None:
        """None if there is none of this number."""
        found = session.execute(_HELD, {**study.trial(number), "rung": rung}).one_or_none()
        return None if found is None else cls(found[0], found[1], study, found[2])

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.row.state == State.RUNNING

    def refuse_lost(self) -> None:
        """Refuse a result of a trial that its worker does not have any more.

        Raises:
            LeaseLostError: it was taken from its worker, or has failed.
        """
        row = self.row
        if row.state in {State.REQUEUED, State.FAILED}:
            ended = "has failed" if row.state == State.FAILED else "was given back"
            raise LeaseLostError(
                f"trial {row.number} of study {self._study.name!r} {ended} and cannot be completed; "
                f"ask again ({row.reason})"
            )

    def add(self, session: Session, rung: int, measurement: Measurement) -> None:
        """Add what was measured on the rung that was asked for, if it is not there."""
        if not self.has_rung:
            row = MeasurementRow(study_id=self._study.id, trial=self.row.number, rung=rung)
            set_measurement(row, measurement)
            session.add(row)

    def drop_lease(self, session: Session) -> None:
        """End the lease on it, if there is one."""
        if self._lease is not None:
            drop_leases(session, [self._lease])


def promoted(mine: ColumnElement[bool]) -> ColumnElement[bool]:
    """Whether another trial continues a pruned one; ``mine``: whether it is of the same study."""
    return TrialRow.number.in_(select(TrialRow.promotes).where(mine, TrialRow.promotes.is_not(None)))


def equal_trial(session: Session, row: TrialRow, but: Sequence[int]) -> int | None:
    """Number of a trial, ``but`` some, that has a new one's rank map: the one that got farthest."""
    return session.scalar(_EQUAL, {"study_id": row.study_id, "digest": row.rank_map_digest, "but": list(but)})


def take_over_rungs(session: Session, study: StudyKey, old: int, new: int) -> None:
    """Make the measurements of a trial that was requeued those of the one that was proposed in its place."""
    for row in session.scalars(RUNGS, study.trial(old)).all():
        moved = MeasurementRow(study_id=study.id, trial=new, rung=row.rung, block_losses=row.block_losses)
        set_measurement(moved, measurement_of(row))
        session.delete(row)
        session.add(moved)
