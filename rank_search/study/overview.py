"""All that a view of a study draws and tells, read in one go. No Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, Select, column, select, table

from rank_search.front import Front
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankSpace, frozen_ranks
from rank_search.spec import LOSS_UNITS
from rank_search.study.engine import READ_ONLY, translated
from rank_search.study.facts import StudyFacts
from rank_search.study.records import MEASURED, PREDICTED_RISE, State, StudyRecord, StudyStatus
from rank_search.study.store import StudyStore
from rank_search.study.tables import StudyRow, TrialRow


@dataclass(frozen=True, slots=True)
class MeasuredTrial:
    """A measured trial without its rank map, which is most of its bytes.

    ``predicted_rise`` is the closed form's own prediction of the loss over the dense model, in nats.
    """

    number: int
    source: str
    state: State
    worker: str
    loss: float
    standard_error: float
    num_params: int
    kept_of_targets: float
    fidelity: Fidelity
    seconds: float
    finished: datetime
    predicted_rise: float | None


@dataclass(frozen=True, slots=True)
class Overview:
    """A study as it is now.

    Attributes:
        record: its file and facts.
        status: how far it is.
        front: the stored one.
        trials: all measured ones, by ascending number.
        rungs: trial of the front → its measurements, rung by rung.
    """

    record: StudyRecord
    status: StudyStatus
    front: Front
    trials: tuple[MeasuredTrial, ...]
    rungs: Mapping[int, tuple[Measurement, ...]]

    @property
    def facts(self) -> StudyFacts:
        """What was found when the study was prepared."""
        return self.record.facts

    @property
    def unit(self) -> str:
        """What losses are a mean over."""
        return LOSS_UNITS[self.record.spec.model.task]

    @property
    def highest(self) -> tuple[MeasuredTrial, ...]:
        """Trials with a loss of the study's highest fidelity, those that miss a goal among them."""
        return tuple(trial for trial in self.trials if trial.state in {State.COMPLETE, State.INFEASIBLE})


def space_of(record: StudyRecord) -> RankSpace:
    """The rank maps that a study can propose."""
    facts, targets = record.facts, record.spec.targets
    frozen = frozen_ranks(facts.shapes, targets.frozen, targets.storage)
    return RankSpace(facts.shapes, facts.model_params, targets.storage, targets.rank_multiple, frozen)


def read_overview(store: StudyStore, name: str) -> Overview:
    """Read a study.

    Raises:
        StorageError: the database cannot be reached, or lacks the study.
    """
    front = store.front(name)
    return Overview(
        record=store.study(name),
        status=store.status(name),
        front=front,
        trials=measured_trials(store.engine, name),
        rungs={point.trial: store.measurements(name, point.trial) for point in front},
    )


def measured_trials(engine: Engine, name: str) -> tuple[MeasuredTrial, ...]:
    """The measured trials of a study, by ascending number.

    Raises:
        StorageError: the database cannot be reached.
    """
    t = TrialRow
    query = (
        select(
            t.number, t.source, t.state, t.worker, t.loss, t.standard_error, t.num_params, t.kept_of_targets,
            t.fidelity, (t.swap_seconds + t.finetune_seconds + t.score_seconds).label("seconds"), t.finished,
        )
        .join(StudyRow, StudyRow.id == t.study_id)
        .where(StudyRow.name == name, t.state.in_(MEASURED))
        .order_by(t.number)
    )  # fmt: skip
    with translated(engine.url), engine.connect().execution_options(**READ_ONLY) as connection:
        rows = connection.execute(query).all()
        rises = {number: json.loads(value) for number, value in connection.execute(_rises_query(name))}
    return tuple(_trial(row, rises) for row in rows)


def _trial(row: Any, rises: Mapping[int, float]) -> MeasuredTrial:
    values = {name: getattr(row, name) for name in MeasuredTrial.__slots__ if name != "predicted_rise"}
    values["state"], values["fidelity"] = State(values["state"]), Fidelity.from_label(values["fidelity"])
    return MeasuredTrial(**values, predicted_rise=rises.get(values["number"]))


def _rises_query(name: str) -> Select[Any, Any]:
    """Number and predicted rise of every trial that Optuna was told of; by its tables, for its interface reads all."""
    studies = table("studies", column("study_id"), column("study_name"))
    trials = table("trials", column("trial_id"), column("study_id"), column("number"))
    attrs = table("trial_user_attributes", column("trial_id"), column("key"), column("value_json"))
    return (
        select(trials.c.number, attrs.c.value_json)
        .join(trials, trials.c.trial_id == attrs.c.trial_id)
        .join(studies, studies.c.study_id == trials.c.study_id)
        .where(studies.c.study_name == name, attrs.c.key == PREDICTED_RISE)
    )
