"""A launch on a terminal: one live table. Where there is none: a line for whatever happens, and one a minute."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rank_search.cli.progress import duration
from rank_search.launch.devices import Use
from rank_search.launch.job import Worker
from rank_search.launch.supervisor import View
from rank_search.launch.usage import Usage
from rank_search.study.watching import StudyView, WorkerView

_LINE_SECONDS = 60.0
_DRAW_SECONDS = 0.5


class LaunchBoard:
    """Shows a launch on standard error; use as a context manager."""

    def __init__(self, name: str) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._name = name
        self._usage = Usage()
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._told = time.monotonic()
        self._states: dict[str, tuple[str, int]] = {}
        self._trouble = ""
        self._engine_trouble = ""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, view: View) -> None:
        """Draw the table anew, or print what is new."""
        for line in self._news(view):
            self.console.print(Text(line), soft_wrap=True)
        now = time.monotonic()
        if self.console.is_terminal:
            if now - self._drawn >= _DRAW_SECONDS:
                self._drawn = now
                self._live.update(Group(self.table(view), Text(summary(self._name, view))), refresh=True)
        elif now - self._told >= _LINE_SECONDS:
            self._told = now
            self.console.print(Text(summary(self._name, view)), soft_wrap=True)

    def table(self, view: View) -> Table:
        """The workers, one a row."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("worker", "device", "trial", "fidelity"):
            table.add_column(title, no_wrap=True)
        for title in ("loss", "s/trial", "memory", "use", "restarts"):
            table.add_column(title, no_wrap=True, justify="right")
        for worker in view.workers:
            table.add_row(*self._row(worker, view.study))
        return table

    def _row(self, worker: Worker, study: StudyView | None) -> tuple[str, ...]:
        told = WorkerView()
        if study is not None and worker.identity is not None:
            told = study.worker(worker.identity)
        doing = worker.state if worker.state != "running" else "starts" if told.trial is None else str(told.trial)
        use = self._use(worker)
        return (
            worker.name, worker.device, doing, told.fidelity or "",
            "" if told.loss is None else f"{told.loss:.4f}",
            "" if told.seconds is None else f"{told.seconds:.1f}",
            "" if use is None else f"{use.memory / 2**30:.1f} GiB",
            "" if use is None else f"{use.percent:.0f} %",
            str(worker.restarts) if worker.restarts else "",
        )  # fmt: skip

    def _use(self, worker: Worker) -> Use | None:
        if worker.device.startswith("GPU "):
            return self._usage.of_gpus(worker.device.removeprefix("GPU ").split(","))
        return None if worker.pid is None else self._usage.of_process(worker.pid)

    def _news(self, view: View) -> list[str]:
        news = []
        for worker in view.workers:
            now = worker.state, worker.restarts
            if self._states.get(worker.name) != now:
                self._states[worker.name] = now
                what = worker.state if not worker.restarts or worker.state != "running" else "running again"
                news.append(
                    f"worker {worker.name} on {worker.device}: {what}{f' ({worker.note})' if worker.note else ''}"
                )
        if view.trouble != self._trouble:
            self._trouble = view.trouble
            news.append(view.trouble or "the database answers again")
        if view.engine_trouble != self._engine_trouble:
            self._engine_trouble = view.engine_trouble
            news.append(
                f"{view.engine_trouble}; the workers go on" if view.engine_trouble else "the engine answers again"
            )
        return news


def summary(name: str, view: View) -> str:
    """How far the study is, in one line."""
    if view.study is None:
        return f"study {name}: being prepared"
    study = view.study
    parts = [f"study {name}: {study.finished} of {view.wanted} trials"]
    if study.hypervolume is not None:
        parts.append(f"hypervolume {study.hypervolume:.4f}")
    if study.per_minute is not None:
        parts.append(f"{study.per_minute:.1f} trials/min")
    left = study.seconds_left(view.wanted)
    if left:
        parts.append(f"{duration(left)} left")
    if view.stopping:
        parts.append("stopping")
    return ", ".join(parts)
