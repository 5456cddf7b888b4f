"""Factor banks at a URL: in object storage, or wherever else fsspec reaches. No torch.

A bank is two objects there: its content under the bank's name with the first digits of the content's SHA-256 in it,
and ``NAME.sha256``, one line as ``sha256sum -c`` reads it. That line is written last, so that its presence says that
the upload is complete; and as the content's name follows from the content, two workers that upload one bank at once,
each as it built it, never overwrite what the other one's line promises.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from rank_search.atomic import whole
from rank_search.errors import BankError, one_line
from rank_search.progress import SILENT, Progress

_MIB = 2**20
_ELSEWHERE = "check run.bank_url, the credentials in the environment and the network"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SECRETS = (
    (re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*"), r"\1?…"),  # a query string, which may be a signature
    (re.compile(r"://[^/@\s]*@"), "://…@"),
)


class RemoteBanks:
    """The banks at a URL. Every method raises :class:`BankError`, in one line, where it cannot do what it says.

    Nothing is opened before it is needed. Credentials are the environment's, as the URL's driver finds them.
    """

    def __init__(self, url: str, progress: Progress = SILENT) -> None:
        self._url = url.rstrip("/")
        self._progress = progress

    @property
    def identity(self) -> str:
        """The same for all who name the same URL."""
        return hashlib.sha256(self._url.encode()).hexdigest()[:24]

    def has(self, name: str) -> bool:
        """Whether the bank whose file is called ``name`` has been uploaded."""
        return self._digest(name) is not None

    def check_writable(self) -> None:
        """Find out that nothing can be uploaded before hours of work, not after them."""
        with self._translated("cannot be written"):
            files, root = self._opened_to_write()
            files.pipe_file(f"{root}/.rank-search", b"factor banks\n")

    def download(self, name: str, path: Path) -> bool:
        """Fetch a bank's file to ``path``, whole or not at all; False where it has not been uploaded.

        Raises:
            BankError: what came is not what was uploaded, among others.
        """
        digest = self._digest(name)
        if digest is None:
            return False
        source = _content_name(name, digest)
        with self._translated(f"has a factor bank {source} that cannot be downloaded"):
            files, root = self._opened
            try:
                size = files.info(f"{root}/{source}")["size"]
            except FileNotFoundError:
                raise self._damaged(name, f"{source} is not there") from None
            with whole(path) as temporary:
                with self._told("download", size) as callback:
                    files.get_file(f"{root}/{source}", str(temporary), callback=callback)
                if _sha256(temporary) != digest:
                    raise self._damaged(name, f"the SHA-256 of {source} is another one")
        return True

    def upload(self, path: Path) -> None:
        """Keep the bank's file ``path`` here, too, unless another worker has done so by then."""
        with self._translated("cannot be written"):
            digest = _sha256(path)
            content = _content_name(path.name, digest)
            files, root = self._opened_to_write()
            with self._told("upload", path.stat().st_size) as callback:
                files.put_file(str(path), f"{root}/{content}", callback=callback)
            if not self.has(path.name):  # else what was put there stays unnamed: to delete it may not be allowed
                files.pipe_file(f"{root}/{_line_name(path.name)}", f"{digest}  {content}\n".encode())

    def _digest(self, name: str) -> str | None:
        """SHA-256 of a bank's content, None where its upload is not complete."""
        with self._translated("cannot be read"):
            files, root = self._opened
            try:
                line = bytes(files.cat_file(f"{root}/{_line_name(name)}"))
            except FileNotFoundError:
                return None
        if not line.endswith(b"\n"):
            return None  # it is being written, or whoever wrote it was killed
        digest = line[:64].decode("ascii", "replace")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or line != f"{digest}  {_content_name(name, digest)}\n".encode():
            raise self._damaged(name, f"{_line_name(name)} is no line of sha256sum")
        return digest

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """fsspec's file system, and the URL's path in it."""
        try:
            files, root = fsspec.url_to_fs(self._url)
        except (ImportError, ValueError) as error:  # no driver, no such protocol
            raise BankError(f"run.bank_url {self._url} cannot be opened: {_reason(error)}") from error
        return files, root.rstrip("/")

    def _opened_to_write(self) -> tuple[Any, str]:
        files, root = self._opened
        if isinstance(files, LocalFileSystem):  # elsewhere folders are made by what is put into them
            files.makedirs(root, exist_ok=True)
        return files, root

    @contextmanager
    def _told(self, what: str, size: int) -> Iterator[Callback]:
        self._progress.say(f"{what}ing the factor bank ({size / _MIB:,.0f} MiB)")
        with self._progress.step(f"bank {what}", size // _MIB) as step:
            yield Callback(hooks={"advance": _in_mebibytes(step.advance)})

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except BankError:
            raise
        except Exception as error:  # every driver has exceptions of its own, and they share no base
            is_full = isinstance(error, OSError) and error.errno in _NO_ROOM
            way_out = "free space" if is_full else _ELSEWHERE
            raise BankError(f"run.bank_url {self._url} {what}: {_reason(error)}; {way_out}") from error

    def _damaged(self, name: str, why: str) -> BankError:
        return BankError(
            f"factor bank {name} at {self._url} is damaged: {why}; delete {_line_name(name)} there and run again"
        )


def _content_name(name: str, digest: str) -> str:
    path = Path(name)
    return f"{path.stem}.{digest[:16]}{path.suffix}"


def _line_name(name: str) -> str:
    return f"{name}.sha256"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_mebibytes(advance: Callable[[int], None]) -> Callable[..., None]:
    told = 0

    def tell(_size: int | None, value: int, **_: object) -> None:
        nonlocal told
        done = value // _MIB
        if done > told:
            advance(done - told)
            told = done

    return tell


def _reason(error: Exception) -> str:
    text = one_line(error)
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text
