"""Sums of outer products of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model, device
from tl_factedit.backend.weights import DownProj
from tl_factedit.stats.streaming import KeyBatch, Place


def where(model: Model) -> torch.device:
    """Where sums are kept: with the model, unless that is where float64 isn't known (Apple's MPS)."""
    return torch.device("cpu") if device(model).type == "mps" else device(model)


@dataclass(eq=False)
class Sums:
    """Σ k kᵀ by layer, so far; of each matrix only the upper triangle (with the diagonal) is meant."""

    totals: dict[int, Float[Tensor, "d_mlp d_mlp"]]
    counted: int
    place: Place

    @classmethod
    def zeros(cls, sites: Mapping[int, DownProj], at: torch.device) -> Sums:
        """Nothing summed yet."""
        sizes = {layer: len(site.W) for layer, site in sites.items()}
        totals = {layer: torch.zeros(size, size, dtype=torch.float64, device=at) for layer, size in sizes.items()}
        return cls(totals, 0, Place(0, 0, ""))

    def add_(self, batch: KeyBatch) -> None:
        """Count a batch. In place, as one matrix of a wide layer is a large part of the memory."""
        for layer, total in self.totals.items():
            keys = batch.keys(layer, total.device)
            total.addmm_(keys.T, keys)
        self.counted += batch.n_tokens
        self.place = batch.place

    def check_finite(self) -> None:
        """By the diagonal, as |C_ij|² <= C_ii C_jj."""
        if not all(bool(total.diagonal().isfinite().all()) for total in self.totals.values()):
            raise RuntimeError("key statistics are not finite: the model overflows on this text (try another dtype)")


def mirror_(upper: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "d_mlp d_mlp"]:
    """Overwrite the lower triangle by the upper one."""
    upper.triu_()
    return upper.add_(upper.triu(1).T)


def pack_sums(moment: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "packed"]:
    """The upper triangle row by row: an index of it would be as large as the matrix."""
    return torch.cat([row[i:] for i, row in enumerate(moment.cpu())])


def unpack_sums(packed: Float[Tensor, "packed"], size: int) -> Float[Tensor, "size size"]:
    """The symmetric matrix of `pack_sums`."""
    moment = torch.zeros(size, size, dtype=packed.dtype)
    for i, row in enumerate(packed.split(list(range(size, 0, -1)))):
        moment[i, i:] = row
    return mirror_(moment)
