"""Tar files that are sent as they are made, a piece at a time. Pure."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PIECE = 2**18
_END = b"\0" * (2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Tar:
    """A folder's plain files as a tar file, all below one folder; of one state of a folder always the same bytes.

    Attributes:
        top: the name of the folder in the tar file.
        files: where each file is, its header, and its bytes.
    """

    top: str
    files: tuple[tuple[Path, bytes, int], ...]

    @classmethod
    def of(cls, folder: Path, top: str) -> Tar:
        """Look at a folder.

        Raises:
            OSError: it cannot be read, or holds no file.
        """
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
        if not found:
            raise FileNotFoundError(folder)
        sizes = [path.stat().st_size for path in found]
        names = [f"{top}/{path.relative_to(folder).as_posix()}" for path in found]
        headers = [_header(name, size) for name, size in zip(names, sizes, strict=True)]
        return cls(top, tuple(zip(found, headers, sizes, strict=True)))

    @property
    def size(self) -> int:
        """Bytes of the tar file."""
        return sum(len(header) + size + _padding(size) for _, header, size in self.files) + len(_END)

    def pieces(self) -> Iterator[bytes]:
        """The tar file.

        Raises:
            OSError: a file cannot be read, or is not as long as it was.
        """
        for path, header, size in self.files:
            yield header
            left = size
            with path.open("rb") as file:
                while left:
                    piece = file.read(min(_PIECE, left))
                    if not piece:
                        raise OSError(f"{path} has become shorter")
                    left -= len(piece)
                    yield piece
            yield b"\0" * _padding(size)
        yield _END


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
