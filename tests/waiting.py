"""Waiting for what other threads and processes do: as short as they are, and long enough for a slow machine."""

from __future__ import annotations

import time
from collections.abc import Callable

LONG = 120.0
"""Seconds after which it will not happen any more, however slow the machine."""


def until(condition: Callable[[], object], pause: float = 0.05) -> None:
    """Return as soon as it holds."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, f"not within {LONG:.0f} s"
        time.sleep(pause)
