"""``[search]`` of the study file. Pure: no torch, no Optuna."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Space = Literal["multipliers", "groups", "direct"]
Sampler = Literal["fitted", "tpe", "nsga2", "nsga3", "gp", "random", "mutation"]
Allocation = Literal["closed-form", "uniform", "asvd", "svd-llm-v2", "zs-svd", "io-svd", "bolaco"]
"""Rules from a budget to a rank map: the package's own two, and those of published methods."""
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[str, Field(min_length=1)]

STOP_KEYS = ("trials", "wall_time", "gpu_seconds", "flat_trials", "flat_tolerance", "target_loss", "target_kept")
"""Keys of ``[search]`` that say when to stop; a study may be resumed with others."""


class Table(BaseModel):
    """A table of the study file: typed strictly, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class SearchSpec(Table):
    """``[search]``: the study's space, sampler and size."""

    space: Space = "multipliers"
    """A budget and multipliers by layer type and depth (`multipliers`) or for every layer type in every stretch of
    blocks (`groups`), or one rank a layer (`direct`)."""
    depth_buckets: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Stretches of blocks: those of the space `groups`, None: 4; or with a multiplier each beside those of the space
    `multipliers`, None: without."""
    sampler: Sampler = "fitted"
    """`fitted`: where it is worth most, the closed form with multipliers fitted to measured losses; not over
    `space = "direct"`. `mutation`: good rank maps, changed by a few layers at a time; over `space = "direct"` alone.
    And Optuna's `tpe` (multivariate), `nsga2`, `nsga3`, `gp` (which needs the extra of that name) and `random`."""
    trials: Positive = 40
    """Finished trials of the whole study."""
    seed: Seed = 0
    """Of the sampler and of the fine-tunes' order of blocks."""
    min_kept: Fraction = 0.3
    """Smallest kept fraction of the target layers that is proposed; over `space = "direct"` by `mutation` alone, for
    Optuna's samplers choose every rank for itself there."""
    max_kept: Fraction = 0.95
    """Largest kept fraction of the target layers that is proposed; as for `min_kept`."""
    ladder: tuple[Fraction, ...] = (0.9, 0.8, 0.6, 0.4)
    """Kept fractions of the target layers whose rank maps by all of `seeds` are measured first."""
    seeds: tuple[Allocation, ...] = ("closed-form", "uniform")
    """Allocations: the closed form, `uniform` (which shows what the closed form is worth), and the rules of published
    methods on the study's own factors. `asvd` and `bolaco` score many rank maps for it, once a study; `bolaco` needs
    the `gp` extra."""
    multiplier_range: Annotated[float, Field(gt=0, le=20)] = 0.5
    """Multipliers u are searched in ± this; a predicted rise is scaled by exp(u)."""
    fidelities: tuple[Literal["predicted", "sliced", "tuned"], ...] | None = None
    """Measure every rank map at these in turn, lowest first, and go on only with those that may still reach the front:
    the closed form's own prediction, an evaluation without a fine-tune, and one after it. None: at the last alone."""
    sliced_tokens: tuple[Positive, ...] = (2048, 16384)
    """Where `fidelities` has `sliced`: measure on the first so many tokens of the validation text before all of it."""
    interest: tuple[Fraction, Fraction] | None = None
    """Range of kept fractions of the target layers in which about four of five proposals lie; for spaces that have a
    budget, not `direct` with one number a layer."""
    max_params: Positive | None = None
    """Goal: most parameters of the whole model. What misses a goal is infeasible and never on the front."""
    max_loss: Annotated[float, Field(gt=0)] | None = None
    """Goal: highest validation loss, nats per token."""
    wall_time: Annotated[float, Field(gt=0)] | None = None
    """Stop a run that has searched for so many seconds."""
    gpu_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop when all measurements of the study together have taken so many seconds, whatever device they ran on."""
    flat_trials: Positive | None = None
    """Stop when the hypervolume has not grown over so many complete trials, but for ``flat_tolerance``."""
    flat_tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    """Share of the hypervolume that counts as no growth."""
    target_loss: Annotated[float, Field(gt=0)] | None = None
    """Stop when the front has a point of at most this loss that keeps at most ``target_kept``."""
    target_kept: Fraction | None = None
    """Kept fraction of the target layers that goes with ``target_loss``."""

    @field_validator("ladder", "interest", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return tuple(float(v) if isinstance(v, int) else v for v in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _seeds_once(self) -> SearchSpec:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds ({', '.join(self.seeds)}) name an allocation twice")
        return self

    @model_validator(mode="after")
    def _range(self) -> SearchSpec:
        if self.min_kept >= self.max_kept:
            raise ValueError(f"min_kept ({self.min_kept:g}) must be below max_kept ({self.max_kept:g})")
        return self

    @model_validator(mode="after")
    def _interest_within_range(self) -> SearchSpec:
        if self.interest is not None:
            low, high = self.interest
            if not self.min_kept <= low < high <= self.max_kept:
                raise ValueError(
                    f"interest ({low:g} to {high:g}) must rise and lie within min_kept and max_kept "
                    f"({self.min_kept:g} to {self.max_kept:g})"
                )
            if self.space == "direct" and self.sampler != "mutation":
                raise ValueError(
                    f"interest needs a space with a budget, which 'direct' has not under sampler = {self.sampler!r}; "
                    "leave it out or change one of them"
                )
        return self

    @model_validator(mode="after")
    def _fidelities_rise(self) -> SearchSpec:
        if self.fidelities is not None:
            order = ["predicted", "sliced", "tuned"]
            if not self.fidelities or self.fidelities != tuple(f for f in order if f in self.fidelities):
                raise ValueError(f"fidelities must be some of {', '.join(order)}, once each, in this order")
        return self

    @model_validator(mode="after")
    def _whole_target(self) -> SearchSpec:
        if (self.target_loss is None) != (self.target_kept is None):
            raise ValueError("target_loss and target_kept go together; give both or none")
        return self
