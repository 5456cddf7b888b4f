"""Who works on a trial, and whether that process is still there. Pure: no torch, no Optuna."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

UNKNOWN = "unknown:0:"
"""Stands for the worker that holds a trial, where it was claimed by nobody knows whom."""


@dataclass(frozen=True, slots=True)
class WorkerId:
    """A process: host, process id, and a token of its start.

    The token guards against two mistakes. A process id is used again by later processes, so the token holds the
    start time of the process in clock ticks since boot (field 22 of ``/proc/PID/stat``). And containers may share
    a host name but not process ids, so it holds the identity of the process-id namespace too. Without ``/proc``
    the token is empty and the process id alone decides.
    """

    host: str
    pid: int
    token: str

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.token}"

    @classmethod
    def current(cls) -> WorkerId:
        """The running process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> WorkerId:
        """A process of this host."""
        return cls(socket.gethostname(), pid, _token(pid))

    @classmethod
    def parse(cls, text: str) -> WorkerId:
        """Inverse of ``str``."""
        host, pid, token = text.rsplit(":", 2)
        return cls(host, int(pid), token)

    def is_dead(self) -> bool:
        """Whether this process has certainly ended; False for processes that cannot be seen from here."""
        here = WorkerId.current()
        if self.host != here.host or _namespace(self.token) != _namespace(here.token):
            return False
        if not _exists(self.pid):
            return True
        return self.token != _token(self.pid)


def _namespace(token: str) -> str:
    return token.partition(".")[0]


def _token(pid: int) -> str:
    """``<namespace>.<start ticks>``, empty where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return ""
    # The command name, field 2, may hold blanks; the rest follows its closing parenthesis.
    start = stat.rpartition(")")[2].split()[19]
    return f"{namespace.strip('pid:[]')}.{start}"


def _exists(pid: int) -> bool:
    """Whether a process of this id runs; a zombie, ended but not yet waited for, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}
