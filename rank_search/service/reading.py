"""What the service reads of studies, once for all who ask at about the same time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from anyio import to_thread

from rank_search.export.tables import front_objects
from rank_search.service.describing import detail
from rank_search.service.models import StudyDetail
from rank_search.study.board import find_optuna_id
from rank_search.study.listing import (
    Mark,
    TrialSummary,
    WorkerSummary,
    front_outline,
    mark_of,
    trial_summaries,
    workers_of,
)
from rank_search.study.records import State, StudyRecord
from rank_search.study.requests import asked_for, queued_rank_maps
from rank_search.study.store import StudyStore
from rank_search.study.submissions import Submission, submission

FRESH_SECONDS = 0.5
"""A look that is younger is not taken again."""
RECENT_SECONDS = 2.0
"""A look that is younger serves those who can do with a recent one, while the next one is taken."""
_MOST_STUDIES = 32
"""Looks at so many studies are kept."""


@dataclass(frozen=True)
class Look:
    """A study as it was a moment ago.

    Attributes:
        mark: equal where nothing has changed.
        told: what is told of it.
        record: None before it is prepared.
        points: trial → its point of the front, as it is answered.
        front_json: the front as it is answered, and its digest.
        trials: without rank maps.
    """

    mark: Mark
    told: StudyDetail
    record: StudyRecord | None
    points: Mapping[int, Mapping[str, Any]]
    front_json: bytes
    front_digest: str
    trials: tuple[TrialSummary, ...]
    workers: tuple[WorkerSummary, ...]


class Reading:
    """Looks at studies; many who ask at once wait for one look, and what has not changed is not read again."""

    def __init__(self, store: StudyStore) -> None:
        self.store = store
        self._looks: OrderedDict[str, tuple[float, Look]] = OrderedDict()
        self._reads: dict[str, asyncio.Task[Look | None]] = {}

    async def look(self, name: str, *, recent: bool = False) -> Look | None:
        """A study as it is now, or was less than :data:`FRESH_SECONDS` ago; None where there is none.

        Args:
            recent: a look that is younger than :data:`RECENT_SECONDS` will do.

        Raises:
            StorageError: the database cannot be reached.
        """
        taken, known = self._looks.get(name, (-math.inf, None))
        age = time.monotonic() - taken
        if age < FRESH_SECONDS:
            return known
        read = self._reads.get(name) or self._begin(name, known)
        return known if recent and age < RECENT_SECONDS else await asyncio.shield(read)

    def forget(self, name: str) -> None:
        """Take a new look at a study next time: something was changed."""
        self._looks.pop(name, None)
        self._reads.pop(name, None)  # it may have begun before the change

    async def close(self) -> None:
        """Wait for looks that are being taken."""
        await asyncio.gather(*self._reads.values(), return_exceptions=True)

    def _begin(self, name: str, known: Look | None) -> asyncio.Task[Look | None]:
        """Take a look, for all who ask until it is there."""

        def end(read: asyncio.Task[Look | None]) -> None:
            is_current = self._reads.get(name) is read
            if is_current:
                del self._reads[name]
            # Asked for its error here, as nobody else may.
            if read.cancelled() or read.exception() is not None:
                return
            found = read.result()
            if is_current and found is not None:
                self._keep(name, found)

        begun = self._reads[name] = asyncio.create_task(to_thread.run_sync(self._read, name, known))
        begun.add_done_callback(end)
        return begun

    def _keep(self, name: str, look: Look) -> None:
        self._looks[name] = time.monotonic(), look
        self._looks.move_to_end(name)
        while len(self._looks) > _MOST_STUDIES:
            self._looks.popitem(last=False)

    def _read(self, name: str, known: Look | None) -> Look | None:
        engine = self.store.engine
        given, action = submission(engine, name), asked_for(engine, name)
        stored = mark_of(engine, name)
        if stored is None:
            return None if given is None else _unprepared(given, (action, given.fate, given.reason))
        queued = len(queued_rank_maps(engine, name))
        mark = (*stored, action, queued, *(() if given is None else (given.fate, given.reason)))
        if known is not None and known.mark == mark:
            return known
        page = find_optuna_id(engine, name)
        if page is None:  # a worker is making it
            return None if given is None else _unprepared(given, (action, given.fate, given.reason))
        record, status, front = self.store.study(name), self.store.status(name), front_outline(engine, name)
        trials = self._trials(name, () if known is None else known.trials)
        told = detail(given, action, record, status, len(front), queued)
        told.dashboard = f"/dashboard/studies/{page}"
        points = {point["trial"]: point for point in front_objects(front)}
        body = _front_json(told, record, list(points.values()))
        digest = hashlib.sha256(body).hexdigest()[:32]
        return Look(mark, told, record, points, body, digest, trials, tuple(workers_of(trials)))

    def _trials(self, name: str, known: tuple[TrialSummary, ...]) -> tuple[TrialSummary, ...]:
        """All trials; those before the first one that was running, or not yet there, have not changed since."""
        ended = takewhile(lambda at: at[1].number == at[0] and at[1].state is not State.RUNNING, enumerate(known))
        settled = tuple(trial for _, trial in ended)
        return (*settled, *trial_summaries(self.store.engine, name, after=len(settled) - 1))


def _unprepared(given: Submission, mark: Mark) -> Look:
    told = detail(given, mark[0], None, None, 0, 0)  # type: ignore[arg-type]
    return Look(mark, told, None, {}, b"", "", (), ())


def _front_json(told: StudyDetail, record: StudyRecord, points: list[dict[str, Any]]) -> bytes:
    return json.dumps(
        {
            "study": told.name, "unit": told.unit, "dense_loss": record.dense_loss,
            "dense_params": record.facts.model_params, "points": points,
        },
        separators=(",", ":"), allow_nan=False,
    ).encode()  # fmt: skip
