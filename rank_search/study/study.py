"""A study: proposes rank maps, stores what came of them, survives the death of its workers. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState

from rank_search.allocation import Allocator
from rank_search.errors import StudyMismatchError, TrialError
from rank_search.front import Front
from rank_search.measurement import Measurement
from rank_search.ranks import RankMap
from rank_search.spec import StudySpec
from rank_search.study.engine import make_engine, parse_url
from rank_search.study.facts import StudyFacts
from rank_search.study.liveness import WorkerId
from rank_search.study.optuna_study import OptunaStudy
from rank_search.study.records import State
from rank_search.study.samplers import check_sampler
from rank_search.study.schema import ensure_schema, exclusive
from rank_search.study.space import GivenSeeds, SearchSpace, Seed, ladder, make_space
from rank_search.study.store import StudyStore, find_study

MAX_REQUEUES = 3
"""How often a trial whose worker died is proposed again; then it fails, for it may be what kills them."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A rank map to measure.

    Attributes:
        number: of the trial.
        rank_map: to measure.
        source: the sampler's name, or the seed it is.
        predicted_rise: of the loss over the dense model, nats per token.
    """

    number: int
    rank_map: RankMap
    source: str
    predicted_rise: float


class Study:
    """A study that is open for work; made by :meth:`open`.

    A measurement goes to the project's own tables first, with the front in one transaction, and to Optuna
    afterwards. What a process that died in between did not tell Optuna, :meth:`reconcile` tells it later.
    """

    def __init__(
        self,
        spec: StudySpec,
        allocator: Allocator,
        space: SearchSpace,
        store: StudyStore,
        optuna_study: OptunaStudy,
    ) -> None:
        self.name = spec.name
        self._spec = spec
        self._allocator = allocator
        self._space = space
        self._store = store
        self._optuna = optuna_study
        self._worker = str(WorkerId.current())

    @classmethod
    def open(
        cls, spec: StudySpec, storage_url: str, allocator: Allocator, facts: StudyFacts, given: GivenSeeds | None = None
    ) -> Self:
        """Create a study or go on with it.

        Args:
            given: the rank maps of seeds that are not the allocator's own, where :func:`given_seeds` asks for them.

        Raises:
            BudgetError: the ladder or the range of kept fractions cannot be met; nothing was made.
            StudyFileError: a sampler or a ladder that does not suit the space; nothing was made.
            StudyMismatchError: the stored study has another meaning or other facts; names the first field.
            StorageError: the database cannot be reached, written or understood.
        """
        check_sampler(spec.search)
        space, seeds = make_space(spec.search, allocator), ladder(spec.search, allocator)
        engine = make_engine(storage_url)
        try:
            ensure_schema(engine)
        finally:
            engine.dispose()
        with ExitStack() as opened:
            store = opened.enter_context(closing(StudyStore(storage_url)))
            with exclusive(store.engine):
                _create_or_check(store, spec, facts)
                optuna_study = OptunaStudy(store.engine.url, spec.search, spec.name, space, seeds)
                opened.enter_context(closing(optuna_study))
                optuna_study.prepare(spec.digest, given or {})
            study = cls(spec, allocator, space, store, optuna_study)
            study.reconcile()
            opened.pop_all()  # all went well: they stay open
        return study

    def ask(self) -> Proposal:
        """The next rank map: seeds first, then what was requeued, then what the sampler proposes."""
        claim = self._optuna.ask()
        rank_map = self._space.decode(claim.params) if claim.rank_map is None else claim.rank_map
        source = claim.source or self._spec.search.sampler
        self._store.begin_trial(self.name, claim.number, source, rank_map, self._worker)
        return Proposal(claim.number, rank_map, source, self._allocator.predicted_rise(rank_map))

    def tell(self, proposal: Proposal, measurement: Measurement) -> None:
        """Store what came of a proposal; telling twice keeps the first measurement.

        Raises:
            TrialError: an objective that is not a finite number; nothing was stored.
        """
        _objectives(measurement)
        stored = self._store.complete_trial(self.name, proposal.number, measurement)
        self._tell_optuna(proposal.number, proposal.rank_map, proposal.source, stored)

    def fail(self, proposal: Proposal, reason: str) -> None:
        """Store why a proposal could not be measured."""
        self._store.fail_trial(self.name, proposal.number, reason)
        self._optuna.fail(proposal.number, reason)

    def requeue(self, proposal: Proposal) -> None:
        """Give a proposal back unmeasured, to be proposed again under another number; it does not count as tried."""
        trial = self._optuna.trial(proposal.number)
        if not trial.state.is_finished():
            self._propose_again(trial, deaths=trial.user_attrs.get("deaths", 0), reason="interrupted")
            self._store.requeue_trial(self.name, proposal.number, "interrupted")
            self._optuna.fail(proposal.number, "interrupted; proposed again")

    def finished(self) -> int:
        """Trials that are complete or failed."""
        return self._store.finished(self.name)

    def front(self) -> Front:
        """The stored front."""
        return self._store.front(self.name)

    @property
    def dense_loss(self) -> float | None:
        """Validation loss of the dense model, nats per token, once it is known."""
        return self._store.study(self.name).dense_loss

    def set_dense_loss(self, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Store the validation loss of the dense model, nats per token, and its metrics."""
        self._store.set_dense_loss(self.name, loss, metrics)
        self._optuna.set_dense_loss(loss)

    def close(self) -> None:
        """Close all connections."""
        self._optuna.close()
        self._store.close()

    def reconcile(self) -> None:
        """Make Optuna and the project's tables agree, and propose again what dead workers left; done at opening.

        Optuna is told every stored end of a trial that it still takes for running. A running trial whose worker
        was a process of this host and has ended is proposed again, :data:`MAX_REQUEUES` times at most. Running
        trials of living workers and of other hosts are left alone.
        """
        with exclusive(self._store.engine):
            retried = {trial.user_attrs.get("retry_of") for trial in self._optuna.trials()}
            for trial in self._optuna.trials(TrialState.RUNNING):
                row = self._store.trial(self.name, trial.number)
                if row is not None and row.measurement is not None:
                    self._tell_optuna(row.number, row.rank_map, row.source, row.measurement)
                elif row is not None and row.state is not State.RUNNING:
                    self._optuna.fail(row.number, row.reason or row.state)
                else:
                    worker = trial.user_attrs.get("worker") if row is None else row.worker
                    if worker is not None and WorkerId.parse(worker).is_dead():
                        self._bury(trial, worker, stored=row is not None, retried=trial.number in retried)

    def _bury(self, trial: FrozenTrial, worker: str, *, stored: bool, retried: bool) -> None:
        """End a trial whose worker died. ``stored``: it has a row; ``retried``: it waits again already."""
        deaths = trial.user_attrs.get("deaths", 0) + 1
        reason = f"worker {worker} died"
        again = deaths <= MAX_REQUEUES
        if again and not retried:
            self._propose_again(trial, deaths, reason)
        if not again:
            reason = f"its workers died {deaths} times, last {worker}; see their memory and logs"
        if stored:
            end = self._store.requeue_trial if again else self._store.fail_trial
            end(self.name, trial.number, reason)
        self._optuna.fail(trial.number, reason)

    def _propose_again(self, trial: FrozenTrial, deaths: int, reason: str) -> None:
        params = trial.system_attrs.get("fixed_params") or trial.params
        if params:  # without any, nothing was sampled yet
            source = trial.user_attrs.get("source", self._spec.search.sampler)
            attrs = {"source": source, "deaths": deaths, "retry_of": trial.number, "retried_because": reason}
            if "rank_map" in trial.user_attrs:
                attrs["rank_map"] = trial.user_attrs["rank_map"]
            self._optuna.enqueue(params, attrs)

    def _tell_optuna(self, number: int, rank_map: RankMap, source: str, measurement: Measurement) -> None:
        attrs: dict[str, Any] = {
            "rank_map": json.dumps(dict(rank_map)),
            "kept_of_targets": measurement.kept_of_targets,
            "source": source,
            "fidelity": measurement.fidelity.label,
            "seconds": measurement.seconds,
        }
        if math.isfinite(measurement.perplexity):
            attrs["perplexity"] = measurement.perplexity
        attrs |= {f"metric {name}": value for name, value in measurement.metrics.items() if math.isfinite(value)}
        if measurement.fold_deviation is not None:
            attrs["fold_deviation"] = measurement.fold_deviation
        self._optuna.complete(number, _objectives(measurement), attrs)


