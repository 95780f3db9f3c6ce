"""A low-rank change of one ``W_out``, and what it was made to write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import FactoredMatrix


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
class Delta:
    """A low-rank change of one layer's weight, ``W_out += left @ right``.

    Attributes:
        layer: The block.
        left: Which keys it answers to, [d_mlp, rank], float64.
        right: What it adds to the value, [rank, d_model], float64.
    """

    layer: int
    left: Float[Tensor, "d_mlp rank"]
    right: Float[Tensor, "rank d_model"]

    @classmethod
    def full(cls, layer: int, change: Float[Tensor, "d_mlp d_model"]) -> Delta:
        """A change of full rank: the matrix itself beside the identity, so that it is added to the bit as it is."""
        return cls(layer, change.double(), torch.eye(change.shape[1], dtype=torch.float64, device=change.device))

    @property
    def matrix(self) -> FactoredMatrix:
        """The change as a TransformerLens `FactoredMatrix` (norm, SVD, products without the dense form)."""
        return FactoredMatrix(self.left, self.right)

    @property
    def dense(self) -> Float[Tensor, "d_mlp d_model"]:
        """The change as one matrix, float64."""
        return self.left @ self.right

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), without the dense form where the rank is small."""
        if self.left.shape[1] >= min(len(self.left), self.right.shape[1]):
            return float(self.dense.norm())
        return float((torch.linalg.qr(self.left, mode="r").R @ self.right).norm())

    def on(self, weight: Float[Tensor, "d_mlp d_model"]) -> Float[Tensor, "d_mlp d_model"]:
        """`weight` with the change: added in float64, rounded once to the weight's type."""
        dense = (self.left.to(weight.device) @ self.right.to(weight.device)).to(torch.float64)
        return (weight.double() + dense).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """What an editor does in one layer: the change, where it is to write, and what.

    Attributes:
        delta: The change.
        keys: The keys it writes at, [fact d_mlp], float64.
        residuals: What the answer to each key was to change by, [fact d_model], float64, where the change may fall
            short of it; None where the change does what it was to do by construction.
        directions: For each fact, the direction along which its key is answered, such as C⁻¹k, [fact d_mlp]; None for
            the key itself, where nothing is divided by.
        values: What each key is to be answered with, [fact d_model], float64; None for what the change makes of it.
        weight: λ, by which what is kept weighs against what is written, as given or found; None where there is none.
    """

    delta: Delta
    keys: Float[Tensor, "fact d_mlp"]
    residuals: Float[Tensor, "fact d_model"] | None = None
    directions: Float[Tensor, "fact d_mlp"] | None = None
    values: Float[Tensor, "fact d_model"] | None = None
    weight: float | None = None

    @property
    def moved(self) -> Float[Tensor, "fact d_model"]:
        """What the change adds to the answer to each key, before rounding."""
        return self.keys @ self.delta.left @ self.delta.right


def norm_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, and 0 for nothing of nothing."""
    return torch.where(part == 0, 0.0, part / whole)
