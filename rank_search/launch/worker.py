"""One worker: a run of the study that stops in good order and ends with a telling exit code.

``python -m rank_search.launch.worker STUDY`` is what engines start: ``rank-search worker`` without a terminal.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rank_search import api
from rank_search.errors import HostMemoryError, RankSearchError, one_line
from rank_search.launch import exits
from rank_search.launch.job import check_grace
from rank_search.launch.log_streams import drop_unwritable
from rank_search.launch.stopping import Stopping, end_with_supervisor
from rank_search.progress import SILENT, Preempted, Progress, Step
from rank_search.spec import StudyFile, load_study_file

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # OpenMP's threads would spin away the cores of the other workers of the host.
    "GOMP_SPINCOUNT": "3000",
}
_LEAST_SECONDS = 1.0
"""Shorter steps leave no line in a log."""

if TYPE_CHECKING:
    from rank_search.worker import Outcome


def study_file(study: str, storage: str | None) -> StudyFile:
    """A study's file, or for a name the one in the database, whose relative paths start where they did then.

    Those of one that a service took on and no worker has prepared start here: the first worker makes its folder.

    Raises:
        StudyFileError: the file is missing or malformed.
        StorageError: the database cannot be reached, or has no study of this name.
    """
    if Path(study).suffix == ".toml" or Path(study).is_file():
        return load_study_file(study)
    from rank_search.study.store import StudyStore
    from rank_search.study.submissions import submission

    with StudyStore(api.storage_url(storage, None)) as store:
        if study not in store.studies() and (taken_on := submission(store.engine, study)) is not None:
            return StudyFile(spec=taken_on.spec, folder=Path.cwd())
        record = store.study(study)
    return StudyFile(spec=record.spec, folder=Path(record.facts.folder))


def spread_over(file: StudyFile, gpus: int | None) -> StudyFile:
    """The same study with its model on so many GPUs, unless the file itself says on how many."""
    if gpus is None or file.spec.run.gpus_per_model is not None:
        return file
    run = file.spec.run.model_copy(update={"gpus_per_model": gpus})
    return StudyFile(spec=file.spec.model_copy(update={"run": run}), folder=file.folder)


def run_worker(
    file: StudyFile,
    *,
    storage: str | None = None,
    trials: int | None = None,
    grace: float = 30.0,
    progress: Progress = SILENT,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> int:
    """Measure trials of a study until it has enough, and return an exit code of :mod:`rank_search.launch.exits`.

    Args:
        grace: seconds that SIGTERM or SIGINT leaves for the trial under way, which is given back if it takes longer.

    Raises:
        BudgetError: a grace time below 0 or longer than a day.
        RankSearchError: as :func:`rank_search.api.run`; :func:`exits.exit_code` tells its exit code.
    """
    from rank_search.study.hosts import refuse_other_hosts

    check_grace(grace)

    def ended(outcome: Outcome) -> None:
        on_outcome(outcome)
        stopping.after_trial()

    try:
        end_with_supervisor()
        with Stopping(grace) as stopping:
            refuse_other_hosts(api.storage_url(storage, file), file.spec.name)
            with _told_apart():
                api.run(file, storage=storage, trials=trials, progress=stopping.watching(progress), on_outcome=ended)
    except Preempted:
        return exits.PREEMPTED
    return exits.DONE


@contextmanager
def _told_apart() -> Iterator[None]:
    """From defects: memory that runs out where no trial can be blamed for it."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        from rank_search.model.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise HostMemoryError(
            f"out of memory beside the trials ({one_line(error)}); give the worker more, or run fewer on this host"
        ) from None


def outcome_line(outcome: Outcome) -> str:
    """What came of a trial, in one line."""
    measured = outcome.measurement
    ended = f"{outcome.state}: {outcome.reason}"
    if measured is not None:
        ended = f"loss {measured.loss:.4f}, {measured.num_params:,} parameters, {measured.seconds:.1f} s"
    return f"trial {outcome.proposal.number} ({outcome.proposal.source}): {ended}"


class LogLines(Progress):
    """Lines on standard error: what is said, and what took long."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        started = time.perf_counter()
        with super().step(title, total) as step:
            yield step
        seconds = time.perf_counter() - started
        if seconds >= _LEAST_SECONDS:
            self.say(f"{title}: {seconds:.1f} s")

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker by command line and return its exit code; its log goes to standard output and error."""
    parser = argparse.ArgumentParser(prog="python -m rank_search.launch.worker", description=run_worker.__doc__)
    parser.add_argument("study", help="the study's file, or its name in the database")
    parser.add_argument("--trials", type=int, help="finished trials wanted")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds to finish a trial in when asked to stop")
    parser.add_argument("--gpus-per-model", type=int, help="GPUs to spread the model over, if its file does not tell")
    given = parser.parse_args(arguments)
    drop_unwritable("stdout", "stderr")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        file = spread_over(study_file(given.study, None), given.gpus_per_model)
        code = run_worker(
            file, trials=given.trials, grace=given.grace, progress=LogLines(),
            on_outcome=lambda outcome: print(outcome_line(outcome), flush=True),
        )  # fmt: skip
    except RankSearchError as error:
        print(f"rank-search: error: {error}", file=sys.stderr)
        return exits.exit_code(error)
    if code == exits.PREEMPTED:
        print("stopped; what is done is kept", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
