"""What stands in front of every page: who asks, how often, how much, and what browsers may do with the answer."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import traceback
from typing import Any
from urllib.parse import urlsplit

from rank_search.errors import StorageError
from rank_search.service.access import NOBODY, Access, Caller, is_right_csrf
from rank_search.service.asgi import App, Message, Receive, Scope, Send
from rank_search.service.limits import Buckets
from rank_search.service.settings import Settings

API, PAGE = "/v1", "/service"
CSRF_HEADER = "x-csrf-token"
LOGIN = f"{API}/session"

_PUBLIC = frozenset({f"{API}/health", f"{API}/ready"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_BODY_SECONDS = 30.0
_LOGINS_A_MINUTE = 10
_OUTAGE = "the database cannot be reached; try again later"

_STRICT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# optuna-dashboard's page styles itself as it goes, and Plotly compiles what it draws.
_OF_DASHBOARD = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'; style-src 'self' data: 'unsafe-inline'; "
    "img-src 'self' data: blob:; frame-src 'self'; connect-src 'self'; object-src 'none'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_OURS = b"content-security-policy"


class Refused(Exception):  # noqa: N818  (an answer, not an error)
    """A request that goes no further: status, one line, further headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class Guard:
    """Wraps the whole service.

    A caller is put into the request's state. Bodies are read here, whole and within limits, before anything else sees
    them.
    """

    def __init__(self, app: App, settings: Settings, access: Access) -> None:
        self._app = app
        self._settings = settings
        self._access = access
        self._requests = Buckets(settings.rate, settings.burst)
        self._failures = Buckets(_LOGINS_A_MINUTE / 60, _LOGINS_A_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope["path"], https=self._settings.https)
        try:
            scope.setdefault("state", {})["caller"] = await self._admit(scope)
            body = await self._body(scope, receive)
            await self._app(scope, body, answer.send)
        except Refused as refusal:
            await answer.refuse(refusal.status, str(refusal), refusal.headers)
        except StorageError as error:
            print(f"rank-search: {error}", file=sys.stderr)
            await answer.refuse(503, _OUTAGE, {"retry-after": "5"})
        except Exception:
            traceback.print_exc()
            if answer.has_begun:
                raise
            await answer.refuse(500, "a defect of the service; its log tells more", {})

    async def still_admits(self, scope: Scope) -> bool:
        """Whether the caller of a request that goes on and on is still known."""
        headers = _headers(scope)
        return not self._settings.auth or (
            await self._access.caller(headers.get("authorization"), headers.get("cookie", "")) is not None
        )

    async def _admit(self, scope: Scope) -> Caller | None:
        """Who asks; None on pages for everyone."""
        method, path, headers = scope["method"], scope["path"], _headers(scope)
        self._check_host(headers)
        if method not in _SAFE:
            _check_origin(headers)
        address = (scope.get("client") or ("", 0))[0]
        if path in _PUBLIC or _is_of_page(path) or (path == LOGIN and method == "POST"):
            self._take(f"address {address}")
            if path == LOGIN:
                self._check_failures(address)
            return None
        # A token that was revoked changes nothing from that moment on.
        caller = await self._caller(headers, address, anew=method not in _SAFE)
        if caller is None:
            self._take(f"address {address}")
            raise _unknown(headers, path)
        self._take(f"caller {caller.name}" if self._settings.auth else f"address {address}")
        if method not in _SAFE:
            if not caller.may_write and path != LOGIN:
                raise Refused(403, f"token {caller.name!r} may only read; ask for one that may write")
            if not is_right_csrf(caller, headers.get(CSRF_HEADER)):
                raise Refused(403, f"the request lacks the session's {CSRF_HEADER} header; see GET {LOGIN}")
        return caller

    async def _caller(self, headers: dict[str, str], address: str, *, anew: bool) -> Caller | None:
        if not self._settings.auth:
            return NOBODY
        authorization = headers.get("authorization")
        caller = await self._access.caller(authorization, headers.get("cookie", ""), anew=anew)
        if caller is None and authorization is not None:  # who has a right token is not kept out by who has not
            self._check_failures(address)
            self.count_failure(address)
        return caller

    def count_failure(self, address: str) -> None:
        """A token was wrong."""
        self._failures.take(address)

    def _check_failures(self, address: str) -> None:
        if (seconds := self._failures.wait(address)) > 0:
            raise _too_often("too many wrong tokens", seconds)

    def _take(self, caller: str) -> None:
        if (seconds := self._requests.take(caller)) > 0:
            raise _too_often("too many requests", seconds)

    def _check_host(self, headers: dict[str, str]) -> None:
        if not self._settings.auth and headers.get("host", "") not in self._settings.names:
            raise Refused(403, f"unknown name of the host; without a login it is {self._settings.url}")

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, for what follows to read."""
        if scope["method"] in _SAFE:
            return receive
        most = self._settings.body_bytes
        told = _headers(scope).get("content-length", "0")
        if not (told.isascii() and told.isdigit()) or int(told) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                content = await _read(receive, most)
        except TimeoutError:
            raise Refused(408, f"the request's body took longer than {_BODY_SECONDS:g} s") from None
        pending = [content]

        async def replay() -> Message:
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            return await receive()

        return replay


class _Answer:
    """Sends an answer with the headers that all have."""

    def __init__(self, send: Send, path: str, *, https: bool) -> None:
        self._send = send
        self._is_ours = is_ours(path)
        self._https = https
        self.has_begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message["headers"] = self._headers(message.get("headers", ()))
        await self._send(message)

    async def refuse(self, status: int, reason: str, headers: dict[str, str]) -> None:
        """One line of JSON."""
        if self.has_begun:
            return
        body = json.dumps({"error": reason}).encode()
        told = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        encoded = [(name.encode(), value.encode()) for name, value in told.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})

    def _headers(self, given: Any) -> list[tuple[bytes, bytes]]:
        kept = [
            (name, value)
            for name, value in given
            if not name.lower().startswith(b"access-control-") and name.lower() != _OURS
        ]
        present = {name.lower() for name, _ in kept}
        added = {
            "content-security-policy": _STRICT if self._is_ours else _OF_DASHBOARD,
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-store",
        }
        if self._https:
            added["strict-transport-security"] = "max-age=31536000"
        return kept + [(n.encode(), v.encode()) for n, v in added.items() if n.encode() not in present]


def is_ours(path: str) -> bool:
    """Whether a path is under one of the service's own prefixes."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in (API, PAGE))


