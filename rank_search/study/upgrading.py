"""Bringing a database up to date, and telling what was done."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.storages import RDBStorage
from sqlalchemy import Engine, inspect
from sqlalchemy.engine import URL

from rank_search.study.engine import engine_kwargs, make_engine, translated
from rank_search.study.optuna_study import quiet
from rank_search.study.schema import ensure_schema, exclusive, migrations, version_of


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What an upgrade did.

    Attributes:
        before, after: versions of the project's tables; ``before`` is None where they were made.
        steps: version and purpose of every migration that ran.
        optuna: versions of Optuna's tables before and after, where they changed.
    """

    before: str | None
    after: str | None
    steps: tuple[tuple[str, str], ...]
    optuna: tuple[str, str] | None = None


def upgrade(storage: str | URL) -> Upgrade:
    """Make all tables, or bring them up to date; safe for any number of processes at once.

    Raises:
        StorageError: the database cannot be reached or written, or is of an unknown newer version.
    """
    engine = make_engine(storage)
    try:
        before = version_of(engine)
        optuna = _upgrade_optuna(engine)
        ensure_schema(engine)
        after = version_of(engine)
    finally:
        engine.dispose()
    return Upgrade(before, after, migrations(before, after), optuna)


def _upgrade_optuna(engine: Engine) -> tuple[str, str] | None:
    """Run Optuna's own migrations where its tables are of an older version."""
    with translated(engine.url):
        if not inspect(engine).has_table("alembic_version"):
            return None
    with exclusive(engine), translated(engine.url), quiet():
        storage = RDBStorage(
            engine.url.render_as_string(hide_password=False), engine_kwargs=engine_kwargs(engine.url),
            skip_compatibility_check=True, skip_table_creation=True,
        )  # fmt: skip
        try:
            before = storage.get_current_version()
            if before == storage.get_head_version() or before not in storage.get_all_versions():
                return None
            storage.upgrade()
            return before, storage.get_current_version()
        finally:
            storage.remove_session()
            storage.engine.dispose()
