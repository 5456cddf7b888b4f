"""Commands of the service: serve, token, jobs; and pause, resume and stop, which work without it, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rank_search import api
from rank_search.cli.database_commands import DatabaseOption
from rank_search.cli.launch_commands import key_values
from rank_search.cli.options import StorageOption, StudyArgument
from rank_search.errors import InputError

if TYPE_CHECKING:
    from rank_search.study.requests import Action
    from rank_search.study.store import StudyStore

_HAND = "by hand"
_Folder = Annotated[Path, typer.Option(metavar="DIR", help="The service's own: study files, banks, checkpoints.")]
_DEFAULT_FOLDER = Path("rank-search-service")
_Role = Annotated[str, typer.Option(metavar="ROLE", help="read or write.")]

token_app = typer.Typer(help="Make, list and revoke the service's tokens.", no_args_is_help=True)


def serve(
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen at; tokens are needed if others reach it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes any free one.")] = 8000,
    storage: DatabaseOption = None,
    folder: _Folder = _DEFAULT_FOLDER,
    root: Annotated[
        list[Path] | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="A folder whose models and texts studies may name; any number.",
            show_default=False,
        ),
    ] = None,
    launcher: Annotated[
        str, typer.Option(metavar="ENGINE", help="local, ray, slurm, kubernetes, or none: workers join by hand.")
    ] = "local",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="Of the engine, any number.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Of a study. Default: one a GPU, or one for a few cores.", show_default=False
        ),
    ] = None,
    at_once: Annotated[int, typer.Option(metavar="N", min=1, help="Studies that are worked on at a time.")] = 1,
    auth: Annotated[bool, typer.Option("--auth", help="Ask for tokens on this host, too; behind a proxy.")] = False,
    https: Annotated[bool, typer.Option("--https", help="A proxy in front speaks HTTPS.")] = False,
    rate: Annotated[float, typer.Option(metavar="N", min=0.1, help="Requests a second of one caller.")] = 50.0,
    studies: Annotated[int, typer.Option(metavar="N", min=1, help="Studies that the database may hold.")] = 200,
) -> None:
    """Serve studies over HTTP: submit, watch, steer, export; with optuna-dashboard and a page of its own."""
    try:
        from rank_search.service.app import create_app
        from rank_search.service.serving import serve as serve_app
        from rank_search.service.serving import take_port
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("rank_search"):
            raise
        raise InputError(f"the service needs {error.name}; pip install 'rank-search[service]'") from None
    from rank_search.launch.fleet import Crew, ServiceFleet
    from rank_search.launch.launching import ENGINES
    from rank_search.launch.log_streams import drop_unwritable
    from rank_search.service.settings import Settings, is_loopback

    if launcher not in (launchers := (*ENGINES, "none")):
        raise InputError(f"--launcher must be one of {', '.join(launchers)}, not {launcher!r}")
    url = _storage(storage, folder, make=True)
    needs_tokens = auth or not is_loopback(host)
    if needs_tokens:
        _require_token(url)
    if launcher == "kubernetes":
        from rank_search.study.hosts import require_server

        require_server(url, launcher)
    crew = Crew(launcher, key_values(option or []), workers, at_once)
    fleet = None if launcher == "none" else ServiceFleet(url, folder, crew)
    listening = take_port(host, port)
    drop_unwritable("stdout", "stderr")  # a full disk under its log must end neither the service nor its workers
    with listening:
        settings = Settings(
            url, folder, tuple(_root(path) for path in root or []), host, listening.getsockname()[1],
            auth=needs_tokens, https=https, rate=rate, burst=max(200, int(4 * rate)), most_studies=studies,
        )  # fmt: skip
        app = create_app(settings, fleet)
        typer.echo(f"service at {settings.url}/service/")
        typer.echo("Its API is told at /v1/openapi.json, the dashboard is at /. Ctrl-C ends it and its workers.")
        serve_app(app, listening)


def jobs(storage: DatabaseOption = None) -> None:
    """Do the apply and confirm jobs that wait in a database, one after the other; join a service by hand."""
    from rank_search.cli.progress import TerminalProgress
    from rank_search.cli.quiet import quiet_libraries
    from rank_search.launch.job_worker import do_jobs, job_line

    quiet_libraries()
    with TerminalProgress() as progress:
        code = do_jobs(
            api.storage_url(storage, None), progress=progress,
            on_job=lambda job, told: typer.echo(job_line(job, told)),
        )  # fmt: skip
    raise typer.Exit(code)


def pause(study: StudyArgument, storage: StorageOption = None) -> None:
    """Have the workers of a study, wherever they are, propose nothing new until it is resumed."""
    from rank_search.study.requests import Action

    _ask(study, storage, Action.PAUSE)
    typer.echo("paused; trials under way go on, and workers that wait for a minute end")


def resume(study: StudyArgument, storage: StorageOption = None) -> None:
    """Have a paused or stopped study go on; a service starts workers anew."""
    from rank_search.study.store import StudyStore
    from rank_search.study.submissions import resume as resume_study

    url, name = api.storage_of(study, storage)
    with StudyStore(url) as store:
        _check(store, name)
        resume_study(store.engine, name, _HAND)
    typer.echo("resumed; where workers have ended, start some")


def stop(study: StudyArgument, storage: StorageOption = None) -> None:
    """Have the workers of a study, wherever they are, end after the trials under way."""
    from rank_search.study.requests import Action

    _ask(study, storage, Action.STOP)
    typer.echo("stopped; trials under way are finished")


@token_app.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.", show_default=False)],
    role: _Role = "read", storage: DatabaseOption = None, folder: _Folder = _DEFAULT_FOLDER,
) -> None:  # fmt: skip
    """Make a token and print it; it is kept as a digest and cannot be shown again."""
    from rank_search.study.store import StudyStore
    from rank_search.study.tokens import Role, create_token

    if role not in set(Role):
        raise InputError(f"--role must be one of {', '.join(Role)}, not {role!r}")
    with StudyStore(_made(_storage(storage, folder, make=True))) as store:
        typer.echo(create_token(store.engine, name, Role(role)))


@token_app.command("list")
def list_tokens(storage: DatabaseOption = None, folder: _Folder = _DEFAULT_FOLDER) -> None:
    """Print all tokens: name, role, when made, when revoked."""
    from rank_search.study.store import StudyStore
    from rank_search.study.tokens import tokens

    with StudyStore(_storage(storage, folder)) as store:
        for token in tokens(store.engine):
            ended = f"  revoked {token.revoked:%Y-%m-%d %H:%M}" if token.revoked else ""
            typer.echo(f"{token.name}  {token.role}  made {token.created:%Y-%m-%d %H:%M}{ended}")


@token_app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.", show_default=False)],
    storage: DatabaseOption = None, folder: _Folder = _DEFAULT_FOLDER,
) -> None:  # fmt: skip
    """Make a token, and the sessions that were opened with it, worthless."""
    from rank_search.study.store import StudyStore
    from rank_search.study.tokens import revoke_token

    with StudyStore(_storage(storage, folder)) as store:
        revoke_token(store.engine, name)
    typer.echo(f"revoked {name}")


def _storage(storage: str | None, folder: Path, *, make: bool = False) -> str:
    """The database that is named, else an SQLite file in the service's folder, which ``make`` makes."""
    url = api.given_storage(storage)
    if url is not None:
        return url
    return f"sqlite:///{(_made_folder(folder) if make else folder).resolve()}/studies.db"


def _made_folder(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror}; choose another --folder") from None
    return folder


def _made(url: str) -> str:
    """The database, made or brought up to date."""
    from rank_search.study.upgrading import upgrade

    upgrade(url)
    return url


def _require_token(url: str) -> None:
    from rank_search.study.store import StudyStore
    from rank_search.study.tokens import has_tokens

    with StudyStore(_made(url)) as store:
        if not has_tokens(store.engine):
            raise InputError(
                "the address needs tokens and there is none yet; make one with `rank-search token create NAME`, with "
                "the same --storage or --folder"
            )


def _root(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"--root {path} is no folder; name one that is there")
    return path.resolve()


def _ask(study: str, storage: str | None, action: Action) -> None:
    from rank_search.study.requests import ask_for
    from rank_search.study.store import StudyStore

    url, name = api.storage_of(study, storage)
    with StudyStore(url) as store:
        _check(store, name)
        ask_for(store.engine, name, action, _HAND)


def _check(store: StudyStore, name: str) -> None:
    """Refuse a study that is neither prepared nor submitted."""
    from rank_search.study.submissions import submission

    if name not in store.studies() and submission(store.engine, name) is None:
        raise InputError(f"the database has no study {name!r}; known are {', '.join(store.studies()) or 'none'}")
