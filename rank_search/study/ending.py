"""The end of a trial in Optuna's tables, all of it in one transaction.

Optuna's own methods take one for every attribute. This uses its tables, which are no public interface: the one reason
why the package asks for a minor version of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import TrialState
from sqlalchemy import select
from sqlalchemy.orm import Session


def end_trial(
    storage: RDBStorage, trial_id: int, state: TrialState, values: Sequence[float] | None,
    shown: Mapping[str, Any], hidden: Mapping[str, Any],
) -> None:  # fmt: skip
    """What the storage's own methods do in a transaction for each attribute, of four statements each.

    Args:
        values: of the objectives, where there are some.
        shown: attributes for people.
        hidden: attributes for samplers.

    Raises:
        UpdateFinishedTrialError: it has ended already.
    """
    with _create_scoped_session(storage.scoped_session) as session:
        # The lock makes those wait who would end it, too; after it, it has ended for them.
        trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        storage.check_trial_is_updatable(trial_id, trial.state)
        for model, attributes in (
            (models.TrialUserAttributeModel, shown), (models.TrialSystemAttributeModel, hidden),
        ):  # fmt: skip
            _write(session, model, trial_id, attributes)
        for objective, value in enumerate(values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            session.add(
                models.TrialValueModel(trial_id=trial_id, objective=objective, value=stored, value_type=kind)
            )  # fmt: skip
        trial.state, trial.datetime_complete = state, datetime.now()  # as Optuna has it


def _write(session: Session, model: Any, trial_id: int, attributes: Mapping[str, Any]) -> None:
    if not attributes:
        return
    wanted = select(model).where(model.trial_id == trial_id, model.key.in_(list(attributes)))
    known = {row.key: row for row in session.scalars(wanted)}
    for key, value in attributes.items():
        if key in known:
            known[key].value_json = json.dumps(value)
        else:
            session.add(model(trial_id=trial_id, key=key, value_json=json.dumps(value)))
