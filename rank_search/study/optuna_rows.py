"""A trial's steps in Optuna's tables, each in one transaction of few statements. No torch.

Optuna's own methods take a transaction for every parameter and attribute, of three to five statements each. These use
its tables, which are no public interface: the one reason why the package asks for a minor version of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, bindparam, delete, insert, select, union_all, update

from rank_search.study.engine import READ_ONLY

_STUDIES: Table = models.StudyModel.__table__
_TRIALS: Table = models.TrialModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_SHOWN: Table = models.TrialUserAttributeModel.__table__
_HIDDEN: Table = models.TrialSystemAttributeModel.__table__

# Statements of every trial, for one takes about as long to make as to execute.
_OF_STUDY = _TRIALS.c.study_id == bindparam("study")
_LOCKED_STUDY = select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == bindparam("study")).with_for_update()
_NEWEST_NUMBER = select(_TRIALS.c.number).where(_OF_STUDY).order_by(_TRIALS.c.trial_id.desc()).limit(1)
_IN_STATES = (
    select(_TRIALS.c.trial_id).where(_OF_STUDY, _TRIALS.c.state.in_(bindparam("states", expanding=True))).limit(1)
)
_LOCKED_STATE = select(_TRIALS.c.state).where(_TRIALS.c.trial_id == bindparam("trial")).with_for_update()


def has_trials(storage: RDBStorage, study_id: int, states: Iterable[TrialState]) -> bool:
    """Whether a study has a trial in one of the states."""
    with storage.engine.connect().execution_options(**READ_ONLY) as connection:
        return connection.scalar(_IN_STATES, {"study": study_id, "states": list(states)}) is not None


def has_attribute(storage: RDBStorage, study_id: int, key: str, value: Any) -> bool:
    """Whether a trial of a study has an attribute for people of this value."""
    query = select(_SHOWN.c.value_json).join(_TRIALS, _TRIALS.c.trial_id == _SHOWN.c.trial_id)
    with storage.engine.connect().execution_options(**READ_ONLY) as connection:
        found = connection.scalars(query.where(_TRIALS.c.study_id == study_id, _SHOWN.c.key == key))
        return json.dumps(value) in set(found)


def create_trial(storage: RDBStorage, study_id: int, shown: Mapping[str, Any]) -> FrozenTrial:
    """A new running trial with attributes for people."""
    now = datetime.now(UTC)
    with storage.engine.begin() as connection:
        # Whoever makes a trial locks the study's row first, Optuna too, so the newest trial has the highest number.
        connection.execute(_LOCKED_STUDY, {"study": study_id})
        before = connection.scalar(_NEWEST_NUMBER, {"study": study_id})
        number = 0 if before is None else before + 1
        row = {"study_id": study_id, "number": number, "state": TrialState.RUNNING, "datetime_start": _stored(now)}
        made = connection.execute(insert(_TRIALS).values(row)).inserted_primary_key
        assert made is not None
        _add_attributes(connection, _SHOWN, made[0], shown)
    return FrozenTrial(
        number=number, state=TrialState.RUNNING, value=None, datetime_start=now.astimezone().replace(tzinfo=None),
        datetime_complete=None, params={}, distributions={}, user_attrs=dict(shown), system_attrs={},
        intermediate_values={}, trial_id=made[0],
    )  # fmt: skip


def add_params(storage: RDBStorage, trial_id: int, params: Mapping[str, tuple[float, BaseDistribution]]) -> None:
    """Write the parameters of a trial that has none, in Optuna's inner representation.

    Raises:
        UpdateFinishedTrialError: it has ended.
    """
    rows = [
        {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": distribution_to_json(of)}
        for name, (value, of) in params.items()
    ]
    with storage.engine.begin() as connection:
        _lock_unfinished(connection, trial_id)
        connection.execute(insert(_PARAMS), rows)


def end_trial(
    storage: RDBStorage, trial_id: int, state: TrialState, values: Sequence[float] | None,
    shown: Mapping[str, Any], hidden: Mapping[str, Any],
) -> None:  # fmt: skip
    """End a trial.

    Args:
        values: of the objectives, where there are some.
        shown: attributes for people.
        hidden: attributes for samplers.

    Raises:
        UpdateFinishedTrialError: it has ended already.
    """
    with storage.engine.begin() as connection:
        # The lock makes those wait who would end it, too; after it, it has ended for them.
        _lock_unfinished(connection, trial_id)
        _drop_attributes(connection, trial_id, {_SHOWN: shown, _HIDDEN: hidden})
        _add_attributes(connection, _SHOWN, trial_id, shown)
        _add_attributes(connection, _HIDDEN, trial_id, hidden)
        rows = []
        for objective, value in enumerate(values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            rows.append({"trial_id": trial_id, "objective": objective, "value": stored, "value_type": kind})
        if rows:
            connection.execute(insert(_VALUES), rows)
        ended = {"state": state, "datetime_complete": _stored(datetime.now(UTC))}
        connection.execute(update(_TRIALS).where(_TRIALS.c.trial_id == trial_id).values(ended))


def _lock_unfinished(connection: Connection, trial_id: int) -> None:
    if connection.execute(_LOCKED_STATE, {"trial": trial_id}).scalar_one().is_finished():
        raise UpdateFinishedTrialError(f"trial {trial_id} has ended")


def _drop_attributes(connection: Connection, trial_id: int, tables: Mapping[Table, Mapping[str, Any]]) -> None:
    """Those that are to be written, where some earlier step has written them."""
    queries = [
        select(table.c.key).where(table.c.trial_id == trial_id, table.c.key.in_(list(attributes)))
        for table, attributes in tables.items()
    ]
    # Hardly ever is there one, so that a single look for all tables is worth it.
    if known := list(connection.scalars(union_all(*queries))):
        for table in tables:
            connection.execute(delete(table).where(table.c.trial_id == trial_id, table.c.key.in_(known)))


def _add_attributes(connection: Connection, table: Table, trial_id: int, attributes: Mapping[str, Any]) -> None:
    if attributes:
        rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(to)} for key, to in attributes.items()]
        connection.execute(insert(table), rows)


def _stored(moment: datetime) -> datetime:
    """As Optuna's tables hold it: UTC, without a zone."""
    return moment.astimezone(UTC).replace(tzinfo=None)
