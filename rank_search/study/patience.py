"""Waiting for a database that is away for a while: with back-off, told once a minute, and not forever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from rank_search.errors import OutOfPatienceError, UnavailableError

_Result = TypeVar("_Result")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
SAY_SECONDS = 60.0
"""How often it is said that the database is still away."""


class Patience:
    """Tries again what fails because the database is unavailable.

    Attributes:
        seconds: how long it may be so, 0: not at all.
        say: takes one line for whoever watches.
        outages: how often something failed because of it.
    """

    def __init__(self, seconds: float = 0.0, say: Callable[[str], object] = lambda _line: None) -> None:
        self.seconds = seconds
        self.say = say
        self.outages = 0

    def keep_trying(
        self, action: Callable[[], _Result], only: type[UnavailableError] = UnavailableError
    ) -> _Result:  # fmt: skip
        """The result of ``action``, which must be one that may be done twice.

        Args:
            only: what is waited out. At a start that is :class:`CrowdedError` alone: nobody wants to wait half an hour
                for a server whose address is mistyped.

        Raises:
            UnavailableError: there is no patience at all.
            OutOfPatienceError: it was unavailable for longer than :attr:`seconds`.
        """
        started, said, pause = time.monotonic(), float("-inf"), FIRST_PAUSE
        while True:
            try:
                result = action()
            except only as error:
                self.outages += 1
                away = time.monotonic() - started
                if not self.seconds:
                    raise
                if away >= self.seconds:
                    raise OutOfPatienceError(f"gave up after {away:.0f} s: {error}") from None
                if time.monotonic() - said >= SAY_SECONDS:
                    said = time.monotonic()
                    self.say(f"waiting for the database since {away:.0f} s, up to {self.seconds:g} s: {error}")
                time.sleep(min(pause, max(0.0, self.seconds - away)))
                pause = min(LONGEST_PAUSE, 2 * pause)
            else:
                if said > float("-inf"):
                    self.say(f"the database is back after {time.monotonic() - started:.0f} s")
                return result
