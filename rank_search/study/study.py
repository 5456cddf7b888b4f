"""A study: proposes rank maps, stores what came of them, survives the death of its workers. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rank_search.allocation import Allocator
from rank_search.climbing import Climbs, Step, paired_error
from rank_search.errors import (
    CrowdedError,
    ExhaustedError,
    StorageError,
    StudyMismatchError,
    UnavailableError,
)
from rank_search.front import Front
from rank_search.measurement import Measurement
from rank_search.ranges import bank_cuts
from rank_search.ranks import RankMap
from rank_search.spec import StudySpec
from rank_search.stop_rules import StopRules
from rank_search.study.engine import make_engine, parse_url
from rank_search.study.evidence import Evidence
from rank_search.study.facts import StudyFacts
from rank_search.study.heartbeat import Heartbeat
from rank_search.study.hosts import refuse_hosts_beside
from rank_search.study.leases import Leases
from rank_search.study.liveness import WorkerId
from rank_search.study.mutation import rank_map_text
from rank_search.study.optuna_study import Claim, OptunaStudy
from rank_search.study.patience import Patience
from rank_search.study.records import Effort, State, TrialRecord
from rank_search.study.recovery import Recovery
from rank_search.study.requests import Action, asked_of_workers, mark_taken
from rank_search.study.samplers import check_sampler
from rank_search.study.schema import ensure_schema, exclusive
from rank_search.study.space import GivenSeeds, SearchSpace, Seed, ladder, make_space, random_params
from rank_search.study.spool import Spool
from rank_search.study.store import StudyStore, find_study
from rank_search.study.storing import Storing
from rank_search.study.telling import Telling, objectives
from rank_search.study.warm_start import Carried

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
        patience: Patience,
        spool: Spool | None,
    ) -> None:
        self.name = spec.name
        self._spec = spec
        self._allocator = allocator
        self._space = space
        self._store = store
        self._optuna = optuna_study
        self._worker = str(WorkerId.current())
        self._patience = patience
        self._leases = Leases(store.engine, self._worker, spec.run.lease_seconds)
        self._heartbeat = Heartbeat(
            store.engine, self._worker, spec.run.lease_seconds, lambda leases: leases.renew(spec.name)
        )
        self._telling = Telling(spec.name, spec.search, allocator, store, optuna_study)
        self._storing = Storing(spec.name, self._worker, store, patience, self._telling.missed, spool)
        self._recovery = Recovery(
            spec.name, store, optuna_study, self._leases, self._heartbeat, patience, spec.search.sampler,
            self._storing.replay, self._telling.end,
        )  # fmt: skip
        self._climbs = Climbs()
        self._last_step = 0

    @classmethod
    def open(
        cls, spec: StudySpec, storage_url: str, allocator: Allocator, facts: StudyFacts,
        given: GivenSeeds | None = None, *, spool: Path | None = None, patience: Patience | None = None,
    ) -> Self:  # fmt: skip
        """Create a study or go on with it.

        Args:
            given: the rank maps of seeds that are not the allocator's own, where :func:`given_seeds` asks for them.
            spool: folder for results that the database does not take; None keeps none.
            patience: with a database that is away once the study is open, and with a crowded one before that, too; None
                has none.

        Raises:
            BudgetError: the ladder or the range of kept fractions cannot be met; nothing was made.
            StudyFileError: a sampler or a ladder that does not suit the space; nothing was made.
            StudyMismatchError: the stored study has another meaning or other facts; names the first field.
            StorageError: the database cannot be reached, written or understood, or is an SQLite file that another
                host's workers are at.
        """
        check_sampler(spec.search)
        space, seeds = make_space(spec.search, allocator), ladder(spec.search, allocator)
        patience = patience or Patience()
        kept = None if spool is None else Spool(spool, spec.name)

        return patience.keep_trying(
            lambda: cls._open(spec, storage_url, allocator, facts, given or {}, space, seeds, kept, patience),
            CrowdedError,
        )

    @classmethod
    def _open(
        cls, spec: StudySpec, storage_url: str, allocator: Allocator, facts: StudyFacts, given: GivenSeeds,
        space: SearchSpace, seeds: tuple[Seed, ...], spool: Spool | None, patience: Patience,
    ) -> Self:  # fmt: skip
        engine = make_engine(storage_url)
        try:
            ensure_schema(engine)
        finally:
            engine.dispose()
        with ExitStack() as opened:
            store = opened.enter_context(closing(StudyStore(storage_url, keeps=1)))
            with exclusive(store.engine):
                _create_or_check(store, spec, facts)
                evidence = Evidence(store.engine, spec.name)
                optuna_study = OptunaStudy(
                    store.engine.url, spec.search, spec.name, space, seeds, evidence, bank_cuts(spec, allocator.space)
                )
                opened.enter_context(closing(optuna_study))
                optuna_study.prepare(spec.digest, given)
                study = cls(spec, allocator, space, store, optuna_study, patience, spool)
                opened.pop_all()
                opened.callback(study.close)
                study._leases.join(spec.name)
                try:
                    refuse_hosts_beside(store, spec.name)  # of two that start at once, the lock lets one be first
                except StorageError:
                    study._leases.leave(spec.name)  # before the next one looks
                    raise
            study.reconcile()
            study._heartbeat.start()
            opened.pop_all()  # all went well: it stays open
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
        return self._patience.keep_trying(lambda: self._ask(left))

    def _ask(self, left: int | None) -> Proposal:
        self._recovery.sweep()
        if left is not None:
            self._promote(left)
        last = -1
        for skips in range(MAX_SKIPS):
            if skips >= SAMPLED_SKIPS:
                self._enqueue_random(last)
            claim = self._optuna.ask()
            last = claim.number
            rank_map = self._space.decode(claim.params) if claim.rank_map is None else claim.rank_map
            try:
                record = self._begin(claim, rank_map, may_refuse=skips < SAMPLED_SKIPS)
                if record.state is State.RUNNING:
                    return self._proposal(claim, record)
                self._telling.end(record)
            except UnavailableError:
                self._recovery.cut_off(claim.number)
                raise
        raise ExhaustedError(
            f"study {self.name!r} has had every rank map of {MAX_SKIPS} proposals in a row already; widen its [search]"
        )

    def report(self, proposal: Proposal, rung: int, measurement: Measurement) -> bool:
        """Store what a trial has on a rung below the top, and tell whether it goes on; if not, it ends as pruned.

        Raises:
            LeaseLostError: the trial was taken from this worker.
        """
        keep_trying, this = self._patience.keep_trying, (self.name, proposal.number, rung, measurement)
        if not proposal.prunable or keep_trying(lambda: self._goes_on(proposal, rung, measurement)):
            keep_trying(lambda: self._store.add_measurement(*this))
            return True
        keep_trying(lambda: self._store.prune_trial(*this))
        keep_trying(lambda: self._telling.prune(proposal.number, proposal.rank_map, proposal.source, measurement))
        return False

    def _goes_on(self, proposal: Proposal, rung: int, measurement: Measurement) -> bool:
        self._catch_up()
        step = Step(proposal.number, rung, measurement.loss, measurement.kept_of_targets, measurement.num_params)
        rival = self._climbs.rival(step.num_params)
        theirs = () if rival is None else self._store.block_losses(self.name, rival.trial, rung)
        error = paired_error(measurement.block_losses, theirs)
        return self._climbs.goes_on(step, error=error, max_loss=self._spec.search.max_loss)

    def tell(self, proposal: Proposal, measurement: Measurement, rung: int = 0) -> State:
        """Store what came of a proposal on the top rung; telling twice keeps the first measurement.

        What the database does not take is spooled first, and told again until it does. Whoever opens the study later
        tells it, too.

        Returns:
            Whether the trial is complete, or infeasible because it misses a goal of the study.

        Raises:
            TrialError: an objective that is not a finite number; nothing was stored.
            LeaseLostError: the trial was taken from this worker; nothing was stored.
        """
        objectives(measurement)
        missed = self._telling.missed(measurement)
        stored = self._storing.complete(proposal.number, proposal.rank_map.digest, rung, measurement)
        self._patience.keep_trying(
            lambda: self._telling.complete(proposal.number, proposal.rank_map, proposal.source, stored)
        )
        return State.COMPLETE if missed is None else State.INFEASIBLE

    def fail(self, proposal: Proposal, reason: str) -> None:
        """Store why a proposal could not be measured."""
        self._patience.keep_trying(lambda: self._store.fail_trial(self.name, proposal.number, reason))
        self._patience.keep_trying(lambda: self._optuna.fail(proposal.number, reason))

    def requeue(self, proposal: Proposal, death: str | None = None) -> None:
        """Give a proposal back unmeasured, to be proposed again under another number; it does not count as tried.

        A trial that ended just before is not given back: Optuna is told how. Nor is one whose result is on disk: it is
        stored, or the trial is left as it is until it can be. Where the database is away, the trial's lease is left to
        run out.

        Args:
            death: what this worker dies of; then the proposal counts as one that a worker died over.
        """
        try:
            if not self._storing.complete_kept(proposal.number):
                return
            row = self._store.trial(self.name, proposal.number)
            if row is not None and row.state is not State.RUNNING:
                self._telling.end(row)
                return
            trial = self._optuna.trial(proposal.number)
            if trial.state.is_finished():
                return
            if death is not None:
                self._recovery.bury(trial, death, row)
                return
            self._recovery.propose_again(trial, trial.user_attrs.get("deaths", 0), "interrupted")
            self._store.requeue_trial(self.name, proposal.number, "interrupted")
            self._optuna.fail(proposal.number, "interrupted; proposed again")
        except UnavailableError as error:
            self._patience.say(
                f"trial {proposal.number} could not be given back, it is proposed again when its lease has run out: "
                f"{error}"
            )

    def finished(self) -> int:
        """Trials that count towards the number wanted."""
        return self._patience.keep_trying(lambda: self._store.finished(self.name))

    def effort(self, *, with_seconds: bool = True) -> Effort:
        """What the study has cost so far; its seconds, for which all measurements are read, only if asked for."""
        return self._patience.keep_trying(lambda: self._store.effort(self.name, with_seconds=with_seconds))

    def stop_reason(self, rules: StopRules, wall: float, spent: float) -> str | None:
        """The first of the rules that is met, in words; ``wall`` and ``spent`` as in :meth:`StopRules.of_times`."""
        return self._patience.keep_trying(lambda: self._stop_reason(rules, wall, spent))

    def _stop_reason(self, rules: StopRules, wall: float, spent: float) -> str | None:
        found = rules.of_times(wall, spent)
        if found is None and rules.needs_front:
            found = rules.of_front(self._store.front(self.name))
        if found is None and rules.needs_outcomes:
            found = rules.of_outcomes(self._store.outcomes(self.name), self._allocator.space.model_params)
        return found

    def set_stop_reason(self, reason: str | None) -> None:
        """Store why the search has stopped; None while it is at work."""
        self._patience.keep_trying(lambda: self._store.set_stop_reason(self.name, reason))

    def front(self) -> Front:
        """The stored front."""
        return self._patience.keep_trying(lambda: self._store.front(self.name))

    @property
    def dense_loss(self) -> float | None:
        """Validation loss of the dense model, nats per token, once it is known."""
        return self._patience.keep_trying(lambda: self._store.study(self.name)).dense_loss

    def set_dense_loss(self, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Store the validation loss of the dense model, nats per token, and its metrics."""
        self._patience.keep_trying(lambda: self._store.set_dense_loss(self.name, loss, metrics))
        self._patience.keep_trying(lambda: self._optuna.set_dense_loss(loss))

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

    def take_requests(self) -> Action:
        """Put the rank maps that people queued among the trials that wait, and return what workers are to do."""
        return self._patience.keep_trying(self._take_requests)

    def _take_requests(self) -> Action:
        engine, space = self._store.engine, self._allocator.space
        action, queued = asked_of_workers(engine, self.name)
        if queued:
            self.warm_start(Carried(one.source, space.kept_of_targets(one.rank_map), one.rank_map) for one in queued)
            mark_taken(engine, queued)
        return action

    def close(self) -> None:
        """Give up the worker's own lease, and close all connections."""
        self._heartbeat.stop()
        with suppress(StorageError):  # it runs out by itself
            self._leases.leave(self.name)
        self._optuna.close()
        self._store.close()

    def reconcile(self) -> None:
        """As :meth:`Recovery.reconcile`; done at opening, and between trials where somebody is gone."""
        self._recovery.reconcile()

    # Proposing

    def _begin(self, claim: Claim, rank_map: RankMap, *, may_refuse: bool) -> TrialRecord:
        most, size = self._spec.search.max_params, self._allocator.space.num_params(rank_map)
        too_large = may_refuse and claim.source is None and most is not None and size > most
        refused = f"{size:,} parameters, above search.max_params ({most:,})" if too_large else None
        return self._store.begin_trial(
            self.name, claim.number, claim.source or self._spec.search.sampler, rank_map, self._worker,
            lease_seconds=self._leases.seconds, attempt=claim.deaths + 1, continues=claim.retry_of,
            promotes=claim.promotes, refused=refused,
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
        return self._patience.keep_trying(self._unsettled)

    def _unsettled(self) -> list[int]:
        pruned = self._store.unpromoted(self.name) if self._spec.search.fidelities is not None else []
        if not pruned:
            return []
        self._catch_up()
        return self._climbs.promising(pruned, max_loss=self._spec.search.max_loss)

    def _promote(self, left: int) -> None:
        """Have the most promising pruned trial proposed again, if the study has to come to that now."""
        promising = self._unsettled()
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
