"""The service put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from importlib import metadata
from typing import Any

from a2wsgi import WSGIMiddleware
from anyio import to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from rank_search.dashboard.artifacts import ArtifactReader
from rank_search.errors import InputError
from rank_search.service import fronts, general, jobs, page, studies
from rank_search.service.access import Access
from rank_search.service.answers import answer_errors, refusal
from rank_search.service.asgi import App, Receive, Scope, Send
from rank_search.service.context import ByHand, Context, Fleet
from rank_search.service.events import Events
from rank_search.service.guard import Guard, is_ours
from rank_search.service.measures import Counting, Measures
from rank_search.service.reading import Reading
from rank_search.service.sessions import Sessions
from rank_search.service.settings import Settings
from rank_search.spec import StudySpec
from rank_search.study.serving import dashboard_app
from rank_search.study.store import StudyStore
from rank_search.study.tokens import check_token, valid_token
from rank_search.study.upgrading import upgrade

_ABOUT = """Rank search for low-rank compression of Transformers: studies, their fronts, checkpoints of their points.

Every error is `{"error": "one line"}`. Where the service asks for a login, requests carry `Authorization: Bearer TOKEN`
(`rank-search token create`)."""
_REFS = "#/components/schemas/{model}"


def create_app(settings: Settings, fleet: Fleet | None = None) -> App:
    """The service as an ASGI application; the database is made or brought up to date.

    Args:
        fleet: starts workers; None leaves that to others.

    Raises:
        InputError: the folder cannot be written, or optuna-dashboard is missing.
        StorageError: the database cannot be reached or written.
    """
    upgrade(settings.storage)
    _make_folder(settings)
    opened = ExitStack()
    try:
        return _put_together(settings, fleet or ByHand(), opened)
    except BaseException:
        opened.close()
        raise


def _put_together(settings: Settings, fleet: Fleet, opened: ExitStack) -> App:
    """The application, whose end closes what is opened here."""
    store = opened.enter_context(StudyStore(settings.storage))
    reading = Reading(store)
    events = Events(
        reading, most=settings.most_streams, of_caller=settings.caller_streams, poll_seconds=settings.poll_seconds
    )
    access = Access(
        Sessions.with_key_in(settings.folder),
        lambda text: check_token(store.engine, text),
        lambda number: valid_token(store.engine, number),
    )
    context = Context(settings, store, reading, events, Measures(store, events), access, fleet)
    app = FastAPI(
        title="rank-search", version=metadata.version("rank-search"), description=_ABOUT, docs_url=None,
        redoc_url=None, openapi_url="/v1/openapi.json", lifespan=_lifespan(context, opened),
    )  # fmt: skip
    app.state.context = context
    for router in (general.router, studies.router, fronts.router, jobs.router):
        app.include_router(router)
    page.mount(app)
    dashboard = None
    if settings.dashboard:
        pages: Any = opened.enter_context(dashboard_app(settings.storage, ArtifactReader(store)))
        dashboard = WSGIMiddleware(pages)
    app.mount("/", _rest(dashboard))
    answer_errors(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    guard = Guard(app, settings, access)
    app.state.still_admits, app.state.count_failure = guard.still_admits, guard.count_failure
    return Counting(guard, context.measures)


def _make_folder(settings: Settings) -> None:
    try:
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"folder {settings.folder} cannot be made: {error.strerror}; choose another --folder"
        ) from None


def _lifespan(context: Context, opened: ExitStack) -> Any:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await to_thread.run_sync(context.fleet.start)
        try:
            yield
        finally:
            await context.events.close()
            await context.reading.close()
            await to_thread.run_sync(context.fleet.stop)
            opened.close()

    return lifespan


def _rest(dashboard: Any | None) -> App:
    """All other pages: the dashboard's, which are only for reading: it knows no login and deletes studies."""

    async def rest(scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if dashboard is None or is_ours(path) or ".." in path.split("/"):
            answer = refusal(404, "there is no such page; /v1/openapi.json tells of all")
        elif method not in {"GET", "HEAD"}:
            answer = refusal(405, "the dashboard is read-only; rank-search itself changes studies", {"allow": "GET"})
        else:
            await dashboard(scope, receive, send)
            return
        await answer(scope, receive, send)

    return rest


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the study file's schema and how callers say who they are."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = document["components"]
        schema = StudySpec.model_json_schema(ref_template=_REFS)
        parts["schemas"] |= {**schema.pop("$defs"), "StudySpec": schema}
        for unused in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(unused, None)
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema
