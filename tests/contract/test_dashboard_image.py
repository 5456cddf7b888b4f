"""What the dashboard's image runs, run outside of an engine: its program over a real server, and its health check."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.contract.conftest import Postgres
from tests.contract.synthetic import open_study, run_trials
from tests.waiting import until

DOCKER = Path(__file__).parents[2] / "docker"


def commands() -> tuple[list[str], list[str]]:
    """Of the entry point and of the health check, for this Python and this checkout."""
    stage = (DOCKER / "Dockerfile").read_text(encoding="utf-8").partition(" AS dashboard\n")[2].partition("\nFROM ")[0]
    health, entry = (json.loads(found) for found in re.findall(r"^(?:    CMD|ENTRYPOINT) (\[.*\])$", stage, re.M))
    return tuple([sys.executable, command[1].replace("/app", str(DOCKER)), *command[2:]] for command in (entry, health))  # type: ignore[return-value]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_the_dashboard_shows_a_study_and_its_health_is_asked(postgres: Postgres, tmp_path: Path) -> None:
    entry, health = commands()
    with postgres.database(with_schema=True) as storage:
        study = open_study(storage, ladder=[0.5])
        run_trials(study, 2)
        study.close()
        secret = tmp_path / "database_url"
        secret.write_text(f"{storage.replace('postgresql+psycopg://', 'postgresql://')}\n", encoding="utf-8")
        port = free_port()
        environment = {
            **os.environ, "RANK_SEARCH_STORAGE_FILE": str(secret), "HOST": "127.0.0.1", "PORT": f"{port}",
        }  # fmt: skip

        def is_well() -> bool:
            asked = subprocess.run(health, env=environment, capture_output=True, timeout=10, check=False)
            return asked.returncode == 0

        assert not is_well()  # nobody listens
        dashboard = subprocess.Popen(entry, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(is_well)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=10) as answer:
                shown = json.load(answer)["study_summaries"]
        finally:
            dashboard.kill()
            dashboard.wait()
        assert [study["study_name"] for study in shown] == ["tiny"]
        assert not is_well()
