"""The images and the compose file: linted, against their schema, and what pip installs in them outside of an engine.

Not run are the steps that need a root file system of their own: apt-get, useradd, install, python3 -m venv.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
SCHEMA = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text(encoding="utf-8"))


def instructions(stage: str) -> Iterator[tuple[str, str]]:
    """Name and arguments of a stage's instructions."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    current = ""
    for line in filter(None, map(str.strip, lines.splitlines())):
        name, arguments = line.split(maxsplit=1)
        if name == "FROM":
            current = arguments.split()[-1]
        if current == stage:
            yield name, " ".join(arguments.split())


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_keeps_to_the_specification() -> None:
    schema = jsonschema.Draft201909Validator(SCHEMA)
    schema.validate(compose())
    broken = compose()
    broken["services"]["workers"]["volume"] = []
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(broken)


def test_bases_are_pinned_to_a_patch_version() -> None:
    images = [service["image"] for service in compose()["services"].values() if "build" not in service]
    images += re.findall(r"^ARG \w+=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(r"[\w./]+:\d+\.\d+[\w.-]+", image), image


def test_nothing_runs_as_root_and_all_that_stays_is_watched() -> None:
    for stage in ("worker", "dashboard"):
        found = dict(instructions(stage))
        assert found["USER"] == "10001:10001"
        assert "HEALTHCHECK" in found
    for name, service in compose()["services"].items():
        assert service["cap_drop"] == ["ALL"]
        assert "build" in service or ("healthcheck" in service and service["user"] == "999:999"), name


def test_secrets_come_by_file() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    file = compose()
    assert not re.search(r"postgresql(\+psycopg)?://", text)
    assert {secret["file"] for secret in file["secrets"].values()} == {
        "./secrets/database_password", "./secrets/database_url",
    }  # fmt: skip
    for service in file["services"].values():
        assert set(service["secrets"]) <= set(file["secrets"])
        assert {"POSTGRES_PASSWORD_FILE", "RANK_SEARCH_STORAGE_FILE"} & set(service["environment"])
    assert "docker/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_what_is_copied_passes_the_ignore_file() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    for stage in ("worker", "dashboard"):
        for name, arguments in instructions(stage):
            if name == "COPY":
                for source in arguments.split()[:-1]:
                    assert source in kept
                    assert (ROOT / source).exists()


def test_dashboard_and_package_take_the_same_versions() -> None:
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")[1:-1])
    dashboard = (DOCKER / "dashboard-requirements.txt").read_text(encoding="utf-8").split()
    found = dict(line.replace("[binary]", "").split("==") for line in dashboard)
    assert (found["optuna"], found["psycopg"]) == (pins["optuna"], pins["psycopg"])


@pytest.mark.slow
def test_pip_finds_what_the_images_install_complete_and_the_same_as_the_tests_run_with() -> None:
    """Without an index only what is installed here satisfies a pin, and what a pinned package needs in turn."""
    files = []
    for stage in ("worker", "dashboard"):
        runs = " ".join(arguments for name, arguments in instructions(stage) if name == "RUN")
        (file,) = re.findall(r"pip install --no-cache-dir -r (\S+)", runs)
        files.append(DOCKER / Path(file).name if stage == "dashboard" else ROOT / file)
    options = [option for file in files for option in ("-r", str(file))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_worker_image_builds_outside_of_an_engine(tmp_path: Path) -> None:
    """What the image copies is all that its package needs: installed by the same line, it runs from elsewhere."""
    app, target = tmp_path / "app", tmp_path / "installed"
    app.mkdir()
    installs = []
    for name, arguments in instructions("worker"):
        if name == "COPY":
            for source in arguments.split()[:-1]:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, app / source)
        elif name == "RUN" and " pip install " in arguments:
            installs.append(arguments)
    requirements, package = installs
    assert requirements == "python -m pip install --no-cache-dir -r requirements.txt"
    options = shlex.split(package.removeprefix("python -m pip install"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), *options]
    subprocess.run(command, cwd=app, check=True, capture_output=True, text=True)
    entry = next(json.loads(arguments) for name, arguments in instructions("worker") if name == "ENTRYPOINT")
    health = dict(instructions("worker"))["HEALTHCHECK"].partition("CMD ")[2]
    assert entry == ["rank-search"]
    code = f"import sys; sys.argv = {json.loads(health)}\nfrom rank_search.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert told.stdout.startswith("rank-search ")
    for needed in ("py.typed", "compress/modeling_low_rank.py.tmpl", "study/migrations/env.py"):
        assert (target / "rank_search" / needed).is_file()


def test_services_start_what_the_command_line_knows() -> None:
    from rank_search.cli import run_command

    for service in ("tables", "workers"):
        command = [re.sub(r"\$\{.*?\}", "x", word) for word in compose()["services"][service]["command"]]
        assert run_command([*command, "--help"]) == 0
