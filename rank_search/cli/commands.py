"""The commands. Each one parses, calls one function of :mod:`rank_search.api`, and prints."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from rank_search.cli import (
    database_commands,
    insight_commands,
    launch_commands,
    model_commands,
    service_commands,
    study_commands,
    view_commands,
)

app = typer.Typer(
    name="rank-search",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rank-search {metadata.version('rank-search')}")
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Automated rank search for low-rank compression of Transformers."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


app.command()(study_commands.run)
app.command()(launch_commands.launch)
app.command()(launch_commands.worker)
app.command()(study_commands.prepare)
app.command()(study_commands.allocate)
app.command()(study_commands.front)
app.command()(study_commands.status)
app.command()(insight_commands.explain)
app.command()(view_commands.watch)
app.command()(view_commands.dashboard)
app.command()(view_commands.report)
app.command()(service_commands.serve)
app.command()(service_commands.pause)
app.command()(service_commands.resume)
app.command()(service_commands.stop)
app.command()(service_commands.jobs)
app.command()(study_commands.export)
app.command()(model_commands.apply)
app.command()(model_commands.evaluate)
app.command()(model_commands.layers)
app.add_typer(database_commands.app, name="db")
app.add_typer(service_commands.token_app, name="token")
