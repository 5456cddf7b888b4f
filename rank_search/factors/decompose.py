"""Factors of one weight matrix: the best approximation of every rank in a method's own metric.

A method is a pair of metrics, one for rows (outputs) and one for columns (inputs). With square roots ``R Rᵀ = G`` and
``L Lᵀ = A``, the error of ``Ŵ`` is ``½ ‖Rᵀ (W − Ŵ) L‖_F²``, and the truncated SVD of ``M = Rᵀ W L`` gives the best
``Ŵ`` of every rank at once (Eckart and Young, 1936, in that metric).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from rank_search.errors import DecompositionError
from rank_search.factors.statistics import LayerStatistics
from rank_search.progress import SILENT, Progress
from rank_search.spec import Method

Root = Tensor | None
"""None: the identity. 1-D: a diagonal. 2-D: a lower Cholesky factor."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Sorted factors of one matrix: ``W ≈ out[:r].T @ inn[:r]`` is the best of rank r in the method's metric.

    In a bank with ``factors.gain_step`` it is that times one number a layer, which is in ``out``.

    Attributes:
        out: rows of the outer factor, transposed so that a rank is a contiguous slice.
        inn: rows of the inner factor. As decomposed, the two rows of a rank have equal norms, so that both train at one
            rate.
        sigma: all singular values in the method's metric, descending; ``½ Σ_{i>r} σᵢ²`` is the predicted rise at r
            (in nats for ``kfac``).
    """

    out: Float32[Tensor, "rank m"]
    inn: Float32[Tensor, "rank n"]
    sigma: Float64[Tensor, " full_rank"]


@dataclass(frozen=True, slots=True)
class Needs:
    """Which statistics a method asks for."""

    inputs: bool
    gradients: bool


NEEDS: dict[Method, Needs] = {
    "svd": Needs(inputs=False, gradients=False),
    "whitened": Needs(inputs=True, gradients=False),
    "asvd": Needs(inputs=True, gradients=False),
    "fwsvd": Needs(inputs=False, gradients=True),
    "kfac": Needs(inputs=True, gradients=True),
}


MOST_DAMPING = 0.1
"""Sums of float32 products are exact to about 1e-7 of their largest eigenvalue, in wide layers thousands of times the
mean diagonal at worst: a matrix that its damping leaves indefinite is damped ten times more, up to this."""
_TINY = 1e-30
"""Stands for the scale of inputs that are zero in every calibration block."""


class Roots:
    """Square roots of a method's metrics; layers that share their ``A`` share its root.

    ==========  ======================  =====================  ==================================================
    method      columns                 rows                   source
    ==========  ======================  =====================  ==================================================
    svd         identity                identity               Eckart and Young, 1936
    whitened    A                       identity               SVD-LLM: Wang et al., 2024
    asvd        diagonal, E|x|          identity               ASVD: Yuan et al., 2023 (absolute mean, α = 0.5)
    fwsvd       identity                diagonal of G          after FWSVD: Hsu et al., 2022 (row Fisher information)
    kfac        A                       G                      Martens and Grosse, 2015, as a metric for truncation
    ==========  ======================  =====================  ==================================================

    The paper on FWSVD weighs a row by the sum of its weights' squared gradients, in which the inputs count, too; here a
    row weighs what its output's squared gradient is.
    """

    def __init__(self, method: Method, damping: float, progress: Progress = SILENT) -> None:
        self._method = method
        self._damping = damping
        self._progress = progress
        self._last: tuple[Tensor, Tensor] | None = None

    def columns(self, name: str, statistics: LayerStatistics) -> Root:
        """L with ``L Lᵀ = A``.

        Raises:
            DecompositionError: A is not finite, or not positive definite however it is damped.
        """
        A = statistics.A
        if self._method in {"svd", "fwsvd"} or A is None:
            return None
        if self._method == "asvd":
            assert statistics.mean_abs is not None, "collected with A"
            # L is the paper's scaling (E|x|)^α itself, so that L Lᵀ is E|x|.
            return (statistics.mean_abs + self._damping * statistics.mean_abs.mean()).clamp(min=_TINY).sqrt()
        if self._last is None or self._last[0] is not A:
            self._last = (A, self._cholesky(name, "A", A))
        return self._last[1]

    def rows(self, name: str, statistics: LayerStatistics) -> Root:
        """R with ``R Rᵀ = G``.

        Raises:
            DecompositionError: G is not finite, or not positive definite however it is damped.
        """
        G = statistics.G
        if self._method in {"svd", "whitened", "asvd"} or G is None:
            return None
        if self._method == "fwsvd":
            return _damped(G, self._damping).diagonal().sqrt()
        return self._cholesky(name, "G", G)

    def _cholesky(self, name: str, which: str, S: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
        """The root of the damped matrix; a damping that does not suffice is raised, and that is told."""
        if not bool(torch.isfinite(S).all()):
            raise DecompositionError(
                name, f"its {which} holds values that are not finite: the model overflows on the calibration blocks"
            )
        damping = self._damping
        while True:
            root: Tensor
            root, failed = torch.linalg.cholesky_ex(_damped(S, damping))
            if not int(failed) and bool(torch.isfinite(root).all()):
                break
            if damping >= MOST_DAMPING:
                raise DecompositionError(
                    name, f"its {which} is not positive definite; raise factors.damping or calibrate on more text"
                )
            damping = min(10 * damping, MOST_DAMPING)
        if damping > self._damping:
            self._progress.say(f"layer {name}: its {which} needs a damping of {damping:g}")
        return root


def decompose(name: str, W: Float[Tensor, "m n"], columns: Root, rows: Root, max_rank: int) -> Factors:
    """Factors of ``W`` up to ``max_rank``, through the eigenvalues of the smaller Gram matrix of ``M`` in float64.

    For ``m ≤ n``, ``M Mᵀ = U S² Uᵀ`` and ``Ŵ = (R⁻ᵀ U)(Uᵀ Rᵀ W)``: L is not inverted. For ``m > n``,
    ``Mᵀ M = V S² Vᵀ`` and ``Ŵ = (W L V)(Vᵀ L⁻¹)``: R is not inverted. Nothing is divided by a singular value.

    Raises:
        DecompositionError: a matrix is not finite, or the eigenvalue routine does not converge.
    """
    W = W.double()
    if not bool(torch.isfinite(W).all()):
        raise DecompositionError(name, "its weight matrix holds values that are not finite")
    m, n = W.shape
    left = _apply_transposed(rows, W)
    M = _apply_right(left, columns)
    try:
        if m <= n:
            values, U = torch.linalg.eigh(M @ M.T)
            U = U[:, -max_rank:].flip(1) if max_rank else U[:, :0]
            out, inn = _solve_transposed(rows, U).T, U.T @ left
        else:
            values, V = torch.linalg.eigh(M.T @ M)
            V = V[:, -max_rank:].flip(1) if max_rank else V[:, :0]
            out, inn = (_apply_right(W, columns) @ V).T, _solve_right(V.T, columns)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # missing from __all__
        raise DecompositionError(name, f"eigenvalues of its Gram matrix did not converge ({error})") from error
    out, inn = _balanced(out, inn)
    sigma = values.clamp(min=0).sqrt().flip(0)
    for tensor in (out, inn, sigma):
        if not bool(torch.isfinite(tensor).all()):
            raise DecompositionError(name, "its factors are not finite; raise factors.damping")
    return Factors(out.float(), inn.float(), sigma)


def _balanced(out: Tensor, inn: Tensor) -> tuple[Tensor, Tensor]:
    a, b = out.norm(dim=1, keepdim=True), inn.norm(dim=1, keepdim=True)
    # A rank beyond the matrix's own (a norm of 0) stays as it is.
    scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), torch.ones_like(a))
    return out * scale, inn / scale


def _damped(S: Float64[Tensor, "d d"], damping: float) -> Float64[Tensor, "d d"]:
    mean = S.diagonal().mean()
    # A layer that saw only zeros has no preferred direction.
    addend = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return S + torch.diag(addend.expand(len(S)))


def _apply_transposed(root: Root, W: Tensor) -> Tensor:
    """Rᵀ W."""
    if root is None:
        return W
    return root[:, None] * W if root.ndim == 1 else root.T @ W


def _apply_right(W: Tensor, root: Root) -> Tensor:
    """W L."""
    if root is None:
        return W
    return W * root if root.ndim == 1 else W @ root


def _solve_transposed(root: Root, U: Tensor) -> Tensor:
    """R⁻ᵀ U."""
    if root is None:
        return U
    return U / root[:, None] if root.ndim == 1 else torch.linalg.solve_triangular(root.T, U, upper=True)


def _solve_right(V: Tensor, root: Root) -> Tensor:
    """V L⁻¹."""
    if root is None:
        return V
    return V / root if root.ndim == 1 else torch.linalg.solve_triangular(root, V, upper=False, left=False)
