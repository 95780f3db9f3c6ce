"""Adam for edits and attacks, in place and without weight decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma and Ba 2014, arXiv:1412.6980, algorithm 1) with its usual constants.

    ::

        m ← 0.9 m + 0.1 g        v ← 0.999 v + 0.001 g²
        x ← x − lr · (m / (1 − 0.9ᵗ)) / (√(v / (1 − 0.999ᵗ)) + 1e-8)

    Unlike `torch.optim.Adam` it moves plain tensors, which need no ``.grad``, and can go on with some of their rows.

    Args:
        tensors: What is moved, in place.
        lr: Step size.

    Attributes:
        updates: How many steps were made.
    """

    def __init__(self, tensors: Sequence[Tensor], lr: float) -> None:
        self.tensors, self.lr = tuple(tensors), lr
        self.means = tuple(torch.zeros_like(tensor) for tensor in self.tensors)
        self.squares = tuple(torch.zeros_like(tensor) for tensor in self.tensors)
        self.updates = 0

    def of(self, rows: Tensor) -> Adam:
        """The same for copies of some rows of each tensor, at the step that they are at."""
        left = Adam([tensor[rows] for tensor in self.tensors], self.lr)
        left.means, left.squares = (tuple(each[rows] for each in state) for state in (self.means, self.squares))
        left.updates = self.updates
        return left

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move each tensor against its gradient."""
        self.updates += 1
        correct_mean, correct_square = 1 - 0.9**self.updates, 1 - 0.999**self.updates
        for tensor, gradient, mean, square in zip(self.tensors, gradients, self.means, self.squares, strict=True):
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            tensor -= self.lr * (mean / correct_mean) / ((square / correct_square).sqrt() + 1e-8)
