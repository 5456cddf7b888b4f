"""What commands print: tables and lines for people, wide enough that nothing is cut when piped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rank_search.api import Evaluation, ModelLayers, StudyView
from rank_search.cli.progress import duration
from rank_search.export.rank_map_file import RankMapFile
from rank_search.export.tables import front_rows
from rank_search.front import FrontPoint
from rank_search.study.liveness import WorkerId

if TYPE_CHECKING:
    from rank_search.study.records import StudyStatus
    from rank_search.worker import Outcome

_WIDE = 1000
"""Columns where standard output is no terminal: more than any table takes."""


def _console() -> Console:
    """Standard output as it is now."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_WIDE)


def print_front(view: StudyView) -> None:
    """The front, and the dense model as its reference; a narrow terminal leaves out what it has no room for."""
    found = front_rows(view.front)
    metrics = sorted({metric for row in found for metric in row.metrics} - {"perplexity"})
    rows = [
        (
            str(row.trial), row.source, f"{row.num_params:,}", f"{row.kept_of_targets:.4f}", f"{row.kept_of_model:.4f}",
            _loss(row.loss, row.standard_error), perplexity(row.perplexity), row.fidelity,
            *(_metric(row.metrics.get(metric)) for metric in metrics),
            *([] if row.fold_deviation is None else [f"{row.fold_deviation:.4f}"]),
        )
        for row in found
    ]  # fmt: skip
    folds = ["over\nfolds"] if any(row.fold_deviation is not None for row in found) else []
    dense, dense_metrics = view.record.dense_loss, view.record.dense_metrics
    total = [] if dense is None else [
        (
            "", "dense model", f"{view.record.facts.model_params:,}", f"{1:.4f}", f"{1:.4f}", _loss(dense, None),
            perplexity(_exp(dense)), "", *(_metric(dense_metrics.get(metric)) for metric in metrics),
            *("" for _ in folds),
        )
    ]  # fmt: skip
    named = ("trial", "source", "parameters", "kept of\ntargets", "kept of\nmodel", "loss", "perplexity", "fidelity")
    columns = (*named, *metrics, *folds)
    _print_fitting(columns, rows, total, left=("source", "fidelity"), spare=("fidelity", "kept of\nmodel"))


def print_layers(layers: ModelLayers) -> None:
    """The target layers with their share of the whole model; a narrow terminal leaves out their types."""
    rows = [
        (
            shape.name, shape.group, f"{shape.m} × {shape.n}", f"{shape.dense_params:,}",
            f"{shape.dense_params / layers.model_params:.2%}",
        )
        for shape in layers.shapes
    ]  # fmt: skip
    held = sum(shape.dense_params for shape in layers.shapes)
    count = "1 target layer" if len(layers.shapes) == 1 else f"{len(layers.shapes)} target layers"
    total = [
        (count, "", "", f"{held:,}", f"{held / layers.model_params:.2%}"),
        ("whole model", "", "", f"{layers.model_params:,}", f"{1:.2%}"),
    ]
    columns = ("layer", "type", "shape", "parameters", "share of\nmodel")
    _print_fitting(columns, rows, total, left=("layer", "type"), spare=("type",))


def status_lines(status: StudyStatus) -> Iterable[str]:
    """How far a study is, failed trials with their reasons last."""
    others = {
        "pruned": status.pruned, "infeasible": status.infeasible, "failed": status.failed, "running": status.running,
        "requeued": status.requeued, "skipped": status.skipped,
    }  # fmt: skip
    shown = ", ".join([f"{status.complete} complete", *(f"{count} {name}" for name, count in others.items() if count)])
    yield f"study {status.name}: {status.finished} of {status.wanted} trials finished ({shown})"
    for title, loss in (("lowest loss", status.best_loss), ("dense loss", status.dense_loss)):
        value = "not known yet"
        if loss is not None:
            value = f"{loss:.4f} nats per {status.unit}, perplexity {perplexity(_exp(loss))}"
        yield f"{title:<15}{value}"
    of_pruned = f", {duration(status.pruned_seconds)} of it in pruned trials" if status.pruned_seconds else ""
    yield f"{'trial time':<15}{duration(status.seconds)}{of_pruned}"
    if status.stop_reason is not None:
        yield f"{'stopped':<15}{status.stop_reason}"
    if status.last_activity is not None:
        yield f"{'last activity':<15}{_moment(status.last_activity)}"
    for worker in status.workers:
        who = WorkerId.parse(worker.worker)
        doing = "between two trials" if worker.trial is None else f"trial {worker.trial}"
        silent = ", silent: what it holds is proposed again" if worker.is_silent else ""
        yield f"{'worker':<15}{who.host}, process {who.pid}: {doing}, last heard of {worker.age:.0f} s ago{silent}"
    for number, reason in status.failures:
        yield f"trial {number} failed: {reason}"


