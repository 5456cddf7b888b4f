"""One worker: a run of the study that stops in good order and ends with a telling exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rank_search import api
from rank_search.launch import exits
from rank_search.launch.stopping import Preempted, Stopping, end_with_supervisor
from rank_search.progress import SILENT, Progress
from rank_search.spec import StudyFile, load_study_file

if TYPE_CHECKING:
    from rank_search.worker import Outcome


def study_file(study: str, storage: str | None) -> StudyFile:
    """A study's file, or for a name the one in the database, whose relative paths start where they did then.

    Raises:
        StudyFileError: the file is missing or malformed.
        StorageError: the database cannot be reached, or has no study of this name.
    """
    if Path(study).suffix == ".toml" or Path(study).is_file():
        return load_study_file(study)
    record = api.view(study, storage=storage).record
    return StudyFile(spec=record.spec, folder=Path(record.facts.folder))


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
        RankSearchError: as :func:`rank_search.api.run`; :func:`exits.exit_code` tells its exit code.
    """
    from rank_search.study.hosts import refuse_other_hosts

    def ended(outcome: Outcome) -> None:
        on_outcome(outcome)
        stopping.after_trial()

    try:
        end_with_supervisor()
        with Stopping(grace) as stopping:
            refuse_other_hosts(api.storage_url(storage, file), file.spec.name)
            api.run(file, storage=storage, trials=trials, progress=stopping.watching(progress), on_outcome=ended)
    except Preempted:
        return exits.PREEMPTED
    return exits.DONE
