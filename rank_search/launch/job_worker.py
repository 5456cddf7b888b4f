"""A worker of jobs: does what waits, one after the other, and ends when nothing waits.

``python -m rank_search.launch.job_worker`` is what the service starts: ``rank-search jobs`` without a terminal.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rank_search import api
from rank_search.errors import CheckpointError, RankSearchError, StorageError, one_line
from rank_search.export.rank_map_file import RankMapFile
from rank_search.launch import exits
from rank_search.launch.log_streams import drop_unwritable
from rank_search.launch.stopping import Stopping, end_with_supervisor
from rank_search.launch.worker import QUIET, LogLines
from rank_search.progress import SILENT, Preempted, Progress
from rank_search.spec import StudyFile
from rank_search.study.jobs import CLAIM_SECONDS, Job, claim_job, fail_job, finish_job, give_back_job, renew_job
from rank_search.study.liveness import WorkerId
from rank_search.study.store import StudyStore


def do_jobs(
    storage: str, *, progress: Progress = SILENT, on_job: Callable[[Job, str], None] = lambda _job, _told: None
) -> int:
    """Do all jobs that wait, and return an exit code of :mod:`rank_search.launch.exits`.

    Args:
        on_job: told every job with what came of it.

    Raises:
        StorageError: the database cannot be reached.
    """
    try:
        end_with_supervisor()
        with Stopping(grace=0.0), StudyStore(storage) as store:
            while (claimed := claim_job(store.engine, str(WorkerId.current()))) is not None:
                on_job(claimed, _do(store, storage, claimed, progress))
    except Preempted:
        return exits.PREEMPTED
    return exits.DONE


def _do(store: StudyStore, storage: str, claimed: Job, progress: Progress) -> str:
    """Do one job, and tell what came of it."""
    try:
        with _renewed(store, claimed):
            result = _result(store, storage, claimed, progress)
    except StorageError:
        raise  # no fault of the job's: it is claimed again
    except RankSearchError as error:
        return f"failed: {error}" if fail_job(store.engine, claimed, str(error)) else "lost to another worker"
    except Exception as error:
        # A defect or too little memory: given back, it would stand before all other jobs again and again.
        fail_job(store.engine, claimed, f"{type(error).__name__}: {one_line(error)}")
        raise
    except BaseException:
        give_back_job(store.engine, claimed)
        raise
    return "done" if finish_job(store.engine, claimed, result) else "lost to another worker"


def _result(store: StudyStore, storage: str, claimed: Job, progress: Progress) -> Mapping[str, Any]:
    record, options = store.study(claimed.study), claimed.options
    file, out = api.export(claimed.study, storage=storage, trial=claimed.trial), claimed.checkpoint
    if claimed.kind == "confirm":
        file = _longer(file, options["steps"])
    path = out.parent / "rank_map.json"
    try:
        shutil.rmtree(out.parent, ignore_errors=True)  # of this attempt, given back half-way
        out.parent.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"folder {out.parent} cannot be made: {error.strerror or error}") from None
    folder = Path(record.facts.folder)
    file.write(path, folder=folder)
    applied = api.apply(
        path, out, finetune=options.get("finetune", True), form=options["form"], dtype=options["dtype"],
        device=record.spec.run.device, progress=progress,
    )  # fmt: skip
    told = {"validation": _told(applied)}
    if claimed.kind == "confirm" and record.spec.data.test is not None:
        study = StudyFile(spec=record.spec, folder=folder)
        tested = api.evaluate(str(out), study=study, device=record.spec.run.device, progress=progress)
        told["test"] = _told(tested)
    return told


def _longer(file: RankMapFile, steps: int) -> RankMapFile:
    """A rank map file whose recipe fine-tunes for so many steps."""
    finetune = file.recipe.finetune.model_copy(update={"steps": steps, "tokens": None})
    return file.model_copy(update={"recipe": file.recipe.model_copy(update={"finetune": finetune})})


def _told(found: api.Evaluation) -> dict[str, Any]:
    values = {
        "loss": found.loss, "standard_error": found.standard_error, "perplexity": found.perplexity,
        "tokens": found.tokens, "num_params": found.num_params, **found.metrics,
    }  # fmt: skip
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def job_line(job: Job, told: str) -> str:
    """What came of a job, in one line."""
    return f"job {job.number} ({job.kind} {job.study} {job.trial}): {told}"


@contextlib.contextmanager
def _renewed(store: StudyStore, claimed: Job) -> Iterator[None]:
    """Renew a job from another thread while it is done."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(CLAIM_SECONDS / 4):
            with contextlib.suppress(StorageError):  # the next time may come in time
                renew_job(store.engine, claimed)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> int:
    """Do the jobs of the database in the environment and return an exit code."""
    drop_unwritable("stdout", "stderr")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return do_jobs(
            api.storage_url(None, None), progress=LogLines(),
            on_job=lambda job, told: print(job_line(job, told), flush=True),
        )  # fmt: skip
    except RankSearchError as error:
        print(f"rank-search: error: {error}", file=sys.stderr)
        return exits.exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