def given_seeds(spec: StudySpec, storage_url: str, allocator: Allocator) -> tuple[Seed, ...]:
    """The seeds whose rank maps :meth:`Study.open` has to be given: none once the study has all its seeds.

    Raises:
        BudgetError: a kept fraction of the ladder cannot be met.
        StorageError: the database cannot be reached or understood. Nothing is made or changed.
    """
    seeds = tuple(seed for seed in ladder(spec.search, allocator) if not seed.is_own)
    if not seeds or find_study(storage_url, spec.name) is None:
        return seeds
    return () if OptunaStudy.is_seeded(parse_url(storage_url), spec.name) else seeds


def _objectives(measurement: Measurement) -> tuple[float, float]:
    """Validation loss and parameter count as floats, which is what Optuna minimises."""
    values = float(measurement.loss), float(measurement.num_params)
    if not all(math.isfinite(value) for value in values):
        raise TrialError(f"objectives must be finite numbers, not {values}")
    return values


def _create_or_check(store: StudyStore, spec: StudySpec, facts: StudyFacts) -> None:
    """Store a new study, or check that the stored one means the same; under the database's lock."""
    if spec.name not in store.studies():
        if OptunaStudy.exists(store.engine.url, spec.name):
            raise StudyMismatchError(
                f"the database holds an Optuna study {spec.name!r} that rank-search did not make; choose another name"
            )
        store.add_study(spec, facts)
        return
    stored = store.study(spec.name)
    spec.check_same_meaning(stored.spec)
    facts.check_same(stored.facts, spec.name)
    if stored.spec != spec:
        store.update_spec(spec)
