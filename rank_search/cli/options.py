"""Arguments and options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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


_KEYS = (
    "model.task", "model.revision", "model.trust_remote_code",
    "targets.layers", "targets.share", "targets.include", "targets.exclude", "targets.split_qkv", "targets.granularity",
    "data.train", "data.train_split", "data.config", "data.revision", "data.column", "data.pair_column",
    "data.label_column", "data.target_column", "data.sequence_length",
    "validation.metrics", "validation.trust_remote_code",
)  # fmt: skip
"""Keys of the study file that are options of ``evaluate`` or ``layers``."""
_KEY = re.compile(
    # Not within a longer name: modules and files have such names, too.
    rf"(?P<set>set )?(?<![\w./])(?P<key>{'|'.join(map(re.escape, _KEYS))})(?![\w/]|\.\w)"
    r"(?: = (?:'(?P<quoted>[^']+)'|\"(?P<double>[^\"]+)\"|(?P<word>true|false)))?"
)


def option_of(field: str, table: str = "") -> str:
    """The option that sets a field of a study file's tables."""
    if (table, field) == ("data", "revision"):
        return "--data-revision"  # --revision is the model's
    names = {"source": "MODEL", "train": "--data", "train_split": "--split", "metrics": "--metric"}
    return names.get(field, "--" + field.replace("_", "-"))


@contextmanager
def keys_as_options() -> Iterator[None]:
    """Errors that name keys of a study file name options instead, for commands that take these without such a file."""
    try:
        yield
    except InputError as error:
        told = _KEY.sub(_as_option, str(error)).replace("the study file's folder", "the current folder")
        error.args = (told, *error.args[1:])
        raise


def _as_option(found: re.Match[str]) -> str:
    table, _, field = found["key"].partition(".")
    option, value = option_of(field, table), found["quoted"] or found["double"]
    if found["word"] == "false":
        return f"leave out {option}" if found["set"] else f"no {option}"
    return f"{'give ' if found['set'] else ''}{option}{f' {value}' if value else ''}"