class TrialLines:
    """One line for every finished trial, aligned under a heading; 80 columns for models below a billion parameters."""

    def __init__(self, trials: int, sources: Iterable[str]) -> None:
        self._number = max(len("trial"), len(str(trials)))
        self._source = max(map(len, sources), default=0)
        self._params = len("parameters") + 1

    def heading(self) -> str:
        """The names of the columns."""
        # "kept of targets" is longer than its numbers and reaches into the free space after "source".
        return (
            f"{'trial':>{self._number}}  {'source':<{self._source - 7}}kept of targets  "
            f"{'parameters':>{self._params}}  {'loss':>7}  perplexity  seconds"
        )

    def line(self, outcome: Outcome, *, on_front: bool) -> str:
        """One trial."""
        proposal, measured = outcome.proposal, outcome.measurement
        head = f"{proposal.number:>{self._number}}  {proposal.source:<{self._source}}"
        if measured is None:
            return f"{head}  {outcome.state}: {outcome.reason}"
        line = (
            f"{head}  {measured.kept_of_targets:.4f}  {measured.num_params:>{self._params},}  {measured.loss:7.4f}"
            f"  {perplexity(measured.perplexity):>10}  {outcome.seconds:7.1f}"
        )
        if on_front:
            return f"{line}  front"
        if outcome.state == "pruned":
            return f"{line}  pruned at {measured.fidelity.label}"
        return line if outcome.state == "complete" else f"{line}  {outcome.state}"


def written_line(path: object, file: RankMapFile) -> str:
    """What a rank map file holds."""
    found = file.measurement
    loss = "not measured" if found is None else f"loss {_loss(found.loss, found.standard_error)}"
    other, count = file.num_params_otherwise
    return (
        f"wrote {path}: {file.allocation}, kept {file.kept_of_targets:.4f} of the target layers and "
        f"{file.kept_of_model:.4f} of the model, {file.num_params:,} parameters ({count:,} in {other} storage), {loss}"
    )


def evaluation_line(found: Evaluation) -> str:
    """Loss, perplexity, metrics and size of a model."""
    metrics = "".join(f"{name} {_metric(value)}, " for name, value in found.metrics.items())
    return (
        f"loss {_loss(found.loss, found.standard_error)} nats per {found.unit}, "
        f"perplexity {perplexity(found.perplexity)}, "
        f"{metrics}{found.tokens:,} {found.unit}s, {found.num_params:,} parameters"
    )


def _metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def perplexity(value: float) -> str:
    """Two decimals while they mean something."""
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def points_on(front: Sequence[FrontPoint]) -> str:
    """How many points a front has."""
    return "1 point on the front" if len(front) == 1 else f"{len(front)} points on the front"


def _print_fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[Sequence[str]], *,
    left: tuple[str, ...], spare: tuple[str, ...],
) -> None:  # fmt: skip
    """A table with its last rows set apart, without the first columns of ``spare`` that a narrow terminal costs."""
    out = _console()
    for count in range(len(spare) + 1):
        shown = [index for index, column in enumerate(columns) if column not in spare[:count]]
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, 1, 0, 0))
        for index in shown:
            table.add_column(columns[index], justify="left" if columns[index] in left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(row[index]) for index in shown))
        table.add_section()
        for row in total:
            table.add_row(*(Text(row[index]) for index in shown))
        if out.measure(table, options=out.options.update(width=_WIDE)).maximum <= out.width:
            break
    out.print()
    out.print(table)
    out.print()


def _loss(loss: float, standard_error: float | None) -> str:
    return f"{loss:.4f}" + (" " * 9 if standard_error is None else f" ± {standard_error:.4f}")


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf


def _moment(moment: datetime) -> str:
    ago = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S} ({duration(ago)} ago)"
