"""Errors as the service answers them: one line of JSON, whatever went wrong."""

from __future__ import annotations

import sys
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rank_search.errors import ConflictError, RankSearchError, StorageError, one_line
from rank_search.service.models import Error

OUTAGE = "the database cannot be reached; try again later"
_ABOUT = {
    400: "The body cannot be read.",
    401: "No token, or one that is not valid.",
    403: "The caller may not do this.",
    404: "There is no such thing.",
    408: "The body took too long.",
    409: "It does not go with what is there already.",
    410: "It was there once.",
    413: "The body is too large.",
    415: "The body is of another type.",
    422: "What was given is against the schema or cannot be met.",
    429: "Too many requests.",
    503: "The database cannot be reached, or there is no room.",
}
_READING = (401, 403, 422, 429, 503)
_WRITING = (*_READING, 400, 408, 413)


def reading(*further: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route that reads, for the OpenAPI document."""
    return _documented({*_READING, *further})


def writing(*further: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route that changes something, for the OpenAPI document."""
    return _documented({*_WRITING, *further})


def open_to_all(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route without a login."""
    return _documented({*codes, 403, 429})


def _documented(codes: set[int]) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Error, "description": _ABOUT[code]} for code in sorted(codes)}


def answer_errors(app: FastAPI) -> None:
    """Have an application answer its errors so."""
    app.add_exception_handler(RankSearchError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_defect)


def refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer with an error."""
    return JSONResponse({"error": reason}, status, headers)


async def _of_ours(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, StorageError):
        print(f"rank-search: {error}", file=sys.stderr)  # it names the database, which callers need not know
        return refusal(503, OUTAGE, {"retry-after": "5"})
    return refusal(409 if isinstance(error, ConflictError) else 422, one_line(error))


async def _of_validation(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] in {"missing", "json_invalid"} else f", not {_shown(first.get('input'))}"
    return refusal(422, one_line(ValueError(f"{where}: {first['msg']}{given}")))


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


async def _of_http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, one_line(ValueError(str(error.detail))), dict(error.headers or {}))


async def _of_defect(_request: Request, _error: Exception) -> JSONResponse:
    return refusal(500, "a defect of the service; its log tells more")
