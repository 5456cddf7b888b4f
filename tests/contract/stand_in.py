"""A stand-in worker: the study over the made-up model, a pause for each trial, and whatever ill it is told to do.

python -m tests.contract.stand_in TRIALS SECONDS [ILL]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from rank_search.api import STORAGE_VARIABLE
from rank_search.errors import LeaseLostError
from rank_search.launch import exits
from rank_search.launch.stopping import Stopping, end_with_supervisor
from rank_search.progress import Preempted
from rank_search.study.patience import Patience
from tests.contract.synthetic import make_allocator, measure, open_study
from tests.waiting import until


def main(trials: int, seconds: float, ill: str = "") -> int:
    """Measure until the study has ``trials`` finished ones."""
    if ill == "misconfigured":
        print("study file x.toml: no such file")
        return exits.CONFIGURATION
    if ill == "dies at start":
        print("some library\nlibcuda.so.1: cannot open shared object file")
        return 1
    if ill == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_supervisor()
    spool = os.environ.get("RANK_SEARCH_TEST_SPOOL")
    larger = int(os.environ.get("RANK_SEARCH_TEST_LARGER", "1"))  # with as many more rank maps
    groups = (("attn", 12 * larger, 12 * larger), ("mlp", 12 * larger, 20 * larger))
    allocator = make_allocator(groups=groups, slower=larger)
    study = open_study(
        os.environ[STORAGE_VARIABLE], ladder=[0.5], lease=float(os.environ.get("RANK_SEARCH_TEST_LEASE", "120")),
        spool=Path(spool) if spool else None, patience=Patience(60.0, print),
        allocator=allocator,
    )  # fmt: skip
    with Stopping(grace=float(os.environ.get("RANK_SEARCH_TEST_GRACE", "10"))) as stopping:
        if ill == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while study.finished() < trials:
            proposal = study.ask()
            stopping.measuring()
            try:
                if ill.startswith("killed once") and not (marker := Path(ill.split(":", 1)[1])).exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if ill.startswith("in pairs"):
                    _wait_for_another(Path(ill.split(":", 1)[1]))
                time.sleep(seconds)
            except BaseException:
                study.requeue(proposal)
                raise
            try:
                study.tell(proposal, measure(proposal.rank_map, allocator=allocator))
            except LeaseLostError as error:
                print(f"going on: {error}")
            stopping.after_trial()
    study.close()
    return exits.DONE


def _wait_for_another(folder: Path) -> None:
    """Until another worker has a trial, too: however late it started, it shares the study."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    until(lambda: len(list(folder.iterdir())) > 1)


if __name__ == "__main__":
    try:
        sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
    except Preempted:
        sys.exit(exits.PREEMPTED)
