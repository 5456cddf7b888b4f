"""Everything that is Optuna's: its tables, its study, its trials. No torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Engine
from sqlalchemy.engine import URL

from rank_search.errors import StorageError, StudyFileError, StudyMismatchError
from rank_search.ranks import RankMap
from rank_search.spec import SearchSpec
from rank_search.study.bounded import BoundedStorage
from rank_search.study.engine import (
    READ_ONLY,
    WRITING,
    commit_without_waiting,
    engine_kwargs,
    shown,
    storage_error,
    translated,
)
from rank_search.study.evidence import Evidence
from rank_search.study.liveness import WorkerId
from rank_search.study.mutation import RANK_MAP, rank_map_text, told_rank_map
from rank_search.study.optuna_rows import end_trial, has_attribute
from rank_search.study.records import PREDICTED_RISE as PREDICTED_RISE
from rank_search.study.samplers import SeededSampler
from rank_search.study.space import GivenSeeds, Params, SearchSpace, Seed

DIRECTIONS = (StudyDirection.MINIMIZE, StudyDirection.MINIMIZE)
METRICS = ["validation loss", "parameters"]

_SEEDED = "seeded"
"""The study's attribute that says that all its seeds are there."""

_WORKER = "worker"
"""The trial's attribute that names who has claimed it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A trial that this process has claimed.

    Attributes:
        number: of the trial.
        params: its parameters.
        source: of a seed or of what was proposed before; None: sampled.
        rank_map: of one whose parameters only stand near it.
        retry_of: the trial that it is the second attempt of.
        promotes: the pruned trial that it continues.
        deaths: of the workers that had its rank map before.
    """

    number: int
    params: Params
    source: str | None
    rank_map: RankMap | None = None
    retry_of: int | None = None
    promotes: int | None = None
    deaths: int = 0


def create_optuna_tables(url: URL) -> None:
    """Make Optuna's tables where they are missing; only under the database's lock."""
    storage = open_storage(url, skip_table_creation=False)
    close_storage(storage)


