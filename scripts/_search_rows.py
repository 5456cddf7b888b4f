"""Records of :mod:`bench_search`: kept in a file as they are made, turned into hypervolumes, shown and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _lines import append_line, cut_short, whole_lines, write_merged
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from rank_search.errors import InputError
from rank_search.export.figures import save_figure
from rank_search.ranks import RankMap, RankSpace

Record = dict[str, Any]
Row = dict[str, Any]
Run = tuple[str, int]
"""A competitor and a seed."""
CHECKPOINTS = 9
"""Hypervolumes of a run are told at its whole GPU-seconds, at half of them, and so on."""
CLAIMED = (20, 5)
"""And at these parts of them, by which a search is to have what others find in all of them, ..."""
LATE = (0.6, 0.7, 0.8, 0.9)
"""... and at these shares, where those that end nearly alike are told apart."""
ALIKE = 0.02
"""Of hypervolume, by which those that end nearly alike differ at most."""
_FIDELITIES = ("predicted", "sliced", "tuned", "confirmed")


@dataclass(frozen=True)
class Protocol:
    """What all competitors share, and what hypervolumes are measured against.

    Attributes:
        study: digest of the study's file.
        steps: of the own fine-tune.
        score_blocks, confirm_blocks: validation blocks on which competitors score, and on which they are compared.
        gpu_seconds: of every run, what is counted of preparation included.
        budgets: evenly spread over the study's range of kept fractions. Of a front, its best point within each is
            compared, and counts as large as the budget: how many points lie between two of them does not matter.
        dense_loss: of the dense model on the confirmation blocks, nats.
        reference_rise: losses above the dense one by this, in nats, add no hypervolume.
        dense_params, least_params, most_params: the whole model's, and those of the ends of the study's range of kept
            fractions.
    """

    study: str
    steps: int
    score_blocks: int
    confirm_blocks: int
    gpu_seconds: float
    budgets: int
    dense_loss: float
    reference_rise: float
    dense_params: int
    least_params: int
    most_params: int


class RecordFile:
    """One JSON object a line: machine and protocol, seconds of preparation, measured trials, confirmed points.

    Raises:
        InputError: the file was made under another protocol.
    """

    def __init__(self, path: Path, protocol: Protocol, environment: Mapping[str, object]) -> None:
        self._path = path
        self.records: list[Record] = []
        if path.exists():
            cut_short(path)
            self.records = whole_lines(path)
        told = [record["protocol"] for record in self.records if "protocol" in record]
        if told and told[0] != asdict(protocol):
            differ = [name for name, value in asdict(protocol).items() if told[0].get(name) != value]
            raise InputError(
                f"{path} was made with {differ[0]} = {told[0].get(differ[0])}, not {getattr(protocol, differ[0])}; "
                "give the same options or another file"
            )
        if not told:
            self.add({"protocol": asdict(protocol), "environment": dict(environment)})

    def add(self, record: Record) -> None:
        """Keep a record; it is on disk when this returns."""
        self.records.append(record)
        append_line(self._path, record)

    def trials(self, run: Run) -> list[Record]:
        """Measured trials of a run, in their order."""
        return [r for r in self.records if "trial" in r and (r["competitor"], r["seed"]) == run]

    def has_ended(self, run: Run) -> bool:
        """The run's study has stopped by itself."""
        return any("ended" in r and (r["competitor"], r["seed"]) == run for r in self.records)

    def preparation(self) -> Mapping[str, Any]:
        """Seconds of making the factor bank (`bank`) and the nested fine-tune of every range (`nested`, by its bank's
        key), so far as they are known."""
        known: dict[str, Any] = {}
        for record in self.records:
            known |= record.get("preparation", {})
        return known


def rank_map_of(record: Record, space: RankSpace) -> RankMap:
    """Of a trial's record, which holds ranks in the order of the layers; of dense ones None."""
    ranked = zip(space.shapes, record["ranks"], strict=True)
    return RankMap({shape.name: rank for shape, rank in ranked if rank is not None})


def checkpoints(protocol: Protocol) -> list[float]:
    """GPU-seconds at which hypervolumes are told, ascending."""
    seconds = protocol.gpu_seconds
    return sorted([*_halves(protocol), *(seconds / part for part in CLAIMED), *(seconds * share for share in LATE)])


def _halves(protocol: Protocol) -> list[float]:
    return [protocol.gpu_seconds * 2.0**-k for k in reversed(range(CHECKPOINTS))]


