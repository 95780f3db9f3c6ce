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
    """A low-rank update ``W += left @ right``, float64."""

    left: Float[Tensor, "d_mlp rank"]
    right: Float[Tensor, "rank d_model"]


class NotPositiveDefiniteError(ValueError):
    """A second moment that can't be inverted with meaning."""


MAX_CONDITION = 1e12
"""Above this a second moment counts as singular: rounding alone leaves one with pivots of 1e-14 of the largest."""


def whiten_key(
    moment: Float[Tensor, "d_mlp d_mlp"], key: Float[Tensor, "d_mlp"], *, ridge: float = 0.0
) -> Float[Tensor, "d_mlp"]:
    """``(C + ridge · tr(C)/m · I)⁻¹ k``, by Cholesky.

    Args:
        moment: C = E[k kᵀ], uncentred.
        key: k.
        ridge: Share of the mean eigenvalue to add to the diagonal.

    Raises:
        NotPositiveDefiniteError: C is singular, or too ill-conditioned for float64.
    """
    return whiten(cholesky(moment, ridge=ridge), key)


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
        c = c + ridge * torch.trace(c) / len(c) * torch.eye(len(c), dtype=c.dtype, device=c.device)
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
