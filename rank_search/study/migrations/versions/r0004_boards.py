"""Training losses of trials, and whose turn it is to write what a dashboard shows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    """Add a column and a table, both empty."""
    op.add_column("rank_search_measurements", sa.Column("train_losses", LONG_TEXT, nullable=True))
    op.create_table(
        "rank_search_boards",
        sa.Column("study_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker", sa.String(300), nullable=False),
        sa.Column("free", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("study_id", name="pk_rank_search_boards"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["rank_search_studies.id"], name="fk_rank_search_boards_study_id", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    """Drop both."""
    op.drop_table("rank_search_boards")
    op.drop_column("rank_search_measurements", "train_losses")
