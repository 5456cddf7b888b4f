"""Many workers at one study for as long as it is asked for: nothing lost, nothing doubled, and how fast that goes.

``RANK_SEARCH_TEST_SOAK`` is the number of trials, 100 by default; the figures of docs/reliability.md are those of 2000.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rank_search.launch import exits
from rank_search.study.consistency import check_database
from rank_search.study.records import State
from rank_search.study.store import StudyStore

ROOT = Path(__file__).parents[2]
TRIALS = int(os.environ.get("RANK_SEARCH_TEST_SOAK", "100"))
SECONDS = 0.05
"""Of a trial."""
LARGER = "40"
"""Sides of the made-up model's layers: so large that hardly two proposals are one rank map."""
IS_LONG = TRIALS >= 1000
LEAST_RATE = 25.0
"""Trials a second on 2 cores that the database is on, too; a short run is over before a rate says anything."""
WORKERS = {"postgresql": 16 if IS_LONG else 6, "sqlite": 4 if IS_LONG else 3}
"""As many as the figures are of; in a short run they would do little but start."""


@pytest.fixture(params=list(WORKERS))
def backend(request: pytest.FixtureRequest) -> str:
    """The two that the project is run with."""
    return str(request.param)


def test_many_workers_lose_and_double_nothing(backend: str, storage: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RANK_SEARCH_STORAGE": storage,
        "RANK_SEARCH_TEST_LARGER": LARGER,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.contract.stand_in", str(TRIALS), str(SECONDS)]
    logs = [(tmp_path / f"{number}.log").open("w") for number in range(WORKERS[backend])]
    started = time.monotonic()
    workers = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) for log in logs]
    try:
        codes = [worker.wait(timeout=60 + TRIALS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for log in logs:
            log.close()
    wall = time.monotonic() - started
    assert codes == [exits.DONE] * len(workers)
    assert {path.read_text() for path in tmp_path.glob("*.log")} == {""}  # nobody had to wait or to give up anything
    with StudyStore(storage) as store:
        trials = store.trials("tiny")
        assert store.front("tiny") == store.recompute_front("tiny")
    states = Counter(trial.state for trial in trials)
    assert set(states) <= {State.COMPLETE, State.SKIPPED}
    # Workers look whether there are enough before they begin one.
    assert TRIALS <= states[State.COMPLETE] < TRIALS + len(workers)
    measured = [trial for trial in trials if trial.state is State.COMPLETE]
    assert len({trial.rank_map.digest for trial in measured}) == len(measured)
    assert {source: n for source, n in Counter(t.source for t in measured).items() if source.endswith("0.5")} == {
        "closed form 0.5": 1, "uniform 0.5": 1,
    }  # fmt: skip
    assert check_database(storage) == ()
    rate = pace(trials)
    assert rate >= LEAST_RATE or not IS_LONG
    print(f"\n{backend}, {len(workers)} workers, {len(measured)} trials of {SECONDS * 1000:.0f} ms: {rate:.1f} a second"
          f" from the first to the last, {states[State.SKIPPED]} skipped, {wall:.0f} s with the starts")  # fmt: skip


def pace(trials: list[object]) -> float:
    """Trials a second, from the time on at which every worker had begun one."""
    began: dict[str, float] = {}
    for trial in trials:
        began.setdefault(trial.worker, trial.started.timestamp())  # type: ignore[attr-defined]
    everybody = max(began.values())
    ends = sorted(t.finished.timestamp() for t in trials if t.state is State.COMPLETE)  # type: ignore[attr-defined]
    later = [end for end in ends if end > everybody]
    return len(later) / (later[-1] - everybody) if later else len(ends) / (ends[-1] - min(began.values()))
