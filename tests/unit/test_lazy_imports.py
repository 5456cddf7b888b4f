"""What must start fast loads no framework: the package, the help, the study layer, rank map files and pictures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FRAMEWORKS = {"torch", "transformers", "optuna", "datasets", "sqlalchemy", "matplotlib"}
COMMANDS = (
    "run", "launch", "worker", "prepare", "allocate", "front", "status", "export", "apply", "evaluate", "layers",
    "db upgrade", "db check", "db export", "db import",
    "serve", "jobs", "pause", "resume", "stop", "token create", "token list", "token revoke",
)  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """The top-level modules in memory after ``code`` in a fresh interpreter."""
    report = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_loads_no_framework() -> None:
    assert not loaded_by("import rank_search") & FRAMEWORKS


def test_help_loads_no_framework() -> None:
    calls = [["--help"], ["--version"], *([*command.split(), "--help"] for command in COMMANDS)]
    code = f"from rank_search.cli import run_command\nfor call in {calls}: assert run_command(call) == 0"
    assert not loaded_by(code) & FRAMEWORKS


@pytest.mark.parametrize("package", ["study", "export"])
def test_no_module_of_a_layer_without_torch_loads_it(package: str) -> None:
    code = (
        f"import importlib, pkgutil\npackage = importlib.import_module('rank_search.{package}')\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    if not module.name.endswith('.env'):  # Alembic's own entry runs under Alembic only\n"
        "        importlib.import_module(module.name)"
    )
    assert not loaded_by(code) & {"torch", "transformers", "datasets"}
