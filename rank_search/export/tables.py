"""The front as rows, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rank_search.front import FrontPoint


@dataclass(frozen=True, slots=True)
class FrontRow:
    """One point of a front, as tables show it.

    ``num_params`` counts the whole model; ``loss`` and ``standard_error`` are in nats per token. ``fold_deviation`` is
    the standard deviation of the loss over folds, where the study has them.
    """

    trial: int
    source: str
    num_params: int
    kept_of_targets: float
    kept_of_model: float
    loss: float
    standard_error: float
    perplexity: float
    fidelity: str
    fold_deviation: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def front_rows(points: Iterable[FrontPoint]) -> list[FrontRow]:
    """One row a point, in their order."""
    return [
        FrontRow(
            trial=point.trial,
            source=point.source,
            num_params=point.num_params,
            kept_of_targets=measured.kept_of_targets,
            kept_of_model=measured.kept_of_model,
            loss=point.loss,
            standard_error=measured.standard_error,
            perplexity=measured.perplexity,
            fidelity=measured.fidelity.label,
            fold_deviation=measured.fold_deviation,
            metrics=measured.metrics,
        )
        for point in points
        for measured in [point.measurement]
    ]


def front_csv(points: Iterable[FrontPoint]) -> str:
    """The rows as CSV with a heading, a column for each metric."""
    out = io.StringIO()
    rows = front_rows(points)
    names = [column.name for column in fields(FrontRow) if column.name != "metrics"]
    metrics = sorted({metric for row in rows for metric in row.metrics})
    writer = csv.DictWriter(out, [*names, *metrics], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: getattr(row, name) for name in names} | dict(row.metrics) for row in rows)
    return out.getvalue()


def front_json(points: Iterable[FrontPoint]) -> str:
    """The rows as a JSON array of objects; a perplexity too large for a float is null."""
    return json.dumps(front_objects(points), indent=2, allow_nan=False) + "\n"


def front_objects(points: Iterable[FrontPoint]) -> list[dict[str, Any]]:
    """The rows as JSON has them."""
    names = [one.name for one in fields(FrontRow)]
    rows = [{name: getattr(row, name) for name in names} for row in front_rows(points)]
    for row in rows:
        row["perplexity"] = _finite(row["perplexity"])
        row["metrics"] = {name: _finite(value) for name, value in row["metrics"].items()}
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
