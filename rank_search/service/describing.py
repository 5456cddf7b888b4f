"""What is told of a study. No torch."""

from __future__ import annotations

from typing import Literal

from rank_search.service.models import Failure, StudyDetail
from rank_search.spec import LOSS_UNITS
from rank_search.study.records import StudyRecord, StudyStatus
from rank_search.study.requests import Action
from rank_search.study.submissions import Fate, Submission

_State = Literal["submitted", "running", "idle", "pausing", "paused", "stopping", "stopped", "ended", "given up"]
_MOST_FAILURES = 20


def detail(
    given: Submission | None, action: Action, record: StudyRecord | None, status: StudyStatus | None, front: int,
    queued: int,
) -> StudyDetail:  # fmt: skip
    """What is told of a study: of one that is prepared by its record and status, else by what was submitted.

    Args:
        given: None where it came another way.
        front: points of the front.
        queued: rank maps that wait to be taken.
    """
    made = record or given
    assert made is not None
    spec = made.spec
    reason = given.reason if given is not None and given.reason else status.stop_reason if status else None
    told = StudyDetail(
        name=made.name, state=_state(given, action, status), wanted=spec.search.trials, finished=0, front=front,
        unit=LOSS_UNITS[spec.model.task], reason=reason, asked_by=None if given is None else given.asked_by,
        created=made.created, file=spec.model_dump(mode="json"), queued=queued,
    )  # fmt: skip
    if record is None or status is None:
        return told
    counts = ("finished", "running", "complete", "pruned", "infeasible", "failed", "requeued", "skipped")
    values = {name: getattr(status, name) for name in (*counts, "best_loss", "seconds", "last_activity")}
    failures = [Failure(trial=trial, reason=why) for trial, why in status.failures[-_MOST_FAILURES:]]
    facts = record.facts
    return told.model_copy(
        update={
            **values, "dense_loss": record.dense_loss, "model_params": facts.model_params,
            "target_layers": len(facts.shapes), "failures": failures,
        }
    )  # fmt: skip


def _state(given: Submission | None, action: Action, status: StudyStatus | None) -> _State:
    running = status is not None and status.running > 0
    if given is not None and given.fate is Fate.GIVEN_UP:
        return "given up"
    if action is Action.STOP:
        return "stopping" if running else "stopped"
    if status is not None and not running and status.finished >= status.wanted:
        return "ended"
    if action is Action.PAUSE:
        return "pausing" if running else "paused"
    if running:
        return "running"
    if given is not None and given.fate is Fate.ENDED:
        return "ended"
    if status is None:
        return "submitted"
    return "ended" if status.stop_reason and given is None else "idle"
