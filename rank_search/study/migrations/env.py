"""Run by Alembic, through :mod:`rank_search.study.schema`, on a connection that is already in a transaction."""

from __future__ import annotations

from alembic import context

from rank_search.study.schema import VERSION_TABLE
from rank_search.study.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
