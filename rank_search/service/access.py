"""Who asks: tokens in headers, sessions in cookies, or nobody in particular where there is no login."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from anyio import to_thread

from rank_search.service.sessions import COOKIE, Session, Sessions
from rank_search.study.tokens import Role, Token

LOCAL = "local"
"""Name of callers where there is no login."""

_REMEMBERED = 1000
REMEMBERED_SECONDS = 2.0
"""So long a token that was right may look, without asking the database again."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: of the token.
        role: what it allows.
        csrf: what requests that change something must bring along, where a browser's cookie says who asks.
    """

    name: str
    role: Role
    csrf: str | None = None

    @property
    def may_write(self) -> bool:
        """Whether the caller may change something."""
        return self.role is Role.WRITE


NOBODY = Caller(LOCAL, Role.WRITE)


class Access:
    """Finds callers.

    Args:
        check_token: the token that a text is, None if it is none that is valid.
        valid_token: the token of a number, None if it is none that is valid.
    """

    def __init__(
        self, sessions: Sessions, check_token: Callable[[str], Token | None], valid_token: Callable[[int], Token | None]
    ) -> None:
        self._sessions = sessions
        self._check = check_token
        self._valid = valid_token
        self._known: OrderedDict[str, tuple[float, Token]] = OrderedDict()

    async def caller(self, authorization: str | None, cookies: str, *, anew: bool = False) -> Caller | None:
        """The caller whom a request's headers name, None where they name none who is known.

        Args:
            anew: ask the database, even if it was asked a moment ago.

        Raises:
            StorageError: the database cannot be reached.
        """
        if authorization is not None:
            scheme, _, text = authorization.partition(" ")
            if scheme.lower() != "bearer":
                return None
            key = hashlib.sha256(text.encode()).hexdigest()
            token = await self._remembered(key, lambda: self._check(text.strip()), anew)
            return None if token is None else Caller(token.name, token.role)
        session = self._session(cookies)
        if session is None:
            return None
        token = await self._remembered(f"session {session.token}", lambda: self._valid(session.token), anew)
        return None if token is None else Caller(token.name, token.role, session.csrf)

    def open_session(self, text: str) -> tuple[Caller, str] | None:
        """Caller and cookie for a token; None if it is none that is valid.

        Raises:
            StorageError: the database cannot be reached.
        """
        token = self._check(text)
        if token is None:
            return None
        cookie = self._sessions.open(token.number)
        session = self._sessions.check(cookie)
        assert session is not None
        return Caller(token.name, token.role, session.csrf), cookie

    def _session(self, header: str) -> Session | None:
        try:
            cookies = SimpleCookie(header)
        except CookieError:
            return None
        return self._sessions.check(cookies[COOKIE].value) if COOKIE in cookies else None

    async def _remembered(self, key: str, read: Callable[[], Token | None], anew: bool) -> Token | None:
        since, token = self._known.get(key, (0.0, None))
        if not anew and token is not None and time.monotonic() - since < REMEMBERED_SECONDS:
            return token
        found = await to_thread.run_sync(read)
        if found is None:
            self._known.pop(key, None)
            return None
        self._known[key] = time.monotonic(), found
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found


def is_right_csrf(caller: Caller, given: str | None) -> bool:
    """Whether a request brings along what a caller with a cookie must."""
    return caller.csrf is None or (given is not None and hmac.compare_digest(caller.csrf.encode(), given.encode()))
