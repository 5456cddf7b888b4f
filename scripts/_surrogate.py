"""A stand-in for trials on the quickstart's model: losses of rank maps in a millisecond, without the model.

``tests/data/surrogate_quickstart.json`` holds the predicted rises of the model's 42 layers (their logarithms at 16
ranks each, between which they are interpolated) and what was fitted to the losses after a fine-tune of 16 steps of the
200 rank maps of ``tests/data/fidelities_quickstart.json`` and of 28 others near the closed form: a polynomial of the
logarithm of the predicted rise, after every layer's own was scaled by exp(u), and a term in the excess over the closed
form. The residual is 0.010 nats; the closed form's own prediction leaves 0.023.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _made_up import facts_of, measurement_of

from rank_search.allocation import Allocator, Floats
from rank_search.measurement import Measurement
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.study.facts import StudyFacts

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "data" / "surrogate_quickstart.json"


class StandIn(ABC):
    """Losses of rank maps, without the model.

    Attributes:
        allocator: of the predicted rises, as a study knows them.
        noise: standard deviation of what a measurement is off by, the same for one rank map whenever it is measured.
    """

    allocator: Allocator
    noise: float

    @abstractmethod
    def loss(self, rank_map: RankMap) -> float:
        """Without noise, nats per token."""

    def measure(self, rank_map: RankMap) -> Measurement:
        """As a trial would, with noise."""
        off = np.random.default_rng(int(rank_map.digest[:8], 16)).normal(0.0, self.noise)
        return measurement_of(self.allocator, rank_map, self.loss(rank_map) + float(off))

    @property
    def facts(self) -> StudyFacts:
        """What a study over it is of."""
        return facts_of(self.allocator)


@dataclass(frozen=True)
class Surrogate(StandIn):
    """Losses of rank maps.

    Attributes:
        allocator: of the predicted rises, as a study knows them.
        factors: (layers,), what these are off by.
        polynomial: of the logarithm of the rise, highest power first.
        lowest, slope_below: where the polynomial ends, near the dense model, and how the loss goes on below.
        bend: loss for an excess of rise over the closed form's, as a share of it.
        noise: standard deviation of what a measurement is off by, the same for one rank map whenever it is measured.
    """

    allocator: Allocator
    factors: Floats
    polynomial: Floats
    lowest: float
    slope_below: float
    bend: float
    noise: float = 0.006

    @classmethod
    def recorded(cls, *, off: float = 1.0, noise: float = 0.006) -> Surrogate:
        """The one of the file; ``off`` scales how far the closed form is off: at 0 it is right."""
        told = json.loads(RECORDED.read_text(encoding="utf-8"))
        shapes, tails = [], {}
        for layer in told["layers"]:
            shape = LayerShape(layer["name"], layer["m"], layer["n"], layer["group"], layer["depth"])
            full = min(shape.m, shape.n)
            tail = np.exp(np.interp(np.arange(full), layer["ranks"], layer["log_rises"]))
            tails[shape.name] = np.append(tail, 0.0)
            shapes.append(shape)
        factors = np.exp(off * np.array([layer["u"] for layer in told["layers"]]))
        allocator = Allocator(RankSpace(tuple(shapes), told["model_params"]), tails)
        polynomial = np.array(told["loss_of_log_rise"])
        return cls(allocator, factors, polynomial, told["lowest"], told["slope_below"], told["bend"], noise)

    def loss(self, rank_map: RankMap) -> float:
        """Without noise, nats per token."""
        rises = self.allocator.rises(rank_map)
        closed = self.allocator.rises(self.allocator.closed_form(self.allocator.space.kept_of_targets(rank_map)))
        excess = max(float((rises - closed).sum() / closed.sum()), 0.0)
        log_rise = float(np.log(max(self.factors @ rises, 1e-12)))
        below = self.slope_below * min(log_rise - self.lowest, 0.0)
        return float(np.polyval(self.polynomial, max(log_rise, self.lowest))) + below + self.bend * excess
