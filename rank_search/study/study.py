"""A study: proposes rank maps, stores what came of them, survives the death of its workers. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Self

from optuna.trial import FrozenTrial, TrialState

from rank_search.allocation import Allocator
from rank_search.climbing import Climbs, Step, paired_error
from rank_search.errors import ExhaustedError, StudyMismatchError, TrialError
from rank_search.front import Front
from rank_search.measurement import Measurement
from rank_search.ranks import RankMap
from rank_search.spec import StudySpec
from rank_search.stop_rules import StopRules
from rank_search.study.engine import make_engine, parse_url
from rank_search.study.facts import StudyFacts
from rank_search.study.liveness import WorkerId
from rank_search.study.mutation import rank_map_text, told_rank_map
from rank_search.study.optuna_study import PREDICTED_RISE, Claim, OptunaStudy
from rank_search.study.records import MEASURED, Effort, State, TrialRecord
from rank_search.study.samplers import check_sampler
from rank_search.study.schema import ensure_schema, exclusive
from rank_search.study.space import GivenSeeds, SearchSpace, Seed, ladder, make_space, random_params
from rank_search.study.store import StudyStore, find_study
from rank_search.study.warm_start import Carried

MAX_REQUEUES = 3
"""How often a trial whose worker died is proposed again; then it fails, for it may be what kills them."""

MAX_SKIPS = 48
"""Proposals in a row that another trial has already, or that are too large, before the study counts as exhausted."""

SAMPLED_SKIPS = 16
"""So many of them are the sampler's; the others are drawn evenly from the space."""

