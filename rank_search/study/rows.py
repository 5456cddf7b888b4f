"""All rows that belong to a study, the project's and Optuna's alike, found by the foreign keys of the database itself.

So a table that is added later is carried along without a word here. No Optuna.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Connection, Engine, Float, Integer, MetaData, Numeric, Select, Table, insert, select

from rank_search.study.engine import READ_ONLY

STUDIES = {"rank_search_studies": "name", "studies": "study_name"}
"""The tables that hold a row for each study, the project's and Optuna's, with the column of its name."""

_OF_A_MOMENT = {"trial_heartbeats", "rank_search_leases", "rank_search_jobs"}
"""What only means something to workers of the database it is in."""
_OF_TRIALS = re.compile(r"dashboard:(artifacts:)?\d+:")
"""Keys of what a dashboard shows of single trials, by their ids in one database; workers write it anew."""
_GENERATION_OF_IDS = re.compile(r":parent:\d+$")
"""Keys under which Optuna's genetic samplers keep the database ids of a generation's parents."""

Row = tuple[str, dict[str, Any]]
"""A table's name, and a row of it: text, numbers and None."""


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection that sees all tables as they were at one moment, and writes nothing."""
    options: dict[str, Any] = dict(READ_ONLY)
    if engine.url.get_backend_name() == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with engine.connect().execution_options(**options) as connection:
        yield connection


def reflected(connection: Connection) -> MetaData:
    """The tables as the database has them."""
    metadata = MetaData()
    metadata.reflect(connection)
    for table in metadata.tables.values():
        for column in table.columns:
            if isinstance(column.type, Float | Numeric):
                column.type.asdecimal = False  # MySQL's would come rounded to ten decimals
    return metadata


def has_study(connection: Connection, name: str) -> bool:
    """Whether a study of this name is there, the project's or only Optuna's."""
    tables = reflected(connection).tables
    return any(
        connection.execute(select(tables[table].c[column]).where(tables[table].c[column] == name)).first()
        for table, column in STUDIES.items()
    )


def study_tables(metadata: MetaData, name: str) -> Iterator[tuple[Table, Select[Any]]]:
    """Every table that belongs to studies, those that others refer to first, with a query for the rows of one."""
    queries: dict[str, Select[Any]] = {}
    for table in metadata.sorted_tables:
        query = _own_rows(table, name, queries)
        if query is not None and table.name not in _OF_A_MOMENT:
            queries[table.name] = query
            yield table, query


def _own_rows(table: Table, name: str, parents: Mapping[str, Select[Any]]) -> Select[Any] | None:
    if table.name in STUDIES:
        return select(table).where(table.c[STUDIES[table.name]] == name)
    for key in sorted(table.foreign_keys, key=lambda key: key.parent.name):
        parent = key.column.table
        if parent.name in parents:
            wanted = parents[parent.name].with_only_columns(key.column)
            return select(table).where(key.parent.in_(wanted))
    return None


def rows_of(connection: Connection, name: str) -> Iterator[Row]:
    """All rows of a study in an order in which they can be inserted."""
    for table, query in study_tables(reflected(connection), name):
        ordered = query.order_by(*table.primary_key.columns)
        for row in connection.execute(ordered).mappings():
            yield table.name, {column: _plain(value) for column, value in row.items()}


def insert_rows(connection: Connection, rows: Iterable[Row]) -> None:
    """Insert what :func:`rows_of` gave into another database, under new ids."""
    inserting = _Inserting(connection, reflected(connection))
    for table, row in rows:
        inserting.add(table, row)
    inserting.finish()


@dataclass
class _Inserting:
    """Numbers rows anew: ids are the database's own, and two databases give them to different rows."""

    connection: Connection
    metadata: MetaData
    ids: dict[Column[Any], dict[Any, Any]] = field(default_factory=dict)
    waiting: list[tuple[Table, dict[str, Any]]] = field(default_factory=list)
    """Of one table, to be inserted together."""
    last: list[tuple[Table, dict[str, Any]]] = field(default_factory=list)

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        table = self.metadata.tables[name]
        if name == "study_system_attributes" and _GENERATION_OF_IDS.search(row["key"]):
            self.last.append((table, dict(row)))  # it tells ids of trials, which come later
            return
        if name == "study_system_attributes" and _OF_TRIALS.match(row["key"]):
            return
        self._insert(table, row)

    def finish(self) -> None:
        self._flush()
        ids = self.ids.get(self.metadata.tables["trials"].c.trial_id, {})
        for table, row in self.last:
            parents = [ids[parent] for parent in json.loads(row["value_json"]) if parent in ids]
            self._insert(table, {**row, "value_json": json.dumps(parents)})
        self._flush()

    def _insert(self, table: Table, row: Mapping[str, Any]) -> None:
        values = {column.name: _stored(column, row[column.name]) for column in table.columns if column.name in row}
        for key in table.foreign_keys:
            known = self.ids.get(key.column)
            if known is not None:
                values[key.parent.name] = known[values[key.parent.name]]
        own = _surrogate(table)
        if own is not None and self._is_referred_to(own):
            self._flush()
            old = values.pop(own.name)
            new = self.connection.execute(insert(table), values).inserted_primary_key
            assert new is not None
            self.ids.setdefault(own, {})[old] = new[0]
            return
        if own is not None:
            values.pop(own.name)
        if self.waiting and self.waiting[0][0] is not table:
            self._flush()
        self.waiting.append((table, values))

    def _flush(self) -> None:
        if self.waiting:
            self.connection.execute(insert(self.waiting[0][0]), [values for _, values in self.waiting])
            self.waiting.clear()

    def _is_referred_to(self, column: Column[Any]) -> bool:
        return any(key.column is column for table in self.metadata.sorted_tables for key in table.foreign_keys)


def _surrogate(table: Table) -> Column[Any] | None:
    """The column of ids that the database gives out, None of a table whose key says something."""
    columns = list(table.primary_key.columns)
    if len(columns) == 1 and isinstance(columns[0].type, Integer) and not columns[0].foreign_keys:
        return columns[0]
    return None


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _stored(column: Column[Any], value: Any) -> Any:
    if value is not None and column.type.python_type is datetime:
        return datetime.fromisoformat(value)
    return value
