"""Into how many parts the batches of a measurement were cut."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLES = ("rank_search_trials", "rank_search_measurements")


def upgrade() -> None:
    """Add the columns, empty."""
    for table in TABLES:
        op.add_column(table, sa.Column("parts", sa.Integer(), nullable=True))


def downgrade() -> None:
    """Drop them; in place, since making a table anew would delete what refers to its rows."""
    for table in TABLES:
        op.drop_column(table, "parts")
