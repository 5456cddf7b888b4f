"""What Optuna's samplers of the project's own have in common."""

from __future__ import annotations

from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from rank_search.study.space import SearchSpace


class WholeSpaceSampler(BaseSampler):
    """Proposes all parameters of a space at once; what they are, a subclass says in ``sample_relative``."""

    def __init__(self, space: SearchSpace) -> None:
        self._distributions = space.distributions

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of the space at once."""
        return self._distributions

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked: no parameter is outside of the space."""
        raise NotImplementedError(f"{param_name} is not a parameter of the space")
