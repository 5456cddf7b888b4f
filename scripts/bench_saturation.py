"""Where a PostgreSQL server saturates: hundreds of simulated workers, whose trials take recorded times.

    python scripts/bench_saturation.py [--workers 16,64,128,256,512,1024] [--slots 16] [--seconds 20]
        [--times studies/smollm2-135m-wikitext2/bench_trial.json] [--json docs/saturation.json]

1024 Python processes do not fit on one machine, so each of a few, a slot, plays many workers. A slot is a real
open study with its connections, and has a share of the workers: a queue of what is due. A worker's trial is claimed,
proposed and begun, then the worker sleeps for a time drawn from the recorded ones, and then the trial is stored, told
to Optuna, and the next one begun; each worker looks for requests and counts trials in between and renews its leases
three times in their time, as the real one does. All calls are those of a real worker, on SmolLM2's 210 layers. What a
slot cannot do in time waits in its queue, and counts as latency, as the wait for a connection would.

At each number of workers, the load runs for a while before anything is counted. Told are:

- offered: workers over the mean time of a trial, what an infinitely fast database would see;
- trials a second, and the latencies of a claim (ask) and of a result (tell), from when the worker wanted it;
- `database_ms`: processor time of all of the server's processes for a trial, and `database_cores`, how many it keeps
  busy; `client_ms`, that of the simulated workers, which real ones have on hosts of their own;
- connections of the server, and how many real workers would hold.

Workers and database share this host's cores, so the script also tells what the server alone would reach: cores over
`database_ms`.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import numpy as np
import psutil
from _made_up import facts_of, made_up_allocator, made_up_measurement
from _postgres import postgres
from _run import run_script
from sqlalchemy import create_engine, text

from rank_search.allocation import Allocator
from rank_search.spec import StudySpec, parse_study
from rank_search.study.engine import parse_url
from rank_search.study.patience import Patience
from rank_search.study.study import Proposal, Study

LEASE = 120.0
RENEWALS = 3
CONNECTIONS_OF_A_WORKER = 2


@dataclass
class Slot:
    """A real study that plays some workers."""

    study: Study
    allocator: Allocator
    times: Sequence[float]
    random: np.random.Generator
    queue: list[tuple[float, int, Proposal | None]] = field(default_factory=list)
    asks: list[tuple[float, float]] = field(default_factory=list)
    tells: list[tuple[float, float]] = field(default_factory=list)
    renewals: int = 0

    def run(self, workers: int, stop: Event) -> None:
        """Play so many workers, whose first trials begin spread over the time of one."""
        ties = itertools.count()
        self.queue = [(time.time() + self.random.uniform(0, max(self.times)), next(ties), None) for _ in range(workers)]
        heapq.heapify(self.queue)
        renewed = time.time()
        while not stop.is_set():
            now = time.time()
            if workers and now - renewed > LEASE / RENEWALS / workers:
                renewed += LEASE / RENEWALS / workers
                self.study._leases.renew(self.study.name)
                self.renewals += 1
                continue
            due, _, proposal = self.queue[0] if self.queue else (now + 1, 0, None)
            if due > now:
                time.sleep(min(due - now, 0.05))
                continue
            heapq.heappop(self.queue)
            if proposal is not None:
                self.study.tell(proposal, made_up_measurement(self.allocator, proposal.rank_map, self.random))
                self.tells.append((time.time(), time.time() - due))
                self.study.effort(with_seconds=False)
                self.study.take_requests()
                due = time.time()
            proposal = self.study.ask()
            self.asks.append((time.time(), time.time() - due))
            seconds = float(self.random.choice(self.times))
            heapq.heappush(self.queue, (time.time() + seconds, next(ties), proposal))


def play(
    number: int, url: str, spec: StudySpec, workers: int, times: list[float], all_slots: Barrier, stop: Event, out: str
) -> None:
    """A process: one slot; writes what it has measured."""
    allocator = made_up_allocator(30)
    study = Study.open(spec, url, allocator, facts_of(allocator), patience=Patience(600, partial(print, flush=True)))
    slot = Slot(study, allocator, times, np.random.default_rng(number))
    all_slots.wait(120)
    slot.run(workers, stop)
    told = {"asks": slot.asks, "tells": slot.tells, "renewals": slot.renewals, "failed": study._patience.outages}
    Path(out).write_text(json.dumps(told), encoding="utf-8")
    all_slots.wait(120)  # else those who are still at work see a worker that died, and propose its trials again
    os._exit(0)  # what is running stays so; the next number of workers has a study of its own


def measure(
    url: str, data: Path | None, workers: int, args: argparse.Namespace, times: list[float]
) -> dict[str, object]:
    """One row."""
    search = {"space": "multipliers", "sampler": "fitted", "seed": 0}
    run = {"lease_seconds": LEASE}
    tables = {"name": f"saturation-{workers}", "model": {"source": "none"}, "search": search, "run": run}
    spec = parse_study(tables, where="bench")
    slots = min(args.slots, workers)
    shares = [workers // slots + (index < workers % slots) for index in range(slots)]
    context = multiprocessing.get_context("spawn")
    all_slots, stop = context.Barrier(slots + 1), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        outs = [f"{folder}/{number}.json" for number in range(slots)]
        processes = [
            context.Process(target=play, args=(number, url, spec, share, times, all_slots, stop, outs[number]))
            for number, share in enumerate(shares)
        ]
        for process in processes:
            process.start()
        all_slots.wait(120)
        time.sleep(args.warm_up + max(times))
        since, before = time.time(), _processor(data, processes)
        connections = _connections(url)
        time.sleep(args.seconds)
        until, after = time.time(), _processor(data, processes)
        stop.set()
        all_slots.wait(120)
        for process in processes:
            process.join(60)
        told = [json.loads(Path(out).read_text(encoding="utf-8")) for out in outs]
    asks, tells = (
        [seconds for one in told for at, seconds in one[kind] if since <= at < until] for kind in ("asks", "tells")
    )
    rate, span = len(tells) / (until - since), until - since
    database, client = (y - x for x, y in zip(before, after, strict=True))
    return {
        "workers": workers, "offered": round(workers / float(np.mean(times)), 1), "trials_a_second": round(rate, 1),
        "ask_ms_median": _ms(asks, 50), "ask_ms_95": _ms(asks, 95), "tell_ms_median": _ms(tells, 50),
        "tell_ms_95": _ms(tells, 95), "database_ms": round(1e3 * database / max(len(tells), 1), 1),
        "database_cores": round(database / span, 2), "client_ms": round(1e3 * client / max(len(tells), 1), 1),
        "connections": connections, "connections_of_real_workers": CONNECTIONS_OF_A_WORKER * workers,
        "errors": sum(one["failed"] for one in told), "load_before": round(os.getloadavg()[1], 1),
    }  # fmt: skip


def _ms(seconds: Sequence[float], percentile: int) -> float:
    return round(1e3 * float(np.percentile(seconds, percentile)), 1) if len(seconds) else float("nan")


def _processor(data: Path | None, clients: Sequence[multiprocessing.process.BaseProcess]) -> tuple[float, float]:
    """Processor seconds so far of the server's processes, those that have ended included, and of the clients."""

    def used(process: psutil.Process) -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    server = 0.0
    if data is not None:
        main = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
        ended = main.cpu_times()
        server = float(ended.children_user + ended.children_system) + used(main)
        server += sum(used(child) for child in main.children(recursive=True))
    return server, sum(used(psutil.Process(client.pid)) for client in clients)


def _connections(url: str) -> int:
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        count = connection.execute(text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"))
        found = int(count.scalar_one()) - 1
    engine.dispose()
    return found


def main() -> None:
    from _bench import print_table

    args = _arguments()
    recorded = json.loads(args.times.read_text(encoding="utf-8"))["rows"]
    times = [row["swap_seconds"] + row["finetune_seconds"] + row["score_seconds"] for row in recorded]
    with postgres() as (url, data):
        rows = [measure(url, data, workers, args, times) for workers in args.workers]
    print_table(rows)
    if args.json is not None:
        machine = {"cores": os.cpu_count(), "slots": args.slots}
        told = {"environment": machine, "recorded_seconds": [round(seconds, 2) for seconds in times], "rows": rows}
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parents[1]
    parser.add_argument(
        "--workers", type=lambda text: [int(n) for n in text.split(",")], default=[16, 64, 128, 256, 512, 1024]
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="counted at each number of workers")
    parser.add_argument("--warm-up", type=float, default=5.0, help="before them, beside the time of a trial")
    parser.add_argument("--times", type=Path, default=root / "studies/smollm2-135m-wikitext2/bench_trial.json")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
