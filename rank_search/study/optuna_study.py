"""Everything that is Optuna's: its tables, its study, its trials. No torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL

from rank_search.errors import StorageError, StudyFileError, StudyMismatchError
from rank_search.ranks import RankMap
from rank_search.spec import SearchSpec
from rank_search.study.engine import READ_ONLY, WRITING, engine_kwargs, shown, storage_error, translated
from rank_search.study.liveness import WorkerId
from rank_search.study.mutation import rank_map_text
from rank_search.study.samplers import SeededSampler
from rank_search.study.space import GivenSeeds, Params, SearchSpace, Seed

DIRECTIONS = (StudyDirection.MINIMIZE, StudyDirection.MINIMIZE)
METRICS = ["validation loss", "parameters"]

_SEEDED = "seeded"
"""The study's attribute that says that all its seeds are there."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A trial that this process has claimed: its parameters, the source of a seed (None: sampled), and the rank map of
    one whose parameters only stand near it."""

    number: int
    params: Params
    source: str | None
    rank_map: RankMap | None = None


def create_optuna_tables(url: URL) -> None:
    """Make Optuna's tables where they are missing; only under the database's lock."""
    storage = _storage(url, skip_table_creation=False)
    _close(storage)


class OptunaStudy:
    """One Optuna study of two objectives, validation loss and parameter count, driven by ask and tell.

    Trials carry no intermediate values: a pruned one with some would break Optuna's TPE sampler for every worker.
    """

    def __init__(self, url: URL, search: SearchSpec, name: str, space: SearchSpace, seeds: tuple[Seed, ...]) -> None:
        self._url = url
        self._space = space
        self._seeds = seeds
        self._worker = str(WorkerId.current())
        self._proposed: tuple[int, RankMap] | None = None
        self._rdb = _storage(url, skip_table_creation=True)
        self._storage = get_storage(self._rdb)
        with self._translated(), quiet():
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=list(DIRECTIONS),
                sampler=SeededSampler(search, len(seeds), space, self._sign, self._keep),
                load_if_exists=True,
            )
            self._id = self._storage.get_study_id_from_name(name)

    @staticmethod
    def exists(url: URL, name: str) -> bool:
        """Whether the database holds an Optuna study of this name, the project's or another's."""
        storage = _storage(url, skip_table_creation=True)
        try:
            storage.get_study_id_from_name(name)
        except KeyError:
            return False
        except StorageInternalError as error:
            raise storage_error(url, error.__cause__) from None
        finally:
            _close(storage)
        return True

    @staticmethod
    def is_seeded(url: URL, name: str) -> bool:
        """Whether the database holds an Optuna study of this name with all its seeds."""
        storage = _storage(url, skip_table_creation=True)
        try:
            return bool(storage.get_study_user_attrs(storage.get_study_id_from_name(name)).get(_SEEDED))
        except KeyError:
            return False
        except StorageInternalError as error:
            raise storage_error(url, error.__cause__) from None
        finally:
            _close(storage)

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
            told = trial.user_attrs.get("rank_map")
            rank_map = None if told is None else RankMap(json.loads(told))
            if self._proposed is not None and self._proposed[0] == trial.number:
                rank_map = self._proposed[1]
            return Claim(trial.number, dict(trial.params), trial.user_attrs.get("source"), rank_map)

    def complete(self, number: int, values: tuple[float, float], attrs: Mapping[str, Any]) -> None:
        """Tell Optuna a measurement; a trial that has ended already is left as it is."""
        self._finish(number, TrialState.COMPLETE, values, attrs)

    def fail(self, number: int, reason: str) -> None:
        """Tell Optuna that a trial failed; a trial that has ended already is left as it is."""
        self._finish(number, TrialState.FAIL, None, {"reason": reason})

    def enqueue(self, params: Params, attrs: Mapping[str, Any]) -> None:
        """Have ``params`` proposed before anything new is sampled."""
        with self._translated():
            self._study.enqueue_trial(dict(params), user_attrs=dict(attrs))

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in the given states. The caller must not change them."""
        with self._translated():
            return self._study.get_trials(deepcopy=False, states=states or None)

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
        _close(self._rdb)

    def _sign(self, trial: FrozenTrial) -> None:
        """Write who has claimed a trial, so that others know if this process dies over its sampling."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
        self._storage.set_trial_user_attr(trial_id, "worker", self._worker)

    def _keep(self, trial: FrozenTrial, rank_map: RankMap) -> None:
        """Write the rank map that a sampler proposes beside parameters that only stand near it."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
        self._storage.set_trial_user_attr(trial_id, "rank_map", rank_map_text(rank_map))
        self._proposed = trial.number, rank_map

    def _finish(
        self, number: int, state: TrialState, values: tuple[float, float] | None, attrs: Mapping[str, Any]
    ) -> None:
        if self.trial(number).state.is_finished():
            return
        with self._translated():
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
            try:
                for key, value in attrs.items():
                    self._storage.set_trial_user_attr(trial_id, key, value)
                self._study.tell(number, values, state, skip_if_finished=True)
            except UpdateFinishedTrialError:
                return  # another process has told the same measurement since

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with translated(self._url):
                yield
        except StorageInternalError as error:
            raise storage_error(self._url, error.__cause__ or error) from None


def _storage(url: URL, *, skip_table_creation: bool) -> RDBStorage:
    """Optuna's storage, on an engine set up as the project's own.

    Raises:
        StorageError: unreachable, or its Optuna tables are of a version that the installed Optuna cannot read.
    """
    try:
        with translated(url):
            storage = RDBStorage(
                url.render_as_string(hide_password=False),
                # Its constructor reads on two connections at once, which must not both be writers.
                engine_kwargs={**engine_kwargs(url), "execution_options": READ_ONLY},
                skip_table_creation=skip_table_creation,
            )
            storage.engine.update_execution_options(**WRITING)
            return storage
    except StorageInternalError as error:
        raise storage_error(url, error.__cause__ or error) from None
    except RuntimeError:
        # The one RuntimeError of Optuna's constructor is its check of the schema's version.
        raise StorageError(
            f"database {shown(url)} holds tables of another Optuna version than {optuna.__version__}; "
            "run `optuna storage upgrade`, or give another database"
        ) from None


def _close(storage: RDBStorage) -> None:
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
