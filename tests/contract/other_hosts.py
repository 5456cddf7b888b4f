"""Workers of other hosts: studies that are opened under another host's name, silenced by stopping their thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import update

from rank_search.study.clock import database_now
from rank_search.study.engine import make_engine
from rank_search.study.records import State
from rank_search.study.store import StudyStore
from rank_search.study.study import Study
from rank_search.study.tables import LeaseRow


@contextmanager
def elsewhere(host: str = "elsewhere") -> Iterator[None]:
    """Studies that are opened inside are those of a worker of another host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rank_search.study.liveness.socket.gethostname", lambda: host)
        yield


def silence(study: Study) -> None:
    """Let a worker give no sign of life any more."""
    study._heartbeat.stop()


def let_leases_run_out(storage: str, seconds: float = 1.0) -> None:
    """As if nobody had renewed any for long."""
    engine = make_engine(storage)
    with engine.begin() as connection:
        past = database_now(connection) - timedelta(seconds=seconds)
        connection.execute(update(LeaseRow).values(renewed=past - timedelta(seconds=1), expires=past))
    engine.dispose()


def states(storage: str) -> list[State]:
    with StudyStore(storage) as store:
        return [trial.state for trial in store.trials("tiny")]
