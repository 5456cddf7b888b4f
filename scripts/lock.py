"""Pin the installed versions: requirements.txt for users, requirements-dev.txt for the tests as well.

    python scripts/lock.py

Takes the dependencies of pyproject.toml as they are installed in this environment, with all that they need.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
# Builds of torch differ by machine; what belongs to one build only is left to pip.
OF_THE_BUILD = re.compile(r"^(nvidia-|cuda-|triton$)")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    runtime = _closure([*project["dependencies"], *extras["postgresql"]])
    _write("requirements.txt", runtime)
    _write("requirements-dev.txt", _closure([*project["dependencies"], *extras["postgresql"], *extras["dev"]]))


def _closure(requirements: list[str]) -> dict[str, str]:
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed here; pip install -e '.[dev,postgresql]' first") from None
        if not OF_THE_BUILD.match(name):
            pins[name] = Version(found.version).public
        for wanted in ("", *sorted(requirement.extras)):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo.extend((Requirement(text), wanted) for text in found.requires or [])
    return pins


def _write(file: str, pins: dict[str, str]) -> None:
    lines = ["# Written by scripts/lock.py.", *(f"{name}=={version}" for name, version in sorted(pins.items()))]
    (ROOT / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
