"""The linear algebra of edits: matrices in, factors out. Imports torch alone.

Rows are tokens: ``value = key @ W + b`` with W [d_mlp, d_model], so an update is ``W += left @ right``.
Everything is solved in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Factors(NamedTuple):
    """A low-rank update ``W += left @ right``, float64, and the λ of it that it was solved with (None for none)."""

    left: Float[Tensor, "d_mlp rank"]
    right: Float[Tensor, "rank d_model"]
    weight: float | None = None


class NotPositiveDefiniteError(ValueError):
    """A second moment that can't be inverted with meaning."""


MAX_CONDITION = 1e12
"""Above this a second moment counts as singular: rounding alone leaves one with pivots of 1e-14 of the largest."""


def whiten(lower: Float[Tensor, "d_mlp d_mlp"], key: Float[Tensor, "d_mlp"]) -> Float[Tensor, "d_mlp"]:
    """``C⁻¹ k`` from the Cholesky factor of C (see `cholesky`)."""
    return torch.cholesky_solve(key.double()[:, None], lower)[:, 0]


def cholesky(moment: Float[Tensor, "d_mlp d_mlp"], *, ridge: float = 0.0) -> Float[Tensor, "d_mlp d_mlp"]:
    """The lower factor L of ``C + ridge · tr(C)/m · I = L Lᵀ``, float64.

    Raises:
        NotPositiveDefiniteError: C is singular, or too ill-conditioned for float64.
    """
    c = moment.double()
    if ridge:
        c = c.clone()  # the one copy: C is a large part of the memory
        c.diagonal().add_(ridge * torch.trace(c) / len(c))
    factor, info = torch.linalg.cholesky_ex(c)
    if int(info) != 0:
        raise NotPositiveDefiniteError(f"not positive definite (Cholesky fails at row {int(info)})")
    pivots = torch.diagonal(factor)
    # The squared ratio of the pivots bounds the condition number from below, at no cost.
    condition = float((pivots.max() / pivots.min()) ** 2)
    if condition > MAX_CONDITION:
        raise NotPositiveDefiniteError(
            f"condition number at least {condition:.1e}, at most {MAX_CONDITION:.0e} allowed"
        )
    return factor


def rank_one(
    direction: Float[Tensor, "d_mlp"], key: Float[Tensor, "d_mlp"], residual: Float[Tensor, "d_model"]
) -> Factors:
    """The update along `direction` that moves the answer to `key` by `residual`.

    With direction u = C⁻¹k it is the least change to W in the metric of stored keys
    (Meng et al. 2022, arXiv:2202.05262, eq. 2)::

        Δ = u ⊗ r / (uᵀ k)

    and with u = k the least change in Frobenius norm.

    Args:
        direction: u, which keys are moved and how much: another key k' moves by (uᵀk' / uᵀk) r.
        key: k, where to write.
        residual: r, new value minus the value that W gives now, in residual-stream units.

    Raises:
        ZeroDivisionError: uᵀk is 0, so no multiple of u writes at this key.
    """
    u, k, r = direction.double(), key.double(), residual.double()
    factor = u @ k
    if float(factor) == 0.0:
        raise ZeroDivisionError("uᵀk is 0: the direction does not see the key")
    return Factors((u / factor)[:, None], r[None, :])


def least_squares(
    keys: Float[Tensor, "fact d_mlp"],
    residuals: Float[Tensor, "fact d_model"],
    lower: Float[Tensor, "d_mlp d_mlp"],
    weight: float,
) -> Factors:
    """The update that trades what is written at some keys against what is changed at all others.

    It minimises ``‖K Δ − R‖² + λ tr(Δᵀ C Δ)`` (Meng et al. 2023, arXiv:2210.07229, eq. 14), in one of two forms of
    equal value::

        Δ = (λ C + KᵀK)⁻¹ Kᵀ R             primal, [d_mlp d_mlp]
          = C⁻¹ Kᵀ (λ I + K C⁻¹ Kᵀ)⁻¹ R    dual, [fact fact]

    The smaller one is solved. With λ = 0 the residuals are met exactly (EMMET, Gupta et al. 2024,
    arXiv:2403.14236), which needs independent keys.

    Args:
        keys: K, a row for each fact.
        residuals: R, what each is to change by, in residual-stream units.
        lower: Cholesky factor of C (see `cholesky`).
        weight: λ.

    Raises:
        NotPositiveDefiniteError: λ is 0 and two keys are the same, or nearly.
    """
    k, r = keys.double(), residuals.double()
    n, m = k.shape
    if weight > 0 and n > m:
        primal = cholesky(weight * (lower @ lower.T) + k.T @ k)
        return _thin(torch.cholesky_solve(k.T, primal), r, weight)
    spread = torch.cholesky_solve(k.T, lower)  # C⁻¹ Kᵀ
    gram = k @ spread
    dual = cholesky((gram + gram.T) / 2 + weight * torch.eye(n, dtype=k.dtype, device=k.device))
    return _thin(spread, torch.cholesky_solve(r, dual), weight)


