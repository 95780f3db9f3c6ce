"""Corruptions of a subject, as values: what is added to its token embeddings.

A corruption is calibrated once on the embeddings of all subjects to be traced, then drawn for
each fact anew from its own seed: every (layer, position) cell sees the same noise, and a fact's
noise doesn't depend on which other facts are traced with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Corruption(Protocol):
    """What `causal_trace` asks of a corruption."""

    def calibrated(self, embeddings: Float[Tensor, "token d_model"]) -> Corruption:
        """The same corruption with its scale fixed on these subjects' token embeddings."""
        ...

    def draw(self, n_tokens: int, d_model: int) -> Float[Tensor, "sample position d_model"]:
        """The noise for one subject, the same whenever it is asked for."""
        ...


@dataclass(frozen=True)
class GaussianNoise:
    """Independent Gaussian noise, ``scale`` times the spread of the subjects' embeddings.

    Meng et al. 2022 (arXiv:2202.05262, app. B.1): three standard deviations, taken over all
    entries of the token embeddings of all subjects.

    Attributes:
        scale: In standard deviations of the embeddings.
        samples: How many corrupted runs are averaged.
        seed: Of the draw.
        sigma: The standard deviation; None to measure it on the facts that are traced.
    """

    scale: float = 3.0
    samples: int = 10
    seed: int = 0
    sigma: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}, needed at least 1")
        if not self.scale >= 0:  # also refuses NaN
            raise ValueError(f"scale is {self.scale}, needed 0 or more (in standard deviations of the embeddings)")
        if self.sigma is not None and not self.sigma >= 0:
            raise ValueError(f"sigma is {self.sigma}, needed 0 or more, or None to measure it")

    def calibrated(self, embeddings: Float[Tensor, "token d_model"]) -> GaussianNoise:
        """With `sigma` measured, unless it is given."""
        return self if self.sigma is not None else replace(self, sigma=float(embeddings.float().std()))

    def draw(self, n_tokens: int, d_model: int) -> Float[Tensor, "sample position d_model"]:
        """``scale · sigma · N(0, 1)``."""
        if self.sigma is None:
            raise ValueError("sigma isn't known yet: call calibrated(embeddings) first, or give sigma=")
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.samples, n_tokens, d_model, generator=generator) * (self.scale * self.sigma)


@dataclass(frozen=True)
class GivenNoise:
    """Noise given as numbers, for exact replication of another run.

    Attributes:
        noise: [sample position d_model], added to the subject's tokens in order.
    """

    noise: Float[Tensor, "sample position d_model"]

    def calibrated(self, embeddings: Float[Tensor, "token d_model"]) -> GivenNoise:  # noqa: ARG002
        """Itself: it has its scale already."""
        return self

    def draw(self, n_tokens: int, d_model: int) -> Float[Tensor, "sample position d_model"]:
        """The given noise.

        Raises:
            ValueError: It is for another number of tokens or another width.
        """
        if tuple(self.noise.shape[1:]) != (n_tokens, d_model):
            raise ValueError(
                f"the given noise is {tuple(self.noise.shape)}, needed [sample, {n_tokens}, {d_model}]: "
                f"this subject has {n_tokens} tokens"
            )
        return self.noise.float()

    def __eq__(self, other: Any) -> bool:
        """Equal when the numbers are."""
        return isinstance(other, GivenNoise) and torch.equal(self.noise, other.noise)

    def __hash__(self) -> int:
        """Of the shape."""
        return hash(tuple(self.noise.shape))
