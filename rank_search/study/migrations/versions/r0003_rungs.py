"""Measurements on every rung, equal rank maps, promotions, and why a run stopped."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")
MEASURED: tuple[tuple[str, Any], ...] = (
    ("loss", sa.Double()),
    ("standard_error", sa.Double()),
    ("num_params", sa.BigInteger()),
    ("target_params", sa.BigInteger()),
    ("kept_of_targets", sa.Double()),
    ("kept_of_model", sa.Double()),
    ("fidelity", sa.String(16)),
    ("tokens", sa.BigInteger()),
    ("swap_seconds", sa.Double()),
    ("finetune_seconds", sa.Double()),
    ("score_seconds", sa.Double()),
    ("peak_memory", sa.BigInteger()),
    ("metrics", LONG_TEXT),
    ("fold_losses", LONG_TEXT),
)
TRIALS, DIGESTS = "rank_search_trials", "ix_rank_search_trials_study_id_rank_map_digest"


def upgrade() -> None:
    """Add the table, filled with the measurements that are there, and the columns, empty."""
    op.create_table(
        "rank_search_measurements",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("trial", sa.Integer(), nullable=False),
        sa.Column("rung", sa.Integer(), nullable=False),
        *(sa.Column(name, kind, nullable=True) for name, kind in MEASURED),
        sa.Column("block_losses", LONG_TEXT, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_measurements"),
        sa.UniqueConstraint("study_id", "trial", "rung", name="uq_rank_search_measurements_study_id_trial_rung"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["rank_search_studies.id"], name="fk_rank_search_measurements_study_id", ondelete="CASCADE"
        ),
    )
    names = ", ".join(name for name, _ in MEASURED)
    op.execute(
        f"INSERT INTO rank_search_measurements (study_id, trial, rung, {names}) "
        f"SELECT study_id, number, 0, {names} FROM {TRIALS} WHERE state = 'complete' ORDER BY id"
    )
    op.add_column("rank_search_studies", sa.Column("stop_reason", LONG_TEXT, nullable=True))
    op.add_column(TRIALS, sa.Column("same_as", sa.Integer(), nullable=True))
    op.add_column(TRIALS, sa.Column("promotes", sa.Integer(), nullable=True))
    op.create_index(DIGESTS, TRIALS, ["study_id", "rank_map_digest"])


def downgrade() -> None:
    """Drop what was added; in place, since making a table anew would delete what refers to its rows."""
    op.drop_index(DIGESTS, TRIALS)
    op.drop_column(TRIALS, "promotes")
    op.drop_column(TRIALS, "same_as")
    op.drop_column("rank_search_studies", "stop_reason")
    op.drop_table("rank_search_measurements")
