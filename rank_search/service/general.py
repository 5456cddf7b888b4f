"""Routes about the service itself: health, readiness, figures for Prometheus, sessions."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from rank_search.service.access import Caller
from rank_search.service.answers import open_to_all, reading, writing
from rank_search.service.context import Asking, Context, Shared
from rank_search.service.measures import CONTENT_TYPE
from rank_search.service.models import Health, Login, SessionTold
from rank_search.service.sessions import COOKIE, SECONDS
from rank_search.study.submissions import count_of_studies

router = APIRouter(prefix="/v1", tags=["service"])

_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus's text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/health", responses=open_to_all())
async def health() -> Health:
    """The process is there."""
    return Health(version=metadata.version("rank-search"))


@router.get("/ready", responses=open_to_all(503))
async def ready(context: Shared) -> Health:
    """The database can be reached."""
    await to_thread.run_sync(count_of_studies, context.store.engine)
    return Health(version=metadata.version("rank-search"))


@router.get("/metrics", responses={**reading(), **_METRICS}, response_class=Response)
async def metrics(context: Shared) -> Response:
    """Trials, fronts, jobs, requests and event streams, as Prometheus reads them."""
    return Response(await to_thread.run_sync(context.measures.text), headers={"content-type": CONTENT_TYPE})


@router.get("/session", responses=reading())
async def session(context: Shared, caller: Asking) -> SessionTold:
    """Who asks, and what a browser's requests that change something bring along."""
    return _told(context, caller)


@router.post("/session", responses=writing())
async def log_in(body: Login, request: Request, context: Shared) -> Response:
    """Open a session for a browser, with a token."""
    if not context.settings.auth:
        raise HTTPException(422, "this service asks for no login")
    opened = await to_thread.run_sync(context.access.open_session, body.token)
    if opened is None:
        request.app.state.count_failure((request.scope.get("client") or ("", 0))[0])
        raise HTTPException(401, "the token is not valid; `rank-search token create NAME` makes one")
    caller, cookie = opened
    answer = JSONResponse(_told(context, caller).model_dump(mode="json"))
    answer.set_cookie(
        COOKIE, cookie, max_age=SECONDS, httponly=True, samesite="strict", secure=context.settings.https, path="/"
    )
    return answer


@router.delete("/session", status_code=204, responses=writing())
async def log_out(context: Shared) -> Response:
    """End the browser's session."""
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=context.settings.https, path="/")
    return answer


def _told(context: Context, caller: Caller) -> SessionTold:
    settings = context.settings
    return SessionTold(
        name=caller.name, role=caller.role, auth=settings.auth, csrf=caller.csrf, dashboard=settings.dashboard
    )
