"""How fast the service answers: readers of a large front, open event streams, and a search running beside.

    python scripts/bench_service.py [--trials 2000] [--readers 50] [--streams 200] [--seconds 60] [--pause 0.25]
        [--folder DIR] [--json FILE]

A study is filled with trials of made-up losses on the shapes of SmolLM2-135M; no model is loaded. Then the service runs
as a process of its own over SQLite, another process adds a trial every second, and this one opens so many event streams
and then so many readers. Each reader asks for the front, waits --pause seconds and asks again (0: at once, which tells
how much the service can do). Told are milliseconds to the whole answer, and the service's memory after a tenth of the
time and at the end, with points between. --folder keeps the database for the next time. Readers and followers use bare
sockets: on the same cores, an HTTP client would take more time than the service.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path
from typing import Any, Self

import numpy as np
from _made_up import facts_of, made_up_allocator
from _run import run_script

from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap, RankSpace
from rank_search.spec import parse_study
from rank_search.study.study import Study

NAME, BLOCKS = "large", 30
FRONT, EVENTS = f"/v1/studies/{NAME}/front", f"/v1/studies/{NAME}/events"
MORE = 10**6
"""Trials wanted: so many that the search beside does not end."""


def main() -> None:
    args = _arguments()
    with filled(args.folder, args.trials) as (url, folder), searching(url):
        row = measure(url, folder, args)
    tell(row, args.json)


@contextlib.contextmanager
def filled(folder: Path | None, trials: int) -> Iterator[tuple[str, Path]]:
    """URL of a database with so many trials of the study, in a folder that stays, or else in one that does not."""
    with contextlib.ExitStack() as opened:
        where = folder or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="rs-")))
        where.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{where.resolve()}/study.db"
        fill(url, trials)
        yield url, where


@contextlib.contextmanager
def searching(url: str) -> Iterator[None]:
    """A process beside that adds a trial every second."""
    beside = Process(target=search, args=(url,), daemon=True)
    beside.start()
    try:
        yield
    finally:
        beside.terminate()


def tell(row: dict[str, Any], file: Path | None) -> None:
    """Print a row, and add it to those of a JSON file."""
    print(json.dumps(row, indent=1))
    if file is not None:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
        told = {"environment": {"cores": os.cpu_count(), "python": platform.python_version()}, "rows": [*rows, row]}
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def open_study(url: str) -> tuple[Study, RankSpace]:
    """The study, made where it is missing."""
    allocator = made_up_allocator(BLOCKS)
    search = {"sampler": "random", "space": "multipliers", "trials": MORE}
    spec = parse_study({"name": NAME, "model": {"source": "org/none"}, "search": search}, where="bench")
    return Study.open(spec, url, allocator, facts_of(allocator)), allocator.space


def fill(url: str, trials: int) -> None:
    """Bring the study to so many trials."""
    study, space = open_study(url)
    study.set_dense_loss(2.9)
    for number in range(study.finished(), trials):
        add_trial(study, space, number)
    study.close()


def search(url: str) -> None:
    """Add a trial every second, for ever."""
    study, space = open_study(url)
    number = study.finished()
    while True:
        add_trial(study, space, number := number + 1)
        time.sleep(1.0)


def add_trial(study: Study, space: RankSpace, number: int) -> None:
    """A trial whose loss falls with its size, so that fronts are long."""
    proposal = study.ask()
    study.tell(proposal, _measurement(space, proposal.rank_map, number))


def _measurement(space: RankSpace, rank_map: RankMap, number: int) -> Measurement:
    kept = space.kept_of_targets(rank_map)
    noise = float(np.random.default_rng(number).uniform(0, 0.01))
    return Measurement(
        loss=3.0 + (1 - kept) ** 2 + noise, standard_error=0.01, num_params=space.num_params(rank_map),
        target_params=space.target_params(rank_map), kept_of_targets=kept, kept_of_model=space.kept_of_model(rank_map),
        fidelity=Fidelity.TUNED, tokens=100_000,
    )  # fmt: skip


def measure(url: str, folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Start the service and read from it."""
    command = [
        sys.executable, "-m", "rank_search", "serve", "--port", "0", "--storage", url, "--folder",
        str(folder / "service"), "--launcher", "none", "--rate", "1000000",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1].removesuffix("/service/")
        return asyncio.run(_measure(address, process.pid, args))
    finally:
        process.terminate()
        process.wait()


async def _measure(address: str, pid: int, args: argparse.Namespace) -> dict[str, object]:
    host, port = address.removeprefix("http://").split(":")
    place = host, int(port)
    following = Process(target=follow, args=(*place, args.streams), daemon=True)  # it would keep this one waiting
    following.start()
    wanted = f"rank_search_event_streams {args.streams}.0".encode()
    probe = await Connection.to(*place)
    while wanted not in await probe.get("/v1/metrics"):
        await asyncio.sleep(0.5)
    front = json.loads(await probe.get(FRONT))
    milliseconds: list[float] = []
    memory: list[int] = []
    end = time.monotonic() + args.seconds
    connections = [await Connection.to(*place) for _ in range(args.readers)]
    busy = _seconds_of(pid)
    readers = [asyncio.create_task(_read(one, milliseconds, end, args.pause)) for one in connections]
    for _ in range(10):
        await asyncio.sleep(args.seconds / 10)
        memory.append(_memory(pid))
    await asyncio.gather(*readers)
    busy = _seconds_of(pid) - busy
    following.terminate()
    quantiles = statistics.quantiles(milliseconds, n=100)
    return {
        "trials": args.trials, "points": len(front["points"]), "readers": args.readers, "streams": args.streams,
        "seconds": args.seconds, "pause": args.pause, "answers": len(milliseconds),
        "median_ms": round(statistics.median(milliseconds), 1), "p99_ms": round(quantiles[98], 1),
        "most_ms": round(max(milliseconds), 1), "busy_cores": round(busy / args.seconds, 2),
        "memory_mb": [round(one / 2**20) for one in memory], "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


@dataclass(frozen=True)
class Connection:
    """A connection that is kept open."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    host: str

    @classmethod
    async def to(cls, host: str, port: int) -> Self:
        """Opened."""
        return cls(*await asyncio.open_connection(host, port, limit=2**22), f"{host}:{port}")

    def ask(self, path: str) -> None:
        """Send a request."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())

    async def head(self) -> bytes:
        """The head of an answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        return head

    async def get(self, path: str) -> bytes:
        """The body of an answer."""
        self.ask(path)
        length = re.search(rb"content-length: (\d+)", await self.head())
        assert length is not None
        return await self.reader.readexactly(int(length[1]))


def follow(host: str, port: int, streams: int) -> None:
    """Read so many event streams, for ever."""

    async def one() -> None:
        connection = await Connection.to(host, port)
        connection.ask(EVENTS)
        await connection.head()
        while await connection.reader.read(2**16):
            pass

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(streams)))

    asyncio.run(all_of_them())


async def _read(connection: Connection, milliseconds: list[float], end: float, pause: float) -> None:
    await asyncio.sleep(random.uniform(0, pause))
    while time.monotonic() < end:
        started = time.perf_counter()
        await connection.get(FRONT)
        milliseconds.append(1e3 * (time.perf_counter() - started))
        await asyncio.sleep(pause)


def _seconds_of(pid: int) -> float:
    """Seconds that a process has kept a core busy."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> int:
    """Bytes that a process has in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--readers", type=int, default=50)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=0.25)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
