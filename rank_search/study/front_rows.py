"""The stored front: brought up to date point by point, read with its measurements. No Optuna."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from rank_search.front import FrontPoint, Outcome, non_dominated
from rank_search.measurement import Fidelity
from rank_search.study.stored import front_row, measurement_of, rank_map_of
from rank_search.study.tables import FrontRow, TrialRow
from rank_search.study.trial_rows import StudyKey


def update_front(session: Session, study: StudyKey, point: FrontPoint) -> None:
    """Put a new point on the front if it belongs there, and take off what it dominates.

    A point that is off the front stays off, so the old front and the new point determine the new front.
    """
    of_study = FrontRow.study == study.name
    columns = FrontRow.trial, FrontRow.fidelity, FrontRow.num_params, FrontRow.loss
    # Without the rank maps, which are most of what a front holds.
    stored = [
        Outcome(trial, Fidelity.from_label(fidelity), num_params, loss)
        for trial, fidelity, num_params, loss in session.execute(select(*columns).where(of_study))
    ]
    added = Outcome(point.trial, point.fidelity, point.num_params, point.loss)
    kept = {outcome.trial for outcome in non_dominated([*stored, added])}
    dominated = [outcome.trial for outcome in stored if outcome.trial not in kept]
    if dominated:
        session.execute(delete(FrontRow).where(of_study, FrontRow.trial.in_(dominated)))
    if point.trial in kept:
        session.add(front_row(study.name, point))


def stored_front(session: Session, study: StudyKey) -> list[FrontPoint]:
    """The stored points, by ascending parameter count."""
    query = (
        select(TrialRow)
        .join(FrontRow, FrontRow.trial == TrialRow.number)
        .where(TrialRow.study_id == study.id, FrontRow.study == study.name)
        .order_by(FrontRow.num_params)
    )
    return [
        FrontPoint(row.number, rank_map_of(row.rank_map), measurement_of(row), row.source)
        for row in session.scalars(query)
    ]
