"""A study on a terminal: its front drawn, its workers, its last trials; plain lines where there is no terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from rank_search.cli.plotting import Canvas, Range
from rank_search.cli.progress import duration
from rank_search.cli.tables import perplexity
from rank_search.front import Front
from rank_search.spec import LOSS_UNITS
from rank_search.study.liveness import WorkerId
from rank_search.study.overview import MeasuredTrial, measured_trials
from rank_search.study.records import StudyRecord, StudyStatus
from rank_search.study.store import StudyStore
from rank_search.study.watching import StudyView, WorkerView, watch

_PLOT_ROWS = 16
_LAST = 6
_MOST_WORKERS = 8
_FRONT, _CLOSED, _UNIFORM, _OTHER, _DENSE = "bold blue", "yellow", "green", "bright_black", "white"


@dataclass(frozen=True, slots=True)
class Watched:
    """A study at one moment."""

    record: StudyRecord
    status: StudyStatus
    front: Front
    trials: tuple[MeasuredTrial, ...]
    view: StudyView

    @classmethod
    def read(cls, store: StudyStore, name: str) -> Watched:
        """Read it.

        Raises:
            StorageError: the database cannot be reached, or lacks the study.
        """
        record = store.study(name)
        view = watch(store, name)
        assert view is not None  # the study is there
        return cls(record, store.status(name), store.front(name), measured_trials(store.engine, name), view)

    @property
    def has_ended(self) -> bool:
        """Whether no worker is at it any more."""
        return self.status.stop_reason is not None and not self.status.running

    @property
    def measured(self) -> tuple[MeasuredTrial, ...]:
        """Trials of the highest fidelity."""
        return tuple(trial for trial in self.trials if trial.state in {"complete", "infeasible"})


def screen(watched: Watched) -> RenderableType:
    """All of it."""
    parts: list[RenderableType] = [Text(summary(watched), style="bold"), Text(_losses(watched)), Text()]
    if watched.front:
        parts += [FrontPlot(watched), _legend(watched), Text()]
    parts += [_workers(watched.view), _last_trials(watched)]
    return Group(*parts)


def summary(watched: Watched) -> str:
    """How far the study is, in one line."""
    status, view = watched.status, watched.view
    parts = [f"study {status.name}: {status.finished} of {status.wanted} trials"]
    counts = {
        "pruned": status.pruned,
        "infeasible": status.infeasible,
        "failed": status.failed,
        "running": status.running,
    }
    parts += [f"{count} {state}" for state, count in counts.items() if count]
    parts.append(f"{len(watched.front)} on the front")
    if view.hypervolume is not None:
        parts.append(f"hypervolume {view.hypervolume:.4f}")
    if status.stop_reason is not None:
        parts.append(f"stopped: {status.stop_reason}")
    elif view.per_minute is not None:
        parts.append(f"{view.per_minute:.1f} trials/min")
        if left := view.seconds_left():
            parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def _losses(watched: Watched) -> str:
    dense, front = watched.record.dense_loss, watched.front
    told = [] if dense is None else [f"dense model {dense:.4f}"]
    if front:
        told += [
            f"lowest {front[-1].loss:.4f}",
            f"knee {front.knee().loss:.4f} at {_millions(front.knee().num_params)}",
        ]
    unit = LOSS_UNITS[watched.record.spec.model.task]
    return f"loss (nats per {unit}): {', '.join(told) or 'none yet'}"


def trial_line(trial: MeasuredTrial, *, on_front: bool) -> str:
    """A finished trial in one line."""
    end = "front" if on_front else "" if trial.state == "complete" else f"{trial.state} at {trial.fidelity.label}"
    line = (
        f"trial {trial.number} ({trial.source}): kept {trial.kept_of_targets:.4f}, {trial.num_params:,} parameters, "
        f"loss {trial.loss:.4f}, {trial.seconds:.1f} s"
    )
    return f"{line}, {end}" if end else line


class FrontPlot:
    """Loss against parameters, as wide as the terminal."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        x, y = self._ranges()
        width = max(10, min(options.max_width, 120) - 9)
        canvas = Canvas(width, _PLOT_ROWS, x, y)
        self._draw(canvas, x)
        for index, line in enumerate(canvas.lines()):
            share = 1 - index / (_PLOT_ROWS - 1)
            label = f"{y.low + share * (y.high - y.low):7.3f} " if index % 5 == 0 else " " * 8
            yield Text(label, style="dim").append_text(Text("│", style="dim")).append_text(line)
        yield Text(" " * 8 + "└" + "─" * width, style="dim")
        left, right = _millions(x.low), _millions(x.high)
        middle = "parameters of the whole model"
        space = max(1, (width - len(left) - len(right) - len(middle)) // 2)
        yield Text(" " * 9 + left + " " * space + middle + " " * space + right, style="dim")

    def _ranges(self) -> tuple[Range, Range]:
        """The front and the dense model fill the picture, and the closed form raises it by half of that at most."""
        watched, front = self._watched, self._watched.front
        dense = watched.record.dense_loss
        losses = [point.loss for point in front] + ([] if dense is None else [dense])
        low, high = min(losses), max(losses)
        height = (high - low) or 0.1 * max(abs(high), 1.0)
        closed = [trial.loss for trial in watched.measured if trial.source.startswith("closed form")]
        top = min(max([high, *closed]), high + height / 2) + 0.08 * height
        least = min(trial.num_params for trial in watched.measured if trial.loss <= top)
        return Range(least, watched.record.facts.model_params), Range(low - 0.08 * height, top)

    def _draw(self, canvas: Canvas, x: Range) -> None:
        watched, points = self._watched, self._watched.front.points
        if watched.record.dense_loss is not None:
            canvas.horizontal(watched.record.dense_loss, x.low, x.high, _DENSE, every=4)
        for trial in watched.measured:
            canvas.point(trial.num_params, trial.loss, _style(trial), size=1 if _style(trial) == _OTHER else 2)
        for point, following in pairwise(points):
            canvas.horizontal(point.loss, point.num_params, following.num_params, _FRONT)
            canvas.vertical(following.num_params, point.loss, following.loss, _FRONT)
        for point in points:
            canvas.point(point.num_params, point.loss, _FRONT, size=2)
        for trial in watched.measured:
            if _style(trial) != _OTHER:
                canvas.mark(trial.num_params, trial.loss, "□" if _style(trial) == _CLOSED else "△", _style(trial))
        if watched.record.dense_loss is not None:
            canvas.mark(x.high, watched.record.dense_loss, "★", _DENSE)


def _style(trial: MeasuredTrial) -> str:
    starts = {"closed form ": _CLOSED, "uniform ": _UNIFORM}
    return next((style for start, style in starts.items() if trial.source.startswith(start)), _OTHER)


def _legend(watched: Watched) -> Text:
    used = {_style(trial) for trial in watched.measured}
    entries = [("━ front", _FRONT), ("□ closed form", _CLOSED), ("△ uniform", _UNIFORM), ("· other trials", _OTHER)]
    shown = [entry for entry in entries if entry[1] in {*used, _FRONT}]
    if watched.record.dense_loss is not None:
        shown.append(("★ dense model", _DENSE))
    return Text(" " * 9).append_text(Text("   ").join(Text(label, style=style) for label, style in shown))


def _workers(view: StudyView) -> RenderableType:
    table = _table(("worker", "doing"), ("trials", "last loss", "s/trial", "memory"))
    busy = sorted(view.workers.items(), key=lambda item: (item[1].trial is None, item[0]))
    for identity, told in busy[:_MOST_WORKERS]:
        table.add_row(*_worker_row(identity, told))
    if len(busy) > _MOST_WORKERS:
        table.add_row(f"and {len(busy) - _MOST_WORKERS} more")
    return table


def _worker_row(identity: str, told: WorkerView) -> tuple[str, ...]:
    worker = WorkerId.parse(identity)
    gone = told.trial is None or worker.is_dead()
    return (
        f"{worker.host}:{worker.pid}", "idle or gone" if gone else f"trial {told.trial}", str(told.measured),
        "" if told.loss is None else f"{told.loss:.4f}", "" if told.seconds is None else f"{told.seconds:.1f}",
        "" if told.peak_memory is None else f"{told.peak_memory / 2**30:.1f} GiB",
    )  # fmt: skip


def _last_trials(watched: Watched) -> RenderableType:
    on_front = {point.trial for point in watched.front}
    table = _table(("trial", "source"), ("kept", "parameters", "loss", "perplexity", "s", ""))
    for trial in last_trials(watched.trials, _LAST):
        end = "front" if trial.number in on_front else "" if trial.state == "complete" else str(trial.state)
        table.add_row(
            str(trial.number), trial.source, f"{trial.kept_of_targets:.4f}", f"{trial.num_params:,}",
            f"{trial.loss:.4f}", perplexity(math.exp(min(trial.loss, 700.0))), f"{trial.seconds:.1f}", end,
        )  # fmt: skip
    return table


def last_trials(trials: Sequence[MeasuredTrial], count: int) -> list[MeasuredTrial]:
    """Those that ended last, the latest last."""
    return sorted(trials, key=lambda trial: (trial.finished, trial.number))[-count:]


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in left:
        table.add_column(title, no_wrap=True)
    for title in right:
        table.add_column(title, no_wrap=True, justify="right")
    return table


def _millions(params: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if params >= size:
            return f"{params / size:.2f}{unit}"
    return f"{params:.0f}"
