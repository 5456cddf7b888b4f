"""The fleet of the service: what it does when the engine or the database is away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rank_search.errors import InputError, StorageError
from rank_search.launch.fleet import Crew, ServiceFleet


@pytest.mark.parametrize("trouble", [StorageError("connection refused"), InputError("kubectl did not answer")])
def test_the_fleet_outlives_troubles_of_the_database_and_of_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: InputError
) -> None:
    ticks: list[float] = []

    def tick(_fleet: ServiceFleet) -> None:
        ticks.append(time.monotonic())
        if len(ticks) < 3:
            raise trouble

    monkeypatch.setattr("rank_search.launch.fleet.TICK_SECONDS", 0.01)
    monkeypatch.setattr(ServiceFleet, "_tick", tick)
    fleet = ServiceFleet(f"sqlite:///{tmp_path}/study.db", tmp_path, Crew())
    fleet.start()
    deadline = time.monotonic() + 5
    while len(ticks) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    fleet.stop()
    assert len(ticks) >= 5
    assert capsys.readouterr().err == f"rank-search: {trouble}\n"  # told once
