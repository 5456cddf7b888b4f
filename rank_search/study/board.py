"""What optuna-dashboard shows of a study beside its trials: notes, figures, and the names of artifacts.

All of it lies in the attributes of Optuna's study, in the form that optuna-dashboard reads. It is written by SQL, not
through Optuna: in one transaction, so that no reader meets half a figure, and only where it has changed. No Optuna.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, DateTime, Engine, bindparam, column, delete, func, insert, select, table, update

from rank_search.errors import StorageError
from rank_search.study.engine import READ_ONLY, shown, translated
from rank_search.study.tables import BoardRow, StudyRow

HAND_WRITTEN = "*The text above is rank-search's and is written anew as the search goes; what you write below stays.*"
"""The line of a note under which people write."""

CLAIM_SECONDS = 60.0
"""After so long a worker that has claimed the board counts as gone."""

_CHUNK = 15_000
"""Characters of a text in one attribute: with every one escaped still below the 64 KiB that MySQL's TEXT holds."""
_NOTE, _PLOT, _ARTIFACT = "dashboard:", "dashboard:plot_data:", "dashboard:artifacts:"
_TRIAL_NOTE = re.compile(r"dashboard:(\d+):note_(?:ver|str:\d+)")

_STUDIES = table("studies", column("study_id"), column("study_name"))
_TRIALS = table("trials", column("trial_id"), column("study_id"), column("number"))
_ATTRIBUTES = table("study_system_attributes", column("study_id"), column("key"), column("value_json"))


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that is offered beside a trial; ``id`` are hexadecimal digits and hyphens."""

    id: str
    filename: str
    mimetype: str


@dataclass(frozen=True, slots=True)
class Board:
    """What is shown.

    Attributes:
        note: of the study, in Markdown.
        trial_notes: trial → its note.
        figures: id → Plotly's JSON of a figure. Figures of other ids are left alone.
        artifacts: trial → its files.
    """

    note: str
    trial_notes: Mapping[int, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[int, tuple[Artifact, ...]] = field(default_factory=dict)


def optuna_id(engine: Engine, name: str) -> int:
    """The id of Optuna's study, which addresses of the dashboard's pages hold.

    Raises:
        StorageError: the database cannot be reached, or holds no Optuna study of this name.
    """
    return _present(find_optuna_id(engine, name), name, engine)


def find_optuna_id(engine: Engine, name: str) -> int | None:
    """As :func:`optuna_id`; None of a study that is being made, whose own row comes first.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        return _find_id(connection, name)


def study_of(engine: Engine, study_id: int) -> str | None:
    """The name of the study that has an id in Optuna; inverse of :func:`optuna_id`.

    Raises:
        StorageError: the database cannot be reached.
    """
    query = select(_STUDIES.c.study_name).where(_STUDIES.c.study_id == study_id)
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        return connection.scalar(query)


def write_board(engine: Engine, name: str, board: Board) -> int:
    """Show a board, in place of the last one; what people wrote under :data:`HAND_WRITTEN` stays.

    Returns:
        How many attributes have changed.

    Raises:
        StorageError: the database cannot be reached, or holds no Optuna study of this name.
    """
    with translated(engine.url), engine.begin() as connection:
        study = _study_id(connection, name, engine)
        trial_ids = _trial_ids(connection, study, {*board.trial_notes, *board.artifacts})
        stored = _stored(connection, study)
        wanted = dict(_wanted(board, trial_ids, stored))
        gone = [key for key in stored if _is_ours(key, board, stored) and key not in wanted]
        new = {key: value for key, value in wanted.items() if key not in stored}
        changed = {key: value for key, value in wanted.items() if key in stored and stored[key] != value}
        this = _ATTRIBUTES.c.study_id == study
        for key in gone:
            connection.execute(delete(_ATTRIBUTES).where(this, _ATTRIBUTES.c.key == key))
        if changed:
            at_key = update(_ATTRIBUTES).where(this, _ATTRIBUTES.c.key == bindparam("at"))
            replaced = [{"at": key, "to": json.dumps(value)} for key, value in changed.items()]
            connection.execute(at_key.values(value_json=bindparam("to")), replaced)
        if new:
            rows = [{"study_id": study, "key": key, "value_json": json.dumps(value)} for key, value in new.items()]
            connection.execute(insert(_ATTRIBUTES), rows)
    return len(gone) + len(changed) + len(new)


def stored_figure(engine: Engine, name: str, figure: str) -> str | None:
    """The JSON of a figure as it is shown now, None where there is none.

    Raises:
        StorageError: the database cannot be reached, or holds no Optuna study of this name.
    """
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        stored = _stored(connection, _study_id(connection, name, engine))
    return _joined(stored, f"{_PLOT}{figure}:") or None


