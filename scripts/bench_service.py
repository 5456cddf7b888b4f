"""How fast the service answers: readers of a large front, open event streams, and a search running beside.

    python scripts/bench_service.py [--trials 2000] [--readers 50] [--streams 200] [--seconds 60] [--pause 0.25]
        [--folder DIR] [--json FILE]

A study is filled with trials of made-up losses on the shapes of SmolLM2-135M; no model is loaded. Then the service runs
as a process of its own over SQLite, another process adds a trial every second, and this one opens so many event streams
and then so many readers. Each reader asks for the front, waits --pause seconds and asks again (0: at once, which tells
how much the service can do). Told are milliseconds to the whole answer, and the service's memory after a tenth of the
time and at the end. --folder keeps the database for the next time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path

import httpx2
import numpy as np
from bench_overhead import made_up_allocator

from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap, RankSpace
from rank_search.spec import parse_study
from rank_search.study.facts import StudyFacts
from rank_search.study.study import Study

NAME, BLOCKS = "large", 30
MORE = 10**6
"""Trials wanted: so many that the search beside does not end."""


def main() -> None:
    args = _arguments()
    with contextlib.ExitStack() as opened:
        folder = args.folder or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="rs-")))
        folder.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{folder.resolve()}/study.db"
        fill(url, args.trials)
        beside = Process(target=search, args=(url,), daemon=True)
        beside.start()
        opened.callback(beside.terminate)
        row = measure(url, folder, args)
    print(json.dumps(row, indent=1))
    if args.json is not None:
        rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
        told = {"environment": {"cores": os.cpu_count(), "python": platform.python_version()}, "rows": [*rows, row]}
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def open_study(url: str) -> tuple[Study, RankSpace]:
    """The study, made where it is missing."""
    allocator = made_up_allocator(BLOCKS)
    search = {"sampler": "random", "space": "multipliers", "trials": MORE}
    spec = parse_study({"name": NAME, "model": {"source": "org/none"}, "search": search}, where="bench")
    facts = StudyFacts(
        source="none", revision=None, weights_digest="", shapes=allocator.space.shapes,
        model_params=allocator.space.model_params, calibration_digest="", bank="",
    )  # fmt: skip
    return Study.open(spec, url, allocator, facts), allocator.space


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
    following = Process(
        target=follow, args=(address, args.streams), daemon=True
    )  # of its own: it keeps this one waiting
    following.start()
    async with httpx2.AsyncClient(base_url=address, timeout=60, limits=httpx2.Limits(max_connections=None)) as client:
        while (
            args.streams and f"rank_search_event_streams {args.streams}.0" not in (await client.get("/v1/metrics")).text
        ):
            await asyncio.sleep(0.5)
        front = (await client.get(f"/v1/studies/{NAME}/front")).json()
        milliseconds: list[float] = []
        end = time.monotonic() + args.seconds
        readers = [asyncio.create_task(_read(client, milliseconds, end, args.pause)) for _ in range(args.readers)]
        await asyncio.sleep(args.seconds / 10)
        early = _memory(pid)
        await asyncio.gather(*readers)
        late = _memory(pid)
    following.terminate()
    quantiles = statistics.quantiles(milliseconds, n=100)
    return {
        "trials": args.trials, "points": len(front["points"]), "readers": args.readers, "streams": args.streams,
        "seconds": args.seconds, "pause": args.pause, "answers": len(milliseconds),
        "median_ms": round(statistics.median(milliseconds), 1), "p99_ms": round(quantiles[98], 1),
        "most_ms": round(max(milliseconds), 1), "memory_early_mb": round(early / 2**20),
        "memory_late_mb": round(late / 2**20), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def follow(address: str, streams: int) -> None:
    """Read so many event streams, for ever."""

    async def all_of_them() -> None:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=address, limits=limits) as client:
            await asyncio.gather(*(_follow(client) for _ in range(streams)))

    asyncio.run(all_of_them())


async def _read(client: httpx2.AsyncClient, milliseconds: list[float], end: float, pause: float) -> None:
    while time.monotonic() < end:
        started = time.perf_counter()
        answer = await client.get(f"/v1/studies/{NAME}/front")
        assert answer.status_code == 200
        milliseconds.append(1e3 * (time.perf_counter() - started))
        await asyncio.sleep(pause)


async def _open_streams(client: httpx2.AsyncClient) -> int:
    figures = (await client.get("/v1/metrics")).text.splitlines()
    return int(float(next(line.split()[1] for line in figures if line.startswith("rank_search_event_streams "))))


async def _follow(client: httpx2.AsyncClient) -> None:
    async with client.stream("GET", f"/v1/studies/{NAME}/events", timeout=None) as answer:
        async for _ in answer.aiter_bytes():
            pass


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
    main()
