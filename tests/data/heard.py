"""Progress that keeps what is said."""

from __future__ import annotations

from rank_search.progress import Progress


class Heard(Progress):
    """All lines that were said, in ``lines``."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        """Keep a line."""
        self.lines.append(message)
