"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path``, to be written inside the block; at its end it is flushed to the disk and takes the name.

    An older file stays until then.

    Raises:
        OSError: as the system gave it; nothing is left behind and an older file is untouched.
    """
    # Not tempfile: it makes files that only their owner can read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` as :func:`whole` does.

    Raises:
        OSError: as the system gave it; nothing is left behind and an older file is untouched.
    """
    with whole(path) as temporary:
        temporary.write_bytes(content)
