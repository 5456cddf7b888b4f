"""When a worker that has ended is started again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rank_search.launch import exits

FIRST_DELAY = 1.0
"""Seconds before the first restart; each one without a measured trial in between doubles them."""
LONGEST_DELAY = 60.0
MOST_IN_A_ROW = 3
"""A worker that dies so often in a row without a measured trial is given up: the next one would die so, too."""
_MOST_DOUBLINGS = 30
"""Of the delay: further ones change nothing, and a float has an end."""


@dataclass(slots=True)
class Restarts:
    """The history of one worker.

    Attributes:
        patience: seconds that a worker without a measured trial may wait, all its delays together, for what ends it by
            :data:`exits.PASSING` to be over; 0: such ends count as deaths.
        total: how often it was started again.
        in_a_row: how often it has ended since it last measured a trial.
        deaths: how many of these ends count as deaths.
        waited: seconds of delay after the others.
        delay: seconds until it is to be started again.
        given_up: why it is not.
    """

    patience: float = 0.0
    total: int = 0
    in_a_row: int = 0
    deaths: int = 0
    waited: float = 0.0
    delay: float = 0.0
    given_up: str = ""

    def ended(self, code: int | None, *, measured: bool, last_words: str) -> bool:
        """A worker ended with an exit code that is not :data:`exits.DONE`: whether it is to be started again.

        Args:
            code: exit code; of a killed process the negative signal, None where there is none to be had.
            measured: whether this run of it measured a trial.
            last_words: the end of its log.
        """
        if measured:
            self.in_a_row, self.deaths, self.waited = 0, 0, 0.0
        passing = code in exits.PASSING and self.patience > 0
        self.in_a_row += 1
        self.deaths += not passing
        said = f"; its last words: {last_words}" if last_words else ""
        if code == exits.CONFIGURATION:
            self.given_up = f"wrong configuration{said}"
        elif passing and self.waited >= self.patience:
            self.given_up = f"waited {self.waited:g} s in vain (run.database_patience_seconds), {described(code)}{said}"
        elif not passing and self.deaths >= MOST_IN_A_ROW:
            self.given_up = f"died {self.deaths} times in a row, {described(code)}{said}"
        if self.given_up:
            return False
        self.total += 1
        self.delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(self.in_a_row - 1, _MOST_DOUBLINGS))
        if passing:
            self.delay = min(self.delay, self.patience - self.waited)
            self.waited += self.delay
        return True


def described(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "last without an exit code"
    return f"last by signal {-code}" if code < 0 else f"last with exit code {code}"
