"""Whether what a database holds fits together: front and trials, the project's tables and Optuna's. No Optuna."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, MetaData, Table, func, select
from sqlalchemy.engine import URL

from rank_search.errors import RankSearchError
from rank_search.front import Front
from rank_search.ranks import RankMap
from rank_search.study.records import MEASURED, State
from rank_search.study.rows import reflected, snapshot
from rank_search.study.store import StudyStore

PAUSE_SECONDS = 1.0
"""What is wrong for a moment, since a worker is in the middle of something, is right again by then."""

_ENDS = {
    State.COMPLETE: "COMPLETE", State.INFEASIBLE: "COMPLETE", State.PRUNED: "PRUNED", State.FAILED: "FAIL",
    State.REQUEUED: "FAIL",
}  # fmt: skip
"""How Optuna calls the ends of trials; of a skipped one as that of the trial that has its rank map."""

Rows = dict[int, dict[str, Any]]
"""Trials by their number."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in a database that contradicts something else in it; ``study`` is empty where it belongs to none."""

    study: str
    what: str

    def __str__(self) -> str:
        return f"study {self.study}: {self.what}" if self.study else self.what


def check_database(storage: str | URL) -> tuple[Fault, ...]:
    """Every fault of a database; nothing is written, and workers may go on.

    What workers leave undone when they die, such as a measurement that Optuna was not told of, is no fault: the study
    mends it when it is opened next.

    Raises:
        StorageError: the database cannot be reached, or is of another version.
    """
    with StudyStore(storage) as store:
        faults = list(_faults(store))
        if faults:
            time.sleep(PAUSE_SECONDS)
            again = set(_faults(store))
            faults = [fault for fault in faults if fault in again]
    return tuple(faults)


def _faults(store: StudyStore) -> Iterator[Fault]:
    with snapshot(store.engine) as connection:
        metadata = reflected(connection)
        yield from (Fault("", what) for what in _orphans(connection, metadata))
        names = store.studies()
        for name in names:
            yield from (Fault(name, what) for what in _of_study(connection, metadata, name))
        yield from (Fault(name, what) for name, what in _unknown_to_us(connection, metadata, names))
    for name in names:
        yield from (Fault(name, what) for what in _of_front(store, name))


def _orphans(connection: Connection, metadata: MetaData) -> Iterator[str]:
    """Rows that refer to a row that is not there; databases that enforce foreign keys have none."""
    for table in metadata.sorted_tables:
        for key in table.foreign_keys:
            parent = key.column.table.alias()
            there = select(parent.c[key.column.name]).where(parent.c[key.column.name] == key.parent).exists()
            query = select(func.count()).select_from(table).where(key.parent.is_not(None), ~there)
            count = connection.execute(query).scalar_one()
            if count:
                yield f"{count} rows of {table.name} refer to a row of {key.column.table.name} that is not there"


def _of_study(connection: Connection, metadata: MetaData, name: str) -> Iterator[str]:
    tables = metadata.tables
    study = _one(connection, tables["rank_search_studies"], "name", name)
    optuna = _one(connection, tables["studies"], "study_name", name)
    if study is None:
        return
    if optuna is None:
        yield "Optuna has no study of this name"
        return
    if (digest := _attribute(connection, tables, optuna["study_id"], "spec_digest")) != study["spec_digest"]:
        yield f"its file has the digest {study['spec_digest']:.12}, Optuna's attribute says {digest!s:.12}"
    ours = _trials(connection, tables["rank_search_trials"], study["id"])
    theirs = _trials(connection, tables["trials"], optuna["study_id"])
    missing = sorted(set(range(max(theirs, default=-1) + 1)) - theirs.keys())
    if missing:
        yield f"Optuna's trials have no number {missing[0]}"
    for number, count in _numbered_twice(connection, tables["trials"], optuna["study_id"]):
        yield f"Optuna has {count} trials of number {number}"
    yield from _against_optuna(ours, theirs, _values(connection, tables, optuna["study_id"]))
    for number, row in ours.items():
        yield from (f"trial {number}: {what}" for what in _of_trial(row))
    yield from _of_measurements(connection, tables["rank_search_measurements"], study["id"], ours)
    yield from _of_leases(connection, tables["rank_search_leases"], study["id"], ours)
    yield from _of_front_rows(connection, tables["rank_search_front"], name, ours)


def _against_optuna(ours: Rows, theirs: Rows, values: dict[int, dict[int, float]]) -> Iterator[str]:
    for number in sorted(theirs.keys() - ours.keys()):
        if theirs[number]["state"] == "COMPLETE":
            yield f"Optuna's trial {number} is complete, but there is no row for it"
    for number, row in ours.items():
        other = theirs.get(number)
        if other is None:
            yield f"trial {number} is not among Optuna's"
            continue
        told = other["state"]
        if row["state"] == State.RUNNING and told not in {"RUNNING", "WAITING"}:
            yield f"trial {number} is running, but Optuna calls it {told}"
        wanted = _ENDS.get(row["state"])
        if wanted is not None and told not in {wanted, "RUNNING"}:  # a running one is told when the study is opened
            yield f"trial {number} is {row['state']}, but Optuna calls it {told}"
        if wanted == told == "COMPLETE":
            measured = {0: row["loss"], 1: float(row["num_params"] or 0)}
            if values.get(number) != measured:
                yield f"trial {number} was measured as {measured}, Optuna has {values.get(number)}"


