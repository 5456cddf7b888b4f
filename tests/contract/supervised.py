"""A launch of stand-in workers, to be run as a process that is killed. No torch once its factor bank is there."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rank_search.launch import exits, restarts, supervisor
from rank_search.study.engine import make_engine
from rank_search.study.records import FINISHED
from rank_search.study.schema import ensure_schema
from rank_search.study.store import StudyStore
from tests.contract.test_launch import Launch


def launched(storage: str, folder: Path, more: int) -> None:
    """Make the tables, then launch workers for ``more`` trials, and make a bank meanwhile, as one of them would."""
    supervisor.LOOK_SECONDS, supervisor.TICK_SECONDS = 0.1, 0.05
    restarts.FIRST_DELAY, restarts.LONGEST_DELAY = 0.1, 0.5
    restarts.MOST_IN_A_ROW = 1000  # it is not the workers' fault
    engine = make_engine(storage)
    ensure_schema(engine)
    engine.dispose()
    bank = threading.Thread(target=_make_bank, args=(folder,), daemon=True)
    bank.start()
    with StudyStore(storage) as store:
        trials = store.trials("tiny") if "tiny" in store.studies() else []
    wanted = more + sum(trial.state in FINISHED for trial in trials)
    code = Launch(storage, folder, workers=2, trials=wanted, seconds=0.1).run()
    if code == exits.DONE:  # else it is left half-made, as by a worker that is stopped
        bank.join()
    sys.exit(code)


def _make_bank(folder: Path) -> None:
    if list((folder / "banks").glob("*.safetensors")):
        return
    from rank_search.factors.bank import Piece, open_or_build, pieces_of
    from tests.unit.test_bank import KEY
    from tests.unit.test_bank import _factors as make_factors

    def slowly() -> Iterator[Piece]:
        for piece in pieces_of(make_factors()):
            time.sleep(0.2)
            yield piece

    open_or_build(folder, KEY, slowly, {})
