"""The worker's loop: the only place where study and trial meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rank_search.errors import RankSearchError, TrialError
from rank_search.measurement import Measurement
from rank_search.progress import SILENT, Progress
from rank_search.study.study import Proposal, Study
from rank_search.trial import Evaluator

SAME_FAILURES = 3
"""So many trials in a row that fail for the same reason stop the worker: the next would fail too."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one proposal: a measurement, or the reason of its failure."""

    proposal: Proposal
    measurement: Measurement | None
    reason: str | None = None


def work(
    study: Study,
    evaluator: Evaluator,
    trials: int,
    *,
    progress: Progress = SILENT,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> None:
    """Measure proposals until the study, all workers together, has ``trials`` finished ones.

    A failed trial is stored with its reason and the study goes on. An interrupt gives the trial back: the same rank
    map is proposed again when the study is resumed.

    Raises:
        TrialError: several trials in a row failed for the same reason.
    """
    reasons: list[str] = []
    while study.finished() < trials:
        outcome = _measure(study, evaluator, study.ask(), progress)
        on_outcome(outcome)
        reasons = [*reasons, outcome.reason] if outcome.reason else []
        if len(reasons) >= SAME_FAILURES and len(set(reasons[-SAME_FAILURES:])) == 1:
            raise TrialError(
                f"{SAME_FAILURES} trials in a row failed for the same reason ({reasons[-1]}); "
                "mend it and run again, the study resumes"
            )


def _measure(study: Study, evaluator: Evaluator, proposal: Proposal, progress: Progress) -> Outcome:
    try:
        measurement = evaluator.measure(proposal.rank_map, progress)
    except (RankSearchError, torch.OutOfMemoryError) as error:
        reason = _reason(error)
        study.fail(proposal, reason)
        return Outcome(proposal, None, reason)
    except Exception as error:
        # A defect: the trial ends, so that resuming the study does not run into it again, and the traceback is shown.
        study.fail(proposal, f"{type(error).__name__}: {error}")
        raise
    except BaseException:
        study.requeue(proposal)
        raise
    study.tell(proposal, measurement)
    return Outcome(proposal, measurement)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; lower finetune.batch_blocks or run.score_batch_blocks"
    return str(error)