def _of_trial(row: dict[str, Any]) -> Iterator[str]:
    try:
        rank_map = RankMap(json.loads(row["rank_map"]))
    except (ValueError, TypeError, AttributeError, RankSearchError) as error:
        yield f"its rank map is damaged ({error})"
        return
    if rank_map.digest != row["rank_map_digest"]:
        yield f"its rank map has the digest {rank_map.digest:.12}, stored is {row['rank_map_digest']:.12}"
    if row["state"] in MEASURED and (row["loss"] is None or row["num_params"] is None):
        yield f"it is {row['state']} but has no measurement"
    if row["state"] == State.FAILED and not row["reason"]:
        yield "it failed without a reason"


def _of_measurements(connection: Connection, table: Table, study_id: int, trials: Rows) -> Iterator[str]:
    measured = set(connection.scalars(select(table.c.trial).distinct().where(table.c.study_id == study_id)))
    for trial in sorted(measured - trials.keys()):
        yield f"there is a measurement of trial {trial}, which is not there"
    for number, row in trials.items():
        if row["state"] in MEASURED and number not in measured:
            yield f"trial {number} is {row['state']}, but none of its rungs is stored as measured"


def _of_leases(connection: Connection, table: Table, study_id: int, trials: Rows) -> Iterator[str]:
    # One that was granted to a trial without a row outlives it for a while where its worker then skips it.
    may_have_one = {State.RUNNING, State.SKIPPED}
    for number in connection.scalars(select(table.c.trial).where(table.c.study_id == study_id).order_by(table.c.trial)):
        row = trials.get(number)
        if row is not None and row["state"] not in may_have_one:
            yield f"trial {number} is {row['state']}, but there is a lease on it"


def _of_front_rows(connection: Connection, table: Table, name: str, trials: Rows) -> Iterator[str]:
    for row in connection.execute(select(table).where(table.c.study == name)).mappings():
        trial = trials.get(row["trial"])
        if trial is None:
            yield f"the front has trial {row['trial']}, which is not there"
        elif differing := [key for key in ("loss", "num_params", "rank_map", "fidelity") if row[key] != trial[key]]:
            yield f"the front's row of trial {row['trial']} has another {differing[0]} than the trial"


def _of_front(store: StudyStore, name: str) -> Iterator[str]:
    try:
        stored, due = store.front(name), store.recompute_front(name)
    except RankSearchError as error:
        yield str(error)
        return
    if stored != due:
        yield f"its front holds trials {_numbers(stored)}, that of all its trials {_numbers(due)}"


def _unknown_to_us(connection: Connection, metadata: MetaData, names: list[str]) -> Iterator[tuple[str, str]]:
    """Optuna's studies that carry the project's mark but have no row; those of others are none of our business."""
    studies = metadata.tables["studies"]
    for study_id, name in connection.execute(select(studies.c.study_id, studies.c.study_name)).all():
        if name not in names and _attribute(connection, metadata.tables, study_id, "spec_digest") is not None:
            yield name, "Optuna has it, the project's tables do not"


def _one(connection: Connection, table: Table, column: str, value: str) -> dict[str, Any] | None:
    row = connection.execute(select(table).where(table.c[column] == value)).mappings().first()
    return None if row is None else dict(row)


def _trials(connection: Connection, table: Table, study_id: int) -> Rows:
    query = select(table).where(table.c.study_id == study_id).order_by(table.c.number)
    return {row["number"]: dict(row) for row in connection.execute(query).mappings()}


def _numbered_twice(connection: Connection, table: Table, study_id: int) -> list[tuple[int, int]]:
    """Numbers that several of a study's trials have, and how many."""
    count = func.count()
    query = select(table.c.number, count).where(table.c.study_id == study_id).group_by(table.c.number)
    found = connection.execute(query.having(count > 1).order_by(table.c.number))
    return [(number, times) for number, times in found]


def _values(connection: Connection, tables: Any, study_id: int) -> dict[int, dict[int, float]]:
    """Trial number → objective → value, as Optuna has them."""
    trials, values = tables["trials"], tables["trial_values"]
    query = (
        select(trials.c.number, values.c.objective, values.c.value)
        .join(values, values.c.trial_id == trials.c.trial_id)
        .where(trials.c.study_id == study_id)
    )
    found: dict[int, dict[int, float]] = {}
    for number, objective, value in connection.execute(query):
        found.setdefault(number, {})[objective] = float(value)
    return found


def _attribute(connection: Connection, tables: Any, study_id: int, key: str) -> Any:
    table = tables["study_user_attributes"]
    query = select(table.c.value_json).where(table.c.study_id == study_id, table.c.key == key)
    found = connection.execute(query).scalar()
    return None if found is None else json.loads(found)


def _numbers(front: Front) -> str:
    return ", ".join(str(point.trial) for point in front) or "none"
