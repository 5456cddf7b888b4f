"""Factors are the best of every rank in their method's own metric."""

from __future__ import annotations

import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from rank_search.errors import DecompositionError
from rank_search.factors.bank import _tail
from rank_search.factors.decompose import NEEDS, Factors, Root, Roots, decompose
from rank_search.factors.statistics import LayerStatistics
from rank_search.spec import Method
from tests.data.heard import Heard
from tests.data.matrices import KINDS, SHAPES, Kind, layer_statistics, weight

METHODS: tuple[Method, ...] = get_args(Method)
DAMPING = 1e-4


def _roots(method: Method, statistics: LayerStatistics, damping: float = DAMPING) -> tuple[Root, Root]:
    roots = Roots(method, damping)
    return roots.columns("layer", statistics), roots.rows("layer", statistics)


def _factors(method: Method, W: Tensor, statistics: LayerStatistics, max_rank: int | None = None) -> Factors:
    columns, rows = _roots(method, statistics)
    return decompose("layer", W, columns, rows, min(W.shape) if max_rank is None else max_rank)


def _damped(S: Tensor) -> Tensor:
    return S + DAMPING * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)


def _metric(method: Method, statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
    """A and G of a method, written down from its definition."""
    assert statistics.A is not None
    assert statistics.G is not None
    A, G = _damped(statistics.A), _damped(statistics.G)
    eye = torch.eye
    assert statistics.mean_abs is not None
    scale = statistics.mean_abs + DAMPING * statistics.mean_abs.mean()
    identity_n, identity_m = eye(len(A), dtype=A.dtype), eye(len(G), dtype=G.dtype)
    return {
        "svd": (identity_n, identity_m),
        "whitened": (A, identity_m),
        "asvd": (torch.diag(scale), identity_m),
        "fwsvd": (identity_n, torch.diag(G.diagonal())),
        "kfac": (A, G),
    }[method]


def _error(W: Tensor, factors: Factors, rank: int, A: Tensor, G: Tensor) -> float:
    """½ tr(Δᵀ G Δ A), which is ½ ‖G^½ Δ A^½‖²."""
    delta = W.double() - factors.out[:rank].double().T @ factors.inn[:rank].double()
    return 0.5 * float(torch.trace(delta.T @ G @ delta @ A))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_truncation_error_is_the_tail_of_the_singular_values(
    method: Method, shape: tuple[int, int], kind: Kind
) -> None:
    W, statistics = weight(*shape), layer_statistics(*shape, kind)
    factors = _factors(method, W, statistics)
    A, G = _metric(method, statistics)
    tails = _tail(factors.sigma.numpy())
    assert len(tails) == min(shape) + 1
    assert tails[0] == pytest.approx(0.5 * float(torch.trace(W.double().T @ G @ W.double() @ A)), rel=1e-10)
    for rank in (1, 2, 5, 9, min(shape) - 1, min(shape)):
        # Stored in float32: each number is off by up to 6e-8 of itself, so errors below 1e-6 of the whole are noise.
        assert _error(W, factors, rank, A, G) == pytest.approx(tails[rank], rel=1e-4, abs=1e-9 * tails[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_method_beats_kfac_in_its_metric(shape: tuple[int, int], kind: Kind) -> None:
    W, statistics = weight(*shape), layer_statistics(*shape, kind)
    A, G = _metric("kfac", statistics)
    best = _factors("kfac", W, statistics)
    for method in METHODS:
        other = _factors(method, W, statistics)
        for rank in range(1, min(shape)):
            assert _error(W, best, rank, A, G) <= _error(W, other, rank, A, G) * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_the_matrix_itself(method: Method, shape: tuple[int, int], kind: Kind) -> None:
    W = weight(*shape)
    factors = _factors(method, W, layer_statistics(*shape, kind))
    torch.testing.assert_close(factors.out.T @ factors.inn, W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_singular_values_fall_and_agree_with_an_svd(method: Method) -> None:
    W, statistics = weight(12, 20), layer_statistics(12, 20, "random")
    A, G = _metric(method, statistics)

    def root(S: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(S)
        square_root: Tensor = vectors @ torch.diag(values.sqrt()) @ vectors.T
        return square_root

    expected = torch.linalg.svdvals(root(G) @ W.double() @ root(A))
    sigma = _factors(method, W, statistics).sigma
    assert bool((sigma.diff() <= 0).all())
    torch.testing.assert_close(sigma, expected, rtol=1e-6, atol=1e-9)


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError, match="inn"):
        Factors(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, dtype=torch.float64))


def test_the_two_rows_of_a_rank_have_equal_norms() -> None:
    factors = _factors("kfac", weight(12, 20), layer_statistics(12, 20, "massive"))
    torch.testing.assert_close(factors.out.norm(dim=1), factors.inn.norm(dim=1), rtol=1e-5, atol=0)


def test_fewer_ranks_are_the_first_of_all_ranks() -> None:
    W, statistics = weight(20, 12), layer_statistics(20, 12, "random")
    few, full = _factors("kfac", W, statistics, 3), _factors("kfac", W, statistics)
    assert few.out.shape == (3, 20)
    assert few.inn.shape == (3, 12)
    torch.testing.assert_close(few.out, full.out[:3])
    torch.testing.assert_close(few.inn, full.inn[:3])
    assert torch.equal(few.sigma, full.sigma)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1)])
