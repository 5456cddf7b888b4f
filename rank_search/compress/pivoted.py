"""Pivoted storage: r rows of a rank-r matrix, and the coefficients that the others are made of.

``Ŵ = B C`` with ``B`` (m, r) has r independent rows ``p``; with ``T = B_q B_p⁻¹`` for the other rows ``q``,
``Ŵ_q = T Ŵ_p``. That is r n + (m - r) r = r (m + n - r) numbers for the same function (PIFA: Zhao et al., 2025;
the gauge-aligned form of FlexRank, 2026).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn

from rank_search.compress.low_rank import LowRankLinear
from rank_search.errors import DecompositionError

GROWTH = 1.05
"""Rows are exchanged until no coefficient is larger than this in magnitude."""
_EXCHANGES_BEFORE_SOLVING = 1_000
"""After so many exchanges the coefficients are solved for anew, so that the updates' rounding errors stay small."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Independent rows of a matrix.

    Attributes:
        kept: indices of the r kept rows.
        rest: indices of the other rows, ascending.
        coefficients: T, row i of the rest = ``coefficients[i] @ kept rows``; no entry far above 1 in magnitude.
    """

    kept: Int64[Tensor, " rank"]
    rest: Int64[Tensor, " rest"]
    coefficients: Float64[Tensor, "rest rank"]

    @property
    def growth(self) -> float:
        """Largest coefficient in magnitude; rounding errors grow by about this."""
        return float(self.coefficients.abs().max()) if self.coefficients.numel() else 0.0


def independent_rows(B: Float[Tensor, "m rank"], name: str = "(unnamed)") -> Rows:
    """r rows of ``B`` that span all others with small coefficients.

    Partial pivoting on an orthonormal basis of B's columns gives the first choice; then the largest coefficient's row
    replaces the row that it multiplies, as long as that enlarges the kept rows' volume by more than 5 % (Goreinov et
    al., "How to find a good submatrix", 2010). B of smaller rank than r is completed: its basis is orthonormal anyway.
    The volume of an orthonormal basis's rows is at most 1, so the exchanges come to an end.

    Raises:
        DecompositionError: ``B``, of the layer ``name``, holds NaN or infinity.
    """
    m, rank = B.shape
    if not bool(torch.isfinite(B).all()):
        raise DecompositionError(
            name, f"its {m} x {rank} outer factor is not finite, so it has no independent rows; lower the learning rate"
        )
    Q, _ = torch.linalg.qr(B.double())
    _, pivots = torch.linalg.lu_factor(Q)
    kept = _permutation(pivots, m)[:rank].clone()
    while True:
        # Coefficients of all rows over the kept ones; a kept row's are a unit vector.
        C = torch.linalg.solve(Q[kept].T, Q.T).T
        if not _exchange(C, kept):
            break
    inside = torch.zeros(m, dtype=torch.bool, device=B.device)
    inside[kept] = True
    rest = torch.arange(m, device=B.device)[~inside]
    return Rows(kept, rest, C[rest])


def _exchange(C: Float64[Tensor, "m rank"], kept: Int64[Tensor, " rank"]) -> bool:
    """Exchange kept rows, in place, until no coefficient is large or many were exchanged; whether any was."""
    for exchanged in range(_EXCHANGES_BEFORE_SOLVING):
        position = int(C.abs().argmax())
        i, j = divmod(position, C.shape[1])
        value = C[i, j].clone()
        if float(value.abs()) <= GROWTH:
            return exchanged > 0
        # Rank-one update: row i comes in for the j-th kept row.
        step = C[i].clone()
        step[j] -= 1
        C -= torch.outer(C[:, j] / value, step)
        kept[j] = i
    return True


class PivotedLinear(nn.Module):
    """``y = (h, T h)`` in the order of the outputs, plus the bias, with ``h = kept x``: pivoted storage."""

    order: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        kept: Float[Tensor, "rank n"],
        coefficients: Float[Tensor, "rest rank"],
        order: Int[Tensor, " m"],
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        rank, n = kept.shape
        self.kept = nn.Linear(n, rank, bias=False, device="meta")
        self.rest = nn.Linear(rank, len(coefficients), bias=False, device="meta")
        self.kept.weight = nn.Parameter(kept)
        self.rest.weight = nn.Parameter(coefficients)
        self.register_buffer("order", order)
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, layer: LowRankLinear, name: str = "(unnamed)") -> PivotedLinear:
        """The same function as a layer in two-factor storage.

        Raises:
            DecompositionError: the outer factor of the layer ``name`` holds NaN or infinity.
        """
        outer, inner = layer.outer.weight.detach(), layer.inner.weight.detach()
        rows = independent_rows(outer, name)
        kept = outer[rows.kept].double() @ inner.double()
        # Stored with the layer: half of the bytes of what argsort gives, and an index of 16 bits is none to torch.
        order = torch.cat([rows.kept, rows.rest]).argsort().to(torch.int32)
        bias = layer.outer.bias
        return cls(kept.to(inner.dtype), rows.coefficients.to(outer.dtype), order, bias)

    def two_factor(self) -> LowRankLinear:
        """The same function in two-factor storage."""
        rank = self.rank
        unit = torch.eye(rank, dtype=self.rest.weight.dtype, device=self.rest.weight.device)
        outer = torch.cat([unit, self.rest.weight.detach()])[self.order]
        return LowRankLinear(self.kept.weight.detach().clone(), outer, self.bias)

    @property
    def rank(self) -> int:
        """r."""
        return self.kept.out_features

    @property
    def growth(self) -> float:
        """Largest coefficient in magnitude."""
        return float(self.rest.weight.detach().abs().max()) if self.rest.weight.numel() else 0.0

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        """The matrix that the kept rows stand for: for code that reads a layer's matrix instead of calling it."""
        return torch.cat([self.kept.weight, self.rest.weight @ self.kept.weight])[self.order]

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix that the kept rows and the coefficients stand for, without gradients."""
        return self.weight.detach()

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """r outputs from x, the others from them."""
        h = self.kept(x)
        y = torch.cat([h, self.rest(h)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _permutation(pivots: Tensor, m: int) -> Int64[Tensor, " m"]:
    """LAPACK's successive row exchanges (from 1) as one order of the rows."""
    order = list(range(m))
    for i, pivot in enumerate(pivots.tolist()):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    return torch.tensor(order, device=pivots.device)