def confirmed_losses(records: Iterable[Record]) -> dict[tuple[str, int, str], float | None]:
    """Competitor, seed and digest of a rank map → its loss on the confirmation blocks; None where it is not finite."""
    return {
        (record["competitor"], record["seed"], record["digest"]): record["confirmed"]
        for record in records
        if "confirmed" in record
    }


def chosen(trials: Sequence[Record], protocol: Protocol) -> list[tuple[float, Record]]:
    """The protocol's budgets, in parameters of the whole model, and the trial of the highest fidelity that a competitor
    holds for the best within each."""
    finite = [trial for trial in trials if trial["loss"] is not None]
    top = max((_FIDELITIES.index(trial["fidelity"]) for trial in finite), default=0)
    ranked = [trial for trial in finite if _FIDELITIES.index(trial["fidelity"]) == top]
    found = []
    for k in range(1, protocol.budgets + 1):
        most = protocol.least_params + k / protocol.budgets * (protocol.most_params - protocol.least_params)
        fitting = [trial for trial in ranked if trial["num_params"] <= most + 1]
        if fitting:
            found.append((most, min(fitting, key=lambda trial: (trial["loss"], trial["num_params"]))))
    return found


def hypervolume(points: Iterable[tuple[float, float]], protocol: Protocol) -> float:
    """Share of the box between the range's smallest model and the dense one, and between the dense loss and the
    reference, that points (parameters, loss) dominate. A point smaller than the range counts as its smallest."""
    area, lowest = 0.0, protocol.dense_loss + protocol.reference_rise
    for params, loss in sorted(points):
        if loss < lowest and params < protocol.dense_params:
            area += (lowest - loss) * (protocol.dense_params - max(params, protocol.least_params))
            lowest = loss
    return area / (protocol.reference_rise * (protocol.dense_params - protocol.least_params))


def rows_of(records: Sequence[Record], protocol: Protocol) -> list[Row]:
    """A row for every run and checkpoint that it has reached, if it had measured something and that is confirmed."""
    known = confirmed_losses(records)
    runs: dict[Run, list[Record]] = {}
    for record in records:
        if "trial" in record:
            runs.setdefault((record["competitor"], record["seed"]), []).append(record)
    ended = {(record["competitor"], record["seed"]) for record in records if "ended" in record}
    rows = []
    for run, trials in runs.items():
        reached = protocol.gpu_seconds if run in ended else trials[-1]["gpu_seconds"]
        for at in checkpoints(protocol):
            if at > reached:
                break
            done = [trial for trial in trials if trial["gpu_seconds"] <= at]
            front = chosen(done, protocol)
            if not done or any((*run, trial["digest"]) not in known for _, trial in front):
                continue
            losses = [(most, known[(*run, trial["digest"])]) for most, trial in front]
            points = [(most, loss) for most, loss in losses if loss is not None]
            rows.append(
                {
                    "competitor": run[0],
                    "seed": run[1],
                    "gpu_seconds": round(at, 2),
                    "hypervolume": round(hypervolume(points, protocol), 6),
                    "trials": len(done),
                }
            )
    return rows


def merged(paths: Sequence[Path]) -> tuple[list[Record], Protocol]:
    """Records of several files of one protocol.

    Raises:
        InputError: the files were made under different protocols.
    """
    records = [record for path in paths for record in whole_lines(path)]
    protocols = [record["protocol"] for record in records if "protocol" in record]
    if any(protocol != protocols[0] for protocol in protocols):
        raise InputError("the files were made under different protocols; give those of one")
    return records, Protocol(**protocols[0])


def report(records: Sequence[Record], protocol: Protocol, out: Path | None, plot: Path | None) -> None:
    """Print the table, and write rows and picture where asked."""
    rows = rows_of(records, protocol)
    _print(rows, protocol)
    for line in overtakings(rows, "study"):
        print(line)
    if out is not None:
        machines = [record["environment"] for record in records if "environment" in record]
        write_merged(out, machines, rows, protocol=asdict(protocol))
    if plot is not None and rows:
        save_figure(search_figure(rows), plot)


