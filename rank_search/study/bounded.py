"""Optuna's storage as its samplers see it: bounded, and read no more than asked for. No torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rank_search.study.optuna_rows import add_params, create_trial, has_trials

NEWEST = 600
"""So many of the newest finished trials are shown to samplers, ..."""
BEST = 400
"""... and so many from the first fronts. With 200 of each, TPE's hypervolume after 700 trials was 0.3 to 0.6 % less
than with all."""

T = TypeVar("T")
_UNFINISHED = frozenset({TrialState.RUNNING, TrialState.WAITING})


@dataclass
class _Begun:
    """A trial of this process that is being sampled or measured.

    Attributes:
        made: as it was made; until it is asked for, since then nobody needs to read it.
        params: not yet written.
    """

    made: FrozenTrial | None = None
    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)


class BoundedStorage(BaseStorage):
    """One study's trials as a sampler needs them, which neither reads nor looks at all of a long study.

    What Optuna itself does before every trial, looking for waiting ones, reads these alone; its own cache first loads
    every trial with all of its parameters and attributes. Samplers see, besides what is not finished, the
    :data:`NEWEST` finished trials and the :data:`BEST` of the first fronts: of what a sampler does with thousands, most
    goes into telling how bad the bad ones are.

    A trial's parameters are collected, and written in one transaction by :meth:`write_params`, or before anything that
    needs them.

    Args:
        signature: attributes that trials are made with, so that at no moment one is there without them.
    """

    def __init__(self, storage: RDBStorage, signature: Mapping[str, Any] | None = None) -> None:
        self._all = storage
        self._cached: BaseStorage = get_storage(storage)
        self._signature = dict(signature or {})
        self._begun: dict[int, _Begun] = {}
        self._ids: dict[int, int] = {}
        self._shown = _Shown()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Unfinished ones alone straight from the database; with finished ones through the cache, and bounded."""
        wanted = tuple(state for state in TrialState if states is None or state in states)
        if _UNFINISHED.issuperset(wanted):
            if not has_trials(self._all, study_id, wanted):  # as a rule: who asks looks for waiting ones
                return []
            trials = self._all.get_all_trials(study_id, deepcopy=False, states=wanted)
        else:
            trials = self._bounded(self._cached.get_all_trials(study_id, deepcopy=False), set(wanted))
        return copy.deepcopy(trials) if deepcopy else trials

    def _bounded(self, trials: list[FrozenTrial], states: Set[TrialState]) -> list[FrozenTrial]:
        if len(trials) > NEWEST + BEST:
            unfinished = [trial for trial in trials if not trial.state.is_finished()]
            trials = sorted([*self._shown.of(trials), *unfinished], key=lambda trial: trial.number)
        return [trial for trial in trials if trial.state in states]

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """One to be sampled, or one that is given."""
        if template_trial is not None:
            return self._cached.create_new_trial(study_id, template_trial)
        made = create_trial(self._all, study_id, self._signature)
        trial_id: int = made._trial_id
        self._begun[trial_id], self._ids[made.number] = _Begun(made), trial_id
        return trial_id

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """One trial; Optuna asks for a new one at once, which nobody else has changed by then."""
        begun = self._begun.get(trial_id)
        if begun is not None and begun.made is not None:
            made, begun.made = begun.made, None
            return made
        self.write_params(trial_id)
        return self._cached.get_trial(trial_id)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Its id."""
        known = self._ids.get(trial_number)
        return self._cached.get_trial_id_from_study_id_trial_number(study_id, trial_number) if known is None else known

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Collect a parameter."""
        self._begun.setdefault(trial_id, _Begun()).params[param_name] = param_value_internal, distribution

    def write_params(self, trial_id: int) -> None:
        """Write what is collected of a trial.

        Raises:
            UpdateFinishedTrialError: it has ended.
        """
        begun = self._begun.get(trial_id)
        if begun is not None and begun.params:
            add_params(self._all, trial_id, begun.params)
            begun.params = {}

    def forget(self, trial_id: int) -> None:
        """Let go of what is only needed of a trial that runs."""
        self._begun.pop(trial_id, None)
        self._ids = {number: known for number, known in self._ids.items() if known != trial_id}

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As the database does."""
        self.write_params(trial_id)
        if state.is_finished():
            self.forget(trial_id)
        return self._cached.set_trial_state_values(trial_id, state, values)

    # The rest is handed on.

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """As the database does; so, too, everything below."""
        return self._cached.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        """Forget a study."""
        self._cached.delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write a study's attribute."""
        self._cached.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write a study's hidden attribute."""
        self._cached.set_study_system_attr(study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Its id."""
        return self._cached.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """Its name."""
        return self._cached.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Of its objectives."""
        return self._cached.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Its attributes."""
        return self._cached.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Its hidden attributes."""
        return self._cached.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[Any]:
        """All studies of the database."""
        return self._cached.get_all_studies()

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Write what no study here writes."""
        self._cached.set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write a trial's attribute."""
        self._cached.set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write a trial's hidden attribute."""
        self._cached.set_trial_system_attr(trial_id, key, value)

    def remove_session(self) -> None:
        """Close this thread's connection."""
        self._cached.remove_session()


class _Shown:
    """Numbers of the finished trials that samplers see, as a study's trials come in."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float, int]] = []
        self._seen: set[int] = set()
        self._shown: set[int] = set()

    def of(self, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """Of all trials those that are shown."""
        finished = [trial for trial in trials if trial.state.is_finished()]
        new = [trial for trial in finished if trial.number not in self._seen]
        if new:
            self._seen.update(trial.number for trial in new)
            self._points += [(trial.values[1], trial.values[0], trial.number) for trial in new if _is_point(trial)]
            self._points.sort()
            self._shown = {trial.number for trial in finished[-NEWEST:]} | first_fronts(self._points, BEST)
        return [trial for trial in finished if trial.number in self._shown]


def first_fronts(points: Iterable[tuple[float, float, int]], count: int) -> set[int]:
    """Numbers of so many points, front by front; of the last front that fits in part, evenly spread ones.

    Args:
        points: parameters, loss and number, sorted.
    """
    left, found = list(points), set[int]()
    while left and len(found) < count:
        lowest, front, others = math.inf, [], []
        for point in left:
            if point[1] < lowest:
                lowest = point[1]
                front.append(point)
            else:
                others.append(point)
        found.update(number for _, _, number in thinned(front, count - len(found)))
        left = others
    return found


def _is_point(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.COMPLETE and is_feasible(trial)


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial meets its study's goals."""
    return all(missed_by <= 0 for missed_by in trial.constraints.values())


def thinned(points: Sequence[T], count: int) -> list[T]:
    """At most so many of the points, evenly spread, the first and the last among them."""
    if len(points) <= count:
        return list(points)
    if count == 1:
        return [points[0]]
    return [points[round(k * (len(points) - 1) / (count - 1))] for k in range(count)]
