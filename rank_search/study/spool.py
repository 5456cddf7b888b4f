"""Results that the database could not take, kept in files until it can. No Optuna."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rank_search.atomic import write_atomically
from rank_search.errors import RankSearchError, one_line
from rank_search.measurement import Fidelity, Measurement

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Spooled:
    """The result of a trial.

    Attributes:
        number: of the trial.
        worker: who measured it; with the number this tells whether a database holds the trial.
        rank_map_digest: of what was measured.
        rung: the highest, on which it was measured.
        measurement: what was measured.
    """

    number: int
    worker: str
    rank_map_digest: str
    rung: int
    measurement: Measurement


class Spool:
    """A folder of results of one study, any number of workers at it.

    Args:
        folder: made when the first result comes.
        study: its name.
    """

    def __init__(self, folder: Path, study: str) -> None:
        self._folder = folder
        self._study = study

    def keep(self, result: Spooled) -> Path:
        """Write a result to disk, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # Names of hosts hold neither colons nor slashes; a worker's result of a trial has one name.
        path = self._folder / f"{self._study}.{result.number}.{result.worker.replace(':', '_')}.json"
        write_atomically(path, json.dumps({"version": _VERSION, "study": self._study, **_plain(result)}).encode())
        _sync(self._folder)
        return path

    def results(self, on_damaged: Callable[[Path, str], object]) -> Iterator[tuple[Path, Spooled]]:
        """All results, the lowest trial first.

        Args:
            on_damaged: takes a file that is none, or of another version, and why with the way out; it is left alone.
        """
        found = []
        for path in self._folder.glob(f"{self._study}.*.json") if self._folder.is_dir() else ():
            try:
                result = _read(path, self._study)
            except FileNotFoundError:
                continue  # another worker has stored it since
            except _DamagedError as error:
                on_damaged(path, str(error))
                continue
            if result is not None:
                found.append((path, result))
        yield from sorted(found, key=lambda pair: pair[1].number)


def _plain(result: Spooled) -> dict[str, Any]:
    measured = {field.name: getattr(result.measurement, field.name) for field in fields(Measurement)}
    measured |= {"fidelity": result.measurement.fidelity.label, "metrics": dict(result.measurement.metrics)}
    told = {field.name: getattr(result, field.name) for field in fields(Spooled)}
    return {**told, "measurement": measured}


class _DamagedError(Exception):
    """A file that holds no result; says why, and the way out."""


def _read(path: Path, study: str) -> Spooled | None:
    """The result that a file holds; None where it is another study's whose name begins alike.

    Raises:
        FileNotFoundError: it is not there any more.
        _DamagedError: it holds none, or cannot be read.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _DamagedError(f"it cannot be read ({error.strerror or error}); make it readable") from None
    except ValueError:
        raise _DamagedError("it is no JSON; delete it") from None
    try:
        if told.pop("study") != study:
            return None
        if (version := told.pop("version")) != _VERSION:
            raise _DamagedError(f"it is of version {version}, not {_VERSION}; use the rank-search that wrote it")
        measured = told.pop("measurement")
        for name, value in measured.items():
            if isinstance(value, list):
                measured[name] = tuple(value)
        measured["fidelity"] = Fidelity.from_label(measured["fidelity"])
        return Spooled(**told, measurement=Measurement(**measured))
    except (ValueError, KeyError, TypeError, AttributeError, RankSearchError) as error:
        raise _DamagedError(f"its fields are not those of one ({one_line(error)}); delete it") from None


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
