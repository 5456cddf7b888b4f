"""Sessions of the page: cookies that hold a token's number and their end, sealed with a key of the service.

Nothing is stored: a session outlives a restart of the service, and ends with its token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rank_search.errors import InputError

COOKIE = "rank_search_session"
SECONDS = 12 * 3600
_KEY_BYTES = 32
_FORM = re.compile(r"([0-9]{1,9})\.([0-9]{1,12})\.([A-Za-z0-9_-]{16})\.([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Session:
    """A session: the number of its token, and what requests that change something must bring along."""

    token: int
    csrf: str


class Sessions:
    """Opens and checks sessions.

    Args:
        key: 32 random bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def with_key_in(cls, folder: Path) -> Self:
        """With the key in a folder, which is made where it is missing, for its owner alone.

        Raises:
            InputError: it cannot be written or read, or is none.
        """
        path = folder / "session.key"
        try:
            _make_key(path)
            key = path.read_bytes()
        except OSError as error:
            raise InputError(f"session key {path}: {error.strerror or error}; choose another --folder") from None
        if len(key) != _KEY_BYTES:
            raise InputError(f"session key {path} is damaged; remove it, and everyone logs in anew")
        return cls(key)

    def open(self, token: int) -> str:
        """The value of a new session's cookie."""
        told = f"{token}.{int(time.time()) + SECONDS}.{secrets.token_urlsafe(12)}"
        return f"{told}.{self._seal('session', told)}"

    def check(self, cookie: str) -> Session | None:
        """The session of a cookie, None if it is none that was opened here or its time is over."""
        parts = _FORM.fullmatch(cookie)
        if parts is None:
            return None
        told, _, seal = cookie.rpartition(".")
        if not hmac.compare_digest(self._seal("session", told), seal) or int(parts[2]) < time.time():
            return None
        return Session(int(parts[1]), self._seal("csrf", told))

    def _seal(self, purpose: str, told: str) -> str:
        return hmac.new(self._key, f"{purpose}|{told}".encode(), hashlib.sha256).hexdigest()


def _make_key(path: Path) -> None:
    """Make the key, whole or not at all; one that is there stays."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a renaming, it takes no name that is there
    except FileExistsError:
        return  # another process was faster
    finally:
        temporary.unlink(missing_ok=True)
