"""Routes of fronts and rank maps: as JSON, CSV and PNG, and the rank map file of a point."""

from __future__ import annotations

import threading
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, HTTPException, Query
from fastapi.responses import Response

from rank_search.dashboard.artifacts import rank_map_file
from rank_search.dashboard.viewing import StudyView
from rank_search.errors import BudgetError
from rank_search.export.figures import front_figure, rendered
from rank_search.export.rank_map_file import RankMapFile
from rank_search.export.tables import front_csv
from rank_search.front import Front as StoredFront
from rank_search.front import FrontPoint
from rank_search.service.answers import reading
from rank_search.service.context import Context, Shared, look_at, prepared
from rank_search.service.models import MOST_TRIAL, Front
from rank_search.service.parameters import StudyName
from rank_search.service.reading import Look
from rank_search.study.listing import front_outline
from rank_search.study.records import State
from rank_search.study.store import StudyStore

router = APIRouter(prefix="/v1/studies/{name}", tags=["fronts"])

_PICTURES = 32
_drawing = threading.Lock()
"""Matplotlib's fonts are not for two threads at once."""

_KnownTag = Annotated[str | None, Header(alias="If-None-Match", description="The ETag that is known.")]
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "It is what the caller has."}}


def _content(kind: str, schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "The front.", "content": {kind: {"schema": schema}}}}


@router.get("/front", responses={**reading(404, 409), **_UNCHANGED}, response_model=Front)
async def front(name: StudyName, context: Shared, known: _KnownTag = None) -> Response:
    """The front, without rank maps."""
    look = await look_at(context, name, recent=True)
    prepared(look)
    tag = f'"{look.front_digest}"'
    if known == tag:
        return Response(status_code=304, headers={"etag": tag})
    return Response(look.front_json, media_type="application/json", headers={"etag": tag})


@router.get(
    "/front.csv", responses={**reading(404, 409), **_content("text/csv", {"type": "string"})}, response_class=Response
)
async def front_as_csv(name: StudyName, context: Shared) -> Response:
    """The front as CSV with a heading."""
    look = await look_at(context, name)
    prepared(look)
    told = {"content-disposition": f'attachment; filename="{name}-front.csv"'}
    text = await to_thread.run_sync(lambda: front_csv(front_outline(context.store.engine, name)))
    return Response(text, media_type="text/csv", headers=told)


@router.get(
    "/front.png",
    responses={**reading(404, 409), **_content("image/png", {"type": "string", "format": "binary"})},
    response_class=Response,
)
async def front_as_picture(name: StudyName, context: Shared) -> Response:
    """The front as a picture, beside all trials and the dense model."""
    look = await look_at(context, name)
    record = prepared(look)
    if record.dense_loss is None or not look.told.front:
        raise HTTPException(409, f"study {name!r} has no front to draw yet; wait for its first trial")
    picture = await to_thread.run_sync(_picture, context, look)
    return Response(picture, media_type="image/png")


@router.get("/rank-map", responses=reading(404, 409), response_model=RankMapFile)
async def rank_map(
    name: StudyName, context: Shared,
    trial: Annotated[int | None, Query(ge=0, le=MOST_TRIAL, description="By its number, on the front or not.")] = None,
    kept: Annotated[
        float | None,
        Query(gt=0, le=1, allow_inf_nan=False, description="Lowest loss at most at this fraction of the target layers"),
    ] = None,
    max_params: Annotated[
        int | None, Query(ge=1, le=2**53, description="Lowest loss of at most so many parameters in the whole model.")
    ] = None,
    max_loss: Annotated[
        float | None, Query(gt=0, allow_inf_nan=False, description="Fewest parameters of at most this loss, nats.")
    ] = None,
    knee: Annotated[bool | None, Query(description="The front's knee; true or left out.")] = None,
) -> Response:  # fmt: skip
    """The rank map file of one trial, chosen by exactly one of the parameters."""
    choices = [trial is not None, kept is not None, max_params is not None, max_loss is not None, bool(knee)]
    if sum(choices) != 1:
        raise HTTPException(
            422, f"choose a point by exactly one of trial, kept, max_params, max_loss or knee, not by {sum(choices)}"
        )
    look = await look_at(context, name)
    record = prepared(look)
    if trial is not None:
        point = await to_thread.run_sync(measured, context.store, name, trial)
    else:
        stored = await to_thread.run_sync(context.store.front, name)
        point = _chosen(stored, kept, max_params, max_loss)
    text = await to_thread.run_sync(lambda: rank_map_file(record, point).text())
    told = {"content-disposition": f'attachment; filename="{name}-trial-{point.trial}.rank_map.json"'}
    return Response(text, media_type="application/json", headers=told)


def measured(store: StudyStore, name: str, number: int) -> FrontPoint:
    """A trial with a measurement of the study's highest fidelity, on the front or not.

    Raises:
        HTTPException: 404, there is no such trial.
    """
    trial = store.trial(name, number)
    if trial is None or trial.measurement is None or trial.state not in {State.COMPLETE, State.INFEASIBLE}:
        raise HTTPException(404, f"study {name!r} has no trial {number} that was measured to the end")
    return FrontPoint(number, trial.rank_map, trial.measurement, trial.source)


def _chosen(front: StoredFront, kept: float | None, max_params: int | None, max_loss: float | None) -> FrontPoint:
    try:
        if kept is not None:
            return front.at_most_kept(kept)
        if max_params is not None:
            return front.at_most_params(max_params)
        return front.at_most_loss(max_loss) if max_loss is not None else front.knee()
    except BudgetError as error:
        raise HTTPException(404, str(error)) from None


def _picture(context: Context, look: Look) -> bytes:
    """Drawn anew only where the front or the trials around it have changed."""
    shown, pictures = (look.told.name, look.front_digest, len(look.trials)), context.pictures
    with _drawing:
        if shown not in pictures:
            pictures[shown] = _drawn(context.store, look)
            if len(pictures) > _PICTURES:
                del pictures[next(iter(pictures))]  # the oldest
        return pictures[shown]


def _drawn(store: StudyStore, look: Look) -> bytes:
    assert look.record is not None
    assert look.record.dense_loss is not None
    shown = StudyView(look.record, store.front(look.told.name), tuple(store.trials(look.told.name)))
    figure = front_figure(
        shown.front, trials=shown.points, dense_loss=look.record.dense_loss,
        dense_params=look.record.facts.model_params, title=look.told.name, unit=look.told.unit,
    )  # fmt: skip
    return rendered(figure)
