"""Samplers by name, seeded trial by trial. No torch, except what Optuna's own GP sampler loads."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from rank_search.errors import StudyFileError
from rank_search.ranks import RankMap
from rank_search.spec import SearchSpec
from rank_search.study.evidence import Tried
from rank_search.study.fitted import FittedSampler, Rises
from rank_search.study.moves import Moves
from rank_search.study.mutation import MutationSampler
from rank_search.study.space import MultiplierSpace, SearchSpace

POPULATION = 16
"""Population of the genetic samplers: Optuna's 50 would leave a study of 40 trials all random."""


def check_sampler(search: SearchSpec) -> None:
    """Refuse a sampler that cannot work in the study's space, and seeds that cannot be made.

    Raises:
        StudyFileError: a Gaussian process without its library, or over one whole number a layer, where its
            coordinate search takes minutes to hours a trial; mutation over anything but rank maps; multipliers fitted
            where there are none; a number of depth buckets for a space that has none.
    """
    if search.sampler == "mutation" and search.space != "direct":
        raise StudyFileError(
            f"search.sampler = 'mutation' changes whole rank maps, not the numbers of search.space = {search.space!r}; "
            "take space = 'direct', or sampler = 'fitted'"
        )
    if search.sampler == "fitted" and search.space == "direct":
        raise StudyFileError(
            "search.sampler = 'fitted' fits multipliers, of which search.space = 'direct' has none; "
            "take space = 'multipliers', or sampler = 'mutation'"
        )
    if search.depth_buckets is not None and search.space == "direct":
        raise StudyFileError(
            "search.depth_buckets goes with search.space = 'groups' or 'multipliers', not with 'direct'; leave it out"
        )
    if search.sampler == "gp" and search.space == "direct":
        raise StudyFileError(
            "search.sampler = 'gp' needs minutes to hours a trial with search.space = 'direct'; "
            "take space = 'multipliers', or sampler = 'tpe' or 'nsga2'"
        )
    if search.sampler == "gp":
        require_scipy("search.sampler = 'gp'")
    if "bolaco" in search.seeds:
        require_scipy("search.seeds with 'bolaco'")


def require_scipy(what: str) -> None:
    """Refuse ``what`` where Optuna's Gaussian process cannot run.

    Raises:
        StudyFileError: scipy is missing.
    """
    if importlib.util.find_spec("scipy") is None:
        raise StudyFileError(f"{what} needs scipy; pip install 'rank-search[gp]'")


class SeededSampler(BaseSampler):
    """One of the samplers, made afresh for every trial from the study's seed and the trial's number.

    So a proposal depends on the seed, its number and the trials before it, and on nothing in a process's memory:
    one worker with a fixed seed repeats a study trial by trial, a resumed study goes on as if it had not stopped
    instead of drawing the first start's random numbers again, and no two workers ever draw the same ones.

    Args:
        search: names the sampler and the seed.
        seeds: how many seed trials run first.
        space: what is sampled.
        on_start: told the trial as soon as it is claimed, before anything is sampled.
        keep: told the trial and its rank map, where the sampler proposes rank maps rather than parameters.
        tried: what the project's own tables have of trials.
        cuts: kept fractions above each of which trials slice other factors than up to it.
    """

    def __init__(
        self,
        search: SearchSpec,
        seeds: int,
        space: SearchSpace,
        on_start: Callable[[FrozenTrial], None],
        keep: Callable[[FrozenTrial, RankMap], None],
        tried: Callable[[], Sequence[Tried]],
        cuts: Sequence[float],
    ) -> None:
        check_sampler(search)
        self._search = search
        self._space = space
        self._moves = Moves(space.allocator)
        self._keep = keep
        self._tried = tried
        self._cuts = cuts
        self._rises = Rises(space) if isinstance(space, MultiplierSpace) else None
        self._seeds = seeds
        self._on_start = on_start
        self._inner = self._make(0)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the trial's own sampler."""
        self._on_start(trial)
        self._inner = self._make(trial.number)
        self._inner.before_trial(study, trial)
        if isinstance(self._inner, NSGAIISampler | NSGAIIISampler) and "fixed_params" in trial.system_attrs:
            # Optuna gives a trial its generation when it samples for it, which it never does for a seed; without
            # one the seeds would have no children.
            self.sample_relative(study, trial, self.infer_relative_search_space(study, trial))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters with a choice, in alphabetical order, of samplers that draw them together.

        Optuna's own look through the parameters of all trials for those that they share, which are all of them, would
        be half of a proposal's time after 2000 trials.
        """
        if isinstance(self._inner, RandomSampler):
            return {}
        space = self._space.distributions
        interest = self._interest(trial)
        if isinstance(self._inner, MutationSampler | FittedSampler) and interest is not None:
            # They look for the best size there, so they have to be told before.
            space = {**space, "kept": FloatDistribution(*interest)}
        return {name: space[name] for name in sorted(space) if not space[name].single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the sampler does."""
        sampled = self._inner.sample_relative(study, trial, search_space)
        return {name: self._interesting(trial, name, value) for name, value in sampled.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the sampler does."""
        value = self._inner.sample_independent(study, trial, param_name, param_distribution)
        return self._interesting(trial, param_name, value)

    def _interesting(self, trial: FrozenTrial, name: str, value: Any) -> Any:
        """Move a kept fraction outside of the range of interest into it."""
        interest = self._interest(trial) if name == "kept" else None
        if interest is None or interest[0] <= value <= interest[1]:
            return value
        (low, high), allowed = interest, self._space.distributions[name]
        assert isinstance(allowed, FloatDistribution)
        return low + (value - allowed.low) / (allowed.high - allowed.low) * (high - low)

    def _interest(self, trial: FrozenTrial) -> tuple[float, float] | None:
        """The range of interest, which four trials of five keep to."""
        allowed = self._space.distributions.get("kept")
        if self._search.interest is None or trial.number % 5 == 0 or not isinstance(allowed, FloatDistribution):
            return None
        low, high = self._search.interest
        return max(low, allowed.low), min(high, allowed.high)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As the sampler does."""
        self._inner.after_trial(study, trial, state, values)

    def _make(self, number: int) -> BaseSampler:
        text = f"{self._search.seed}:{number}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        # The seeds alone all lie at u = 0; a few random trials show the other samplers the rest of the space.
        startup = max(10, self._seeds + 4)
        match self._search.sampler:
            case "fitted":
                assert isinstance(self._space, MultiplierSpace)  # check_sampler
                assert self._rises is not None
                return FittedSampler(self._space, self._rises, seed, self._tried, self._search.max_loss, self._cuts)
            case "tpe":
                # Optuna's own choice for two objectives, one parameter at a time, is many times slower.
                return TPESampler(multivariate=True, constant_liar=True, n_startup_trials=startup, seed=seed)
            case "nsga2":
                return NSGAIISampler(population_size=POPULATION, seed=seed)
            case "nsga3":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    return NSGAIIISampler(population_size=POPULATION, seed=seed)
            case "gp":
                return GPSampler(n_startup_trials=startup, seed=seed)
            case "random":
                return RandomSampler(seed=seed)
            case "mutation":
                return MutationSampler(self._space, self._moves, seed, self._keep, self._search.max_loss, self._cuts)
