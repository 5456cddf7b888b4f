"""The worker's loop: the only place where study and trial meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from rank_search.errors import (
    DeviceLostError,
    ExhaustedError,
    LeaseLostError,
    OutOfPatienceError,
    RankSearchError,
    StorageError,
    TrialError,
    one_line,
)
from rank_search.measurement import Measurement
from rank_search.model.garbage import sparing_the_collector
from rank_search.model.memory import is_out_of_memory
from rank_search.progress import SILENT, Progress
from rank_search.stop_rules import StopRules, all_finished
from rank_search.study.heeding import Heeding
from rank_search.study.records import Effort, State
from rank_search.study.study import Proposal, Study
from rank_search.trial import Evaluator

SAME_FAILURES = 3
"""So many trials in a row that fail for the same reason stop the worker: the next would fail too."""

_OF_A_LOST_DEVICE = ("CUDA error", "CUBLAS_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED")
"""How RuntimeErrors begin that leave a process without its GPU."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one proposal: the measurement of the highest fidelity it reached, or the reason of its failure.

    ``seconds`` are those of all that was measured for it now.
    """

    proposal: Proposal
    measurement: Measurement | None
    reason: str | None = None
    state: State = State.COMPLETE
    seconds: float = 0.0


def work(
    study: Study,
    evaluator: Evaluator,
    trials: int | None,
    *,
    rules: StopRules = StopRules(),  # noqa: B008  (frozen)
    progress: Progress = SILENT,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> str:
    """Measure proposals until the study, all workers together, has ``trials`` finished ones, or a rule stops it.

    Without a number, pruned trials are promoted until none of them would be on the front by prediction.

    A failed trial is stored with its reason and the study goes on. An interrupt gives the trial back: the same rank
    map is proposed again when the study is resumed, and what was measured of it is not measured again.

    Returns:
        Why the search has stopped, which is stored too.

    Raises:
        TrialError: several trials in a row failed for the same reason.
        DeviceLostError: the GPU failed; the trial is proposed again, to another process.
        OutOfPatienceError: the database was away for longer than ``run.database_patience_seconds``.
    """
    started = time.monotonic()
    reasons: list[str] = []
    study.set_stop_reason(None)
    effort = _effort(study, rules)
    heeding = Heeding(study, progress)

    def reason_to_stop() -> str | None:
        return heeding.stop_reason() or stop_reason(study, trials, rules, effort, heeding.now() - started)

    with sparing_the_collector() as settle:
        while (stop := reason_to_stop()) is None:
            try:
                proposal = study.ask(_left(effort, trials, rules))
            except ExhaustedError as error:
                stop = str(error)
                break
            _make_ready(study, evaluator, proposal)
            outcome = _measure(study, evaluator, proposal, progress)
            on_outcome(outcome)
            reasons = _failures_in_a_row(reasons, outcome)
            effort = _effort(study, rules)
            settle()
    study.set_stop_reason(stop)
    return stop


def stop_reason(
    study: Study, trials: int | None, rules: StopRules, effort: Effort | None = None, wall: float = 0.0
) -> str | None:
    """Why a search that has run for ``wall`` seconds stops here; None: it goes on."""
    effort = effort or _effort(study, rules)
    if trials is None:
        return None if study.unsettled() else "the front is settled"
    if effort.finished >= trials:
        return all_finished(effort.finished)
    return study.stop_reason(rules, wall, effort.seconds)


def _failures_in_a_row(before: Sequence[str], outcome: Outcome) -> list[str]:
    """Their reasons, with this outcome's.

    Raises:
        TrialError: the last :data:`SAME_FAILURES` are the same.
    """
    if outcome.state is not State.FAILED:
        return []
    last = [*before, outcome.reason or ""][-SAME_FAILURES:]
    if len(last) == SAME_FAILURES and len(set(last)) == 1:
        raise TrialError(
            f"{SAME_FAILURES} trials in a row failed for the same reason ({last[0]}); "
            "mend it and run again, the study resumes"
        )
    return last


def _effort(study: Study, rules: StopRules) -> Effort:
    return study.effort(with_seconds=rules.gpu_seconds is not None)


def _left(effort: Effort, trials: int | None, rules: StopRules) -> int:
    """Trials that may still begin: by their number and, at the seconds that one takes, by the rule for these."""
    if trials is None:
        return 0
    left = trials - effort.finished - effort.running
    if rules.gpu_seconds is not None and effort.seconds > 0:
        left = min(left, int((rules.gpu_seconds - effort.seconds) / effort.seconds * effort.finished))
    return left


def _make_ready(study: Study, evaluator: Evaluator, proposal: Proposal) -> None:
    """What many trials share is no trial's fault: where it cannot be made, the trial is given back."""
    try:
        evaluator.make_ready(proposal.rank_map)
    except (StorageError, OutOfPatienceError):
        raise
    except BaseException as error:
        _give_back_if_device_lost(study, proposal, error)
        study.requeue(proposal)
        if is_out_of_memory(error):
            raise TrialError(_out_of_memory(error)) from None
        raise


