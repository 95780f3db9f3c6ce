"""Concept scrubbing: maps that take a relation's objects out of a state, and their placebo.

LEACE (Belrose et al. 2023, arXiv:2306.03819) is the least change of x, in mean square, after which no linear classifier
of the object beats a constant one, *on the rows it was fitted on*; with W = Σ_xx^(−1/2) and Z the one-hot object::

    r(x) = x − W⁺ P W (x − μ),    P the orthogonal projection on the columns of W Σ_xz

It needs as many directions as there are objects, less one. Not everything follows from it: other rows keep a little, a
quadratic classifier may keep much, and later layers may read the object anew from tokens that weren't erased. So it is
fitted on training subjects and tried on others, beside a random subspace of equal rank. `erase_states` puts such a map
to work in a model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.state import plain_torch

TOLERANCE = 1e-6
"""Singular values of W Σ_xz below this count as 0. They are correlations, so the scale of x doesn't matter."""


@dataclass(frozen=True, eq=False)
class Eraser:
    """An affine map that takes a subspace out of a vector: ``r(x) = x − (x − mean) @ right.T @ left.T``.

    Attributes:
        left: [d_model rank], float64.
        right: [rank d_model], float64.
        mean: [d_model], float64.
        n_train: Number of rows it was fitted on.
    """

    left: Float[Tensor, "d_model rank"]
    right: Float[Tensor, "rank d_model"]
    mean: Float[Tensor, "d_model"]
    n_train: int

    @property
    def rank(self) -> int:
        """How many directions it takes out."""
        return self.left.shape[1]

    @plain_torch()
    def __call__(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The vectors without the subspace, in their own type."""
        wide = x.double()
        left, right, mean = (part.to(x.device) for part in (self.left, self.right, self.mean))
        return (wide - (wide - mean) @ right.T @ left.T).to(x.dtype)

    @plain_torch()
    def size(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row"]:
        """How far it moves each vector: ‖x − r(x)‖ / ‖x‖."""
        return (x.double() - self(x.double())).norm(dim=-1) / x.double().norm(dim=-1)


@plain_torch()
def leace(
    x: Float[Tensor, "row d_model"],
    y: Int[Tensor, "row"],
    n_classes: int,
    *,
    shrinkage: bool = True,
    tolerance: float = TOLERANCE,
) -> Eraser:
    """Fit LEACE, in float64, with the package concept-erasure.

    Args:
        x: States of the training facts at one layer and position.
        y: Their objects, 0 to ``n_classes - 1``.
        n_classes: How many objects there are.
        shrinkage: Whether to shrink Σ_xx towards a multiple of the identity, for when there are too few rows to
            estimate it. The guarantee holds either way; what changes is how much else is taken out.
        tolerance: Singular values of W Σ_xz below this count as 0.

    Raises:
        ModuleNotFoundError: concept-erasure isn't installed.
        ValueError: There are fewer than two rows.

    Note:
        The package's ``constrain_cov_trace`` is off: where it takes effect, its mixture no longer has
        Cov(r(x), z) = 0.
    """
    if len(x) < 2:
        raise ValueError(f"{len(x)} rows, needed at least 2")
    fitter = _leace_fitter()
    one_hot = torch.nn.functional.one_hot(y, n_classes).double()
    options = {"shrinkage": shrinkage, "svd_tol": tolerance, "constrain_cov_trace": False}
    found = fitter.fit(x.double(), one_hot, **options).eraser
    taken = found.proj_left.norm(dim=0) > 0  # singular values below the tolerance leave columns of zeros
    return Eraser(found.proj_left[:, taken], found.proj_right[taken], found.bias, len(x))


@plain_torch()
def random_subspace(x: Float[Tensor, "row d_model"], rank: int, *, seed: int = 0) -> Eraser:
    """The placebo of LEACE: directions drawn at random in the whitened space.

    Args:
        x: The rows that LEACE was fitted on, by which to whiten.
        rank: How many directions to take out, as many as LEACE does.
        seed: Seed of the draw.

    Raises:
        ValueError: `rank` is more than the rows span.
    """
    mean = x.double().mean(0)
    apart = x.double() - mean
    values, vectors = torch.linalg.eigh(apart.T @ apart / max(1, len(x) - 1))
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    values, vectors = values[kept], vectors[:, kept]
    if rank > len(values):
        raise ValueError(f"rank {rank} is more than the {len(values)} directions that {len(x)} rows span")
    noise = torch.randn(len(values), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(noise).Q
    left = vectors @ (values.sqrt()[:, None] * basis)
    right = (basis.T / values.sqrt()) @ vectors.T
    return Eraser(left, right, mean, len(x))


def _leace_fitter() -> Any:
    with warnings.catch_warnings():
        # It still scripts a class of its own with torch.jit, of which torch warns.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from concept_erasure import LeaceFitter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "LEACE needs the package concept-erasure: install it with: pip install 'tl-factedit[probes]'"
            ) from error
    return LeaceFitter
