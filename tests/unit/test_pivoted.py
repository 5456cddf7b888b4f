"""Pivoted storage is the same function in r (m + n - r) numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rank_search.compress import pivoted
from rank_search.compress.low_rank import LowRankLinear
from rank_search.compress.pivoted import GROWTH, PivotedLinear, independent_rows
from rank_search.errors import DecompositionError
from rank_search.ranks import LayerShape

SHAPES = [(12, 20, 5), (20, 12, 5), (16, 16, 15), (16, 16, 1), (64, 24, 23), (33, 70, 32)]


def _layer(m: int, n: int, rank: int, *, bias: bool = True, spread: float = 1.0) -> LowRankLinear:
    generator = torch.Generator().manual_seed(m * n + rank)
    scale = torch.logspace(0, -spread, rank)
    outer = torch.randn(m, rank, generator=generator) * scale
    inner = torch.randn(rank, n, generator=generator) * scale[:, None]
    return LowRankLinear(inner, outer, nn.Parameter(torch.randn(m, generator=generator)) if bias else None)


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_is_the_same(m: int, n: int, rank: int, bias: bool) -> None:
    layer = _layer(m, n, rank, bias=bias, spread=3.0)
    x = torch.randn(7, 3, n, generator=torch.Generator().manual_seed(1))
    pivoted = PivotedLinear.of(layer)
    with torch.no_grad():
        assert _error(pivoted(x), layer(x)) < 1e-5
        assert _error(pivoted.two_factor()(x), layer(x)) < 1e-5


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_counted_numbers_are_the_stored_ones(m: int, n: int, rank: int) -> None:
    pivoted = PivotedLinear.of(_layer(m, n, rank, bias=False))
    stored = sum(parameter.numel() for parameter in pivoted.parameters())
    assert stored == LayerShape("w", m, n).params(rank, "pivoted")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_dtype_costs_its_own_rounding_only(dtype: torch.dtype) -> None:
    layer = _layer(96, 64, 40, spread=2.0)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = layer(x)
        plain = _error(layer.to(dtype)(x.to(dtype)).float(), exact)
        layer.float()
        pivoted = _error(PivotedLinear.of(_layer(96, 64, 40, spread=2.0)).to(dtype)(x.to(dtype)).float(), exact)
    assert pivoted < 4 * plain


@pytest.mark.parametrize("seed", range(5))
def test_no_coefficient_is_large(seed: int) -> None:
    B = torch.randn(80, 30, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -8, 30)
    rows = independent_rows(B)
    assert rows.growth <= GROWTH
    assert sorted([*rows.kept.tolist(), *rows.rest.tolist()]) == list(range(80))
    expected = B.double()[rows.rest]
    assert _error(rows.coefficients @ B.double()[rows.kept], expected) < 1e-6


def test_rows_are_exchanged_to_the_end_however_often_the_coefficients_are_solved_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    B = torch.randn(80, 30, generator=torch.Generator().manual_seed(0))
    kept = independent_rows(B).kept
    monkeypatch.setattr(pivoted, "_EXCHANGES_BEFORE_SOLVING", 1)
    rows = independent_rows(B)
    assert rows.growth <= GROWTH
    assert torch.equal(rows.kept, kept)


def test_factors_that_are_not_finite_have_no_independent_rows() -> None:
    B = torch.ones(6, 2)
    B[4, 1] = torch.inf
    with pytest.raises(DecompositionError, match=r"layer w: its 6 x 2 outer factor is not finite.*lower the"):
        independent_rows(B, "w")


def test_factors_of_smaller_rank_than_r_keep_their_function() -> None:
    layer = _layer(12, 9, 6, bias=False)
    with torch.no_grad():
        layer.outer.weight[:, 4:] = 0
        x = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
        assert _error(PivotedLinear.of(layer)(x), layer(x)) < 1e-5
