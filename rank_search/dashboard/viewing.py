"""A study with all its trials, as the database tells it; a notebook shows its front."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rank_search.front import Front, FrontPoint
from rank_search.notebook import table_html
from rank_search.spec import LOSS_UNITS

if TYPE_CHECKING:
    from rank_search.study.records import StudyRecord, TrialRecord


@dataclass(frozen=True)
class StudyView:
    """All that the database tells of a study."""

    record: StudyRecord
    front: Front
    trials: tuple[TrialRecord, ...]

    @property
    def points(self) -> tuple[FrontPoint, ...]:
        """Every trial with a measurement of the study's highest fidelity, those that miss a goal among them."""
        return tuple(
            FrontPoint(trial.number, trial.rank_map, trial.measurement, trial.source)
            for trial in self.trials
            if trial.measurement is not None and trial.state in {"complete", "infeasible"}
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the front beside all other trials and the dense model, and its table."""
        dense = self.record.dense_loss
        if dense is None or not self.front:
            return self.front._repr_html_()
        from rank_search.export.figures import front_figure, rendered

        figure = front_figure(
            self.front, trials=self.points, dense_loss=dense, dense_params=self.record.facts.model_params,
            title=self.record.name, unit=LOSS_UNITS[self.record.spec.model.task],
        )  # fmt: skip
        picture = base64.b64encode(rendered(figure)).decode()
        return f'<img width="640" alt="front" src="data:image/png;base64,{picture}">{table_html(self.front.rows)}'