def weight_for_unmet(
    keys: Float[Tensor, "fact d_mlp"],
    residuals: Float[Tensor, "fact d_model"],
    lower: Float[Tensor, "d_mlp d_mlp"],
    unmet: float,
) -> float:
    """The λ at which `least_squares` leaves a stated share of the residuals unmet, mean over facts.

    With ``K C⁻¹ Kᵀ = V S² Vᵀ`` what is left of R is ``R − V S² (S² + λ)⁻¹ Vᵀ R``, so that λ can be looked for without
    solving anew: by bisection, to 1e-9 of itself. Of one fact it is ``unmet / (1 − unmet) · kᵀC⁻¹k``.

    Args:
        keys: K, a row for each fact.
        residuals: R, in residual-stream units; facts of which nothing is wanted don't count.
        lower: Cholesky factor of C (see `cholesky`).
        unmet: The mean over facts of ``‖k Δ − r‖ / ‖r‖``, between 0 and 1.

    Raises:
        ValueError: More is left whatever λ is, as some keys are nearly the same.
    """
    k, r = keys.double(), residuals.double()
    whitened = torch.linalg.solve_triangular(lower, k.T, upper=False)
    _, sizes, basis = torch.linalg.svd(whitened, full_matrices=False)
    squares, along, size = sizes**2, basis @ r, r.norm(dim=-1)
    wanted = size > 0
    if not bool(wanted.any()):
        return float(squares.max())

    def left(weight: float) -> float:
        lacking = r - basis.T @ ((squares / (squares + weight))[:, None] * along)
        return float((lacking.norm(dim=-1)[wanted] / size[wanted]).mean())

    low = high = float(squares.max())
    while left(high) < unmet:
        high *= 10
    while left(low) > unmet:
        low /= 10
        if low < 1e-12 * float(squares.max()):
            raise ValueError(
                f"{left(low):.0%} is left unmet with any weight, needed {unmet:.0%} or less: some keys are nearly the "
                "same; state a larger share, or leave out facts of the same subject"
            )
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if left(middle) < unmet else (low, middle)
    return (low * high) ** 0.5


def null_space(
    moment: Float[Tensor, "d_mlp d_mlp"], *, threshold: float | None = None, share: float | None = None
) -> Float[Tensor, "d_mlp d_mlp"]:
    """The projection P onto the directions in which stored keys hardly lie (Fang et al. 2024, AlphaEdit).

    Args:
        moment: C = E[k kᵀ].
        threshold: Keep the eigenvectors of C with a smaller eigenvalue (their rule; its scale is that of the keys).
        share: Or the most of the smallest ones that together hold at most this share of C's trace.

    Raises:
        ValueError: Not exactly one rule is given, or nothing is left.
    """
    if (threshold is None) == (share is None):
        raise ValueError(f"threshold is {threshold} and share is {share}, needed one of the two")
    c = moment.double()
    values, vectors = torch.linalg.eigh((c + c.T) / 2)  # ascending
    values = values.clamp(min=0)
    kept = values < threshold if threshold is not None else values.cumsum(0) <= float(share or 0) * values.sum()
    if not bool(kept.any()):
        raise ValueError(
            f"no direction is left for edits: the smallest eigenvalue of C is {float(values[0]):.3g}, "
            f"of a trace of {float(values.sum()):.3g}: take a larger threshold or share"
        )
    small = vectors[:, kept]
    return small @ small.T


def in_null_space(
    keys: Float[Tensor, "fact d_mlp"],
    residuals: Float[Tensor, "fact d_model"],
    projection: Float[Tensor, "d_mlp d_mlp"],
    before: Float[Tensor, "earlier d_mlp"],
    weight: float,
) -> Factors:
    """``Δ = (P (KᵀK + K_pᵀK_p) + λ I)⁻¹ P Kᵀ R`` (Fang et al. 2024, AlphaEdit, eq. 14), which lies in P.

    Args:
        keys: K, a row for each fact.
        residuals: R.
        projection: P.
        before: K_p, the keys of earlier edits, which are kept.
        weight: λ.
    """
    k, past, p = keys.double(), before.double(), projection.double()
    # In P itself, where the matrix is symmetric: with K' = K P it is (K'ᵀK' + K_p'ᵀK_p' + λ I)⁻¹ K'ᵀ R.
    inside, kept = k @ p, past @ p
    matrix = inside.T @ inside + kept.T @ kept
    lower = cholesky(matrix + weight * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    return _thin(torch.cholesky_solve(inside.T, lower), residuals.double(), weight)


def _thin(left: Tensor, right: Tensor, weight: float) -> Factors:
    """Factors of the smaller rank: of more facts than residual-stream dimensions, the product beside the identity."""
    if len(right) <= right.shape[1]:
        return Factors(left, right, weight)
    return Factors(left @ right, torch.eye(right.shape[1], dtype=right.dtype, device=right.device), weight)