class OptunaStudy:
    """One Optuna study of two objectives, validation loss and parameter count, driven by ask and tell.

    Trials carry no intermediate values: a pruned one with some would break Optuna's TPE sampler for every worker.
    """

    def __init__(
        self, url: URL, search: SearchSpec, name: str, space: SearchSpace, seeds: tuple[Seed, ...], evidence: Evidence,
        cuts: Sequence[float],
    ) -> None:  # fmt: skip
        self._url = url
        self._space = space
        self._seeds = seeds
        self._worker = str(WorkerId.current())
        self._proposed: tuple[int, RankMap] | None = None
        self._rdb = open_storage(url, skip_table_creation=True)
        self._storage = BoundedStorage(self._rdb, {_WORKER: self._worker})
        with ExitStack() as undo, self._translated(), quiet():
            undo.callback(self.close)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=list(DIRECTIONS),
                sampler=SeededSampler(search, len(seeds), space, self._sign, self._keep, evidence.read, cuts),
                load_if_exists=True,
            )
            self._id = self._storage.get_study_id_from_name(name)
            undo.pop_all()

    @classmethod
    def exists(cls, url: URL, name: str) -> bool:
        """Whether the database holds an Optuna study of this name, the project's or another's."""
        return cls._attributes(url, name) is not None

    @classmethod
    def is_seeded(cls, url: URL, name: str) -> bool:
        """Whether the database holds an Optuna study of this name with all its seeds."""
        return bool((cls._attributes(url, name) or {}).get(_SEEDED))

    @staticmethod
    def _attributes(url: URL, name: str) -> dict[str, Any] | None:
        """User attributes of an Optuna study of this name; None if there is none."""
        storage = open_storage(url, skip_table_creation=True)
        try:
            return storage.get_study_user_attrs(storage.get_study_id_from_name(name))
        except KeyError:
            return None
        except StorageInternalError as error:
            raise storage_error(url, error.__cause__) from None
        finally:
            close_storage(storage)

    def prepare(self, digest: str, given: GivenSeeds) -> None:
        """Name the metrics and enqueue the seeds that are missing; only under the database's lock.

        Seeds of equal rank maps are one trial, the first one's.

        Raises:
            StudyMismatchError: the study has other directions.
            StudyFileError: a seed that is not the allocator's own is missing and not ``given``.
        """
        with self._translated():
            if tuple(self._study.directions) != DIRECTIONS:
                raise StudyMismatchError(
                    f"Optuna study {self._study.study_name!r} does not minimise two objectives; choose another name"
                )
            if self._study.user_attrs.get("spec_digest") is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    self._study.set_metric_names(METRICS)
                self._study.set_user_attr("spec_digest", digest)
            if not self._study.user_attrs.get(_SEEDED):
                self._enqueue_seeds(given)
                self._study.set_user_attr(_SEEDED, True)

    def _enqueue_seeds(self, given: GivenSeeds) -> None:
        present = {trial.user_attrs.get("source") for trial in self.trials()}
        seen: set[RankMap] = set()
        for seed in self._seeds:
            attrs: dict[str, Any] = {"source": seed.source}
            if seed.is_own:
                params = self._space.encode(seed)
                rank_map = self._space.decode(params)
            elif seed in given:
                rank_map = given[seed]
                params = self._space.nearest(seed.kept, rank_map)
                if self._space.decode(params) != rank_map:
                    attrs["rank_map"] = json.dumps(dict(rank_map))
            elif seed.source in present:
                continue
            else:
                raise StudyFileError(f"search.seeds names {seed.allocation!r}, whose rank maps were not made")
            if seed.source not in present and rank_map not in seen:
                self.enqueue(params, attrs)
            seen.add(rank_map)

    def ask(self) -> Claim:
        """Claim a waiting trial, or sample a new one."""
        with self._translated():
            trial = self._study.ask(fixed_distributions=self._space.distributions)
            self._storage.write_params(trial._trial_id)
            # Only what was enqueued holds one by now, and has a source.
            told = told_rank_map(self.trial(trial.number)) if "source" in trial.user_attrs else None
            rank_map = None if told is None else RankMap(json.loads(told))
            if self._proposed is not None and self._proposed[0] == trial.number:
                rank_map = self._proposed[1]
            attrs = trial.user_attrs
            return Claim(
                trial.number, dict(trial.params), attrs.get("source"), rank_map, attrs.get("retry_of"),
                attrs.get("promotes"), attrs.get("deaths", 0),
            )  # fmt: skip

    def complete(
        self, number: int, values: tuple[float, float], attrs: Mapping[str, Any], excess: Mapping[str, float]
    ) -> None:
        """Tell Optuna a measurement; a trial that has ended already is left as it is.

        ``excess``: by how much each goal of the study is missed; a trial is feasible where none is above 0.
        """
        self._finish(number, TrialState.COMPLETE, values, attrs, excess)

    def prune(self, number: int, attrs: Mapping[str, Any], excess: Mapping[str, float] | None = None) -> None:
        """Tell Optuna that a trial was given up. It has no values there: samplers count it among the bad ones, or not
        at all, and nothing is made up for what was not measured."""
        self._finish(number, TrialState.PRUNED, None, attrs, excess or {})

    def fail(self, number: int, reason: str) -> None:
        """Tell Optuna that a trial failed; a trial that has ended already is left as it is."""
        self._finish(number, TrialState.FAIL, None, {"reason": reason}, {})

    def enqueue(self, params: Params, attrs: Mapping[str, Any]) -> None:
        """Have ``params`` proposed before anything new is sampled."""
        with self._translated():
            shown = {key: value for key, value in attrs.items() if key != "rank_map"}
            hidden: dict[str, Any] = {"fixed_params": dict(params)}
            if "rank_map" in attrs:
                hidden[RANK_MAP] = attrs["rank_map"]
            # What Study.enqueue_trial does, which takes none of the attributes that are not shown.
            self._study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=hidden, user_attrs=shown))

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in the given states, by ascending number; all of a long study take seconds to read."""
        with self._translated():
            return self._rdb.get_all_trials(self._id, deepcopy=False, states=states or None)

    def is_retried(self, number: int) -> bool:
        """Whether a trial was proposed again already, by a process that died before it could end the first attempt."""
        with self._translated():
            return has_attribute(self._rdb, self._id, "retry_of", number)

    def trial(self, number: int) -> FrozenTrial:
        """One trial."""
        with self._translated():
            return self._storage.get_trial(self._storage.get_trial_id_from_study_id_trial_number(self._id, number))

    def set_dense_loss(self, loss: float) -> None:
        """Show the dense model's validation loss among the study's attributes."""
        with self._translated():
            self._study.set_user_attr("dense_loss", loss)

    def close(self) -> None:
        """Close all connections."""
        close_storage(self._rdb)

    def _sign(self, trial: FrozenTrial) -> None:
        """Write who has claimed a trial that waited, so that others know if this process dies over its sampling."""
        if trial.user_attrs.get(_WORKER) != self._worker:
            self._storage.set_trial_user_attr(trial._trial_id, _WORKER, self._worker)

    def _keep(self, trial: FrozenTrial, rank_map: RankMap) -> None:
        """Write the rank map that a sampler proposes beside parameters that only stand near it."""
        self._storage.set_trial_system_attr(trial._trial_id, RANK_MAP, rank_map_text(rank_map))
        self._proposed = trial.number, rank_map

    def _finish(
        self,
        number: int,
        state: TrialState,
        values: tuple[float, float] | None,
        attrs: Mapping[str, Any],
        excess: Mapping[str, float],
    ) -> None:
        # The rank map is thousands of characters, for which a dashboard has no room.
        shown_attrs = {key: value for key, value in attrs.items() if key != "rank_map"}
        hidden: dict[str, Any] = {RANK_MAP: attrs["rank_map"]} if "rank_map" in attrs else {}
        # What Trial.set_constraint writes; a Trial made for it would sample and claim once more.
        hidden |= {f"constraints:{goal}": missed_by for goal, missed_by in excess.items()}
        with self._translated():
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
            try:
                end_trial(self._rdb, trial_id, state, values, shown_attrs, hidden)
            except UpdateFinishedTrialError:
                return  # it has ended already, or another process has told the same measurement since
            self._storage.forget(trial_id)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translated(self._url):
                yield
        except StorageInternalError as error:
            raise storage_error(self._url, error.__cause__ or error) from None


def stored_trials(url: URL, name: str) -> list[FrozenTrial]:
    """All trials of a study as Optuna has them.

    Raises:
        StorageError: the database cannot be reached, or holds no Optuna study of this name.
    """
    storage = open_storage(url, skip_table_creation=True)
    try:
        with translated(url):
            return storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
    except KeyError:
        raise StorageError(f"database {shown(url)} has no Optuna study {name!r}; restore the database") from None
    except StorageInternalError as error:
        raise storage_error(url, error.__cause__ or error) from None
    finally:
        close_storage(storage)


_HEADS: dict[str, str] = {}
"""Optuna's version → the newest version of its tables that it knows, asked once."""


