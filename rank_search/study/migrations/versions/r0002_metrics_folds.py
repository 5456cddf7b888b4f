"""Metrics and the losses of folds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    """Add the columns, empty in studies and trials that are there."""
    op.add_column("rank_search_studies", sa.Column("dense_metrics", LONG_TEXT, nullable=True))
    op.add_column("rank_search_trials", sa.Column("metrics", LONG_TEXT, nullable=True))
    op.add_column("rank_search_trials", sa.Column("fold_losses", LONG_TEXT, nullable=True))


def downgrade() -> None:
    """Drop the columns; in place, since making a table anew would delete what refers to its rows."""
    op.drop_column("rank_search_trials", "fold_losses")
    op.drop_column("rank_search_trials", "metrics")
    op.drop_column("rank_search_studies", "dense_metrics")