def _is_of_page(path: str) -> bool:
    """Files of the page hold no data: who is not logged in needs them to log in."""
    return path == PAGE or path.startswith(f"{PAGE}/")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _check_origin(headers: dict[str, str]) -> None:
    """Refuse what a page elsewhere has a browser send."""
    origin = headers.get("origin")
    is_other = origin is not None and urlsplit(origin).netloc != headers.get("host", "")
    if is_other or headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        raise Refused(403, "the request comes from a page elsewhere")


def _unknown(headers: dict[str, str], path: str) -> Refused:
    if not is_ours(path) and "text/html" in headers.get("accept", ""):
        return Refused(303, "log in first", {"location": f"{PAGE}/"})
    told = "the token is not valid" if "authorization" in headers else "a token is needed"
    return Refused(401, f"{told}; `rank-search token create NAME` makes one", {"www-authenticate": "Bearer"})


def _too_often(reason: str, seconds: float) -> Refused:
    wait = math.ceil(seconds)
    return Refused(429, f"{reason}; wait {wait} s", {"retry-after": str(wait)})


def _too_large(most: int) -> Refused:
    return Refused(413, f"the request's body is larger than {most} bytes, or does not say how large it is")


async def _read(receive: Receive, most: int) -> bytes:
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request has ended before its body")
        content += message.get("body", b"")
        if len(content) > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return bytes(content)
