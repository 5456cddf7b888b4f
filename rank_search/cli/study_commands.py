"""Commands on a study: run, prepare, allocate, front, status, export."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rank_search import api
from rank_search.cli import tables
from rank_search.cli.options import (
    JsonOption,
    RankMapOutput,
    StorageOption,
    StudyArgument,
    StudyFileArgument,
    check_output,
)
from rank_search.cli.progress import TerminalProgress, duration
from rank_search.cli.quiet import quiet_libraries
from rank_search.errors import InputError, UnavailableError
from rank_search.export.tables import front_csv, front_json
from rank_search.spec import LOSS_UNITS, StudyFile, load_study_file
from rank_search.stop_rules import all_finished

if TYPE_CHECKING:
    from rank_search.worker import Outcome


def run(
    study: StudyFileArgument,
    storage: StorageOption = None,
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", help="Finished trials wanted, those of earlier runs counted in.", show_default=False),
    ] = None,
    settle: Annotated[
        bool, typer.Option("--settle", help="Propose nothing new; only promote pruned trials that belong on the front.")
    ] = False,
    warm_start: Annotated[
        str | None,
        typer.Option(
            metavar="STUDY",
            help="Measure the front of this study first, of the same model or a sibling: its file, URL#NAME, or its "
            "name in this study's database.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Create or resume a study: prepare, search, print the front."""
    file = load_study_file(study)
    quiet_libraries()
    with TerminalProgress() as progress:
        search = _Search(file, storage, trials, progress)
        api.run(
            file,
            storage=storage,
            trials=trials,
            settle=settle,
            warm_start=warm_start,
            progress=progress,
            on_outcome=search.finished,
        )
    _print_end(study, storage, api.view(file, storage=storage), measured=search.measured)


class _Search:
    """Tells of every finished trial, and how far the whole study is, all workers together."""

    def __init__(self, file: StudyFile, storage: str | None, trials: int | None, progress: TerminalProgress) -> None:
        self._file = file
        self._storage = storage
        self._wanted = trials or file.spec.search.trials
        self._progress = progress
        self._first: tuple[float, int] | None = None
        search = file.spec.search
        self._lines = tables.TrialLines(
            self._wanted, [*(f"closed form {kept:g}" for kept in search.ladder), search.sampler, "source" + " " * 9]
        )
        self.measured = 0
        progress.overall("trials", None, self._wanted)

    def finished(self, outcome: Outcome) -> None:
        """A line for one trial, and the bar of all."""
        self.measured += 1
        try:
            front = api.front(self._file, storage=self._storage)
            status = api.status(self._file, storage=self._storage)
        except UnavailableError:  # the worker, whose trial is stored, waits for it
            self._echo(outcome, on_front=False)
            return
        self._echo(outcome, on_front=any(point.trial == outcome.proposal.number for point in front))
        lowest = "" if status.best_loss is None else f"lowest loss {status.best_loss:.4f}"
        self._progress.overall("trials", status.finished, self._wanted, lowest, self._left(outcome, status.finished))

    def _echo(self, outcome: Outcome, *, on_front: bool) -> None:
        with self._progress.paused():
            if self.measured == 1:  # not before: whatever is to be refused has been by now
                typer.echo(
                    f"study {self._file.spec.name}, {self._wanted} {'trial' if self._wanted == 1 else 'trials'} wanted"
                )
                typer.echo(self._lines.heading())
            typer.echo(self._lines.line(outcome, on_front=on_front))
            sys.stdout.flush()

    def _left(self, outcome: Outcome, done: int) -> float | None:
        """Seconds to go, by the pace of all workers since the first trial of this one."""
        remaining = max(0, self._wanted - done)
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
            return None if outcome.measurement is None else remaining * outcome.seconds
        started, first = self._first
        return remaining * (now - started) / max(1, done - first)


def _print_end(study: Path, storage: str | None, view: api.StudyView, *, measured: int) -> None:
    tables.print_front(view)
    again = f"{shlex.quote(str(study))}{_storage_again(storage)}"
    status = api.status(study, storage=storage)
    done = status.finished
    if not measured and status.stop_reason == all_finished(done):
        typer.echo(
            f"The study has its {done} trials already; rank-search run {again} --trials {done + 10} asks for more."
        )
    if status.stop_reason is not None:
        typer.echo(f"Stopped because {status.stop_reason}.")
    if not view.front:
        typer.echo(f"No trial meets the study's goals: rank-search status {again}")
        return
    typer.echo(f"Draw it:    rank-search front {again} --plot front.png")
    typer.echo(f"Choose one: rank-search export {again} --knee -o rank_map.json")


