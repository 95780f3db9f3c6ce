"""Pieces of several sequences side by side in one row, behind a past that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.protocol import At

Past: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Attention keys and values of tokens already read, a pair for each layer, [row pos head d_head] each."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Pieces of several sequences side by side in one row, behind a past that they share.

    A cell of a trace changes one token of a sequence: only that token and those after it have to be run again, and
    the pieces that this leaves, one for each cell, fit into one row if none sees another.

    Attributes:
        positions: Each token's place in its own sequence, [row query].
        visible: What each token attends to: the past first, then the row's own tokens, [row query key].
        past: Keys and values of the tokens before; None for none.
        joined: How many of the rows, from the first, each block runs: the others join at a later block, with what is
            given as their residual stream, and `past` has as many rows there. None: all rows run in all blocks.
    """

    positions: Int[Tensor, "row query"]
    visible: Bool[Tensor, "row query key"]
    past: Past | None = None
    joined: tuple[int, ...] | None = None

    def rows(self, count: int) -> Packing:
        """The first `count` rows, without a past."""
        return self if count == len(self.positions) else Packing(self.positions[:count], self.visible[:count])


FIRST: At = (torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
"""One position: where logits have to be asked for and nobody reads them."""


def past_at(past: Sequence[tuple[Tensor, Tensor]], rows: Int[Tensor, "row"], length: int) -> Past:
    """The first `length` positions of some rows of a past."""
    return tuple(
        (keys[rows.to(keys.device), :length], values[rows.to(values.device), :length]) for keys, values in past
    )


def gather(values: Float[Tensor, "row pos *rest"], at: At) -> Float[Tensor, "row_ k *rest"]:
    """The values at each row's own positions, or (for a pair) at a list of rows and positions, as one row."""
    if isinstance(at, tuple):
        rows, places = at
        return values[rows.to(values.device), places.to(values.device)][None]
    return values[torch.arange(len(values), device=values.device)[:, None], at.to(values.device)]
