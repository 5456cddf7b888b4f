"""Tokens of the service: made once, shown once, kept as digests. No Optuna.

A token is ``rs_NUMBER_SECRET``. The secret has 256 random bits, so that a plain SHA-256 of it tells nothing; the number
finds the row, and the digests are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from rank_search.errors import ConflictError, InputError
from rank_search.study.engine import READ_ONLY, translated
from rank_search.study.states import Role as Role
from rank_search.study.tables import TokenRow

_TOKEN = re.compile(r"rs_([0-9]{1,9})_([A-Za-z0-9_-]{43})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_NOBODY = "0" * 64
"""Compared with where there is no row, so that it takes as long."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token without its secret."""

    number: int
    name: str
    role: Role
    created: datetime
    revoked: datetime | None = None


def create_token(engine: Engine, name: str, role: Role) -> str:
    """Make a token and return it; it cannot be shown again.

    Raises:
        InputError: a name that is none.
        ConflictError: there is a token of this name.
        StorageError: the database cannot be reached or written.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"a token's name is letters, digits, dots, hyphens and underscores, not {name!r}")
    secret = secrets.token_urlsafe(32)
    row = TokenRow(name=name, role=role, digest=_digest(secret), created=datetime.now(UTC))
    with translated(engine.url):
        try:
            with Session(engine) as session, session.begin():
                session.add(row)
                session.flush()
                return f"rs_{row.id}_{secret}"
        except IntegrityError:
            raise ConflictError(f"there is a token {name!r} already; revoked ones keep their names") from None


def tokens(engine: Engine) -> list[Token]:
    """All tokens, revoked ones included.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        return [_token(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.id))]


def has_tokens(engine: Engine) -> bool:
    """Whether any token is valid.

    Raises:
        StorageError: the database cannot be reached.
    """
    query = select(func.count()).select_from(TokenRow).where(TokenRow.revoked.is_(None))
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        return bool(connection.scalar(query))


def revoke_token(engine: Engine, name: str) -> None:
    """Make a token, and all sessions that were opened with it, worthless.

    Raises:
        InputError: there is none of this name.
        StorageError: the database cannot be reached or written.
    """
    with translated(engine.url), Session(engine) as session, session.begin():
        row = session.scalar(select(TokenRow).where(TokenRow.name == name))
        if row is None:
            raise InputError(f"there is no token {name!r}; `rank-search token list` shows all")
        row.revoked = row.revoked or datetime.now(UTC)


def check_token(engine: Engine, text: str) -> Token | None:
    """The token that ``text`` is, None if it is none that is valid.

    Raises:
        StorageError: the database cannot be reached.
    """
    parts = _TOKEN.fullmatch(text)
    if parts is None:
        return None
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        row = session.get(TokenRow, int(parts[1]))
        is_right = hmac.compare_digest(_digest(parts[2]), _NOBODY if row is None else row.digest)
        return _token(row) if row is not None and is_right and row.revoked is None else None


def valid_token(engine: Engine, number: int) -> Token | None:
    """The token of a number, None if it is none that is valid; for sessions that were opened with it.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), Session(engine.execution_options(**READ_ONLY)) as session:
        row = session.get(TokenRow, number)
        return _token(row) if row is not None and row.revoked is None else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _token(row: TokenRow) -> Token:
    return Token(row.id, row.name, Role(row.role), row.created, row.revoked)
