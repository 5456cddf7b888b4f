"""Tiny models and studies for all tests, and the checks that run while they run.

Shapes in the annotations of the numerical packages are checked in every call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

_CHECKED = ["rank_search.factors", "rank_search.compress", "rank_search.train", "rank_search.score"]
# Before anything imports these packages: the hook acts on imports.
install_import_hook(_CHECKED, "beartype.beartype")

# The same examples every time, however busy the machine is.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

StudyFactory = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_frugal() -> None:
    """One thread, for workers of the test run share the cores; no progress bars of libraries."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family → folder of a saved model with its tokenizer, each made once."""
    from tests.data import models

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = models.save(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(model_folders: Callable[[str], Path]) -> Path:
    """A saved Llama of two blocks with random weights."""
    return model_folders("llama")


@pytest.fixture(scope="session")
def write_study(model_folders: Callable[[str], Path]) -> StudyFactory:
    """Writes a study of seconds into a folder and returns its file; keyword arguments change whole tables' keys."""
    from tests.data.models import text

    def write(folder: Path, family: str = "llama", **tables: dict[str, Any]) -> Path:
        (folder / "text.txt").write_text(text(20_000), encoding="utf-8")
        study: dict[str, dict[str, Any]] = {
            "model": {"source": str(model_folders(family))},
            "targets": {},
            "data": {
                "train": "text.txt", "sequence_length": 32, "calibration_blocks": 8, "train_blocks": 24,
                "validation_blocks": 8,
            },
            "factors": {},
            "finetune": {"steps": 2, "batch_blocks": 4},
            "search": {"trials": 4, "ladder": [0.8, 0.5]},
            "run": {"device": "cpu", "threads": 1},
            "validation": {},
        }  # fmt: skip
        for name, keys in tables.items():
            study[name] |= keys
        lines = ['name = "tiny"']
        for name, keys in study.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        path = folder / "study.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny_study(tmp_path: Path, write_study: StudyFactory) -> StudyFactory:
    """As ``write_study``, in a folder of the test's own."""
    return lambda family="llama", **tables: write_study(tmp_path, family, **tables)
