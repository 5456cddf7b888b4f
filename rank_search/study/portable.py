"""A study as one file that any database can take in: JSON lines, compressed, with its schema's version and a digest.

Written and read without Optuna's own interfaces, so that nothing is lost that a later version of it may store. The
first line tells what the file is, the last one the digest of all lines before it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alembic import command
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL

from rank_search.errors import StorageError
from rank_search.study.engine import make_engine, shown, translated
from rank_search.study.rows import Row, has_study, insert_rows, rows_of, snapshot
from rank_search.study.schema import alembic_config, check_schema, ensure_schema, exclusive, head, make_empty
from rank_search.study.store import no_study

KIND = "rank-search study"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Header:
    """The first line of a study's portable file.

    Attributes:
        kind, version: say that it is one, and how it is written.
        name: of the study.
        schema: version of the project's tables.
        optuna: version of Optuna's tables.
    """

    kind: str
    version: int
    name: str
    schema: str
    optuna: str


def dump_study(storage: str | URL, name: str) -> bytes:
    """Everything of a study, as it was at one moment, workers or not: files are the caller's.

    Raises:
        StorageError: the database cannot be reached, is of another version, or lacks the study.
    """
    engine = make_engine(storage, must_exist=True)
    try:
        check_schema(engine)
        with translated(engine.url), snapshot(engine) as connection:
            if not has_study(connection, name):
                raise no_study(connection, engine.url, name)
            return _packed(name, connection)
    finally:
        engine.dispose()


def load_study(storage: str | URL, content: bytes, where: str) -> str:
    """Put a study from :func:`dump_study` into a database, all or nothing, and return its name.

    The tables are made where they are missing. A file of an older schema is brought up to the present one first.

    Args:
        where: what the content is called in messages.

    Raises:
        StorageError: the content is damaged or of a newer version, the database has a study of this name already, or
            it cannot be written. Nothing was changed.
    """
    header, rows = _unpacked(content, where)
    if header.schema != head():
        header, rows = _brought_up(header, rows, where)
    engine = make_engine(storage)
    try:
        ensure_schema(engine)
        with exclusive(engine), translated(engine.url), engine.begin() as connection:
            _refuse_other_optuna(connection, header, where)
            if has_study(connection, header.name):
                raise StorageError(
                    f"database {shown(engine.url)} has a study {header.name!r} already; give another database"
                )
            insert_rows(connection, rows)
    finally:
        engine.dispose()
    return header.name


def _packed(name: str, connection: Connection) -> bytes:
    header = Header(KIND, VERSION, name, head(), _optuna_version(connection))
    digest = hashlib.sha256()
    lines = bytearray()
    for value in _lines(header, rows_of(connection, name)):
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        digest.update(line)
        lines += line
    lines += json.dumps({"sha256": digest.hexdigest()}).encode() + b"\n"
    return gzip.compress(bytes(lines), mtime=0)


def _lines(header: Header, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    yield asdict(header)
    for table, row in rows:
        yield {"table": table, "row": row}


def _unpacked(content: bytes, where: str) -> tuple[Header, list[Row]]:
    try:
        *lines, last = gzip.decompress(content).splitlines(keepends=True)
        told = json.loads(last)["sha256"]
        header = Header(**json.loads(lines[0]))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError):
        raise StorageError(
            f"{where} is no whole file of `rank-search db export`; copy it again or export anew"
        ) from None
    if header.kind != KIND or header.version != VERSION:
        raise StorageError(f"{where} is {header.kind!r} of version {header.version}, not {KIND!r} of version {VERSION}")
    if hashlib.sha256(b"".join(lines)).hexdigest() != told:
        raise StorageError(f"{where} is damaged: its digest is not that of its content; copy it again or export anew")
    records = [json.loads(line) for line in lines[1:]]
    return header, [(record["table"], record["row"]) for record in records]


def _brought_up(header: Header, rows: list[Row], where: str) -> tuple[Header, list[Row]]:
    """The rows in the present schema: the migrations run over them in a database of their own."""
    with tempfile.TemporaryDirectory(prefix="rank-search-") as folder:
        engine = make_engine(f"sqlite:///{Path(folder) / 'import.db'}")
        try:
            with translated(engine.url):
                if not make_empty(engine, header.schema):
                    raise StorageError(
                        f"{where} has schema version {header.schema}, newer than this rank-search knows ({head()}); "
                        "upgrade rank-search"
                    )
                with engine.begin() as connection:
                    _refuse_other_optuna(connection, header, where)
                    insert_rows(connection, rows)
                with engine.begin() as connection:
                    command.upgrade(alembic_config(connection), "head")
                with snapshot(engine) as connection:
                    return _unpacked(_packed(header.name, connection), where)
        finally:
            engine.dispose()


def _optuna_version(connection: Connection) -> str:
    """Of Optuna's tables."""
    return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar())


def _refuse_other_optuna(connection: Connection, header: Header, where: str) -> None:
    here = _optuna_version(connection)
    if header.optuna != here:
        raise StorageError(
            f"{where} holds Optuna tables of version {header.optuna}, the database those of {here}; "
            "run `rank-search db upgrade` on the older database and export anew"
        )
