"""Leases on trials and on what is made once: who holds them, and until when."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import DATETIME

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime().with_variant(DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    """Add an empty table; trials that run now get their leases from the first worker that comes."""
    op.create_table(
        "rank_search_leases",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=True),
        sa.Column("trial", sa.Integer(), nullable=True),
        sa.Column("name", sa.String(400), nullable=True),
        sa.Column("holder", sa.String(300), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("acquired", MOMENT, nullable=False),
        sa.Column("renewed", MOMENT, nullable=False),
        sa.Column("expires", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_leases"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["rank_search_studies.id"], name="fk_rank_search_leases_study_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("study_id", "trial", name="uq_rank_search_leases_study_id_trial"),
        sa.UniqueConstraint("name", name="uq_rank_search_leases_name"),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("rank_search_leases")
