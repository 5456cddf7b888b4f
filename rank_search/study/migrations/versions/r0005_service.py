"""What the service keeps: submitted studies, requests to workers, rank maps queued by hand, jobs, tokens."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    """Make the tables, all empty."""
    op.create_table(
        "rank_search_submissions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("spec", LONG_TEXT, nullable=False),
        sa.Column("asked_by", sa.String(100), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", LONG_TEXT, nullable=True),
        sa.Column("engine", sa.String(16), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_submissions"),
        sa.UniqueConstraint("name", name="uq_rank_search_submissions_name"),
    )
    op.create_table(
        "rank_search_requests",
        sa.Column("study", sa.String(100), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("asked_by", sa.String(100), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("study", name="pk_rank_search_requests"),
    )
    op.create_table(
        "rank_search_queue",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("rank_map", LONG_TEXT, nullable=False),
        sa.Column("asked_by", sa.String(100), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("taken", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_queue"),
        _of_study("rank_search_queue"),
    )
    op.create_table(
        "rank_search_jobs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("trial", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("options", LONG_TEXT, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("reason", LONG_TEXT, nullable=True),
        sa.Column("result", LONG_TEXT, nullable=True),
        sa.Column("folder", LONG_TEXT, nullable=False),
        sa.Column("asked_by", sa.String(100), nullable=False),
        sa.Column("worker", sa.String(300), nullable=True),
        sa.Column("renewed", sa.DateTime(), nullable=True),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("started", sa.DateTime(), nullable=True),
        sa.Column("finished", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_jobs"),
        _of_study("rank_search_jobs"),
    )
    op.create_table(
        "rank_search_tokens",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("role", sa.String(8), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("revoked", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_tokens"),
        sa.UniqueConstraint("name", name="uq_rank_search_tokens_name"),
    )


def _of_study(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["study_id"], ["rank_search_studies.id"], name=f"fk_{table}_study_id", ondelete="CASCADE"
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("tokens", "jobs", "queue", "requests", "submissions"):
        op.drop_table(f"rank_search_{table}")