RANDOM = "random"
"""Source of proposals that are drawn evenly."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A rank map to measure.

    Attributes:
        number: of the trial.
        rank_map: to measure.
        source: the sampler's name, or the seed it is.
        predicted_rise: of the loss over the dense model, nats per token.
        known: measurements on the first rungs, from an earlier attempt or from the pruned trial that it continues.
        prunable: it may end on a rung below the top; seeds and promoted trials may not.
        promotes: the number of the pruned trial that it continues.
    """

    number: int
    rank_map: RankMap
    source: str
    predicted_rise: float
    known: tuple[Measurement, ...] = ()
    prunable: bool = False
    promotes: int | None = None


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
        self._climbs = Climbs()
        self._last_step = 0

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

    def ask(self, left: int | None = None) -> Proposal:
        """The next rank map: seeds first, then what was requeued, then what the sampler proposes.

        No rank map is proposed twice: a trial whose rank map another one has, running ones included, is told that
        one's measurement and skipped.

        Args:
            left: trials that the study has left. When no more are left than there are pruned trials that would be on
                the front by prediction, these are proposed instead, for the fidelities they have not reached.

        Raises:
            ExhaustedError: :data:`MAX_SKIPS` proposals in a row were skipped.
        """
        if left is not None:
            self._promote(left)
        last = -1
        for skips in range(MAX_SKIPS):
            if skips >= SAMPLED_SKIPS:
                self._enqueue_random(last)
            claim = self._optuna.ask()
            last = claim.number
            rank_map = self._space.decode(claim.params) if claim.rank_map is None else claim.rank_map
            record = self._begin(claim, rank_map, may_refuse=skips < SAMPLED_SKIPS)
            if record.state is State.RUNNING:
                return self._proposal(claim, record)
            self._end_in_optuna(record)
        raise ExhaustedError(
            f"study {self.name!r} has had every rank map of {MAX_SKIPS} proposals in a row already; widen its [search]"
        )

    def report(self, proposal: Proposal, rung: int, measurement: Measurement) -> bool:
        """Store what a trial has on a rung below the top, and tell whether it goes on; if not, it ends as pruned."""
        if not proposal.prunable:
            self._store.add_measurement(self.name, proposal.number, rung, measurement)
            return True
        self._catch_up()
        step = Step(proposal.number, rung, measurement.loss, measurement.kept_of_targets, measurement.num_params)
        rival = self._climbs.rival(step.num_params)
        theirs = () if rival is None else self._store.block_losses(self.name, rival.trial, rung)
        error = paired_error(measurement.block_losses, theirs)
        if self._climbs.goes_on(step, error=error, max_loss=self._spec.search.max_loss):
            self._store.add_measurement(self.name, proposal.number, rung, measurement)
            return True
        self._store.prune_trial(self.name, proposal.number, rung, measurement)
        self._prune_in_optuna(proposal.number, proposal.rank_map, proposal.source, measurement)
        return False

    def tell(self, proposal: Proposal, measurement: Measurement, rung: int = 0) -> State:
        """Store what came of a proposal on the top rung; telling twice keeps the first measurement.

        Returns:
            Whether the trial is complete, or infeasible because it misses a goal of the study.

        Raises:
            TrialError: an objective that is not a finite number; nothing was stored.
        """
        _objectives(measurement)
        missed = self._missed(measurement)
        stored = self._store.complete_trial(self.name, proposal.number, measurement, rung=rung, infeasible=missed)
        self._complete_in_optuna(proposal.number, proposal.rank_map, proposal.source, stored)
        return State.COMPLETE if missed is None else State.INFEASIBLE

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
        """Trials that count towards the number wanted."""
        return self._store.finished(self.name)

    def effort(self) -> Effort:
        """What the study has cost so far."""
        return self._store.effort(self.name)

    def stop_reason(self, rules: StopRules, wall: float, spent: float) -> str | None:
        """The first of the rules that is met, in words; ``wall`` and ``spent`` as in :meth:`StopRules.of_times`."""
        found = rules.of_times(wall, spent)
        if found is None and rules.needs_front:
            found = rules.of_front(self.front())
        if found is None and rules.needs_outcomes:
            found = rules.of_outcomes(self._store.outcomes(self.name), self._allocator.space.model_params)
        return found

    def set_stop_reason(self, reason: str | None) -> None:
        """Store why the search has stopped; None while it is at work."""
        self._store.set_stop_reason(self.name, reason)

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

    def warm_start(self, carried: Iterable[Carried]) -> int:
        """Have rank maps of another study measured before anything new is sampled, but for those it had already.

        Returns:
            How many are new.
        """
        with exclusive(self._store.engine):
            present = {trial.user_attrs.get("source") for trial in self._optuna.trials()}
            new = [one for one in carried if one.source not in present]
            for one in new:
                params, attrs = self._space.nearest(one.kept, one.rank_map), {"source": one.source}
                if self._space.decode(params) != one.rank_map:
                    attrs["rank_map"] = rank_map_text(one.rank_map)
                self._optuna.enqueue(params, attrs)
        return len(new)

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
                if row is not None and row.state is not State.RUNNING:
                    self._end_in_optuna(row)
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
            attrs |= {"promotes": trial.user_attrs["promotes"]} if "promotes" in trial.user_attrs else {}
            if (told := told_rank_map(trial)) is not None:
                attrs["rank_map"] = told
            self._optuna.enqueue(params, attrs)

    # Proposing

    def _begin(self, claim: Claim, rank_map: RankMap, *, may_refuse: bool) -> TrialRecord:
        most, size = self._spec.search.max_params, self._allocator.space.num_params(rank_map)
        too_large = may_refuse and claim.source is None and most is not None and size > most
        refused = f"{size:,} parameters, above search.max_params ({most:,})" if too_large else None
        return self._store.begin_trial(
            self.name, claim.number, claim.source or self._spec.search.sampler, rank_map, self._worker,
            continues=claim.retry_of, promotes=claim.promotes, refused=refused,
        )  # fmt: skip

    def _proposal(self, claim: Claim, record: TrialRecord) -> Proposal:
        known: tuple[Measurement, ...] = ()
        if claim.promotes is not None:
            known = self._store.measurements(self.name, claim.promotes)
        if claim.retry_of is not None:
            known += self._store.measurements(self.name, claim.number)
        prunable = claim.promotes is None and record.source in {self._spec.search.sampler, RANDOM}
        rise = self._allocator.predicted_rise(record.rank_map)
        return Proposal(claim.number, record.rank_map, record.source, rise, known, prunable, claim.promotes)

    def unsettled(self) -> list[int]:
        """Numbers of the pruned trials that would be on the front by prediction, the most promising first; where there
        are none, the front is settled."""
        pruned = self._store.unpromoted(self.name) if self._spec.search.fidelities is not None else []
        if not pruned:
            return []
        self._catch_up()
        return self._climbs.promising(pruned, max_loss=self._spec.search.max_loss)

    def _promote(self, left: int) -> None:
        """Have the most promising pruned trial proposed again, if the study has to come to that now."""
        promising = self.unsettled()
        if promising and left <= len(promising):
            trial, record = self._optuna.trial(promising[0]), self._store.trial(self.name, promising[0])
            assert record is not None
            attrs = {"source": record.source, "rank_map": rank_map_text(record.rank_map), "promotes": record.number}
            self._optuna.enqueue(trial.params, attrs)

    def _enqueue_random(self, after: int) -> None:
        params = random_params(self._space.distributions, f"{self._spec.search.seed}:{after}")
        self._optuna.enqueue(params, {"source": RANDOM})

    def _catch_up(self) -> None:
        """Take in what all workers have measured since."""
        steps, self._last_step = self._store.steps(self.name, self._last_step)
        self._climbs.add(steps)

    # Telling Optuna

    def _end_in_optuna(self, record: TrialRecord) -> None:
        """Tell Optuna the end that a trial has in the project's tables; of a skipped one, that of its equal."""
        equal = record if record.same_as is None else self._store.trial(self.name, record.same_as)
        assert equal is not None  # same_as names a trial of this study, and trials are never deleted
        measured = equal.measurement
        same = {} if record.same_as is None else {"same_as": record.same_as}
        if measured is not None and equal.state is State.PRUNED:
            self._prune_in_optuna(record.number, record.rank_map, record.source, measured, same)
        elif measured is not None and equal.state in MEASURED:
            self._complete_in_optuna(record.number, record.rank_map, record.source, measured, same)
        elif record.state is State.SKIPPED and record.same_as is None:
            size = self._allocator.space.num_params(record.rank_map)
            excess = {"parameters": float(size - (self._spec.search.max_params or size))}
            self._optuna.prune(record.number, {"source": record.source, "reason": record.reason}, excess)
        else:
            self._optuna.fail(record.number, record.reason or record.state)

    def _complete_in_optuna(
        self, number: int, rank_map: RankMap, source: str, measured: Measurement, more: Mapping[str, Any] | None = None
    ) -> None:
        rise = {PREDICTED_RISE: self._allocator.predicted_rise(rank_map)}
        attrs = _attributes(rank_map, source, measured) | rise | dict(more or {})
        self._optuna.complete(number, _objectives(measured), attrs, self._excess(measured))

    def _prune_in_optuna(
        self, number: int, rank_map: RankMap, source: str, measured: Measurement, more: Mapping[str, Any] | None = None
    ) -> None:
        attrs = {f"{measured.fidelity.label} loss": measured.loss, "tokens": measured.tokens}
        self._optuna.prune(number, _attributes(rank_map, source, measured) | attrs | dict(more or {}))

    def _excess(self, measured: Measurement) -> dict[str, float]:
        """By how much each of the study's goals is missed, at most 0 where it is met."""
        goals, excess = self._spec.search, {}
        if goals.max_params is not None:
            excess["parameters"] = float(measured.num_params - goals.max_params)
        if goals.max_loss is not None:
            excess["loss"] = measured.loss - goals.max_loss
        return excess

    def _missed(self, measured: Measurement) -> str | None:
        """The goals that are missed, in words."""
        goals, excess = self._spec.search, self._excess(measured)
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
