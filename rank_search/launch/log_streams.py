"""Standard output and error of a worker. Its log may lie on a full disk; what cannot be written there is dropped."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Dropping(io.FileIO):
    """A file that takes everything, and forgets what the system refuses."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:  # a full disk, a reader that is gone: a line less, where an error would end a trial
            return memoryview(data).nbytes


def drop_unwritable(*names: str) -> None:
    """From now on, drop the lines that cannot be written to these streams of :mod:`sys`, whoever prints them.

    Python keeps what it could not write and tries it again as it ends, with exit code 120; so it is not enough to catch
    the error of a ``print``. Streams that stand for the process's own, as in a test, stay as they are.
    """
    for name in names:
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        with contextlib.suppress(OSError):  # it cannot be written, and is dropped
            stream.flush()
        dropping = _Dropping(stream.fileno(), "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(dropping, stream.encoding, stream.errors, line_buffering=True))
