"""Progress of long work, told to whoever watches. Pure: the CLI draws it, the library is silent by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Step(Protocol):
    """One piece of long work under way."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """``amount`` more units are done; ``note`` is shown beside the bar."""


class Progress:
    """Tells nothing; subclasses draw. Every long function of the library takes one."""

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """Announce a piece of work of ``total`` units (None: unknown)."""
        yield _SilentStep()

    def say(self, message: str) -> None:
        """One line that stays."""

    def seconds_left(self) -> float | None:
        """Seconds until this process has to end, where it was asked to; None: it was not."""
        return None


class Preempted(KeyboardInterrupt):
    """The process was asked to stop. The trial under way, if any, is given back as it passes through."""


class _SilentStep:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


SILENT = Progress()
