"""What the routes share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, HTTPException, Request

from rank_search.service.access import Access, Caller
from rank_search.service.events import Events
from rank_search.service.measures import Measures
from rank_search.service.reading import Look, Reading
from rank_search.service.settings import Settings
from rank_search.study.records import StudyRecord
from rank_search.study.store import StudyStore


class Fleet(Protocol):
    """Starts workers for what is to be done; the database tells what that is."""

    def start(self) -> None:
        """Begin to look."""

    def poke(self) -> None:
        """Look now: something was changed."""

    def stop(self) -> None:
        """End the workers in good order, and leave none behind."""


class ByHand:
    """Starts nothing: workers join by hand."""

    def start(self) -> None:
        """Nothing to begin."""

    def poke(self) -> None:
        """Nothing to look at."""

    def stop(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the routes share.

    Attributes:
        pictures: of fronts, by study, digest of the front, and number of trials.
    """

    settings: Settings
    store: StudyStore
    reading: Reading
    events: Events
    measures: Measures
    access: Access
    fleet: Fleet
    pictures: dict[tuple[str, str, int], bytes] = field(default_factory=dict)


# Coroutines, or every request would wait for a thread to run them in.


async def _context(request: Request) -> Context:
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


async def _caller(request: Request) -> Caller:
    found = request.state.caller
    assert isinstance(found, Caller)
    return found


Shared = Annotated[Context, Depends(_context)]
Asking = Annotated[Caller, Depends(_caller)]


async def look_at(context: Context, name: str, *, recent: bool = False) -> Look:
    """A study as it is now.

    Args:
        recent: one that others have looked at lately will do; nobody waits for the database then.

    Raises:
        HTTPException: 404, there is none.
    """
    look = await context.reading.look(name, recent=recent)
    if look is None:
        raise HTTPException(404, f"there is no study {name!r}; GET /v1/studies lists all")
    return look


def prepared(look: Look) -> StudyRecord:
    """The record of a study.

    Raises:
        HTTPException: 409, no worker has prepared it yet.
    """
    if look.record is None:
        raise HTTPException(409, f"no worker has prepared study {look.told.name!r} yet; wait until one has")
    return look.record
