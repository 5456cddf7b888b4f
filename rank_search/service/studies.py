"""Routes of studies: submitted, listed, watched, paused, resumed, stopped."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse

from rank_search.ranks import RankMap
from rank_search.service import admission
from rank_search.service.answers import reading, writing
from rank_search.service.context import Asking, Context, Shared, look_at, prepared
from rank_search.service.describing import detail
from rank_search.service.models import (
    MOST_TRIAL,
    Layer,
    Layers,
    Queued,
    QueuedRankMap,
    Requested,
    Studies,
    Study,
    StudyDetail,
    Trial,
    Trials,
    Worker,
    Workers,
)
from rank_search.service.parameters import StudyName
from rank_search.spec import StudySpec
from rank_search.study.listing import study_lines, trial_summaries
from rank_search.study.overview import space_of
from rank_search.study.requests import Action, all_asked_for, ask_for, queue_rank_map
from rank_search.study.submissions import resume, submissions, submit

router = APIRouter(prefix="/v1/studies", tags=["studies"])

TOML, JSON = "application/toml", "application/json"
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A study file, as TOML or as JSON.",
        "content": {
            JSON: {"schema": {"$ref": "#/components/schemas/StudySpec"}},
            TOML: {"schema": {"type": "string"}},
        },
    }
}


def _event(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    told = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {
        "type": "object",
        "properties": {"event": {"const": kind}, "data": told},
        "required": ["event", "data"],
    }


def _one(model: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model}"}


def _many(model: str) -> dict[str, Any]:
    return {"type": "array", "items": _one(model)}


_POINTS: dict[str, Any] = {
    "type": "object",
    "properties": {"added": _many("Point"), "removed": {"type": "array", "items": {"type": "integer"}}},
    "required": ["added", "removed"],
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `study`, `front`, `trials` and `workers`: at first all there is, then what has changed. "
        "Of the front, `points` then tells the points `added` and the trials `removed`.",
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "oneOf": [
                        _event("study", _one("Study")),
                        _event("front", {"anyOf": [_one("Front"), {"type": "null"}]}),
                        _event("points", _POINTS),
                        _event("trials", _many("Trial")),
                        _event("workers", _many("Worker")),
                    ]
                }
            }
        },
    }
}


@router.get("", responses=reading())
async def studies(context: Shared) -> Studies:
    """All studies, submitted ones that no worker has prepared yet among them."""
    return Studies(studies=await to_thread.run_sync(_all_studies, context))


@router.post("", status_code=201, responses=writing(409, 415), openapi_extra=_BODY)
async def submit_study(request: Request, context: Shared, caller: Asking) -> StudyDetail:
    """Take a study on. Its workers start as soon as there is room for them."""
    spec = await to_thread.run_sync(_read, context, request.headers.get("content-type", ""), await request.body())
    settings = context.settings
    await to_thread.run_sync(
        lambda: submit(context.store.engine, spec, caller.name, most=settings.most_studies), abandon_on_cancel=False
    )
    context.fleet.poke()
    context.reading.forget(spec.name)
    return (await look_at(context, spec.name)).told


@router.get("/{name}", responses=reading(404))
async def study(name: StudyName, context: Shared) -> StudyDetail:
    """How far a study is, with its file."""
    return (await look_at(context, name)).told


@router.get("/{name}/trials", responses=reading(404))
async def trials(
    name: StudyName, context: Shared,
    after: Annotated[int, Query(ge=-1, le=MOST_TRIAL, description="Number of the last trial that is known.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Trials:  # fmt: skip
    """Trials by ascending number, without their rank maps."""
    await look_at(context, name)
    engine = context.store.engine
    found = await to_thread.run_sync(lambda: trial_summaries(engine, name, after=after, limit=limit + 1))
    page = [Trial.model_validate(trial) for trial in found[:limit]]
    return Trials(trials=page, next=page[-1].number if len(found) > limit else None)


@router.get("/{name}/layers", responses=reading(404, 409))
async def layers(name: StudyName, context: Shared) -> Layers:
    """The target layers of a study, and the ranks they may have."""
    space = space_of(prepared(await look_at(context, name)))
    return Layers(layers=[_layer(shape, space.ranks(shape), space.may_be_dense(shape)) for shape in space.shapes])


@router.get("/{name}/workers", responses=reading(404))
async def workers(name: StudyName, context: Shared) -> Workers:
    """The workers of a study."""
    look = await look_at(context, name)
    return Workers(workers=[Worker.model_validate(worker) for worker in look.workers])


@router.get("/{name}/events", responses={**reading(404), **_EVENTS}, response_class=Response)
async def events(name: StudyName, request: Request, context: Shared, caller: Asking) -> Response:
    """Server-sent events of a study."""
    look = await look_at(context, name)
    if (reason := context.events.why_full(caller.name)) is not None:
        raise HTTPException(503, reason, {"retry-after": "10"})
    admits = request.app.state.still_admits
    stream = context.events.stream(look, caller.name, lambda: admits(request.scope))
    return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


@router.post("/{name}/pause", responses=writing(404))
async def pause(name: StudyName, context: Shared, caller: Asking) -> Requested:
    """Have workers propose nothing new until the study is resumed; trials under way go on."""
    return await _ask(context, name, Action.PAUSE, caller.name)


@router.post("/{name}/resume", responses=writing(404))
async def resume_study(name: StudyName, context: Shared, caller: Asking) -> Requested:
    """Have a paused, stopped or given up study go on."""
    await look_at(context, name)
    await to_thread.run_sync(resume, context.store.engine, name, caller.name)
    context.reading.forget(name)
    context.fleet.poke()
    return Requested(study=name, action=Action.RUN)


@router.post("/{name}/stop", responses=writing(404))
async def stop(name: StudyName, context: Shared, caller: Asking) -> Requested:
    """Have workers end after the trials under way."""
    return await _ask(context, name, Action.STOP, caller.name)


@router.post("/{name}/rank-maps", status_code=201, responses=writing(404, 409))
async def queue(name: StudyName, body: QueuedRankMap, context: Shared, caller: Asking) -> Queued:
    """Have a rank map measured before anything new is sampled."""
    look = await look_at(context, name)
    prepared(look)
    if look.told.finished >= look.told.wanted:
        raise HTTPException(409, f"study {name!r} has its {look.told.wanted} trials, and its workers have ended")
    asked = RankMap(body.ranks)
    queued = await to_thread.run_sync(queue_rank_map, context.store.engine, name, asked, caller.name)
    context.reading.forget(name)
    return Queued(number=queued.number, source=queued.source)


async def _ask(context: Context, name: str, action: Action, asked_by: str) -> Requested:
    await look_at(context, name)
    await to_thread.run_sync(ask_for, context.store.engine, name, action, asked_by)
    context.reading.forget(name)
    context.fleet.poke()
    return Requested(study=name, action=action)


def _read(context: Context, told: str, content: bytes) -> StudySpec:
    kind, most = told.partition(";")[0].strip().lower(), context.settings.study_bytes
    if kind not in {TOML, JSON}:
        raise HTTPException(415, f"a study file is {TOML} or {JSON}, by its Content-Type")
    if len(content) > most:
        raise HTTPException(413, f"a study file has at most {most} bytes, not {len(content)}")
    tables = admission.read_toml(content) if kind == TOML else admission.read_json(content)
    return admission.admit(tables, context.settings.roots)


def _all_studies(context: Context) -> list[Study]:
    engine = context.store.engine
    given, actions = {one.name: one for one in submissions(engine)}, all_asked_for(engine)
    lines = {line.record.name: line for line in study_lines(engine)}
    found = []
    for name in sorted({*given, *lines}):
        line, action = lines.get(name), actions.get(name, Action.RUN)
        told = detail(
            given.get(name), action, line.record if line else None, line.status if line else None,
            line.front if line else 0, 0,
        )  # fmt: skip
        found.append(Study.model_validate(told))
    return found


def _layer(shape: Any, ranks: range, may_be_dense: bool) -> Layer:
    return Layer(
        name=shape.name, group=shape.group, depth=shape.depth, m=shape.m, n=shape.n,
        least_rank=ranks[0] if ranks else None, most_rank=ranks[-1] if ranks else None,
        step=ranks.step if ranks else None, may_be_dense=may_be_dense,
    )  # fmt: skip