def _storage_again(storage: str | None) -> str:
    """The option as it was given, its password hidden."""
    if storage is None:
        return ""
    from rank_search.study.engine import parse_url, shown

    return f" --storage {shlex.quote(shown(parse_url(storage)))}"


def prepare(study: StudyFileArgument) -> None:
    """Calibrate and build the factor bank only."""
    file = load_study_file(study)
    quiet_libraries()
    with TerminalProgress() as progress:
        prepared = api.prepare(file, progress=progress)
    space, splits, times = prepared.space, prepared.splits, prepared.times
    built = (
        f"built in {duration(times.statistics + times.decomposition + times.bank)} (statistics "
        f"{duration(times.statistics)}, decomposition {duration(times.decomposition)})"
    )
    in_folds = f" in {splits.folds} folds" if splits.folds else f" and {len(splits.validation)} validation"
    typer.echo(
        f"{len(space.shapes)} target layers of {space.dense_params:,} parameters in a model of {space.model_params:,}\n"
        f"{len(splits.calibration)} calibration, {len(splits.train)} training{in_folds} "
        f"blocks of {file.spec.data.sequence_length} tokens\n"
        f"factor bank {prepared.bank.path} of {prepared.bank.nbytes / 2**20:.1f} MiB "
        f"{built if prepared.built else 'was there already'}"
    )


def allocate(
    study: StudyFileArgument,
    kept: Annotated[float, typer.Option(metavar="F", help="Kept fraction of the target layers.", show_default=False)],
    output: RankMapOutput,
    uniform: Annotated[bool, typer.Option("--uniform", help="One kept fraction for all layers.")] = False,
) -> None:
    """Write the closed form's rank map for a kept fraction, without a search."""
    file = load_study_file(study)
    check_output(output)
    quiet_libraries()
    with TerminalProgress() as progress:
        made = api.allocate(file, kept, allocation="uniform" if uniform else "closed form", progress=progress)
    made.write(output, folder=file.folder)
    typer.echo(tables.written_line(output, made))


def front(
    study: StudyArgument,
    storage: StorageOption = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV and nothing else.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.", show_default=False)
    ] = None,
) -> None:
    """Print the front of a study, draw it with --plot."""
    if as_json and as_csv:
        raise InputError("give --json or --csv, not both")
    if plot is not None:
        check_output(plot)
    view = api.view(study, storage=storage)
    if plot is not None:
        _draw(view, plot)
    if as_json or as_csv:
        typer.echo(front_json(view.front) if as_json else front_csv(view.front), nl=False)
        return
    typer.echo(f"study {view.record.name}: {tables.points_on(view.front)}, {len(view.points)} measured trials")
    tables.print_front(view)
    if plot is not None:
        typer.echo(f"wrote {plot}")


def _draw(view: api.StudyView, path: Path) -> None:
    from rank_search.export.figures import front_figure, save_figure

    dense = view.record.dense_loss
    if dense is None:
        raise InputError(f"study {view.record.name!r} has not measured the dense model yet; run it first")
    figure = front_figure(
        view.front, trials=view.points, dense_loss=dense, dense_params=view.record.facts.model_params,
        title=view.record.name, unit=LOSS_UNITS[view.record.spec.model.task],
    )  # fmt: skip
    save_figure(figure, path)


def status(study: StudyArgument, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """Print how far a study is, and why trials failed."""
    found = api.status(study, storage=storage)
    if as_json:
        record = {**dataclasses.asdict(found), "finished": found.finished}
        typer.echo(json.dumps(record, indent=2, default=str))
        return
    for line in tables.status_lines(found):
        typer.echo(line)


def export(
    study: StudyArgument,
    output: RankMapOutput,
    storage: StorageOption = None,
    trial: Annotated[
        int | None, typer.Option(metavar="N", help="This trial, on the front or not.", show_default=False)
    ] = None,
    kept: Annotated[
        float | None,
        typer.Option(metavar="F", help="Lowest loss at this kept fraction of the target layers.", show_default=False),
    ] = None,
    max_params: Annotated[
        int | None,
        typer.Option(metavar="N", help="Lowest loss of at most N parameters in the whole model.", show_default=False),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(metavar="X", help="Fewest parameters of at most this loss, nats per token.", show_default=False),
    ] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The knee of the front.")] = False,
) -> None:
    """Write the rank map of one trial, chosen by exactly one of --trial, --kept, --max-params, --max-loss, --knee."""
    check_output(output)
    chosen = api.export(
        study, storage=storage, trial=trial, kept=kept, max_params=max_params, max_loss=max_loss, knee=knee
    )
    chosen.write(output, folder=api.study_folder(study, storage=storage))
    typer.echo(tables.written_line(output, chosen))
