"""The command line: parses, calls :mod:`rank_search.api`, prints.

Errors of the user are one line on standard error and exit code 2; an interrupt is 130; a defect shows its traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from itertools import zip_longest

from typer import BadParameter
from typer.core import TyperArgument, TyperOption
from typer.exceptions import TyperException
from typer.main import get_command

from rank_search.errors import RankSearchError

USAGE_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
_BROKEN_PIPE = 1


def main() -> None:
    """Entry of the ``rank-search`` console script."""
    # Before torch is loaded, whose OpenMP threads would spin away the cores of a second worker on the host: on two
    # cores a fine-tune of 1.6 s took over 45 s beside another, and takes 4.6 s now (1.9 s alone).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line, without the program's name, and return its exit code."""
    from rank_search.cli.commands import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks "±" is no reason to fail
    try:
        code = get_command(app).main(list(arguments), prog_name="rank-search", standalone_mode=False)
        sys.stdout.flush()
    except RankSearchError as error:
        return _refused(str(error), error.exit_code)
    except TyperException as error:
        return _refused(f"{_usage_message(error, arguments)} ({_help_of(error)})", USAGE_ERROR)
    except BrokenPipeError:
        # The reader has gone (`| head`): what is left in the buffer must not be tried again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    if code == INTERRUPTED:  # Typer has turned the KeyboardInterrupt into this
        _tell("interrupted; what is done is kept, and the same command resumes")
    return int(code or 0)


def _refused(message: str, code: int) -> int:
    _tell(f"error: {message}")
    return code


def _tell(message: str) -> None:
    print(f"rank-search: {' '.join(message.split())}", file=sys.stderr)


def _usage_message(error: TyperException, arguments: Sequence[str]) -> str:
    """Typer's message with the value that was given, which it leaves out where a value has the wrong type."""
    message = error.format_message().rstrip(".")
    given = _given(getattr(error, "param", None), arguments) if isinstance(error, BadParameter) else None
    return message if given is None or repr(given) in message else f"{message}, not {given!r}"


def _given(parameter: TyperOption | TyperArgument | None, arguments: Sequence[str]) -> str | None:
    """The value of an option in a command line."""
    names = parameter.opts if isinstance(parameter, TyperOption) else []
    for argument, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else following
    return None


def _help_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"see `{context.command_path if context else 'rank-search'} --help`"
