"""Progress on a terminal: Rich's bars on standard error, below lines on standard output that stay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from rank_search.progress import Progress as ProgressProtocol
from rank_search.progress import Step

_OF_A_TRIAL = frozenset({"fine-tune", "scoring"})
"""Steps that come back in every trial; the others leave a line with their time."""
_LEAST_SECONDS = 0.05
"""Shorter steps leave no line."""


class TerminalProgress(ProgressProtocol):
    """Draws every step as a bar while it runs. Where standard error is no terminal it draws nothing.

    Use as a context manager: on the way out, errors included, the bars are wiped away.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}", table_column=_whole()),
            BarColumn(bar_width=24, table_column=_whole()),
            _Count(_whole()),
            _Clock(_whole()),
            _Note(),
            console=self.console,
            transient=True,
            refresh_per_second=8,
            redirect_stdout=False,
            disable=not self.console.is_terminal,
        )
        self._overall: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """A bar while the block runs."""
        lasting = title not in _OF_A_TRIAL
        task = self._bars.add_task(title if lasting else f"  {title}", total=total, note="", left=None)
        started = time.perf_counter()
        try:
            yield _Bar(self._bars, task)
        finally:
            self._bars.remove_task(task)
        seconds = time.perf_counter() - started
        if lasting and self.console.is_terminal and seconds >= _LEAST_SECONDS:
            self.say(f"{title}  {seconds:.1f} s")

    def say(self, message: str) -> None:
        """A line on standard error, above the bars."""
        self.console.print(Text(message, style="dim"), soft_wrap=True)

    def overall(self, title: str, done: int | None, total: int, note: str = "", left: float | None = None) -> None:
        """The bar of the whole work, above all others. ``done`` None: not known yet; ``left``: seconds to go."""
        if self._overall is None:
            self._overall = self._bars.add_task(title, total=None, note=note, left=None)
        self._bars.update(
            self._overall, description=title, completed=done or 0, total=total if done is not None else None,
            note=note, left=left,
        )  # fmt: skip

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without bars on the terminal, so that lines on standard output do not run into them."""
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=amount, note=note)


class _Count(ProgressColumn):
    """Units done and wanted; nothing where the total is unknown."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        total = f"{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}".rjust(len(total)) + f"/{total}", style="progress.download")


class _Note(ProgressColumn):
    """What goes with the bar, cut where the terminal ends."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], style="dim", no_wrap=True, overflow="ellipsis")


class _Clock(ProgressColumn):
    """Time spent, or what is left where that was told."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        if left is not None:
            return Text(f"{duration(left)} left", style="progress.remaining")
        return Text(duration(task.elapsed or 0.0), style="progress.elapsed")


def _whole() -> Column:
    return Column(no_wrap=True)


def duration(seconds: float) -> str:
    """A time span for people: ``5.2 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
