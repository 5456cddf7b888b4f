"""Who climbs: whether a trial goes on to its study's next rung. Pure: no torch, no Optuna.

A study with several fidelities measures every rank map on the lowest rung first, a cheap evaluation, and only those
that stay promising on the higher ones. What is promising is learnt in the study itself. From the pairs (loss at a rung,
loss at the top) of trials that went all the way, the loss at the top is predicted with the spread of that prediction;
a trial is pruned when even the lower edge of its prediction lies above a loss that is already measured at no more
parameters. All trials are measured on the same first blocks of the validation text, so what is hard about these blocks
is common to all pairs and leaves the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev

import numpy as np
from numpy.typing import NDArray

from rank_search.measurement import Fidelity

TAIL = 0.02
"""Probability, by the prediction, with which a pruned trial would have reached the front."""
LEAST_PAIRS = 8
"""Pairs at a rung before it prunes anything."""

_NEAR = 0.15
"""Width of the neighbourhood in kept fraction that a prediction is made from."""
_SLOPE = (0.5, 0.5)
"""Prior mean and deviation of the slope of the loss at the top over the loss at the rung."""
_LEAST_SLOPE = 0.1
"""By how much the loss at the top rises at least with that at the rung, beyond all that has been seen."""
_PRIOR_SPREAD = 0.25
"""Prior residual deviation, as a share of the deviation of all losses at the top, ..."""
_PRIOR_PAIRS = 3.0
"""... and so many pairs' worth of it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rung:
    """A fidelity, and on how many of the validation blocks (the first ones; None: all)."""

    fidelity: Fidelity
    blocks: int | None = None


