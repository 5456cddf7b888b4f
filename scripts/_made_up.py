"""SmolLM2-135M's shapes, and losses that are made up over them: a study without a model. No torch."""

from __future__ import annotations

import numpy as np

from rank_search.allocation import Allocator, Floats
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.study.facts import StudyFacts

TYPES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def made_up_allocator(blocks: int) -> Allocator:
    """Layers of SmolLM2's shapes whose predicted rises fall off at various paces."""
    shapes = tuple(
        LayerShape(f"model.layers.{depth}.{name}", m, n, name, depth)
        for depth in range(blocks)
        for name, (m, n) in TYPES.items()
    )
    random = np.random.default_rng(0)
    tails = {}
    for shape in shapes:
        energies = np.exp(-np.arange(min(shape.m, shape.n)) / random.uniform(20, 200)) * random.uniform(0.2, 2) * 1e-3
        tails[shape.name] = tail_of(energies)
    dense = sum(shape.dense_params for shape in shapes)
    return Allocator(RankSpace(shapes, dense + 28_300_000), tails)


def tail_of(energies: Floats) -> Floats:
    """Predicted rise of a layer at rank 0, 1, ...: what the energies from there on sum up to."""
    return np.append(np.cumsum(energies[::-1])[::-1], 0.0)


def made_up_measurement(allocator: Allocator, rank_map: RankMap, random: np.random.Generator) -> Measurement:
    loss = 3.0 + allocator.predicted_rise(rank_map) * float(random.uniform(0.9, 1.1))
    return measurement_of(allocator, rank_map, loss)


def measurement_of(allocator: Allocator, rank_map: RankMap, loss: float) -> Measurement:
    """What a trial that came out at this loss would tell."""
    space = allocator.space
    return Measurement(
        loss=loss, standard_error=0.01,
        num_params=space.num_params(rank_map), target_params=space.target_params(rank_map),
        kept_of_targets=space.kept_of_targets(rank_map), kept_of_model=space.kept_of_model(rank_map),
        fidelity=Fidelity.TUNED, tokens=100_000,
    )  # fmt: skip


def facts_of(allocator: Allocator) -> StudyFacts:
    return StudyFacts(
        source="none", revision=None, weights_digest="", shapes=allocator.space.shapes,
        model_params=allocator.space.model_params, calibration_digest="", bank="",
    )  # fmt: skip
