"""Event streams: one look at a study serves all who watch it.

A stream begins with the study, its front, its last trials and its workers, and then tells what has changed: of the
front, the points that have come and gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from rank_search.errors import StorageError
from rank_search.service.models import Trial, Worker
from rank_search.service.reading import Look, Reading
from rank_search.study.listing import TrialSummary

FIRST_TRIALS = 100
"""So many of the last trials begin a stream."""
QUIET_SECONDS = 15.0
"""After so long without news a line is sent that tells nothing, so that nobody on the way closes the connection."""
CHECK_SECONDS = 2.0
"""So often callers are looked at again, whose tokens may have been revoked."""
_MOST_PENDING = 64
"""A stream whose reader is so far behind ends; browsers open it again."""
_AT_ONCE = 10
"""So many readers are told before other requests have their turn."""
_RETRY = b"retry: 3000\n\n"
_NOTHING_NEW = b": nothing new\n\n"


class Events:
    """All event streams of the service.

    Args:
        most, of_caller: streams that may be open, and of one caller.
        poll_seconds: how often the database is looked at for a study that someone watches.
    """

    def __init__(self, reading: Reading, *, most: int, of_caller: int, poll_seconds: float) -> None:
        self._reading = reading
        self._most = most
        self._of_caller = of_caller
        self._poll_seconds = poll_seconds
        self._watches: dict[str, _Watch] = {}
        self._open: Counter[str] = Counter()

    @property
    def open_streams(self) -> int:
        """Streams that are open."""
        return self._open.total()

    @property
    def watched(self) -> int:
        """Studies that someone watches; each is looked at by one task."""
        return len(self._watches)

    def why_full(self, caller: str) -> str | None:
        """Why a caller may open no further stream; None where it may."""
        if self._open[caller] >= self._of_caller:
            return f"{caller!r} has {self._of_caller} event streams open; close some, or try again later"
        return "too many event streams are open; try again later" if self._open.total() >= self._most else None

    async def stream(self, look: Look, caller: str, is_admitted: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        """What a reader of a study's events is sent."""
        pending: asyncio.Queue[bytes | None] = asyncio.Queue(_MOST_PENDING)
        watch = self._watch(look)
        watch.readers.add(pending)
        self._open[caller] += 1
        try:
            yield watch.beginning()
            told = checked = time.monotonic()
            while True:
                message = await _next(pending)
                now = time.monotonic()
                if now - checked >= CHECK_SECONDS:
                    if not await is_admitted():
                        return
                    checked = now
                if message is None:
                    return
                if message is not _NOTHING_NEW or now - told >= QUIET_SECONDS:
                    told = now
                    yield message
        finally:
            self._open[caller] -= 1
            self._open += Counter()  # forgets who has none
            watch.readers.discard(pending)
            if not watch.readers and self._watches.get(look.told.name) is watch:
                del self._watches[look.told.name]
                watch.task.cancel()

    async def close(self) -> None:
        """End all streams."""
        for watch in list(self._watches.values()):
            watch.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch.task
            watch.end()
        self._watches.clear()

    def _watch(self, look: Look) -> _Watch:
        name = look.told.name
        if name not in self._watches:
            self._watches[name] = _Watch(self._reading, look, self._poll_seconds)
        return self._watches[name]


class _Watch:
    """Looks at one study, and tells all its readers."""

    def __init__(self, reading: Reading, look: Look, poll_seconds: float) -> None:
        self._reading = reading
        self._look = look
        self._poll_seconds = poll_seconds
        self._beginning: bytes | None = None
        self.readers: set[asyncio.Queue[bytes | None]] = set()
        self.task = asyncio.create_task(self._run())

    def beginning(self) -> bytes:
        """All there is, made once for all who come before the next change."""
        if self._beginning is None:
            look = self._look
            self._beginning = b"".join(
                [
                    _RETRY, _event("study", _study(look)), _raw("front", look.front_json or b"null"),
                    _event("trials", _trials(look.trials[-FIRST_TRIALS:])), _event("workers", _workers(look)),
                ]
            )  # fmt: skip
        return self._beginning

    def end(self) -> None:
        """End all its streams."""
        for reader in list(self.readers):
            _end(reader)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                look = await self._reading.look(self._look.told.name)
            except StorageError:
                continue  # an outage: readers are told what has changed when it is over
            if look is None:
                self.end()
                return
            if look.mark != self._look.mark:
                before, self._look, self._beginning = self._look, look, None
                await self._tell(_changes(before, look))

    async def _tell(self, message: bytes) -> None:
        for count, reader in enumerate(list(self.readers), start=1):
            try:
                reader.put_nowait(message)
            except asyncio.QueueFull:
                _end(reader)
            if count % _AT_ONCE == 0:
                await asyncio.sleep(0)


async def _next(pending: asyncio.Queue[bytes | None]) -> bytes | None:
    """The next message, or after a while one that tells nothing."""
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await pending.get()
    except TimeoutError:
        return _NOTHING_NEW


def _end(reader: asyncio.Queue[bytes | None]) -> None:
    while not reader.empty():
        reader.get_nowait()
    reader.put_nowait(None)


def _changes(before: Look, look: Look) -> bytes:
    messages = [_event("study", _study(look))]
    if look.front_json != before.front_json:
        messages.append(_changes_of_front(before, look))
    known = {trial.number: trial for trial in before.trials}
    same = (known.get(trial.number) for trial in look.trials)  # most are the very same object
    changed = [trial for trial, other in zip(look.trials, same, strict=True) if trial is not other and trial != other]
    if changed:
        messages.append(_event("trials", _trials(changed)))
    if look.workers != before.workers:
        messages.append(_event("workers", _workers(look)))
    return b"".join(messages)


def _changes_of_front(before: Look, look: Look) -> bytes:
    """The points that have come and gone; the whole front where there was none, or the dense model is scored."""
    if not before.front_json or before.told.dense_loss != look.told.dense_loss:
        return _raw("front", look.front_json)
    added = [point for trial, point in look.points.items() if before.points.get(trial) != point]
    removed = [trial for trial in before.points if trial not in look.points]
    return _event("points", {"added": added, "removed": removed})


def _study(look: Look) -> Any:
    return look.told.model_dump(mode="json", exclude={"file", "failures"})


def _trials(trials: Iterable[TrialSummary]) -> Any:
    return [Trial.model_validate(trial).model_dump(mode="json") for trial in trials]


def _workers(look: Look) -> Any:
    return [Worker.model_validate(worker).model_dump(mode="json") for worker in look.workers]


def _event(kind: str, data: Any) -> bytes:
    return _raw(kind, json.dumps(data, separators=(",", ":"), allow_nan=False).encode())


def _raw(kind: str, data: bytes) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
