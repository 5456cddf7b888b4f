"""Tells Optuna what the project's tables hold. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rank_search.allocation import Allocator
from rank_search.errors import TrialError
from rank_search.measurement import Measurement
from rank_search.ranks import RankMap
from rank_search.search_spec import SearchSpec
from rank_search.study.mutation import rank_map_text
from rank_search.study.optuna_study import PREDICTED_RISE, OptunaStudy
from rank_search.study.records import MEASURED, State, TrialRecord
from rank_search.study.store import StudyStore


@dataclass(frozen=True)
class Telling:
    """Tells Optuna the ends of a study's trials; telling twice changes nothing."""

    name: str
    _goals: SearchSpec
    _allocator: Allocator
    _store: StudyStore
    _optuna: OptunaStudy

    def end(self, record: TrialRecord) -> None:
        """Tell Optuna the end that a trial has in the project's tables; of a skipped one, that of its equal."""
        equal = record if record.same_as is None else self._store.trial(self.name, record.same_as)
        assert equal is not None  # same_as names a trial of this study, and trials are never deleted
        measured = equal.measurement
        same = {} if record.same_as is None else {"same_as": record.same_as}
        if measured is not None and equal.state is State.PRUNED:
            self.prune(record.number, record.rank_map, record.source, measured, same)
        elif measured is not None and equal.state in MEASURED:
            self.complete(record.number, record.rank_map, record.source, measured, same)
        elif record.state is State.SKIPPED and record.same_as is None:
            size = self._allocator.space.num_params(record.rank_map)
            excess = {"parameters": float(size - (self._goals.max_params or size))}
            self._optuna.prune(record.number, {"source": record.source, "reason": record.reason}, excess)
        else:
            self._optuna.fail(record.number, record.reason or record.state)

    def complete(
        self, number: int, rank_map: RankMap, source: str, measured: Measurement, more: Mapping[str, Any] | None = None
    ) -> None:
        """Tell Optuna a measurement."""
        rise = {PREDICTED_RISE: self._allocator.predicted_rise(rank_map)}
        attrs = _attributes(rank_map, source, measured) | rise | dict(more or {})
        self._optuna.complete(number, objectives(measured), attrs, self._excess(measured))

    def prune(
        self, number: int, rank_map: RankMap, source: str, measured: Measurement, more: Mapping[str, Any] | None = None
    ) -> None:
        """Tell Optuna a measurement with which a trial was given up."""
        attrs = {f"{measured.fidelity.label} loss": measured.loss, "tokens": measured.tokens}
        self._optuna.prune(number, _attributes(rank_map, source, measured) | attrs | dict(more or {}))

    def _excess(self, measured: Measurement) -> dict[str, float]:
        """By how much each of the study's goals is missed, at most 0 where it is met."""
        goals, excess = self._goals, {}
        if goals.max_params is not None:
            excess["parameters"] = float(measured.num_params - goals.max_params)
        if goals.max_loss is not None:
            excess["loss"] = measured.loss - goals.max_loss
        return excess

    def missed(self, measured: Measurement) -> str | None:
        """The goals that are missed, in words."""
        goals, excess = self._goals, self._excess(measured)
        missed = []
        if excess.get("parameters", 0.0) > 0:
            missed.append(f"{measured.num_params:,} parameters, above search.max_params ({goals.max_params:,})")
        if excess.get("loss", 0.0) > 0:
            missed.append(f"loss {measured.loss:.4f}, above search.max_loss ({goals.max_loss:g})")
        return "; ".join(missed) or None


def _attributes(rank_map: RankMap, source: str, measured: Measurement) -> dict[str, Any]:
    """What is shown of a measurement beside Optuna's own values."""
    attrs: dict[str, Any] = {
        "rank_map": rank_map_text(rank_map),
        "kept_of_targets": round(measured.kept_of_targets, 4),
        "source": source,
        "fidelity": measured.fidelity.label,
        "seconds": round(measured.seconds, 3),
    }
    if math.isfinite(measured.perplexity):
        attrs["perplexity"] = float(f"{measured.perplexity:.6g}")
    attrs |= {f"metric {name}": round(value, 6) for name, value in measured.metrics.items() if math.isfinite(value)}
    if measured.fold_deviation is not None:
        attrs["fold_deviation"] = round(measured.fold_deviation, 6)
    return attrs


def objectives(measurement: Measurement) -> tuple[float, float]:
    """Validation loss and parameter count as floats, which is what Optuna minimises.

    Raises:
        TrialError: one is not a finite number.
    """
    values = float(measurement.loss), float(measurement.num_params)
    if not all(math.isfinite(value) for value in values):
        raise TrialError(f"objectives must be finite numbers, not {values}")
    return values
