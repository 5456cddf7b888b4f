"""Studies that were handed to the service: their files, and what became of them. No Optuna."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rank_search.errors import ConflictError
from rank_search.spec import StudySpec
from rank_search.study.engine import READ_ONLY, translated
from rank_search.study.requests import Action, set_action
from rank_search.study.states import Fate as Fate
from rank_search.study.stored import spec_json, spec_of
from rank_search.study.tables import StudyRow, SubmissionRow


@dataclass(frozen=True, slots=True)
class Submission:
    """A study that was handed to the service.

    Attributes:
        number: of the submission; its folder has this name.
        spec: the study's file.
        asked_by: name of the token, or of nobody.
        fate: what became of it, with its reason.
        engine: the engine that has its workers and keeps them whatever becomes of the service.
    """

    number: int
    spec: StudySpec
    asked_by: str
    created: datetime
    fate: Fate = Fate.OPEN
    reason: str | None = None
    engine: str | None = None

    @property
    def name(self) -> str:
        """The study's name."""
        return self.spec.name


def submit(engine: Engine, spec: StudySpec, asked_by: str, *, most: int) -> Submission:
    """Take a study on: its file and the request to run it, both or neither.

    Args:
        most: studies that the database may hold, this one among them.

    Raises:
        ConflictError: there is a study of this name, or there are too many; nothing was changed.
        StorageError: the database cannot be reached or written.
    """
    with translated(engine.url):
        try:
            return _submit(engine, spec, asked_by, most)
        except IntegrityError:  # somebody else was faster
            raise ConflictError(_taken(spec.name)) from None


def _submit(engine: Engine, spec: StudySpec, asked_by: str, most: int) -> Submission:
    with Session(engine) as session, session.begin():
        names = {*session.scalars(select(StudyRow.name)), *session.scalars(select(SubmissionRow.name))}
        if spec.name in names:
            raise ConflictError(_taken(spec.name))
        if len(names) >= most:
            raise ConflictError(f"there are {len(names)} studies, and no more than {most} are taken on")
        row = SubmissionRow(
            name=spec.name, spec=spec_json(spec), asked_by=asked_by, created=datetime.now(UTC), state=Fate.OPEN
        )
        session.add(row)
        set_action(session, spec.name, Action.RUN, asked_by)
        session.flush()
        return _submission(row)


def submissions(engine: Engine) -> list[Submission]:
    """All studies that were handed to the service, the first one first.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        return [_submission(row) for row in session.scalars(select(SubmissionRow).order_by(SubmissionRow.id))]


def submission(engine: Engine, name: str) -> Submission | None:
    """The submission of a study, None where it came another way.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        row = session.scalar(select(SubmissionRow).where(SubmissionRow.name == name))
        return None if row is None else _submission(row)


def set_fate(engine: Engine, number: int, fate: Fate, reason: str | None = None) -> None:
    """Store what became of a submission.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    _set(engine, number, {"state": fate, "reason": reason})


def set_engine(engine: Engine, number: int, name: str | None) -> None:
    """Store which engine keeps the workers of a submission.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    _set(engine, number, {"engine": name})


def resume(engine: Engine, name: str, asked_by: str) -> None:
    """Ask the workers of a study to run; one that was submitted is given workers anew.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    with translated(engine.url), Session(engine) as session, session.begin():
        set_action(session, name, Action.RUN, asked_by)
        again = update(SubmissionRow).where(SubmissionRow.name == name)
        session.execute(again.values(state=Fate.OPEN, reason=None, engine=None))


def count_of_studies(engine: Engine) -> int:
    """Studies in the database, those included that are only submitted yet.

    Raises:
        StorageError: the database cannot be reached.
    """
    names = select(StudyRow.name).union(select(SubmissionRow.name)).subquery()
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        return int(connection.scalar(select(func.count()).select_from(names)) or 0)


def _set(engine: Engine, number: int, values: dict[str, object]) -> None:
    with translated(engine.url), engine.begin() as connection:
        connection.execute(update(SubmissionRow).where(SubmissionRow.id == number).values(values))


def _submission(row: SubmissionRow) -> Submission:
    # What spec_of reads of a study's row, a submission's has as well.
    spec = spec_of(StudyRow(name=row.name, spec=row.spec))
    return Submission(row.id, spec, row.asked_by, row.created, Fate(row.state), row.reason, row.engine)


def _taken(name: str) -> str:
    return f"there is a study {name!r} already; give yours another name"
