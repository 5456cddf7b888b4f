"""What dead, silent and cut-off workers leave behind: found, and proposed again. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial, TrialState

from rank_search.study.heartbeat import Heartbeat
from rank_search.study.leases import Lease, Leases
from rank_search.study.liveness import UNKNOWN, WorkerId
from rank_search.study.mutation import told_rank_map
from rank_search.study.optuna_study import OptunaStudy
from rank_search.study.patience import Patience
from rank_search.study.records import State, TrialRecord
from rank_search.study.schema import exclusive
from rank_search.study.store import StudyStore

MAX_REQUEUES = 3
"""How often a trial whose worker died is proposed again; then it fails, for it may be what kills them."""

SWEEP_SECONDS = 5.0
"""A worker looks for leases that have run out when so much time has passed, between two trials."""


@dataclass
class Recovery:
    """The recovery of one study, as one worker sees it.

    A trial is taken from its worker when that was a process of this host and has ended, or when its lease has run out.
    Leases run out, too, while the database is away. So after an outage, and after its own start, a worker takes nothing
    for as long as a lease lasts; unless a lease ran out so long ago that its holder has given up by itself.

    Args:
        sampler: source of proposals that name none.
        replay: stores the results that are kept on disk.
        end_in_optuna: tells Optuna the end that a trial has in the project's tables.
    """

    name: str
    store: StudyStore
    optuna: OptunaStudy
    leases: Leases
    heartbeat: Heartbeat
    patience: Patience
    sampler: str
    replay: Callable[[], None]
    end_in_optuna: Callable[[TrialRecord], None]
    _cut_off: set[int] = field(default_factory=set)
    _outages: int = 0
    _due: float = 0.0

    def cut_off(self, number: int) -> None:
        """Note a claim of this worker's that it does not know the fate of, for the connection broke over it."""
        self._cut_off.add(number)

    def sweep(self) -> None:
        """Now and then, and after every outage: see whether somebody is gone, and if so, :meth:`reconcile`."""
        if self._outages != self.patience.outages:
            self.reconcile()
            self._outages = self.patience.outages
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + min(SWEEP_SECONDS, self.leases.seconds / 2)
            if any(self._why_gone(lease.holder, lease) for lease in self.leases.of_study(self.name)):
                self.reconcile()

    def reconcile(self) -> None:
        """Make Optuna and the project's tables agree, and propose again what nobody works on any more.

        Results that are kept on disk are stored first. Optuna is told every stored end of a trial that it still takes
        for running. A running trial whose worker is gone is proposed again, :data:`MAX_REQUEUES` times at most.
        """
        self.replay()
        with exclusive(self.store.engine):
            leases = self.leases.of_study(self.name)
            of_trials = {lease.trial: lease for lease in leases if lease.trial is not None}
            of_workers = {lease.holder: lease for lease in leases if lease.trial is None}
            running = self.optuna.trials(TrialState.RUNNING)
            for trial in running:
                row = self.store.trial(self.name, trial.number)
                if row is not None and row.state is not State.RUNNING:
                    self.end_in_optuna(row)
                else:
                    self._look_at(trial, row, of_trials, of_workers)
            self._cut_off.clear()
            for number in of_trials.keys() - {trial.number for trial in running}:
                self.leases.drop(self.name, number)  # granted before its worker had a row for it, and skipped it
            for holder, lease in of_workers.items():
                if self._why_gone(holder, lease):
                    self.leases.leave(self.name, holder)

    def _look_at(
        self, trial: FrozenTrial, row: TrialRecord | None, of_trials: Mapping[int, Lease],
        of_workers: Mapping[str, Lease],
    ) -> None:  # fmt: skip
        """Decide on a trial that runs, or that was claimed and has no row yet."""
        worker = trial.user_attrs.get("worker") if row is None else row.worker
        is_mine = worker == self.leases.holder
        if is_mine and (row is None or trial.number in self._cut_off):
            self._end(trial, "its claim was cut off from the database", trial.user_attrs.get("deaths", 0), row)
            return
        # A trial without a row is sampled; it has no lease yet, but its worker has.
        lease = of_trials.get(trial.number) or (None if worker is None or row is not None else of_workers.get(worker))
        why = self._why_gone(worker, lease)
        if why is not None:
            self.bury(trial, why, row)
        elif lease is None:
            self.leases.grant(self.name, trial.number, worker or UNKNOWN)

    def bury(self, trial: FrozenTrial, why: str, row: TrialRecord | None) -> None:
        """End a trial whose worker is gone, and propose it again unless it has had enough of them."""
        deaths = trial.user_attrs.get("deaths", 0) + 1
        if deaths > MAX_REQUEUES:
            why = f"its workers died {deaths} times, last: {why}; see their memory and logs"
        self._end(trial, why, deaths, row)

    def _end(self, trial: FrozenTrial, why: str, deaths: int, row: TrialRecord | None) -> None:
        again = deaths <= MAX_REQUEUES
        if again and not self.optuna.is_retried(trial.number):
            self.propose_again(trial, deaths, why)
        if row is not None:
            end = self.store.requeue_trial if again else self.store.fail_trial
            end(self.name, trial.number, why)
        else:
            self.leases.drop(self.name, trial.number)
        self.optuna.fail(trial.number, why)

    def propose_again(self, trial: FrozenTrial, deaths: int, why: str) -> None:
        """Enqueue a trial's rank map; ``deaths``: of its workers so far."""
        params = trial.system_attrs.get("fixed_params") or trial.params
        if params:  # without any, nothing was sampled yet
            source = trial.user_attrs.get("source", self.sampler)
            attrs = {"source": source, "deaths": deaths, "retry_of": trial.number, "retried_because": why}
            attrs |= {"promotes": trial.user_attrs["promotes"]} if "promotes" in trial.user_attrs else {}
            if (told := told_rank_map(trial)) is not None:
                attrs["rank_map"] = told
            self.optuna.enqueue(params, attrs)

    def _why_gone(self, worker: str | None, lease: Lease | None) -> str | None:
        """In words, why what a worker holds may be taken from it; None if it may not."""
        if worker == self.leases.holder:
            return None
        if worker is not None and WorkerId.parse(worker).is_dead():
            return f"worker {worker} died"
        if lease is None or not lease.has_run_out:
            return None
        # A lease that runs out by the database's clock may have had no chance to be renewed.
        if self.heartbeat.steady_seconds() < lease.seconds and -lease.left < self.patience.seconds:
            return None
        return f"worker {worker or 'unknown'} was silent for {lease.age:.0f} s"
