"""What the service asks of studies, takes on, and lets in: its words. Pure."""

from __future__ import annotations

from enum import StrEnum


class Action(StrEnum):
    """What workers of a study are asked to do."""

    RUN = "run"
    PAUSE = "pause"
    """Propose nothing new until further notice."""
    STOP = "stop"
    """End after the trial under way."""


class Fate(StrEnum):
    """What became of a submitted study."""

    OPEN = "open"
    """It waits for workers or has some."""
    ENDED = "ended"
    """Its workers found it done."""
    GIVEN_UP = "given up"
    """Its workers failed; the reason is stored."""


class JobState(StrEnum):
    """The state of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """It has a reason."""
    CANCELLED = "cancelled"


class Role(StrEnum):
    """What a token allows."""

    READ = "read"
    WRITE = "write"
    """To read, too."""
