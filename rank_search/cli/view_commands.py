"""Commands to look at a study: dashboard, watch, report."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from rank_search import api
from rank_search.cli.options import StorageOption, StudyArgument, check_output

if TYPE_CHECKING:
    from rank_search.study.store import StudyStore


def dashboard(
    study: Annotated[
        str | None,
        typer.Argument(
            metavar="[STUDY]", help="A study's file or name. Default: all in the database.", show_default=False
        ),
    ] = None,
    storage: StorageOption = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="127.0.0.1, localhost or ::1.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes any free one.")] = 8080,
) -> None:
    """Serve optuna-dashboard with the study's notes, figures and rank maps; an interrupt ends it."""
    from rank_search.dashboard.opening import open_dashboard

    url, name = (api.storage_url(storage, None), None) if study is None else api.storage_of(study, storage)
    with open_dashboard(url, name, host=host, port=port) as opened:
        typer.echo(f"dashboard at {opened.url}")
        typer.echo("It is read-only but for notes. Ctrl-C ends it.")
        try:
            opened.server.serve()
        except KeyboardInterrupt:
            typer.echo()


def report(
    study: StudyArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The HTML file to write.", show_default=False)
    ],
    storage: StorageOption = None,
) -> None:
    """Write a study's figures and tables as one HTML file, which opens from disk without a network."""
    from rank_search.dashboard.report import write_report

    check_output(output)
    write_report(*api.storage_of(study, storage), output)
    typer.echo(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")


def watch(
    study: StudyArgument,
    storage: StorageOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print it as it is now, and end.")] = False,
    every: Annotated[float, typer.Option(metavar="S", min=0.5, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Draw the front of a study in the terminal as it grows, with its workers and last trials, until it stops."""
    from rank_search.cli.watch_screen import Watched, screen
    from rank_search.study.store import StudyStore

    url, name = api.storage_of(study, storage)
    out = Console(highlight=False)
    with StudyStore(url) as store:
        watched = Watched.read(store, name)
        if once:
            out.print(screen(watched))
        elif out.is_terminal:
            with Live(screen(watched), console=out, auto_refresh=False) as live:
                while not watched.has_ended:
                    time.sleep(every)
                    watched = Watched.read(store, name)
                    live.update(screen(watched), refresh=True)
        else:
            _print_lines(store, name, every)


def _print_lines(store: StudyStore, name: str, every: float) -> None:
    """A line for the study and one for every trial that ends; where there is no terminal."""
    from rank_search.cli.watch_screen import Watched, summary, trial_line

    watched = Watched.read(store, name)
    typer.echo(summary(watched))
    if watched.has_ended:
        return
    told = {trial.number for trial in watched.trials}
    while not watched.has_ended:
        time.sleep(every)
        watched = Watched.read(store, name)
        on_front = {point.trial for point in watched.front}
        new = [trial for trial in watched.trials if trial.number not in told]
        told |= {trial.number for trial in new}
        for trial in new:
            typer.echo(trial_line(trial, on_front=trial.number in on_front))
        sys.stdout.flush()
    typer.echo(summary(watched))
