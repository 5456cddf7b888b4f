"""Jobs on points of a front, done by workers: to write a checkpoint, or to confirm a loss. No Optuna.

Who claims a job renews it now and then; a job that was not renewed for :data:`CLAIM_SECONDS`, or whose worker was a
process of this host and has ended, is claimed again, :data:`MAX_ATTEMPTS` times at most. The attempt decides whose
result counts, and each has a folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy import Engine, Select, func, select, update
from sqlalchemy.orm import Session

from rank_search.errors import ConflictError, StorageError
from rank_search.study.clock import database_now
from rank_search.study.engine import READ_ONLY, shown, translated
from rank_search.study.liveness import WorkerId
from rank_search.study.states import JobState as JobState
from rank_search.study.tables import JobRow, StudyRow

CLAIM_SECONDS = 120.0
"""After so long without being renewed, a job's worker counts as gone."""
MAX_ATTEMPTS = 3
"""How often a job is claimed; then it fails, for it may be what kills its workers."""
MOST_OPEN = 100
"""Jobs that may wait or run at a time."""

Kind = Literal["apply", "confirm"]
"""Write the checkpoint of a trial's rank map, or do so after a longer fine-tune and score it on the test text too."""


OPEN = (JobState.WAITING, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class Job:
    """A job as stored.

    Attributes:
        study, trial: what it is about.
        options: of its kind.
        attempt: how often it was claimed.
        reason: why it failed.
        result: what was measured on the way.
        folder: where its files go.
    """

    number: int
    study: str
    trial: int
    kind: Kind
    options: Mapping[str, Any]
    state: JobState
    attempt: int
    folder: Path
    asked_by: str
    created: datetime
    started: datetime | None = None
    finished: datetime | None = None
    reason: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    worker: str | None = None

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint of the present attempt goes."""
        return self.folder / f"attempt-{self.attempt}" / "checkpoint"


def add_job(
    engine: Engine, study: str, trial: int, kind: Kind, options: Mapping[str, Any], folder: Path, asked_by: str
) -> Job:
    """Have a job done by the next worker that looks for one.

    Args:
        folder: where the folders of all jobs are; this one's has its number as its name.

    Raises:
        ConflictError: :data:`MOST_OPEN` jobs wait or run already.
        StorageError: the database cannot be reached or written, or lacks the study.
    """
    with translated(engine.url), Session(engine) as session, session.begin():
        study_id = session.scalar(select(StudyRow.id).where(StudyRow.name == study).with_for_update())
        if study_id is None:
            raise StorageError(f"database {shown(engine.url)} has no study {study!r}")
        open_ones = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state.in_(OPEN))) or 0
        if open_ones >= MOST_OPEN:
            raise ConflictError(f"{open_ones} jobs wait or run already; let workers do them")
        row = JobRow(
            study_id=study_id, trial=trial, kind=kind, options=json.dumps(dict(options)), state=JobState.WAITING,
            attempt=0, folder=str(folder), asked_by=asked_by, created=datetime.now(UTC),
        )  # fmt: skip
        session.add(row)
        session.flush()
        row.folder = str(folder.resolve() / str(row.id))
        return _job(row, study)


def jobs(engine: Engine, study: str | None = None) -> list[Job]:
    """All jobs, or those of one study, the first one first.

    Raises:
        StorageError: the database cannot be reached.
    """
    query = _query()
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        mine = query if study is None else query.where(StudyRow.name == study)
        return [_job(row, name) for row, name in session.execute(mine)]


def job(engine: Engine, number: int) -> Job | None:
    """A job, None if there is none of this number.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        found = session.execute(_query().where(JobRow.id == number)).first()
        return None if found is None else _job(found[0], found[1])


def cancel_job(engine: Engine, number: int) -> bool:
    """Cancel a job that no worker has begun; whether it was one.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    waiting = JobRow.id == number, JobRow.state == JobState.WAITING
    with translated(engine.url), engine.begin() as connection:
        change = update(JobRow).where(*waiting).values(state=JobState.CANCELLED, finished=datetime.now(UTC))
        return connection.execute(change).rowcount == 1


def waiting_jobs(engine: Engine) -> int:
    """Jobs that a worker could claim now.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        return len(list(_claimable(session)))


def claim_job(engine: Engine, worker: str) -> Job | None:
    """Take the first job that waits or whose worker is gone; None where there is none.

    A job that has had :data:`MAX_ATTEMPTS` workers fails.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    with translated(engine.url), Session(engine) as session, session.begin():
        for row in _claimable(session, lock=True):
            if row.attempt >= MAX_ATTEMPTS:
                row.state, row.finished = JobState.FAILED, datetime.now(UTC)
                row.reason = f"its workers died {row.attempt} times, last {row.worker}; see their memory and logs"
                continue
            row.state, row.worker, row.attempt = JobState.RUNNING, worker, row.attempt + 1
            row.renewed, row.started = database_now(session), datetime.now(UTC)
            name = session.scalar(select(StudyRow.name).where(StudyRow.id == row.study_id))
            return _job(row, name or "")
    return None


def renew_job(engine: Engine, claimed: Job) -> bool:
    """Tell that a job's worker is at it; False where it has lost the job.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    with translated(engine.url), engine.begin() as connection:
        change = update(JobRow).where(*_mine(claimed)).values(renewed=database_now(connection))
        return connection.execute(change).rowcount == 1


def finish_job(engine: Engine, claimed: Job, result: Mapping[str, Any]) -> bool:
    """Store what came of a job; False where its worker has lost it, and nothing was changed.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    return _end(engine, claimed, state=JobState.DONE, result=json.dumps(dict(result), allow_nan=False))


def fail_job(engine: Engine, claimed: Job, reason: str) -> bool:
    """Store why a job failed; False where its worker has lost it, and nothing was changed.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    return _end(engine, claimed, state=JobState.FAILED, reason=reason)


def give_back_job(engine: Engine, claimed: Job) -> bool:
    """Let another worker do a job; False where its worker has lost it, and nothing was changed.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    values = {"state": JobState.WAITING, "worker": None, "renewed": None, "attempt": claimed.attempt - 1}
    with translated(engine.url), engine.begin() as connection:
        return connection.execute(update(JobRow).where(*_mine(claimed)).values(**values)).rowcount == 1


def _end(engine: Engine, claimed: Job, **values: object) -> bool:
    with translated(engine.url), engine.begin() as connection:
        change = update(JobRow).where(*_mine(claimed)).values(finished=datetime.now(UTC), **values)
        return connection.execute(change).rowcount == 1


def _mine(claimed: Job) -> tuple[Any, ...]:
    return JobRow.id == claimed.number, JobRow.state == JobState.RUNNING, JobRow.attempt == claimed.attempt


def _claimable(session: Session, *, lock: bool = False) -> Iterator[JobRow]:
    query = select(JobRow).where(JobRow.state.in_(OPEN)).order_by(JobRow.id)
    rows = session.scalars(query.with_for_update() if lock else query).all()
    limit = database_now(session) - timedelta(seconds=CLAIM_SECONDS)
    for row in rows:
        if row.worker is None or row.renewed is None or row.renewed < limit or WorkerId.parse(row.worker).is_dead():
            yield row


def _query() -> Select[JobRow, str]:
    return select(JobRow, StudyRow.name).join(StudyRow, StudyRow.id == JobRow.study_id).order_by(JobRow.id)


def _job(row: JobRow, study: str) -> Job:
    return Job(
        row.id, study, row.trial, cast(Kind, row.kind), json.loads(row.options), JobState(row.state), row.attempt,
        Path(row.folder), row.asked_by, row.created, row.started, row.finished, row.reason,
        json.loads(row.result or "{}"), row.worker,
    )  # fmt: skip
