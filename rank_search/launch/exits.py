"""Exit codes of a worker, by which whoever keeps it alive knows what to do. Pure."""

from __future__ import annotations

from rank_search.errors import InputError, RankSearchError, UnavailableError

DONE = 0
"""The study has its trials."""
UNAVAILABLE = 69
"""The database could not be reached or had no room: worth another try, later."""
SYSTEM = 71
"""The host had no memory left beside the trials, or the GPU failed: another worker may fare better."""
PREEMPTED = 75
"""Asked to stop, or tired of waiting for the database; its trial is stored or waits to be proposed again: start the
worker again."""
CONFIGURATION = 78
"""What the user gave is wrong, the database's URL too: another try would end the same way."""
PASSING = frozenset({UNAVAILABLE, PREEMPTED})
"""Ends that are not the worker's fault."""


def exit_code(error: RankSearchError) -> int:
    """The exit code of a worker that ends with ``error``."""
    if isinstance(error, UnavailableError):
        return UNAVAILABLE
    return CONFIGURATION if isinstance(error, InputError) else error.exit_code
