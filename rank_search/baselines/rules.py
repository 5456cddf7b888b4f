"""The allocation rules of published methods, on what was measured for them. No torch.

Each rule ends in numbers of parameters that the layers should hold; :meth:`Allocator.towards` makes them a rank map
within the budget, in either storage form.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np

from rank_search.allocation import Allocator, Floats, proportional
from rank_search.ranks import LayerShape, RankMap, RankSpace

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Kept fractions of one layer at which ASVD measures the model."""

_LEAST_LOSS = 1e-12


def rank_at(space: RankSpace, shape: LayerShape, kept: float) -> int | None:
    """Largest allowed rank of at most the ``kept`` fraction of a layer, its smallest one where all are above it.

    None: the layer can only be dense.
    """
    ranks = space.ranks(shape)
    within = [rank for rank in ranks if shape.params(rank, space.storage) <= kept * shape.dense_params]
    return within[-1] if within else next(iter(ranks), None)


def asvd(allocator: Allocator, losses: Mapping[str, Mapping[float, float]], kept: float) -> RankMap:
    """Sensitivity-based truncation rank search of ASVD (Yuan et al., "ASVD: Activation-aware singular value
    decomposition for compressing large language models", 2023).

    Every layer takes the smallest fraction at which the model with this layer alone truncated has a loss of at most a
    threshold, or stays dense; the threshold, one for all, is the smallest that meets the budget, found by bisection.

    Args:
        losses: module name → kept fraction of the layer → loss of the model, nats per token (the order of losses is
            that of the paper's perplexities).
    """
    space = allocator.space
    thresholds = sorted({loss for layer in losses.values() for loss in layer.values()})

    def wanted(threshold: float) -> dict[str, float]:
        return {
            shape.name: shape.dense_params
            * min((f for f, loss in losses.get(shape.name, {}).items() if loss <= threshold), default=1.0)
            for shape in space.shapes
        }

    budget = space.budget(kept)
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(wanted(thresholds[middle]).values()) > budget:
            low = middle + 1
        else:
            high = middle
    return allocator.towards(kept, wanted(thresholds[low] if thresholds else 0.0))


def svd_llm_v2(allocator: Allocator, tails: Mapping[str, Floats], kept: float, tokens: int) -> RankMap:
    """Heterogeneous allocation of SVD-LLM V2 (Wang et al., "SVD-LLM V2: Optimizing singular value truncation for large
    language model compression", 2025, section 3.1).

    Each layer type keeps the same fraction. Within a type, what a layer gives up is proportional to 1 / log L, with L
    its theoretical truncation loss at that fraction: the whitened singular values' ``Σ_{i>r} σᵢ²``, a sum over
    the calibration as in the paper. (Its norm has half the logarithm, which cancels.) The logarithm is that of 1 + L,
    the same for the losses of a whole calibration and defined for the smallest; no layer gives up more than it has.

    Args:
        tails: module name → ``½ Σ_{i>r} σᵢ²`` by rank, a mean over tokens.
        tokens: of the calibration.
    """
    space = allocator.space
    wanted: dict[str, float] = {}
    for group in dict.fromkeys(shape.group for shape in space.shapes):
        shapes = [shape for shape in space.shapes if shape.group == group]
        ranks = {shape: rank_at(space, shape, kept) for shape in shapes}
        able = {shape: rank for shape, rank in ranks.items() if rank is not None}
        wanted |= {shape.name: float(shape.dense_params) for shape in shapes}
        if not able:
            continue
        losses = np.array([2 * tokens * tails[shape.name][rank] for shape, rank in able.items()])
        dense = np.array([float(shape.dense_params) for shape in able])
        most = dense - [least_params(space, shape) for shape in able]
        weights = dense / np.log1p(np.maximum(losses, _LEAST_LOSS))
        given = proportional(weights, np.zeros(len(able)), most, (1 - kept) * float(dense.sum()))
        wanted |= {shape.name: float(p) for shape, p in zip(able, dense - given, strict=True)}
    return allocator.towards(kept, wanted)


def first_order(allocator: Allocator, changes: Mapping[str, Floats], kept: float, *, zero_sum: bool) -> RankMap:
    """Greedy removal of singular components by the first-order change of the loss, over all layers at once.

    Dropping component i of ``W = Σ σᵢ uᵢ vᵢᵀ`` (in the method's metric) changes the loss by about ``-σᵢ uᵢᵀ H vᵢ``
    with H the gradient in that metric. Within a layer, components go from the smallest singular value on.

    With ``zero_sum`` the next one is the smallest in magnitude among those whose sign brings the sum of all changes so
    far back to zero (Abbasi et al., "Zero Sum SVD: Balancing loss sensitivity for low rank LLM compression", 2026);
    without, the smallest of all (Abbasi et al., "IO-SVD: Input-output whitened SVD for adaptive-rank LLM
    compression", 2026).

    Args:
        changes: module name → predicted change of the loss for each component, descending singular values,
            (min(m, n),), nats per token.
    """
    space = allocator.space
    ranks = _drop(space, changes, space.budget(kept), zero_sum=zero_sum)
    return allocator.towards(kept, {shape.name: _params(space, shape, ranks[shape.name]) for shape in space.shapes})


def least_params(space: RankSpace, shape: LayerShape) -> int:
    """Parameters of a layer at its smallest allowed rank, dense where it has none."""
    return shape.params(next(iter(space.ranks(shape)), None), space.storage)


def _drop(space: RankSpace, changes: Mapping[str, Floats], budget: int, *, zero_sum: bool) -> dict[str, int]:
    """Ranks after dropping components one by one until the budget is met."""
    ranks = {shape.name: min(shape.m, shape.n) for shape in space.shapes}
    least = {shape.name: next(iter(space.ranks(shape)), ranks[shape.name]) for shape in space.shapes}
    # Candidates whose change is positive, and the others; without the rule of signs, all are in the first.
    queues: tuple[list[tuple[float, str]], list[tuple[float, str]]] = ([], [])

    def offer(name: str) -> None:
        if ranks[name] > least[name]:
            change = float(changes[name][ranks[name] - 1])
            heapq.heappush(queues[zero_sum and change < 0], (abs(change), name))

    for shape in space.shapes:
        offer(shape.name)
    used, total = space.dense_params, 0.0
    while used > budget:
        preferred = queues[zero_sum and total > 0]
        _, name = heapq.heappop(preferred or queues[0] or queues[1])
        shape, rank = space[name], ranks[name]
        used -= _params(space, shape, rank) - _params(space, shape, rank - 1)
        total += float(changes[name][rank - 1])
        ranks[name] = rank - 1
        offer(name)
    return ranks


def _params(space: RankSpace, shape: LayerShape, rank: int) -> int:
    """Dense from the rank on at which factors pay no longer."""
    return shape.params(rank if rank <= shape.max_rank(space.storage) else None, space.storage)
