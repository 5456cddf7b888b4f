"""What a stored study found out about its model. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from rank_search.errors import InputError
from rank_search.front import EMPTY, Front, FrontPoint
from rank_search.insight import Agreement, Insight, above_others, agreement, profile, tendencies
from rank_search.measurement import Fidelity, Measurement
from rank_search.search_spec import Sampler
from rank_search.spec import LOSS_UNITS
from rank_search.study.engine import parse_url
from rank_search.study.optuna_study import PREDICTED_RISE, quiet, stored_trials
from rank_search.study.overview import space_of
from rank_search.study.records import State, StudyRecord, TrialRecord
from rank_search.study.store import StudyStore

LEAST_TRIALS = 20
"""Trials below which no importance is told."""
_BEST = 0.25
"""Share of the trials that count as good ones: of a few dozen a tenth would be a handful."""


def explain(database: str, name: str) -> Insight:
    """Read a study's measurements and say what they tell.

    Raises:
        StorageError: no such database, or no such study in it.
        InputError: the study has measured nothing yet.
    """
    url = parse_url(database)
    with StudyStore(url) as store:
        record, front, trials, rungs = store.study(name), store.front(name), store.trials(name), store.rungs(name)
    if not front:
        raise InputError(EMPTY)
    points = _points(trials)
    closed_form = [point for point in points if point.source.startswith("closed form")]
    sampled = [point for point in points if point.source in get_args(Sampler)]
    space = space_of(record)
    told = stored_trials(url, name)
    return Insight(
        study=name,
        trials=len(points),
        tendencies=tendencies(front, closed_form, space),
        importances=importances(told, above_others(sampled)),
        agreements=(*_predictions(record, points, told), *_climbs(points, rungs)),
        profile=profile(Front.of(front), space),
        unit=LOSS_UNITS[record.spec.model.task],
    )


def importances(trials: Iterable[FrozenTrial], above: Mapping[int, float]) -> dict[str, float]:
    """Parameter → its share in what makes a trial good for its size, by PED-ANOVA (Watanabe, Bansal and Hutter, 2023).

    Args:
        trials: Optuna's.
        above: trial → its loss above that of others of its size. Of sampled ones alone: the parameters of some seeds
            only stand near their rank maps, and the others are all at 0.

    Returns:
        The largest share first, of parameters that were varied; empty where there are no multipliers, or fewer than
        :data:`LEAST_TRIALS` trials.
    """
    sampled = [trial for trial in trials if trial.number in above]
    names = {name for trial in sampled for name in trial.params if name == "uniformity" or name.startswith("u.")}
    varied = sorted(name for name in names if len({trial.params.get(name) for trial in sampled}) > 1)
    if len(varied) < 2 or len(sampled) < LEAST_TRIALS:
        return {}
    with quiet():
        study = optuna.create_study()
        for trial in sampled:
            params = {name: trial.params[name] for name in varied}
            distributions = {name: trial.distributions[name] for name in varied}
            study.add_trial(create_trial(value=above[trial.number], params=params, distributions=distributions))
        evaluator = PedAnovaImportanceEvaluator(target_quantile=_BEST)
        return {key: float(share) for key, share in get_param_importances(study, evaluator=evaluator).items()}


def _points(trials: Iterable[TrialRecord]) -> list[FrontPoint]:
    """Measurements of the highest fidelity."""
    return [
        FrontPoint(trial.number, trial.rank_map, trial.measurement, trial.source)
        for trial in trials
        if trial.measurement is not None and trial.state in {State.COMPLETE, State.INFEASIBLE}
    ]


def _predictions(
    record: StudyRecord, points: Sequence[FrontPoint], trials: Iterable[FrozenTrial]
) -> Iterable[Agreement]:
    """The closed form's own prediction, of all trials."""
    rises = {trial.number: trial.user_attrs.get(PREDICTED_RISE) for trial in trials}
    if record.dense_loss is None:
        return
    pairs = [
        (point.measurement.kept_of_targets, record.dense_loss + rise, point.loss)
        for point in points
        if (rise := rises.get(point.trial)) is not None
    ]
    if found := agreement("predicted", pairs):
        yield found


def _climbs(points: Iterable[FrontPoint], rungs: Mapping[int, Sequence[Measurement]]) -> Iterable[Agreement]:
    """Every lower rung that trials were measured on before the highest."""
    pairs: dict[str, list[tuple[float, float, float]]] = {}
    for point in points:
        for lower in rungs.get(point.trial, ())[:-1]:
            if lower.fidelity is not Fidelity.PREDICTED:
                label = f"{lower.fidelity.label}, {lower.tokens:,} tokens"
                pairs.setdefault(label, []).append((lower.kept_of_targets, lower.loss, point.loss))
    for label, found in pairs.items():
        if told := agreement(label, found):
            yield told
