"""Rows of :mod:`bench_methods`: kept in a file as they are made, brought together, shown and drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _lines import append_line, cut_short, whole_lines, write_merged
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from rich.console import Console
from rich.table import Table

from rank_search.errors import InputError
from rank_search.export.figures import save_figure

Row = dict[str, Any]
KEY = ("method", "allocation", "storage", "kept", "finetune", "seed")
_GROUP = ("method", "allocation", "storage", "finetune")
_TALLEST = 40
"""Curves are drawn up to so many times the dense model's perplexity; the table holds the rest."""
_MARKERS = "osv^D*Pp<>X"


class RowFile:
    """One JSON object a line: the machine that measured what follows, and finished rows.

    Raises:
        InputError: the file holds rows of another study.
    """

    def __init__(self, path: Path | None, study: str, environment: Mapping[str, object]) -> None:
        self._path = path
        self.environment = dict(environment)
        self.rows: list[Row] = []
        if path is not None and path.exists():
            cut_short(path)
            self.rows, machines = read_rows([path])
            others = {row["study"] for row in self.rows} - {study}
            if others:
                raise InputError(f"{path} holds rows of another study ({others.pop()}, not {study}); give another file")
            if machines and machines[-1] == self.environment:
                return
        self._append({"environment": self.environment})

    def has(self, key: tuple[object, ...]) -> bool:
        """Whether the row of this method, allocation, storage, kept fraction, fine-tune and seed is there."""
        return any(_key(row) == key for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a finished row; it is on disk when this returns."""
        self.rows.append(row)
        self._append(row)

    def _append(self, line: Mapping[str, object]) -> None:
        if self._path is not None:
            append_line(self._path, line)


def read_rows(paths: Iterable[Path]) -> tuple[list[Row], list[dict[str, object]]]:
    """Rows of all files, each key once, and the machines they were measured on.

    Raises:
        InputError: the files hold rows of several studies.
    """
    rows: dict[tuple[object, ...], Row] = {}
    machines: list[dict[str, object]] = []
    for path in paths:
        for line in whole_lines(path):
            if "environment" in line:
                machines.append(line["environment"])
            else:
                rows[_key(line)] = line
    studies = {row["study"] for row in rows.values()}
    if len(studies) > 1:
        raise InputError(f"the files hold rows of {len(studies)} studies ({', '.join(sorted(studies))}); give one's")
    return list(rows.values()), machines


def report(rows: Sequence[Row], machines: Sequence[Mapping[str, object]], out: Path | None, plot: Path | None) -> None:
    """Print the table, and write rows and picture where asked."""
    print_means(rows)
    if out is not None:
        write_merged(out, machines, rows)
    if plot is not None:
        save_figure(methods_figure(rows), plot)


def print_means(rows: Sequence[Row]) -> None:
    """Perplexity of every method at every kept fraction: mean ± standard deviation over seeds."""
    fractions = sorted({row["kept"] for row in rows}, reverse=True)
    table = Table(
        title="validation perplexity (mean ± standard deviation over seeds) by kept fraction of target layers"
    )
    for name in (*_GROUP, *(f"{kept:g}" for kept in fractions)):
        table.add_column(name.replace("_", " "), justify="left" if name in _GROUP else "right")
    for group, found in _grouped(rows).items():
        cells = [_cell([row for row in found if row["kept"] == kept]) for kept in fractions]
        table.add_row(*map(str, group), *cells)
    Console(width=200).print(table)


def methods_figure(rows: Sequence[Row]) -> Figure:
    """Perplexity against kept fraction, a panel for each fine-tune, a curve for each method with its spread."""
    dense = [row for row in rows if row["method"] == "dense"]
    others = [row for row in rows if row["method"] != "dense"]
    panels = list(dict.fromkeys(row["finetune"] for row in others))
    figure = Figure(figsize=(6.5 * max(1, len(panels)), 6.5), dpi=150, layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        level = _mean(dense, panel)
        if level is not None:
            axes.axhline(level, color="black", linestyle="--", linewidth=1, label="dense model")
        _draw_panel(axes, [row for row in others if row["finetune"] == panel], level)
        axes.set_title("no fine-tune" if panel == "none" else f"after {panel}")
        if index == 0:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], level: float | None) -> None:
    shown: list[float] = [] if level is None else [level]
    for number, (group, found) in enumerate(_grouped(rows).items()):
        shown += _draw(axes, group, found, number)
    top = _TALLEST * (level or min(shown, default=1.0))
    visible = [value for value in shown if value <= top]
    axes.set_yscale("log")
    if visible:
        axes.set_ylim(0.93 * min(visible), 1.1 * max(visible))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel("kept fraction of the target layers")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.25, which="both")


def _draw(axes: Axes, group: tuple[str, ...], rows: Sequence[Row], number: int) -> list[float]:
    """Draw one curve, with bars from the smallest to the largest of a point's seeds; returns its perplexities. The
    package's own stand out by black and width."""
    values = {kept: _perplexities([row for row in rows if row["kept"] == kept]) for kept in _fractions(rows)}
    x = [kept for kept, found in values.items() if found]
    y = [statistics.fmean(values[kept]) for kept in x]
    below = [mean - min(values[kept]) for kept, mean in zip(x, y, strict=True)]
    above = [max(values[kept]) - mean for kept, mean in zip(x, y, strict=True)]
    own = group[0] == "kfac"
    axes.errorbar(
        x, y, yerr=[below, above], label=", ".join(dict.fromkeys(group[:3])),
        marker=_MARKERS[number % len(_MARKERS)], capsize=2, markersize=5, color="black" if own else f"C{number % 10}",
        linewidth=2 if own else 1.2, linestyle=_own_style(group) if own else "-", zorder=3 if own else 2,
    )  # fmt: skip
    return y


def _own_style(group: tuple[str, ...]) -> str:
    """The default is solid."""
    _, allocation, storage, *_ = group
    return "-" if storage == "pivoted" else "--" if allocation == "closed-form" else ":"


def _fractions(rows: Sequence[Row]) -> list[float]:
    return sorted({row["kept"] for row in rows}, reverse=True)


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    return groups


def _cell(rows: Sequence[Row]) -> str:
    values = _perplexities(rows)
    if not values:
        return "" if not rows else "not finite"
    mean = statistics.fmean(values)
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} ± {_spread(values):.2g}"


def _mean(rows: Sequence[Row], finetune: str) -> float | None:
    values = _perplexities([row for row in rows if row["finetune"] == finetune])
    return statistics.fmean(values) if values else None


def _perplexities(rows: Sequence[Row]) -> list[float]:
    return [row["perplexity"] for row in rows if row["perplexity"] is not None and math.isfinite(row["perplexity"])]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in KEY)