def _head(storage: RDBStorage) -> str:
    if optuna.__version__ not in _HEADS:
        _HEADS[optuna.__version__] = storage.get_head_version()
    return _HEADS[optuna.__version__]


def open_storage(url: URL, *, skip_table_creation: bool = True) -> RDBStorage:
    """Optuna's storage, on an engine set up as the project's own.

    Raises:
        StorageError: unreachable, or its Optuna tables are of a version that the installed Optuna cannot read.
    """
    made: list[Engine] = []
    # Its constructor reads on two connections at once, which must not both be writers.
    kwargs = {**engine_kwargs(url), "execution_options": READ_ONLY, "rank_search_made": made}
    with ExitStack() as undo:
        undo.callback(_dispose, made)  # nobody else does where the constructor refuses
        try:
            with translated(url):
                shown_url = url.render_as_string(hide_password=False)
                storage = RDBStorage(
                    shown_url, engine_kwargs=kwargs, skip_table_creation=skip_table_creation,
                    skip_compatibility_check=True,  # it reads all of Optuna's migrations every time
                )  # fmt: skip
                version = storage.get_current_version()
        except StorageInternalError as error:
            raise storage_error(url, error.__cause__ or error) from None
        if version != _head(storage):
            raise StorageError(
                f"database {shown(url)} holds tables of another Optuna version than {optuna.__version__}; "
                "run `rank-search db upgrade`, or give another database"
            )
        storage.engine.update_execution_options(**WRITING)
        # Several commits a trial. The project's own, which wait, take those before them to the disk; what comes after
        # them, the telling of a stored measurement, is told again when the study is opened.
        commit_without_waiting(storage.engine)
        undo.pop_all()
    return storage


def _dispose(engines: list[Engine]) -> None:
    for engine in engines:
        engine.dispose()


def close_storage(storage: RDBStorage) -> None:
    """Close all its connections."""
    storage.remove_session()
    storage.engine.dispose()


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's lines on standard error about studies it makes and loads."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
