"""Commands that put workers on a study: launch, worker."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rank_search import api
from rank_search.cli.options import StorageOption, StudyArgument, StudyFileArgument
from rank_search.cli.progress import TerminalProgress
from rank_search.cli.quiet import quiet_libraries
from rank_search.errors import InputError, RankSearchError
from rank_search.spec import load_study_file

if TYPE_CHECKING:
    from rank_search.worker import Outcome

TrialsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Finished trials wanted, those of earlier runs counted in.", show_default=False),
]
GraceOption = Annotated[
    float, typer.Option(metavar="S", help="Seconds that a worker which is asked to stop has to finish its trial.")
]


def launch(
    study: StudyFileArgument,
    storage: StorageOption = None,
    trials: TrialsOption = None,
    workers: Annotated[
        str, typer.Option(metavar="N", help="Workers; auto: one a GPU, or one for a few cores where there is none.")
    ] = "auto",
    gpus_per_worker: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="GPUs each, over which the model is spread. Default: one where there are GPUs.",
            show_default=False,
        ),
    ] = None,
    on: Annotated[str, typer.Option(metavar="ENGINE", help="local, ray, slurm or kubernetes.")] = "local",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="Of the engine, any number.", show_default=False),
    ] = None,
    grace: GraceOption = 30.0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Of slurm and kubernetes: submit the workers and leave.")
    ] = False,
) -> None:
    """Run a study with many workers, on this host or on a cluster, and watch over them."""
    from rank_search.cli.launch_table import LaunchBoard
    from rank_search.cli.tables import print_front
    from rank_search.launch import exits
    from rank_search.launch.launching import launch as launch_workers
    from rank_search.launch.log_streams import drop_unwritable

    drop_unwritable("stderr")  # which may go to a full disk, and workers are not to end with it
    left: list[str] = []
    with LaunchBoard(load_study_file(study).spec.name) as board:
        code = launch_workers(
            study, board, storage=storage, trials=trials, workers=_count(workers), gpus_per_worker=gpus_per_worker,
            on=on, options=key_values(option or []), grace=grace, detach=detach,
            on_leaving=left.append,
        )  # fmt: skip
    if left:
        typer.echo(left[0])
    elif code == exits.DONE:
        print_front(api.view(study, storage=storage))
    elif code == exits.PREEMPTED:
        typer.echo("rank-search: stopped; what is done is kept, and the same command resumes", err=True)
    else:
        typer.echo("rank-search: error: all workers were given up, for the reasons above", err=True)
    raise typer.Exit(code)


def worker(
    study: StudyArgument, storage: StorageOption = None, trials: TrialsOption = None, grace: GraceOption = 30.0
) -> None:
    """Join a study by hand with one worker.

    Its exit code says why it ended: 0 done, 69 database, 71 GPU or memory, 75 stopped, 78 wrong configuration.
    """
    from rank_search.launch import exits
    from rank_search.launch.log_streams import drop_unwritable
    from rank_search.launch.worker import run_worker, study_file

    drop_unwritable("stdout", "stderr")
    try:
        file = study_file(study, storage)
        quiet_libraries()
        with TerminalProgress() as progress:
            code = run_worker(
                file, storage=storage, trials=trials, grace=grace, progress=progress, on_outcome=_print_outcome
            )
    except RankSearchError as error:
        typer.echo(f"rank-search: error: {error}", err=True)
        raise typer.Exit(exits.exit_code(error)) from None
    if code == exits.PREEMPTED:
        typer.echo("rank-search: stopped; what is done is kept, and the same command resumes", err=True)
    raise typer.Exit(code)


def _print_outcome(outcome: Outcome) -> None:
    from rank_search.launch.worker import outcome_line

    typer.echo(outcome_line(outcome))
    sys.stdout.flush()


def _count(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise InputError(f"--workers must be auto or a number, not {text!r}")
    return int(text)


def key_values(pairs: list[str]) -> dict[str, str]:
    """An engine's options by their names."""
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"--option must be KEY=VALUE, not {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)
