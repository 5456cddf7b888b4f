"""When a worker that has ended is started again. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from rank_search.launch import exits

FIRST_DELAY = 1.0
"""Seconds before the first restart; each one without a measured trial in between doubles them."""
LONGEST_DELAY = 60.0
MOST_IN_A_ROW = 3
"""A worker that ends so often in a row without a measured trial is given up: the next one would end so, too."""


@dataclass(slots=True)
class Restarts:
    """The history of one worker.

    Attributes:
        total: how often it was started again.
        in_a_row: how often it has ended since it last measured a trial.
        delay: seconds until it is to be started again.
        given_up: why it is not.
    """

    total: int = 0
    in_a_row: int = 0
    delay: float = field(default=0.0)
    given_up: str = ""

    def ended(self, code: int, *, measured: bool, last_words: str) -> bool:
        """A worker ended with an exit code that is not :data:`exits.DONE`: whether it is to be started again.

        Args:
            code: exit code; of a killed process the negative signal.
            measured: whether this run of it measured a trial.
            last_words: the end of its log.
        """
        self.in_a_row = 1 if measured else self.in_a_row + 1
        said = f"; its last words: {last_words}" if last_words else ""
        if code == exits.CONFIGURATION:
            self.given_up = f"wrong configuration{said}"
        elif self.in_a_row >= MOST_IN_A_ROW:
            self.given_up = f"died {self.in_a_row} times in a row, {described(code)}{said}"
        if self.given_up:
            return False
        self.total += 1
        self.delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self.in_a_row - 1))
        return True


def described(code: int) -> str:
    """An exit code in words."""
    return f"last by signal {-code}" if code < 0 else f"last with exit code {code}"
