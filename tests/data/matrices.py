"""Weight matrices and second moments, easy ones and ill-conditioned ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rank_search.factors.statistics import LayerStatistics

Kind = Literal["random", "dead", "massive", "deficient"]
KINDS: tuple[Kind, ...] = ("random", "dead", "massive", "deficient")
SHAPES = ((12, 20), (20, 12), (16, 16))


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix (m, n) in float32 with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    left, right = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    spectrum: Tensor = 0.8 ** torch.arange(rank) / rank**0.5
    return left @ torch.diag(spectrum) @ right


def moment(size: int, kind: Kind, seed: int) -> Tensor:
    """E[v vᵀ], (size, size) in float64.

    ``dead``: a quarter of the channels is always 0. ``massive``: two channels are a thousand times the others.
    ``deficient``: fewer vectors than channels.
    """
    generator = torch.Generator().manual_seed(seed)
    count = size // 3 if kind == "deficient" else 8 * size
    vectors = torch.randn(count, size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    vectors = vectors @ (torch.eye(size, dtype=torch.float64) + 0.5 * mixing / size**0.5)
    if kind == "dead":
        vectors[:, : size // 4] = 0
    if kind == "massive":
        vectors[:, -2:] *= 1e3
    result: Tensor = vectors.T @ vectors / count
    return result


def layer_statistics(m: int, n: int, kind: Kind) -> LayerStatistics:
    """A and G of one kind; the inputs' mean magnitudes are those of a normal distribution of these variances."""
    A = moment(n, kind, 1)
    return LayerStatistics(A, moment(m, kind, 2) * 1e-3, (2 / torch.pi * A.diagonal()).sqrt())
