"""Every command and every piece of Python in the README runs, in its order, as a reader would type it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rank_search.spec import parse_study

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in _blocks("sh") for line in block.splitlines() if line.startswith("rank-search ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart study as the repository has it, smaller: fewer trials, steps and blocks."""
    folder = tmp_path_factory.mktemp("readme")
    target = folder / "studies" / "quickstart"
    shutil.copytree(ROOT / "studies" / "quickstart" / "model", target / "model")
    study = (ROOT / "studies" / "quickstart" / "study.toml").read_text(encoding="utf-8")
    shorter = {"trials": "9", "steps": "1", "calibration_blocks": "16\nvalidation_blocks = 16"}
    for key, value in shorter.items():
        study, count = re.subn(rf"^{key} = \d+", f"{key} = {value}", study, flags=re.MULTILINE)
        assert count == 1
    (target / "study.toml").write_text(study, encoding="utf-8")
    return folder


def _run(arguments: list[str], folder: Path, given: str = "") -> str:
    result = subprocess.run(arguments, cwd=folder, input=given, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


_IN_TURN = """
import json, sys
from rank_search.cli import run_command
for arguments in json.load(sys.stdin):
    if code := run_command(arguments):
        sys.exit(f"{code} of {arguments}")
"""
"""What the console script does, for one command line after another: torch takes seconds to import."""


def test_the_commands_run(folder: Path) -> None:
    assert len(COMMANDS) >= 8
    (program, *first), *others = [shlex.split(command) for command in COMMANDS]
    _run([str(Path(sys.executable).with_name(program)), *first], folder)
    _run([sys.executable, "-c", _IN_TURN], folder, json.dumps([arguments for _, *arguments in others]))
    assert (folder / "front.png").stat().st_size > 10_000
    assert (folder / "rank_map.json").is_file()
    assert (folder / "compressed" / "model.safetensors").is_file()


def test_the_python_examples_run_after_them(folder: Path) -> None:
    shutil.rmtree(folder / "compressed", ignore_errors=True)
    examples = _blocks("python")
    assert len(examples) == 2
    for example in examples:
        _run([sys.executable, "-c", example], folder)
    assert (folder / "compressed" / "config.json").is_file()


def test_make_has_the_targets_that_are_named() -> None:
    targets = [line.split()[1] for block in _blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["quickstart", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_study_file_is_one() -> None:
    import tomllib

    (example,) = _blocks("toml")
    assert parse_study(tomllib.loads(example), where="README").name == "my-study"


def test_the_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_query_is_enough_to_read_the_front(folder: Path) -> None:
    import sqlite3

    (query,) = re.findall(r"`(SELECT [^`]+)`", README)
    with sqlite3.connect(folder / "studies" / "quickstart" / "quickstart.db") as connection:
        assert len(connection.execute(query).fetchall()) >= 3
