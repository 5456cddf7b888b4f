"""The files that are offered beside every trial of the front. None is stored: they follow from the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from rank_search.export.figures import rendered
from rank_search.export.rank_map_figures import rank_map_figure, train_loss_figure
from rank_search.export.rank_map_file import RankMapFile
from rank_search.front import FrontPoint
from rank_search.measurement import Measurement
from rank_search.spec import LOSS_UNITS
from rank_search.study.board import Artifact, study_of
from rank_search.study.overview import Overview, space_of
from rank_search.study.records import StudyRecord
from rank_search.study.store import StudyStore

_KINDS = (
    ("rank_map.json", "application/json"),
    ("rank_map.png", "image/png"),
    ("train_loss.png", "image/png"),
)
_RANK_MAP, _PICTURE, _TRAIN_LOSS = range(len(_KINDS))
_CACHED = 256


def rank_map_file(record: StudyRecord, point: FrontPoint) -> RankMapFile:
    """The rank map file of a measured trial; relative paths in it start from the study's folder."""
    facts = record.facts
    return RankMapFile.of(
        point.rank_map, space_of(record), record.spec, weights_digest=facts.weights_digest,
        allocation=f"trial {point.trial} ({point.source})", revision=facts.revision,
        measurement=point.measurement, trial=point.trial,
        calibration_digest=facts.calibration_digest, bank_digest=facts.bank,
    )  # fmt: skip


def artifacts(overview: Overview, study_id: int) -> Mapping[int, tuple[Artifact, ...]]:
    """Trial of the front → its rank map file, its picture, and the loss curve of its fine-tune where that is stored."""
    found = {}
    for point in overview.front:
        has_curve = bool(train_losses(overview.rungs.get(point.trial, ())))
        kinds = [_RANK_MAP, _PICTURE, *([_TRAIN_LOSS] if has_curve else [])]
        found[point.trial] = tuple(Artifact(f"{study_id:x}-{point.trial:x}-{kind:x}", *_KINDS[kind]) for kind in kinds)
    return found


def train_losses(rungs: Sequence[Measurement]) -> tuple[float, ...]:
    """The training loss of every step of the last measurement that has any, nats; of folds their mean."""
    return next((told.train_losses for told in reversed(rungs) if told.train_losses), ())


class ArtifactReader:
    """Makes the files of artifacts as they are asked for."""

    def __init__(self, store: StudyStore) -> None:
        self._store = store
        self._made = lru_cache(_CACHED)(self._make)

    def read(self, artifact: str) -> bytes | None:
        """The content of an artifact by its id, None where there is none.

        Raises:
            StorageError: the database cannot be reached.
        """
        numbers = artifact.split("-")
        if len(numbers) != 3:
            return None
        study_id, trial, kind = (int(number, 16) for number in numbers)
        return self._made(study_id, trial, kind)

    def _make(self, study_id: int, number: int, kind: int) -> bytes | None:
        name = study_of(self._store.engine, study_id)
        if name is None or kind >= len(_KINDS):
            return None
        record, trial = self._store.study(name), self._store.trial(name, number)
        if trial is None or trial.measurement is None:
            return None
        point = FrontPoint(number, trial.rank_map, trial.measurement, trial.source)
        if kind == _RANK_MAP:
            return rank_map_file(record, point).text().encode()
        told = f"{name}, trial {number}: kept {point.measurement.kept_of_targets:.3f}, loss {point.loss:.4f}"
        if kind == _PICTURE:
            return rendered(rank_map_figure(point.rank_map, space_of(record), told))
        losses = train_losses(self._store.measurements(name, number))
        unit = LOSS_UNITS[record.spec.model.task]
        return rendered(train_loss_figure(losses, title=told, unit=unit)) if losses else None
