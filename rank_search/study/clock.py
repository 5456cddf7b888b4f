"""The database's clock, the only one by which workers of several hosts agree. No Optuna."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, DateTime, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement


class Now(FunctionElement[datetime]):
    """This moment in UTC, without a zone. Not the beginning of the transaction, which may have waited for a lock."""

    type = DateTime()
    inherit_cache = True


@compiles(Now, "sqlite")
def _of_sqlite(_element: Now, _compiler: Any, **_: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


@compiles(Now, "postgresql")
def _of_postgresql(_element: Now, _compiler: Any, **_: Any) -> str:
    return "timezone('UTC', clock_timestamp())"


@compiles(Now, "mysql")
@compiles(Now, "mariadb")
def _of_mysql(_element: Now, _compiler: Any, **_: Any) -> str:
    return "UTC_TIMESTAMP(6)"


def database_now(connection: Connection | Session) -> datetime:
    """What the database's clock says: UTC, without a zone, whatever the sessions' time zones are."""
    now = connection.execute(select(Now())).scalar_one()
    assert isinstance(now, datetime)
    return now
