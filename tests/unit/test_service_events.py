"""Event streams: one look serves all, slow readers and those who lost their token are let go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rank_search.errors import StorageError
from rank_search.ranks import RankMap
from rank_search.service import events as events_module
from rank_search.service.events import Events
from rank_search.service.reading import Look, Reading
from rank_search.study.requests import Action, ask_for
from rank_search.study.store import StudyStore
from tests.contract.synthetic import open_study, run_trials
from tests.data.service import make_study

POLL = 0.02


class Counted(Reading):
    """Counts how often the database is read."""

    def __init__(self, store: StudyStore) -> None:
        super().__init__(store)
        self.reads = 0
        self.is_out = False

    def _read(self, name: str, known: Look | None) -> Look | None:
        self.reads += 1
        if self.is_out:
            raise StorageError("out")
        return super()._read(name, known)


@pytest.fixture
def reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    monkeypatch.setattr("rank_search.service.reading.FRESH_SECONDS", POLL / 2)
    make_study(f"sqlite:///{tmp_path}/s.db", trials=3)
    with StudyStore(f"sqlite:///{tmp_path}/s.db") as store:
        yield Counted(store)


async def always() -> bool:
    return True


async def opened(
    events: Events, reading: Reading, admits: Callable[[], Awaitable[bool]] = always
) -> AsyncIterator[bytes]:
    look = await reading.look("tiny")
    assert look is not None
    assert events.why_full("me") is None
    return events.stream(look, "me", admits)


def told(message: bytes) -> dict[str, Any]:
    """Event → its data."""
    parts = [part.split("\n", 1) for part in message.decode().split("\n\n") if part.startswith("event: ")]
    return {kind.removeprefix("event: "): json.loads(data.removeprefix("data: ")) for kind, data in parts}


def more_trials(storage: Path, count: int = 1) -> None:
    study = open_study(f"sqlite:///{storage}/s.db", ladder=[0.9, 0.5], sampler="random", trials=12)
    run_trials(study, count)
    study.close()


def test_a_stream_begins_with_all_and_goes_on_with_what_changed(reading: Counted, tmp_path: Path) -> None:
    async def main() -> None:
        events = Events(reading, most=5, of_caller=500, poll_seconds=POLL)
        stream = await opened(events, reading)
        first = told(await anext(stream))
        assert list(first) == ["study", "front", "trials", "workers"]
        assert [trial["number"] for trial in first["trials"]] == [0, 1, 2]
        await asyncio.to_thread(more_trials, tmp_path)
        seen: list[int] = []
        points = {point["trial"]: point for point in first["front"]["points"]}
        while 3 not in seen or first["study"]["state"] == "running":
            first = told(await anext(stream))
            seen += [trial["number"] for trial in first.get("trials", ())]
            change = first.get("points", {"added": [], "removed": []})
            points = {trial: point for trial, point in points.items() if trial not in change["removed"]}
            points |= {point["trial"]: point for point in change["added"]}
        with StudyStore(f"sqlite:///{tmp_path}/s.db") as store:
            front = store.front("tiny")
        assert {trial: point["loss"] for trial, point in points.items()} == {p.trial: p.loss for p in front}
        assert set(seen) == {3}  # the others have not changed
        await asyncio.to_thread(ask_for, reading.store.engine, "tiny", Action.PAUSE, "me")
        while (state := told(await anext(stream))["study"]["state"]) != "paused":
            assert state in {"idle", "running"}
        await stream.aclose()
        assert (events.open_streams, events.watched) == (0, 0)

    asyncio.run(main())


def test_two_hundred_streams_of_a_study_are_one_look(reading: Counted, tmp_path: Path) -> None:
    async def main() -> None:
        events = Events(reading, most=200, of_caller=500, poll_seconds=POLL)
        streams = [await opened(events, reading) for _ in range(200)]
        beginnings = [await anext(stream) for stream in streams]
        assert len({id(beginning) for beginning in beginnings}) == 1  # one piece of memory for all
        assert events.watched == 1
        assert events.why_full("me") == "too many event streams are open; try again later"
        before = reading.reads
        await asyncio.to_thread(more_trials, tmp_path)
        messages = await asyncio.gather(*(anext(stream) for stream in streams))
        assert len({id(message) for message in messages}) == 1
        assert reading.reads - before < 60
        for stream in streams:
            await stream.aclose()
        assert (events.open_streams, events.watched) == (0, 0)

    asyncio.run(main())


def test_a_reader_who_falls_behind_is_let_go(reading: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "_MOST_PENDING", 3)

    async def main() -> None:
        events = Events(reading, most=5, of_caller=500, poll_seconds=POLL)
        slow, quick = await opened(events, reading), await opened(events, reading)
        await anext(slow)
        await anext(quick)
        watch = events._watches["tiny"]
        for number in range(6):
            await watch._tell(b"%d" % number)
            assert await anext(quick) == b"%d" % number
        with pytest.raises(StopAsyncIteration):
            await anext(slow)
        await quick.aclose()

    asyncio.run(main())


def test_a_stream_ends_with_its_callers_token(reading: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "CHECK_SECONDS", POLL)
    monkeypatch.setattr(events_module, "QUIET_SECONDS", POLL)

    async def main() -> None:
        events = Events(reading, most=5, of_caller=500, poll_seconds=10.0)
        answers = iter([True, False])

        async def admits() -> bool:
            return next(answers)

        stream = await opened(events, reading, admits)
        await anext(stream)
        assert await anext(stream) == b": nothing new\n\n"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert events.open_streams == 0

    asyncio.run(main())


def test_a_busy_stream_ends_with_its_callers_token_too(reading: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "CHECK_SECONDS", 0.0)

    async def main() -> None:
        async def never() -> bool:
            return False

        events = Events(reading, most=5, of_caller=500, poll_seconds=10.0)
        stream = await opened(events, reading, never)
        await anext(stream)
        await events._watches["tiny"]._tell(b"news")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_a_stream_outlives_an_outage_of_the_database(reading: Counted, tmp_path: Path) -> None:
    async def main() -> None:
        events = Events(reading, most=5, of_caller=500, poll_seconds=POLL)
        stream = await opened(events, reading)
        await anext(stream)
        reading.is_out = True
        before = reading.reads
        while reading.reads < before + 3:
            await asyncio.sleep(POLL)
        await asyncio.to_thread(more_trials, tmp_path)
        reading.is_out = False
        assert told(await anext(stream))["study"]["name"] == "tiny"
        await stream.aclose()

    asyncio.run(main())


def test_closing_ends_all_streams(reading: Counted) -> None:
    async def main() -> None:
        events = Events(reading, most=5, of_caller=500, poll_seconds=POLL)
        stream = await opened(events, reading)
        await anext(stream)
        await events.close()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_many_who_ask_at_once_wait_for_one_look(reading: Counted) -> None:
    async def main() -> None:
        looks = await asyncio.gather(*(reading.look("tiny") for _ in range(50)))
        assert reading.reads == 1
        assert len({id(look) for look in looks}) == 1
        await asyncio.sleep(POLL)
        assert await reading.look("tiny") is looks[0]  # looked again, but nothing has changed
        assert reading.reads == 2
        assert await reading.look("nothing") is None

    asyncio.run(main())


def test_who_can_do_with_a_recent_look_does_not_wait_for_the_next(reading: Counted) -> None:
    async def main() -> None:
        look = await reading.look("tiny", recent=True)  # there is none: this one waits
        await asyncio.sleep(POLL)
        assert look is not None
        ask_for(reading.store.engine, "tiny", Action.PAUSE, "me")
        assert await reading.look("tiny", recent=True) is look
        assert reading.reads == 1  # the next one has only begun
        newer = await reading.look("tiny")
        assert newer is not None
        assert (reading.reads, newer.told.state) == (2, "paused")

    asyncio.run(main())


def test_what_was_read_before_a_change_is_not_kept(reading: Counted) -> None:
    async def main() -> None:
        await reading.look("tiny")
        await asyncio.sleep(POLL)
        assert await reading.look("tiny", recent=True) is not None  # begins to read
        reading.forget("tiny")
        await asyncio.gather(reading.look("tiny"), reading.look("tiny"))
        assert reading.reads == 3

    asyncio.run(main())


def test_an_outage_is_told_to_those_who_wait_and_not_to_those_who_do_not(
    reading: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        look = await reading.look("tiny")
        await asyncio.sleep(POLL)
        reading.is_out = True
        assert await reading.look("tiny", recent=True) is look
        with pytest.raises(StorageError):
            await reading.look("tiny")
        monkeypatch.setattr("rank_search.service.reading.RECENT_SECONDS", POLL)
        with pytest.raises(StorageError):
            await reading.look("tiny", recent=True)
        reading.is_out = False
        assert await reading.look("tiny") is look

    asyncio.run(main())


def test_one_caller_does_not_take_all_streams(reading: Counted) -> None:
    async def main() -> None:
        events = Events(reading, most=3, of_caller=2, poll_seconds=10.0)
        streams = [await opened(events, reading) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        assert events.why_full("me") == "'me' has 2 event streams open; close some, or try again later"
        assert events.why_full("you") is None
        await streams[0].aclose()
        assert events.why_full("me") is None
        await streams[1].aclose()
        assert events.open_streams == 0

    asyncio.run(main())


def test_a_stream_that_never_began_takes_no_place(reading: Counted) -> None:
    """A caller may be gone before the first byte is sent."""

    async def main() -> None:
        events = Events(reading, most=1, of_caller=1, poll_seconds=10.0)
        await (await opened(events, reading)).aclose()
        assert events.why_full("me") is None

    asyncio.run(main())


def test_a_trial_that_is_stored_after_later_ones_is_seen(reading: Counted, tmp_path: Path) -> None:
    """Two workers have numbers 3 and 4, and the second one stores its trial first."""

    async def main() -> None:
        study = open_study(f"sqlite:///{tmp_path}/s.db", ladder=[0.9, 0.5], sampler="random", trials=12)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study._store, "begin_trial", _later)
            with pytest.raises(StorageError):
                study.ask()
        run_trials(study, 1)
        look = await reading.look("tiny")
        assert look is not None
        assert [trial.number for trial in look.trials] == [0, 1, 2, 4]
        study._store.begin_trial("tiny", 3, "by hand", RankMap({"block.0.attn": 1}), "host:1:x")
        study.close()
        await asyncio.sleep(POLL)
        look = await reading.look("tiny")
        assert look is not None
        assert [trial.number for trial in look.trials] == [0, 1, 2, 3, 4]

    asyncio.run(main())


def _later(*_: object, **__: object) -> None:
    raise StorageError("later")
