"""A target layer that can stand at any of its ranks, for the nested fine-tune."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rank_search.compress.low_rank import aligned_rank, padded
from rank_search.factors.decompose import Factors
from rank_search.model.targets import Target


class NestedLinear(nn.Module):
    """The factors of one target layer, of which the first ``rank`` are used; a rank of -1 is the dense layer.

    The rank is a tensor that the layer reads in every forward pass, and all factors are multiplied whatever it says:
    the work never changes, so that on a GPU a step can be recorded (``masked``). On a CPU, which gains nothing from
    that, the factors are sliced. Both give the same sums of the same products.

    Args:
        largest: the largest rank that will be asked for; factors beyond it are left out.
        ever_dense: whether the dense layer will be asked for.
    """

    def __init__(
        self, target: Target, factors: Factors, rank: Int[Tensor, ""], *, masked: bool, largest: int, ever_dense: bool
    ) -> None:
        super().__init__()
        weight = target.matrix
        aligned = aligned_rank(largest, weight.device)
        out, inn = (part[:largest].to(weight.device, weight.dtype, copy=True) for part in (factors.out, factors.inn))
        self.inner = nn.Parameter(padded(inn, aligned))
        self.outer = nn.Parameter(padded(out, aligned).T.contiguous())
        self.rank = rank
        self.ever_dense = ever_dense
        self._masked = masked
        self._largest = largest
        self._index = torch.arange(aligned, device=weight.device)
        # Not registered: they are the dense model's.
        self._dense = (weight, target.bias)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Inner (rank, n) and outer factor (m, rank)."""
        return self.inner, self.outer

    @property
    def dense(self) -> Float[Tensor, "m n"]:
        """The dense model's matrix."""
        return self._dense[0]

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense model's bias."""
        return self._dense[1]

    def trained(self, before: Factors) -> Factors:
        """The factors as they are now; the singular values are those of ``before``."""
        out, inn = (
            torch.cat((part[: self._largest].float().to(untrained.device), untrained[self._largest :]))
            for part, untrained in ((self.outer.detach().T, before.out), (self.inner.detach(), before.inn))
        )
        return Factors(out, inn, before.sigma)

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        """The matrix at the present rank: for code that reads a layer's matrix instead of calling it."""
        low_rank: Tensor = self.outer @ self._used(self.inner)
        if not self.ever_dense:
            return low_rank
        return low_rank + self.dense * (self.rank < 0).to(self.outer.dtype)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """The layer at its present rank."""
        weight, bias = self._dense
        if not self._masked:
            rank = int(self.rank)
            if rank < 0:
                return F.linear(x, weight, bias)
            return F.linear(F.linear(x, self.inner[:rank]), self.outer[:, :rank], bias)
        # Whichever is less work for a batch of many vectors, next to which a product of factors is none.
        if self.ever_dense or len(self._index) * sum(weight.shape) > weight.numel():
            return F.linear(x, self.weight, bias)
        return F.linear(F.linear(x, self._used(self.inner)), self.outer, bias)

    def _used(self, factors: Float[Tensor, "rank d"]) -> Float[Tensor, "rank d"]:
        return factors * (self._index < self.rank).to(factors.dtype)[:, None]
