"""What rows of the project's tables mean, and how they are made. No Optuna."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

from rank_search.errors import StorageError
from rank_search.front import FrontPoint
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import RankMap
from rank_search.spec import StudySpec, parse_study
from rank_search.study.facts import StudyFacts
from rank_search.study.records import MEASURED, State, StudyRecord, TrialRecord
from rank_search.study.tables import FrontRow, MeasuredColumns, MeasurementRow, StudyRow, TrialRow

_OF_RUNGS = ("block_losses", "train_losses")
"""What only the measurements of single rungs hold."""
_COLUMNS = tuple(field.name for field in fields(Measurement) if field.name not in _OF_RUNGS)
"""The columns of a measurement have the names of its fields."""


def rank_map_json(rank_map: RankMap) -> str:
    """A rank map as tables hold it."""
    return json.dumps(dict(rank_map))


def rank_map_of(text: str) -> RankMap:
    """Inverse of :func:`rank_map_json`.

    Raises:
        StorageError: the text is something else; so everywhere here.
    """
    return RankMap(_json(text, "a rank map"))


def spec_json(spec: StudySpec) -> str:
    """The whole file with its defaults, so that later versions read what this one meant."""
    return json.dumps(spec.model_dump(mode="json"))


def spec_of(row: StudyRow) -> StudySpec:
    """A study's file."""
    tables = _json(row.spec, f"the file of study {row.name!r}")
    return parse_study(tables, where=f"study {row.name!r} in the database", stored=True)


def study_record(row: StudyRow) -> StudyRecord:
    """A study as stored."""
    metrics = _json(row.dense_metrics or "{}", f"the metrics of study {row.name!r}")
    return StudyRecord(row.name, spec_of(row), StudyFacts.from_json(row.facts), row.dense_loss, row.created, metrics)


def trial_record(row: TrialRow) -> TrialRecord:
    """A trial as stored."""
    return TrialRecord(
        number=row.number,
        state=State(row.state),
        source=row.source,
        rank_map=rank_map_of(row.rank_map),
        measurement=measurement_of(row) if row.state in MEASURED else None,
        reason=row.reason,
        worker=row.worker,
        started=row.started,
        finished=row.finished,
        same_as=row.same_as,
        promotes=row.promotes,
    )


def measurement_of(row: MeasuredColumns) -> Measurement:
    """The measurement that a row holds."""
    values = {name: getattr(row, name) for name in _COLUMNS}
    values["fidelity"] = Fidelity.from_label(row.fidelity or "")
    values["metrics"] = _json(row.metrics or "{}", "the metrics of a trial")
    values["fold_losses"] = tuple(_json(row.fold_losses or "[]", "the losses of a trial's folds"))
    values["parts"] = row.parts or 1
    if isinstance(row, MeasurementRow):
        values["block_losses"] = block_losses_of(row.block_losses)
        values["train_losses"] = tuple(_json(row.train_losses or "[]", "the training losses of a trial"))
    return Measurement(**values)


def block_losses_of(text: str | None) -> tuple[float, ...]:
    """The losses of single blocks."""
    return tuple(_json(text or "[]", "the losses of a trial's blocks"))


def set_measurement(row: MeasuredColumns, measured: Measurement) -> None:
    """Write a measurement into its columns."""
    for name in _COLUMNS:
        setattr(row, name, getattr(measured, name))
    row.fidelity = measured.fidelity.label
    row.metrics, row.fold_losses = json.dumps(dict(measured.metrics)), json.dumps(measured.fold_losses)
    if isinstance(row, MeasurementRow):
        row.block_losses = json.dumps(measured.block_losses)
        row.train_losses = json.dumps([round(loss, 5) for loss in measured.train_losses])


def front_row(study: str, point: FrontPoint) -> FrontRow:
    """A point of the front."""
    measured = point.measurement
    return FrontRow(
        study=study,
        trial=point.trial,
        rank_map=rank_map_json(point.rank_map),
        loss=measured.loss,
        perplexity=measured.perplexity if math.isfinite(measured.perplexity) else None,
        num_params=measured.num_params,
        kept_of_targets=measured.kept_of_targets,
        kept_of_model=measured.kept_of_model,
        fidelity=measured.fidelity.label,
    )


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise StorageError(f"{what} in the database is damaged ({error}); restore the database") from None
