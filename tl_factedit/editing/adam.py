"""Adam."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def adam_step(
    value: Float[Tensor, "place d_model"],
    gradient: Float[Tensor, "place d_model"],
    mean: Float[Tensor, "place d_model"],
    square: Float[Tensor, "place d_model"],
    step: int,
    lr: float,
) -> Float[Tensor, "place d_model"]:
    """One step of Adam (Kingma and Ba 2014, arXiv:1412.6980) with its usual constants; moments are updated in place."""
    mean.lerp_(gradient, 0.1)
    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    size = (square / (1 - 0.999**step)).sqrt() + 1e-8
    return value - lr * (mean / (1 - 0.9**step)) / size
