"""The project's own tables, beside Optuna's in the same database. No Optuna.

``SELECT * FROM rank_search_front WHERE study = '...'`` is enough to read a front. Changes here need a migration in
``migrations/versions``; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.dialects.mysql import DATETIME, LONGTEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

LongText = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
"""Text of any length; MySQL's own TEXT ends at 64 KiB."""


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time: aware in Python, UTC without a zone in the database, where not every one keeps zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """All tables of the project; named constraints, so that migrations can change them on every database."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


class StudyRow(Base):
    """A study: its file, and the facts found when it was prepared."""

    __tablename__ = "rank_search_studies"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    spec: Mapped[str] = mapped_column(LongText)
    spec_digest: Mapped[str] = mapped_column(String(64))
    facts: Mapped[str] = mapped_column(LongText)
    dense_loss: Mapped[float | None] = mapped_column(Double)
    dense_metrics: Mapped[str | None] = mapped_column(LongText)
    """JSON: metric → value of the dense model."""
    stop_reason: Mapped[str | None] = mapped_column(LongText)
    """Why the last run stopped; none while one is at work or after an interrupt."""
    created: Mapped[datetime] = mapped_column(UtcDateTime)


class MeasuredColumns:
    """A measurement: columns named as its fields, all empty where there is none."""

    loss: Mapped[float | None] = mapped_column(Double)
    standard_error: Mapped[float | None] = mapped_column(Double)
    num_params: Mapped[int | None] = mapped_column(BigInteger)
    target_params: Mapped[int | None] = mapped_column(BigInteger)
    kept_of_targets: Mapped[float | None] = mapped_column(Double)
    kept_of_model: Mapped[float | None] = mapped_column(Double)
    fidelity: Mapped[str | None] = mapped_column(String(16))
    tokens: Mapped[int | None] = mapped_column(BigInteger)
    swap_seconds: Mapped[float | None] = mapped_column(Double)
    finetune_seconds: Mapped[float | None] = mapped_column(Double)
    score_seconds: Mapped[float | None] = mapped_column(Double)
    peak_memory: Mapped[int | None] = mapped_column(BigInteger)
    metrics: Mapped[str | None] = mapped_column(LongText)
    """JSON: metric → value; none in trials of versions that had no metrics."""
    fold_losses: Mapped[str | None] = mapped_column(LongText)
    """JSON: the loss of every fold."""
    parts: Mapped[int | None] = mapped_column(Integer)
    """None of versions that cut no batches."""


class TrialRow(MeasuredColumns, Base):
    """A trial: one proposed rank map with its measurement of the highest fidelity. ``number`` is Optuna's."""

    __tablename__ = "rank_search_trials"
    __table_args__ = (UniqueConstraint("study_id", "number"), Index(None, "study_id", "rank_map_digest"))

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey(StudyRow.id, ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16))
    source: Mapped[str] = mapped_column(String(200))
    rank_map: Mapped[str] = mapped_column(LongText)
    rank_map_digest: Mapped[str] = mapped_column(String(64))
    same_as: Mapped[int | None] = mapped_column(Integer)
    """Of a skipped trial: the number of the one that has its rank map."""
    promotes: Mapped[int | None] = mapped_column(Integer)
    """The number of the pruned trial that this one continues."""
    reason: Mapped[str | None] = mapped_column(LongText)
    worker: Mapped[str] = mapped_column(String(300))
    started: Mapped[datetime] = mapped_column(UtcDateTime)
    finished: Mapped[datetime | None] = mapped_column(UtcDateTime)


