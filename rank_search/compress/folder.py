"""The folder of a checkpoint before anything is written. Pure: the CLI asks before it loads torch."""

from __future__ import annotations

from pathlib import Path

from rank_search.errors import CheckpointError


def check_free(out: Path) -> None:
    """Refuse a folder that something stands in already.

    Raises:
        CheckpointError: it exists and is not an empty folder, or a file stands where one of its folders would.
    """
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise CheckpointError(f"{out} cannot be made: {nearest} is a file; choose another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another folder or remove it")