def _print(rows: Sequence[Row], protocol: Protocol) -> None:
    """Hypervolume of every competitor at a few checkpoints: mean ± standard deviation over seeds."""
    shown = _halves(protocol)[::2]
    table = Table(title="hypervolume of the confirmed front by GPU-seconds (mean ± standard deviation over seeds)")
    table.add_column("competitor")
    for at in shown:
        table.add_column(f"{at:.4g} s", justify="right")
    table.add_column("trials", justify="right")
    for competitor in dict.fromkeys(row["competitor"] for row in rows):
        mine = [row for row in rows if row["competitor"] == competitor]
        cells = [_cell([r["hypervolume"] for r in mine if r["gpu_seconds"] == round(at, 2)]) for at in shown]
        most = [max(r["trials"] for r in mine if r["seed"] == seed) for seed in {r["seed"] for r in mine}]
        table.add_row(competitor, *cells, f"{statistics.fmean(most):.0f}")
    Console(width=160).print(table)


def overtakings(rows: Sequence[Row], competitor: str) -> list[str]:
    """When a competitor had, in the mean over seeds, what each of the others has at the end; a line each."""
    means: dict[str, dict[float, float]] = {}
    for name in dict.fromkeys(row["competitor"] for row in rows):
        mine = [row for row in rows if row["competitor"] == name]
        seeds = len({row["seed"] for row in mine})
        by_time = {
            at: [r["hypervolume"] for r in mine if r["gpu_seconds"] == at] for at in {r["gpu_seconds"] for r in mine}
        }
        means[name] = {at: statistics.fmean(found) for at, found in sorted(by_time.items()) if len(found) == seeds}
    own = means.pop(competitor, {})
    lines = []
    for name, found in means.items():
        if own and found:
            end, goal = max(found), found[max(found)]
            at = next((at for at, reached in own.items() if reached >= goal), None)
            when = "never" if at is None else f"by {at:g} of {end:g} s (1/{end / at:.3g})"
            ends = f"ends {own[max(own)] - goal:+.4f}"
            if goal == 0:  # any front has that much
                lines.append(f"{name} has nothing at the end: no point that counts; {competitor} {ends}")
            else:
                lines.append(f"{competitor} has what {name} has at the end ({goal:.4f}) {when}; it {ends}")
    return lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def search_figure(rows: Sequence[Row]) -> Figure:
    """Hypervolume against GPU-seconds: the mean over seeds, and between the least and the most; where several end
    nearly alike, the last half of them once more, larger."""
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    last = max(row["gpu_seconds"] for row in rows)
    ended = [row for row in rows if row["gpu_seconds"] == last]
    ends = {name: [row["hypervolume"] for row in ended if row["competitor"] == name] for name in names}
    best = max(statistics.fmean(found) for found in ends.values() if found)
    alike = [name for name, found in ends.items() if found and statistics.fmean(found) > best - ALIKE]
    panels = 2 if len(alike) > 1 else 1
    figure = Figure(figsize=(8.5 if panels == 1 else 12.5, 5.5), dpi=150, layout="constrained")
    whole, *late = figure.subplots(1, panels, squeeze=False, width_ratios=(2, 1)[:panels])[0]
    _draw(whole, rows, names, names)
    whole.set_xscale("log")
    whole.xaxis.set_major_formatter("{x:g}")
    whole.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    whole.set_ylabel("hypervolume of the confirmed front")
    for axes in late:
        _draw(axes, [row for row in rows if row["gpu_seconds"] >= last / 2], alike, names)
        axes.set_title(f"the best, the last {last / 2:g} s", fontsize=10)
    for axes in (whole, *late):
        axes.set_xlabel("GPU-seconds")
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=9, framealpha=0.92)
    return figure


def _draw(axes: Axes, rows: Sequence[Row], names: Sequence[str], all_names: Sequence[str]) -> None:
    """A line for every name, in the colour of its place among all."""
    for name in names:
        number = all_names.index(name)
        mine: dict[float, list[float]] = {}
        for row in rows:
            if row["competitor"] == name:
                mine.setdefault(row["gpu_seconds"], []).append(row["hypervolume"])
        x = sorted(mine)
        own = name.startswith("study")
        color = "black" if name == "study" else f"C{number % 10}"
        axes.plot(
            x, [statistics.fmean(mine[at]) for at in x], marker="osv^D*Pp<>X"[number % 11], markersize=4, color=color,
            linewidth=2.2 if own else 1.3, label=name, zorder=3 if own else 2,
        )  # fmt: skip
        axes.fill_between(x, [min(mine[at]) for at in x], [max(mine[at]) for at in x], color=color, alpha=0.12)
