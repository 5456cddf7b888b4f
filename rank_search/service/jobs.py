"""Routes of jobs: checkpoints are written and losses confirmed by workers, and fetched from here."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import Response, StreamingResponse

from rank_search.service.answers import reading, writing
from rank_search.service.context import Asking, Context, Shared, look_at, prepared
from rank_search.service.fronts import measured
from rank_search.service.models import Job, JobBody, Jobs
from rank_search.service.parameters import Number
from rank_search.service.tar import Tar
from rank_search.study import jobs as stored
from rank_search.study.jobs import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JOBS_FOLDER = "jobs"
_TAR: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The checkpoint's folder.",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("", responses=reading())
async def jobs(
    context: Shared, study: Annotated[str | None, Query(max_length=100, description="Only those of this study.")] = None
) -> Jobs:
    """All jobs, the first one first."""
    found = await to_thread.run_sync(stored.jobs, context.store.engine, study)
    return Jobs(jobs=[Job.model_validate(job) for job in found])


@router.post("", status_code=201, responses=writing(404, 409))
async def add(body: JobBody, context: Shared, caller: Asking) -> Job:
    """Have a checkpoint written (`apply`), or a loss confirmed by a longer fine-tune and the test text (`confirm`)."""
    prepared(await look_at(context, body.study))
    await to_thread.run_sync(measured, context.store, body.study, body.trial)
    options = body.model_dump(exclude={"kind", "study", "trial"})
    folder = context.settings.folder / JOBS_FOLDER
    job = await to_thread.run_sync(
        stored.add_job, context.store.engine, body.study, body.trial, body.kind, options, folder, caller.name
    )
    context.fleet.poke()
    return Job.model_validate(job)


@router.get("/{number}", responses=reading(404))
async def job(number: Number, context: Shared) -> Job:
    """How far a job is."""
    return Job.model_validate(await _job(context, number))


@router.delete("/{number}", responses=writing(404, 409))
async def cancel(number: Number, context: Shared) -> Job:
    """Cancel a job that no worker has begun."""
    await _job(context, number)
    if not await to_thread.run_sync(stored.cancel_job, context.store.engine, number):
        raise HTTPException(409, f"job {number} has begun already; only jobs that wait are cancelled")
    return Job.model_validate(await _job(context, number))


@router.get("/{number}/checkpoint", responses={**reading(404, 409, 410), **_TAR}, response_class=Response)
async def checkpoint(number: Number, context: Shared) -> Response:
    """The checkpoint of a job that is done, as a tar file."""
    found = await _job(context, number)
    if found.state is not JobState.DONE:
        raise HTTPException(409, f"job {number} is {found.state}; its checkpoint is there once it is done")
    top = f"{found.study}-trial-{found.trial}"
    try:
        tar = await to_thread.run_sync(Tar.of, found.checkpoint, top)
    except OSError:
        raise HTTPException(410, f"the checkpoint of job {number} is gone; add the job anew") from None
    told = {"content-disposition": f'attachment; filename="{top}.tar"', "content-length": str(tar.size)}
    return StreamingResponse(tar.pieces(), media_type="application/x-tar", headers=told)


async def _job(context: Context, number: int) -> stored.Job:
    found = await to_thread.run_sync(stored.job, context.store.engine, number)
    if found is None:
        raise HTTPException(404, f"there is no job {number}; GET /v1/jobs lists all")
    return found
