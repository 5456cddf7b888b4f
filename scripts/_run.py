"""Runs a script as the command line runs its commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rank_search.errors import RankSearchError


def run_script(main: Callable[[], object]) -> None:
    """Call it; what is wrong with its input becomes one line on stderr and the command line's exit code."""
    try:
        main()
    except RankSearchError as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
