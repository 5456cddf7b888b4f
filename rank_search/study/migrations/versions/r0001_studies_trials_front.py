"""Studies, trials and the front."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

LONG_TEXT = sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    """Make the three tables."""
    op.create_table(
        "rank_search_studies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("spec", LONG_TEXT, nullable=False),
        sa.Column("spec_digest", sa.String(64), nullable=False),
        sa.Column("facts", LONG_TEXT, nullable=False),
        sa.Column("dense_loss", sa.Double(), nullable=True),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_studies"),
        sa.UniqueConstraint("name", name="uq_rank_search_studies_name"),
    )
    op.create_table(
        "rank_search_trials",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("source", sa.String(200), nullable=False),
        sa.Column("rank_map", LONG_TEXT, nullable=False),
        sa.Column("rank_map_digest", sa.String(64), nullable=False),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("standard_error", sa.Double(), nullable=True),
        sa.Column("num_params", sa.BigInteger(), nullable=True),
        sa.Column("target_params", sa.BigInteger(), nullable=True),
        sa.Column("kept_of_targets", sa.Double(), nullable=True),
        sa.Column("kept_of_model", sa.Double(), nullable=True),
        sa.Column("fidelity", sa.String(16), nullable=True),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.Column("swap_seconds", sa.Double(), nullable=True),
        sa.Column("finetune_seconds", sa.Double(), nullable=True),
        sa.Column("score_seconds", sa.Double(), nullable=True),
        sa.Column("peak_memory", sa.BigInteger(), nullable=True),
        sa.Column("reason", LONG_TEXT, nullable=True),
        sa.Column("worker", sa.String(300), nullable=False),
        sa.Column("started", sa.DateTime(), nullable=False),
        sa.Column("finished", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_rank_search_trials"),
        sa.UniqueConstraint("study_id", "number", name="uq_rank_search_trials_study_id_number"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["rank_search_studies.id"], name="fk_rank_search_trials_study_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "rank_search_front",
        sa.Column("study", sa.String(100), nullable=False),
        sa.Column("trial", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rank_map", LONG_TEXT, nullable=False),
        sa.Column("loss", sa.Double(), nullable=False),
        sa.Column("perplexity", sa.Double(), nullable=True),
        sa.Column("num_params", sa.BigInteger(), nullable=False),
        sa.Column("kept_of_targets", sa.Double(), nullable=False),
        sa.Column("kept_of_model", sa.Double(), nullable=False),
        sa.Column("fidelity", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("study", "trial", name="pk_rank_search_front"),
        sa.ForeignKeyConstraint(
            ["study"], ["rank_search_studies.name"], name="fk_rank_search_front_study", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    """Drop the three tables."""
    op.drop_table("rank_search_front")
    op.drop_table("rank_search_trials")
    op.drop_table("rank_search_studies")