def claim_board(engine: Engine, name: str, worker: str) -> bool:
    """Whether a worker may write the board now: no other one is at it, and the pause since the last time is over.

    By the database's clock, for those of workers may differ.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), engine.begin() as connection:
        study = connection.scalar(select(StudyRow.id).where(StudyRow.name == name).with_for_update())
        now = _now(connection)
        free = connection.scalar(select(BoardRow.free).where(BoardRow.study_id == study))
        if study is None or (free is not None and free > now):
            return False
        _set_free(connection, study, worker, now + timedelta(seconds=CLAIM_SECONDS), is_new=free is None)
        return True


def release_board(engine: Engine, name: str, worker: str, pause: float) -> None:
    """Let the next worker write the board after ``pause`` seconds.

    Raises:
        StorageError: the database cannot be reached.
    """
    with translated(engine.url), engine.begin() as connection:
        study = connection.scalar(select(StudyRow.id).where(StudyRow.name == name))
        if study is not None:
            _set_free(connection, study, worker, _now(connection) + timedelta(seconds=pause), is_new=False)


def _now(connection: Connection) -> datetime:
    now: datetime | None = connection.scalar(select(func.current_timestamp(type_=DateTime)))
    assert now is not None
    return now.replace(tzinfo=None)


def _set_free(connection: Connection, study: int, worker: str, free: datetime, *, is_new: bool) -> None:
    if is_new:
        connection.execute(insert(BoardRow).values(study_id=study, worker=worker, free=free))
    else:
        connection.execute(update(BoardRow).where(BoardRow.study_id == study).values(worker=worker, free=free))


def _study_id(connection: Connection, name: str, engine: Engine) -> int:
    return _present(_find_id(connection, name), name, engine)


def _find_id(connection: Connection, name: str) -> int | None:
    return connection.scalar(select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name))


def _present(found: int | None, name: str, engine: Engine) -> int:
    if found is None:
        raise StorageError(f"database {shown(engine.url)} has no Optuna study {name!r}; restore the database")
    return int(found)


def _trial_ids(connection: Connection, study: int, numbers: set[int]) -> dict[int, int]:
    query = select(_TRIALS.c.number, _TRIALS.c.trial_id).where(
        _TRIALS.c.study_id == study, _TRIALS.c.number.in_(numbers)
    )
    return {number: trial for number, trial in connection.execute(query)}


def _stored(connection: Connection, study: int) -> dict[str, Any]:
    query = select(_ATTRIBUTES.c.key, _ATTRIBUTES.c.value_json).where(
        _ATTRIBUTES.c.study_id == study, _ATTRIBUTES.c.key.like("dashboard:%")
    )
    return {key: json.loads(value) for key, value in connection.execute(query)}


def _wanted(board: Board, trial_ids: Mapping[int, int], stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key and value of every attribute."""
    yield from _note(_NOTE, board.note, stored)
    for number, note in board.trial_notes.items():
        yield from _note(f"{_NOTE}{trial_ids[number]}:", note, stored)
    for figure, text in board.figures.items():
        yield from _chunks(f"{_PLOT}{figure}:", text)
    for number, files in board.artifacts.items():
        for file in files:
            told = {"artifact_id": file.id, "filename": file.filename, "mimetype": file.mimetype, "encoding": None}
            yield f"{_ARTIFACT}{trial_ids[number]}:{file.id}", json.dumps(told)


def _note(prefix: str, text: str, stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A note with what people wrote under it. Its version rises with every change: editors of an old one are told."""
    before = _joined(stored, f"{prefix}note_str:")
    head, line, tail = before.partition(HAND_WRITTEN)
    kept = tail if line else f"\n\n{head}" if head.strip() else ""
    after = f"{text.rstrip()}\n\n---\n\n{HAND_WRITTEN}{kept}"
    version = int(stored.get(f"{prefix}note_ver", 0))
    yield f"{prefix}note_ver", version if after == before else version + 1
    yield from _chunks(f"{prefix}note_str:", after)


def _chunks(prefix: str, text: str) -> Iterator[tuple[str, str]]:
    for index, start in enumerate(range(0, len(text), _CHUNK)):
        yield f"{prefix}{index}", text[start : start + _CHUNK]


def _joined(stored: Mapping[str, Any], prefix: str) -> str:
    parts = {int(key[len(prefix) :]): value for key, value in stored.items() if key.startswith(prefix)}
    return "".join(parts[index] for index in sorted(parts))


def _is_ours(key: str, board: Board, stored: Mapping[str, Any]) -> bool:
    """Whether an attribute that is not wanted any more may go: a chunk too many, or of a trial off the front."""
    if key.startswith(_PLOT):
        return key[len(_PLOT) :].rpartition(":")[0] in board.figures
    if key.startswith(_ARTIFACT):
        return True
    if key.startswith(f"{_NOTE}note_str:"):
        return True
    trial = _TRIAL_NOTE.fullmatch(key)
    if trial is None:
        return False
    _, line, tail = _joined(stored, f"{_NOTE}{trial[1]}:note_str:").partition(HAND_WRITTEN)
    return bool(line) and not tail.strip()