def make_rungs(
    fidelities: Sequence[str] | None, sliced_tokens: Sequence[int], top: Fidelity, blocks: int, sequence_length: int
) -> tuple[Rung, ...]:
    """The rungs of a study, ascending; the last is ``top`` on all blocks.

    Args:
        fidelities: labels as in the study file; None: the highest alone.
        sliced_tokens: token budgets of ``sliced``, before all blocks; those that all blocks are within fall away.
        blocks: of the whole validation text.
        sequence_length: tokens in a block.
    """
    if fidelities is None:
        return (Rung(top),)
    made: list[Rung] = []
    for fidelity in map(Fidelity.from_label, fidelities):
        if fidelity is Fidelity.SLICED:
            # Two blocks at least, so that a standard error can be told.
            counts = sorted({max(2, -(-tokens // sequence_length)) for tokens in sliced_tokens})
            made += [Rung(fidelity, count) for count in counts if count < blocks]
        made.append(Rung(fidelity))
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Step:
    """A measurement on one rung, as much of it as the rule needs.

    Attributes:
        trial: its number; of a promoted one, that of the pruned trial that it continues.
        rung: index of the rung, from 0.
        loss: validation loss, nats per token.
        kept: kept fraction of the target layers.
        num_params: of the whole compressed model.
        top: the trial went all the way, and this is its highest rung.
        feasible: it meets the study's goals, or is not at the top.
    """

    trial: int
    rung: int
    loss: float
    kept: float
    num_params: int
    top: bool = False
    feasible: bool = True


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of the loss at the top: a t distribution's centre, scale and degrees of freedom, and its slope over the loss at
    the rung."""

    mean: float
    scale: float
    freedom: float
    slope: float

    def lower_edge(self, error: float = 0.0) -> float:
        """The loss below which the top is with probability :data:`TAIL`.

        ``error`` is the standard error of the difference to a rival on the same blocks of the rung; a scale that a few
        pairs happened to make smaller than it is not believed.
        """
        scale = max(self.scale, abs(self.slope) * error)
        return self.mean - t_quantile(1 - TAIL, self.freedom) * scale


class Climbs:
    """What a study has measured on all its rungs, and what follows from it for the next trial."""

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self._steps: dict[int, dict[int, Step]] = {}
        self._tops: dict[int, Step] = {}
        self.add(steps)

    def add(self, steps: Iterable[Step]) -> None:
        """Take in more; a step that is known already is replaced."""
        for step in steps:
            self._steps.setdefault(step.trial, {})[step.rung] = step
            if step.top:
                self._tops[step.trial] = step

    def pairs(self, rung: int) -> int:
        """Trials that were measured on this rung and at the top."""
        return sum(rung in self._steps[trial] and rung < top.rung for trial, top in self._tops.items())

    def rival(self, num_params: int) -> Step | None:
        """The lowest loss at the top of a model of at most so many parameters."""
        fitting = (top for top in self._tops.values() if top.feasible and top.num_params <= num_params)
        return min(fitting, key=lambda top: (top.loss, top.trial), default=None)

    def predict(self, step: Step) -> Prediction | None:
        """The loss at the top of a trial, from what it has on one rung; None as long as pairs are too few."""
        pairs = [
            (known[step.rung].loss, known[step.rung].kept, top.loss)
            for trial, top in sorted(self._tops.items())
            if step.rung in (known := self._steps[trial]) and step.rung < top.rung and trial != step.trial
        ]
        return _predict(np.array(pairs), step.loss, step.kept) if len(pairs) >= LEAST_PAIRS else None

    def goes_on(self, step: Step, *, error: float = 0.0, max_loss: float | None = None) -> bool:
        """Whether a trial may still reach the front.

        Args:
            error: standard error of the difference to :meth:`rival` on the same blocks, where it is known.
            max_loss: the study's goal, which the top must meet too.
        """
        limit = self._limit(step, max_loss)
        predicted = self.predict(step) if limit is not None else None
        return limit is None or predicted is None or predicted.lower_edge(error) <= limit

    def promising(self, trials: Iterable[int], *, max_loss: float | None = None) -> list[int]:
        """Of these pruned trials those that by prediction would reach the front, the one that would lower it most
        first."""
        gains = []
        for trial in trials:
            step = self._steps[trial][max(self._steps[trial])]
            limit, predicted = self._limit(step, max_loss), self.predict(step)
            if limit is not None and predicted is not None and predicted.mean < limit:
                gains.append((predicted.mean - limit, trial))
        return [trial for _, trial in sorted(gains)]

    def _limit(self, step: Step, max_loss: float | None) -> float | None:
        rival = self.rival(step.num_params)
        limits = [*([] if rival is None else [rival.loss]), *([] if max_loss is None else [max_loss])]
        return min(limits, default=None)


def paired_error(one: Sequence[float], other: Sequence[float]) -> float:
    """Standard error of the mean difference of two models' losses, block by block; 0 where the blocks are too few or
    not the same."""
    if len(one) != len(other) or len(one) < 2:
        return 0.0
    return stdev(a - b for a, b in zip(one, other, strict=True)) / math.sqrt(len(one))


def _predict(pairs: Floats, loss: float, kept: float) -> Prediction:
    """Bayesian linear regression of the loss at the top on the loss at the rung and the kept fraction.

    Pairs of near kept fractions count most: a normal kernel of width ``_NEAR`` makes the model a local one, since the
    slope changes with the size. Conjugate priors (normal and inverse gamma), the intercept's flat, give a t
    distribution (Gelman et al., "Bayesian Data Analysis", 2013, section 14.2), whose scale shrinks as pairs come in.

    What is worse at the rung than anything seen is not extrapolated to, where a line from a few pairs may lead
    anywhere: it is taken to be a little worse at the top than the worst seen, and no less certain.
    """
    x, k, y = pairs.T
    beyond = max(0.0, loss - float(x.max()))
    weights = np.exp(-0.5 * ((k - kept) / _NEAR) ** 2) + 1e-9
    total = float(weights.sum())
    means = weights @ pairs / total
    spread = max(float(y.std()), 1e-9)
    noise = _PRIOR_SPREAD * spread
    prior = np.array([_SLOPE[0], 0.0])
    # In units of the noise; the slope over the kept fraction is all but free.
    precision = np.diag([(noise / _SLOPE[1]) ** 2, (noise / (10 * spread)) ** 2])
    design = np.column_stack([x - means[0], k - means[1]])
    covariance = np.linalg.inv(design.T @ (weights[:, None] * design) + precision)
    shift = covariance @ design.T @ (weights * (y - means[2] - design @ prior))
    slopes = prior + shift
    squares = float(weights @ (y - means[2] - design @ slopes) ** 2 + shift @ precision @ shift)
    freedom = _PRIOR_PAIRS + max(total - 1, 0.0)
    variance = (_PRIOR_PAIRS * noise**2 + squares) / freedom
    at = np.array([loss - beyond, kept]) - means[:2]
    scale = math.sqrt(variance * (1 + 1 / total + float(at @ covariance @ at)))
    return Prediction(float(means[2] + at @ slopes) + _LEAST_SLOPE * beyond, scale, freedom, float(slopes[0]))


def t_quantile(probability: float, freedom: float) -> float:
    """Of Student's t distribution, by its expansion around the normal one (Abramowitz and Stegun, 26.7.5); within 2 %
    from three degrees of freedom on at the probabilities used here."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
