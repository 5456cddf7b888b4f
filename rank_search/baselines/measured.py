"""What published allocation rules measure on a model: losses of single truncations, and changes by gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rank_search.allocation import Floats
from rank_search.baselines.rules import FRACTIONS, rank_at
from rank_search.compress.low_rank import compressed
from rank_search.errors import NonFiniteLossError
from rank_search.factors.decompose import Factors
from rank_search.model.targets import Target
from rank_search.progress import SILENT, Progress
from rank_search.ranks import RankMap, RankSpace
from rank_search.score import score
from rank_search.task import Examples


def untrained_loss(
    model: nn.Module,
    targets: Sequence[Target],
    factors: Mapping[str, Factors],
    examples: Examples,
    *,
    batch_blocks: int,
) -> Callable[[RankMap], float]:
    """The loss on ``examples`` under a rank map without a fine-tune, nats per prediction; infinite if not finite."""

    def loss(rank_map: RankMap) -> float:
        with compressed(targets, factors, rank_map, trainable=False):
            try:
                return score(model, examples, batch_blocks=batch_blocks).loss
            except NonFiniteLossError:
                return math.inf

    return loss


def sensitivities(
    space: RankSpace, loss: Callable[[RankMap], float], progress: Progress = SILENT
) -> dict[str, dict[float, float]]:
    """Module name → kept fraction → loss of the model with this layer alone truncated, nats per token (ASVD's).

    A layer that can only be dense has none.
    """
    measured: dict[str, dict[float, float]] = {}
    with progress.step("sensitivities", len(space.shapes) * len(FRACTIONS)) as step:
        for shape in space.shapes:
            ranks = {kept: rank_at(space, shape, kept) for kept in FRACTIONS}
            measured[shape.name] = {
                kept: loss(RankMap({shape.name: rank})) for kept, rank in ranks.items() if rank is not None
            }
            step.advance(len(FRACTIONS), note=shape.name)
    return measured


def component_changes(
    targets: Sequence[Target], factors: Mapping[str, Factors], gradients: Mapping[str, Float[Tensor, "m n"]]
) -> dict[str, Floats]:
    """Module name → first-order change of the loss for every component that is dropped, (min(m, n),), nats per token.

    ``-σᵢ uᵢᵀ H vᵢ`` in a method's metric is ``-⟨∇W, outᵢ innᵢᵀ⟩`` in the weights' own, whatever the metric. The
    components that a bank of two-factor storage does not hold share the rest of ``-⟨∇W, W⟩`` evenly.
    """
    changes: dict[str, Floats] = {}
    for target in targets:
        layer, gradient = factors[target.name], gradients[target.name].double()
        out, inn = (factor.to(gradient.device, torch.float64) for factor in (layer.out, layer.inn))
        held = -((out @ gradient) * inn).sum(1).cpu().numpy()
        whole = -float((gradient * target.matrix).sum())
        absent = min(target.shape.m, target.shape.n) - len(held)
        rest = np.full(absent, (whole - held.sum()) / absent) if absent else np.empty(0)
        changes[target.name] = np.concatenate([held, rest])
    return changes
