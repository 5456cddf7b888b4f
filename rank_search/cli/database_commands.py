"""Commands on a database: db upgrade, db check, db export, db import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rank_search import api
from rank_search.cli.options import StorageOption, StudyArgument, check_output
from rank_search.errors import InputError

FAULTY = 1
"""Exit code of a check that found faults."""

app = typer.Typer(help="Upgrade, check, export and import databases.", no_args_is_help=True)

DatabaseOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="Database. Default: RANK_SEARCH_STORAGE.", show_default=False),
]


@app.command()
def upgrade(storage: DatabaseOption = None) -> None:
    """Make the tables of a database, or bring them up to date, and print what was done."""
    from rank_search.study.upgrading import upgrade as upgrade_database

    done = upgrade_database(api.storage_url(storage, None))
    if done.optuna is not None:
        typer.echo(f"Optuna's tables: {done.optuna[0]} to {done.optuna[1]}")
    for version, purpose in done.steps:
        typer.echo(f"{version}  {purpose.rstrip('.')}")
    typer.echo(f"schema version {done.after}" + ("" if done.steps else ", up to date already"))


@app.command()
def check(storage: DatabaseOption = None) -> None:
    """Print every fault of a database: front against trials, orphans, digests, Optuna's tables; exit 1 if any."""
    from rank_search.study.consistency import check_database

    faults = check_database(api.storage_url(storage, None))
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(FAULTY)
    typer.echo("no faults")


@app.command("export")
def export_study(
    study: StudyArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.", show_default=False)
    ],
    storage: StorageOption = None,
) -> None:
    """Write a study with all its trials, measurements and failures, and Optuna's state, to one portable file."""
    from rank_search.atomic import write_atomically
    from rank_search.study.portable import dump_study

    check_output(output)
    url, name = api.storage_of(study, storage)
    content = dump_study(url, name)
    try:
        write_atomically(output, content)
    except OSError as error:
        raise InputError(f"output {output} cannot be written: {error.strerror or error}; write elsewhere") from None
    typer.echo(f"wrote {output}: study {name}, {len(content) / 2**10:.0f} KiB")


@app.command("import")
def import_study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="From db export.", show_default=False)],
    storage: DatabaseOption = None,
) -> None:
    """Put a study from a portable file into a database; refused if it has a study of that name."""
    from rank_search.study.portable import load_study

    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"file {file}: {error.strerror or error}") from None
    name = load_study(api.storage_url(storage, None), content, f"file {file}")
    typer.echo(f"study {name} is in the database; `rank-search status {name} --storage URL` shows it")
