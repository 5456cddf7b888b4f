"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rank_search.errors import InputError
from rank_search.spec import TaskName

StudyFileArgument = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.", show_default=False)]
StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="The study's file, or its name in --storage.", show_default=False)
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Database, any SQLAlchemy URL. Default: RANK_SEARCH_STORAGE, else an SQLite file beside the study file.",
        show_default=False,
    ),
]
RankMapOutput = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", help="The rank map file to write.", show_default=False)
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, GGUF file, or hub id.", show_default=False)
]
TaskOption = Annotated[
    TaskName | None, typer.Option(metavar="TASK", help="As model.task. Default: causal-lm.", show_default=False)
]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="COMMIT", help="Commit, tag or branch of a hub model.", show_default=False)
]
RemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that the model brings to run.")]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def check_output(path: Path) -> None:
    """Refuse an output file that could not be written, before minutes of work and not after them.

    Raises:
        InputError: its folder is missing, or a folder has its name.
    """
    if path.is_dir():
        raise InputError(f"output {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"output {path}: folder {path.parent} does not exist; make it or write elsewhere")