class MeasurementRow(MeasuredColumns, Base):
    """A measurement of a trial on one rung; a trial that climbs has several."""

    __tablename__ = "rank_search_measurements"
    __table_args__ = (UniqueConstraint("study_id", "trial", "rung"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey(StudyRow.id, ondelete="CASCADE"))
    trial: Mapped[int] = mapped_column(Integer)
    rung: Mapped[int] = mapped_column(Integer)
    block_losses: Mapped[str | None] = mapped_column(LongText)
    """JSON: losses of the validation blocks, whose mean ``loss`` is."""
    train_losses: Mapped[str | None] = mapped_column(LongText)
    """JSON: losses of the steps of the trial's own fine-tune."""


class FrontRow(Base):
    """A point of a study's front; the rows of one study are its whole front at every moment."""

    __tablename__ = "rank_search_front"

    study: Mapped[str] = mapped_column(String(100), ForeignKey(StudyRow.name, ondelete="CASCADE"), primary_key=True)
    trial: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    rank_map: Mapped[str] = mapped_column(LongText)
    loss: Mapped[float] = mapped_column(Double)
    perplexity: Mapped[float | None] = mapped_column(Double)
    """None where exp(loss) overflows."""
    num_params: Mapped[int] = mapped_column(BigInteger)
    kept_of_targets: Mapped[float] = mapped_column(Double)
    kept_of_model: Mapped[float] = mapped_column(Double)
    fidelity: Mapped[str] = mapped_column(String(16))


class BoardRow(Base):
    """Whose turn it is to write what a dashboard shows of a study."""

    __tablename__ = "rank_search_boards"

    study_id: Mapped[int] = mapped_column(
        ForeignKey(StudyRow.id, ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    worker: Mapped[str] = mapped_column(String(300))
    """Who had the last turn, or has it."""
    free: Mapped[datetime] = mapped_column(DateTime)
    """When the next one may be taken, by the database's clock."""


class SubmissionRow(Base):
    """A study that was handed to the service, from before its preparation on."""

    __tablename__ = "rank_search_submissions"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    spec: Mapped[str] = mapped_column(LongText)
    asked_by: Mapped[str] = mapped_column(String(100))
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    state: Mapped[str] = mapped_column(String(16))
    """``open``, or how it ended."""
    reason: Mapped[str | None] = mapped_column(LongText)
    """Why its workers were given up."""
    engine: Mapped[str | None] = mapped_column(String(16))
    """The engine that has its workers and keeps them whatever becomes of the service."""


class RequestRow(Base):
    """What workers of a study are asked to do; by its name, for it may not be prepared yet."""

    __tablename__ = "rank_search_requests"

    study: Mapped[str] = mapped_column(String(100), primary_key=True)
    action: Mapped[str] = mapped_column(String(16))
    asked_by: Mapped[str] = mapped_column(String(100))
    created: Mapped[datetime] = mapped_column(UtcDateTime)


class QueueRow(Base):
    """A rank map that somebody wants measured."""

    __tablename__ = "rank_search_queue"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey(StudyRow.id, ondelete="CASCADE"))
    rank_map: Mapped[str] = mapped_column(LongText)
    asked_by: Mapped[str] = mapped_column(String(100))
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    taken: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When a worker has put it among the trials that wait."""


class JobRow(Base):
    """Work on a point of a front: to write its checkpoint, or to confirm its loss."""

    __tablename__ = "rank_search_jobs"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey(StudyRow.id, ondelete="CASCADE"))
    trial: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(16))
    options: Mapped[str] = mapped_column(LongText)
    """JSON."""
    state: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(Integer)
    reason: Mapped[str | None] = mapped_column(LongText)
    result: Mapped[str | None] = mapped_column(LongText)
    """JSON: what was measured on the way."""
    folder: Mapped[str] = mapped_column(LongText)
    """Where its files go; each attempt has a folder of its own there."""
    asked_by: Mapped[str] = mapped_column(String(100))
    worker: Mapped[str | None] = mapped_column(String(300))
    renewed: Mapped[datetime | None] = mapped_column(DateTime)
    """When its worker last told that it is at it, by the database's clock."""
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    started: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished: Mapped[datetime | None] = mapped_column(UtcDateTime)


class TokenRow(Base):
    """A token of the service: its name, and the digest of its secret."""

    __tablename__ = "rank_search_tokens"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    role: Mapped[str] = mapped_column(String(8))
    digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the secret, hexadecimal."""
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked: Mapped[datetime | None] = mapped_column(UtcDateTime)


Moment = DateTime().with_variant(DATETIME(fsp=6), "mysql", "mariadb")
"""A point in time by the database's clock, UTC without a zone; MySQL's own DATETIME keeps whole seconds."""


class LeaseRow(Base):
    """Who holds something, and until when, by the database's clock. What nobody renews in time, others may take."""

    __tablename__ = "rank_search_leases"
    __table_args__ = (UniqueConstraint("study_id", "trial"), UniqueConstraint("name"))

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    study_id: Mapped[int | None] = mapped_column(ForeignKey(StudyRow.id, ondelete="CASCADE"))
    """None of what belongs to no study, such as the building of a factor bank."""
    trial: Mapped[int | None] = mapped_column(Integer)
    """Number of the trial that is measured under it; None of a worker's own lease and of a named one."""
    name: Mapped[str | None] = mapped_column(String(400))
    """What it is on, where that is no trial."""
    holder: Mapped[str] = mapped_column(String(300))
    """Identity of the worker."""
    attempt: Mapped[int] = mapped_column(Integer)
    """1, and one more for every holder that lost it, of a trial for every worker that died over its rank map."""
    acquired: Mapped[datetime] = mapped_column(Moment)
    renewed: Mapped[datetime] = mapped_column(Moment)
    expires: Mapped[datetime] = mapped_column(Moment)