def test_a_layer_too_thin_for_any_rank_has_empty_factors_and_its_rise(shape: tuple[int, int]) -> None:
    W, statistics = weight(*shape), layer_statistics(*shape, "random")
    factors = _factors("kfac", W, statistics, 0)
    assert factors.out.shape == (0, shape[0])
    assert factors.inn.shape == (0, shape[1])
    assert _tail(factors.sigma.numpy()).shape == (2,)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_needs_no_more(shape: tuple[int, int]) -> None:
    W = weight(shape[0], 3) @ weight(3, shape[1], seed=5)
    factors = _factors("kfac", W, layer_statistics(*shape, "dead"))
    torch.testing.assert_close(factors.out[:3].T @ factors.inn[:3], W, rtol=1e-4, atol=1e-5)
    assert _tail(factors.sigma.numpy())[3] < 1e-12 * _tail(factors.sigma.numpy())[0]


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    factors = _factors("kfac", torch.zeros(6, 8), layer_statistics(6, 8, "random"))
    assert not bool((factors.out.T @ factors.inn).any())
    assert not bool(factors.sigma.any())


def test_a_layer_that_saw_only_zeros_is_decomposed_plainly() -> None:
    W = weight(6, 8)
    silent = LayerStatistics(torch.zeros(8, 8, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64))
    torch.testing.assert_close(_factors("kfac", W, silent).sigma, torch.linalg.svdvals(W.double()))


def test_layers_that_share_their_inputs_share_the_root() -> None:
    first = layer_statistics(6, 8, "random")
    second = LayerStatistics(first.A, layer_statistics(6, 8, "dead").G)
    roots = Roots("kfac", DAMPING)
    assert roots.columns("a", first) is roots.columns("b", second)
    assert roots.rows("a", first) is not roots.rows("b", second)


def test_tails_are_sums_of_squares_from_every_rank_on() -> None:
    sigma = np.array([3.0, 2.0, 1e-8])
    assert _tail(sigma) == pytest.approx([6.5 + 5e-17, 2.0 + 5e-17, 5e-17, 0.0])
    assert _tail(sigma)[2] == 0.5 * 1e-8**2


@pytest.mark.parametrize("method", METHODS)
def test_a_method_needs_exactly_the_statistics_that_it_uses(method: Method) -> None:
    needs, statistics = NEEDS[method], layer_statistics(6, 8, "random")
    columns, rows = _roots(method, statistics)
    assert (columns is not None, rows is not None) == (needs.inputs, needs.gradients)


def test_a_matrix_that_is_not_finite_is_an_error_with_the_layers_name() -> None:
    W = weight(6, 8)
    W[2, 3] = torch.nan
    with pytest.raises(DecompositionError, match=r"^layer layer: its weight matrix holds values that are not finite$"):
        _factors("svd", W, LayerStatistics())


def test_a_moment_that_is_not_finite_is_an_error_with_the_layers_name() -> None:
    broken = LayerStatistics(torch.full((8, 8), torch.nan, dtype=torch.float64), None)
    with pytest.raises(DecompositionError, match=r"^layer layer: its A holds values that are not finite") as raised:
        _factors("whitened", weight(6, 8), broken)
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (str(copied), copied.layer) == (str(raised.value), "layer")


def _with_least_eigenvalue(least: float) -> LayerStatistics:
    """A of mean diagonal 1, as rounding of a large eigenvalue may leave it."""
    vectors, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    values = torch.full((8,), (8 - least) / 7, dtype=torch.float64)
    values[0] = least
    return LayerStatistics((vectors * values) @ vectors.T, None)


def test_a_damping_that_rounding_exceeds_is_raised_and_told() -> None:
    said = Heard()
    roots = Roots("whitened", 1e-4, said)
    assert isinstance(roots.columns("mild", _with_least_eigenvalue(-5e-5)), torch.Tensor)
    assert said.lines == []
    root = roots.columns("layer", _with_least_eigenvalue(-5e-3))
    assert root is not None
    assert bool(torch.isfinite(root).all())
    assert said.lines == ["layer layer: its A needs a damping of 0.01"]
    with pytest.raises(DecompositionError, match=r"^layer worse: its A is not positive definite; raise"):
        roots.columns("worse", _with_least_eigenvalue(-0.5))