def _measure(study: Study, evaluator: Evaluator, proposal: Proposal, progress: Progress) -> Outcome:
    try:
        outcome = _climb(study, evaluator, proposal, progress)
    except LeaseLostError as error:
        progress.say(f"this worker was silent for too long: {error}; going on with another trial")
        return Outcome(proposal, None, str(error), State.REQUEUED)
    except (StorageError, OutOfPatienceError):
        raise  # no fault of the trial's: its result is spooled, or it is proposed again when its lease has run out
    except RankSearchError as error:
        return _failed(study, evaluator, proposal, str(error))
    except Exception as error:
        if is_out_of_memory(error):
            return _failed(study, evaluator, proposal, _out_of_memory(error))
        _give_back_if_device_lost(study, proposal, error)
        # A defect: the trial ends, so that resuming the study does not run into it again, and the traceback is shown.
        _failed(study, evaluator, proposal, f"{type(error).__name__}: {error}")
        raise
    except BaseException:
        study.requeue(proposal)
        raise
    evaluator.forget(proposal.rank_map)
    return outcome


def _failed(study: Study, evaluator: Evaluator, proposal: Proposal, reason: str) -> Outcome:
    study.fail(proposal, reason)
    evaluator.forget(proposal.rank_map)
    return Outcome(proposal, None, reason, State.FAILED)


def _climb(study: Study, evaluator: Evaluator, proposal: Proposal, progress: Progress) -> Outcome:
    """Measure on every rung that is left, as long as the study lets the trial go on."""
    top, seconds = len(evaluator.rungs) - 1, 0.0
    with closing(evaluator.climb(proposal.rank_map, len(proposal.known), progress)) as measurements:
        for rung, measurement in enumerate(measurements, start=len(proposal.known)):
            seconds += measurement.seconds
            if rung < top and not study.report(proposal, rung, measurement):
                return Outcome(proposal, measurement, None, State.PRUNED, seconds)
    return Outcome(proposal, measurement, None, study.tell(proposal, measurement, top), seconds)


def _give_back_if_device_lost(study: Study, proposal: Proposal, error: BaseException) -> None:
    if _is_device_lost(error):
        reason = f"the GPU failed under it ({one_line(error)})"
        study.requeue(proposal, death=reason)
        raise DeviceLostError(f"trial {proposal.number}: {reason}; another process must go on") from None


def _is_device_lost(error: BaseException) -> bool:
    """Whether a GPU is of no more use to this process: after such an error every later call of CUDA fails, too."""
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_A_LOST_DEVICE)
    )


def _out_of_memory(error: BaseException) -> str:
    which = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
    return f"out of {which}; lower finetune.batch_blocks or run.score_batch_blocks"
