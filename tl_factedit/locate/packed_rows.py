"""The tokens that a cell changes, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_factedit.backend.packing import Packing, Past, past_at
from tl_factedit.core.tokens import pad
from tl_factedit.locate.cells import Cell, Question


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of cells, the same for all layers.

    Attributes:
        groups: The cells, by question.
        tokens: [row query].
        runs: Which corrupted run a row belongs to, [row].
        places: Which position of its question a token is, [row query].
        own: Rows and queries of the changed tokens, in the order (cell, sample).
        own_runs: The runs of the same.
        own_places: Their positions.
        own_units: Their heads or neurons; None if none are given.
        at: Rows and queries of the logits, in the order (cell, sample, target).
        at_of_own: Which entry of `own` each of them belongs to.
        sizes: How many of them a group has.
        packing: None where rows are whole sequences.
    """

    groups: tuple[tuple[Cell, ...], ...]
    tokens: Tensor
    runs: Tensor
    places: Tensor
    own: tuple[Tensor, Tensor]
    own_runs: Tensor
    own_places: Tensor
    own_units: Tensor | None
    at: tuple[Tensor, Tensor]
    at_of_own: Tensor
    sizes: list[int]
    packing: Packing | None


class Rows:
    """Collects the rows of a `PackedRows`."""

    def __init__(self) -> None:
        self.groups: list[tuple[Cell, ...]] = []
        self.tokens: list[Tensor] = []
        self.places: list[Tensor] = []
        self.cell_of: list[Tensor] = []  # of each token, within its row
        self.runs: list[int] = []
        self.own: list[tuple[int, int, int, int, int]] = []  # row, query, run, position, unit
        self.at: list[tuple[int, int, int]] = []  # row, query, place in `own`
        self.sizes: list[int] = []

    def add(self, cells: Sequence[Cell], question: Question, runs: range, *, packed: bool) -> None:
        """All samples of some cells of one question: in a row each, or in a row for every cell."""
        length = len(question.ids)
        starts: list[tuple[int, int]] = []  # for each cell, its first row, and what makes a position a query
        for row_cells in [cells] if packed else [[cell] for cell in cells]:
            here, begin = 0, len(self.runs)
            pieces = []
            for cell in row_cells:
                from_ = cell.position if packed else 0
                starts.append((begin, here - from_))
                pieces.append(torch.arange(from_, length))
                here += length - from_
            places = torch.cat(pieces)
            owner = torch.arange(len(pieces)).repeat_interleave(torch.tensor([len(piece) for piece in pieces]))
            for run in runs:
                self.runs.append(run)
                self.places.append(places)
                self.tokens.append(question.ids[places])
                self.cell_of.append(owner)
        for cell, (row, shift) in zip(cells, starts, strict=True):
            for sample, run in enumerate(runs):
                self.at += [(row + sample, place + shift, len(self.own)) for place in question.logits_at]
                unit = -1 if cell.unit is None else cell.unit
                self.own.append((row + sample, cell.position + shift, run, cell.position, unit))
        self.groups.append(tuple(cells))
        self.sizes.append(len(cells) * len(runs) * len(question.logits_at))

    def sheet(self, past: tuple[Past, Tensor] | None) -> PackedRows:
        """Pad, and say what sees what."""
        own, at, runs = torch.tensor(self.own), torch.tensor(self.at), torch.tensor(self.runs)
        cell_of = pad(self.cell_of, -1)
        # Rows are filled up with a token of their own: what lies before a subject has no value in a corrupted run.
        width = cell_of.shape[1]
        places = torch.stack([torch.cat([row, row[-1:].repeat(width - len(row))]) for row in self.places])
        units = own[:, 4]
        return PackedRows(
            groups=tuple(self.groups),
            tokens=pad(self.tokens, 0),
            runs=runs,
            places=places,
            own=(own[:, 0], own[:, 1]),
            own_runs=own[:, 2],
            own_places=own[:, 3],
            own_units=None if bool((units < 0).any()) else units,
            at=(at[:, 0], at[:, 1]),
            at_of_own=at[:, 2],
            sizes=self.sizes,
            packing=None if past is None else self._packing(places, cell_of, past, runs),
        )

    def _packing(self, places: Tensor, cell_of: Tensor, past: tuple[Past, Tensor], runs: Tensor) -> Packing:
        real = cell_of >= 0
        same = (cell_of[:, :, None] == cell_of[:, None]) & (places[:, :, None] >= places[:, None]) & real[:, None]
        alone = torch.eye(places.shape[1], dtype=torch.bool)  # what fills a row up sees itself
        # Cells lie in a row one after the other: where a token's cell begins is where it, or a cell before it, does.
        new = torch.ones_like(real)
        new[:, 1:] = cell_of[:, 1:] != cell_of[:, :-1]
        index = torch.arange(places.shape[1]).expand_as(places)
        begins = places.gather(1, torch.where(new, index, 0).cummax(1).values)
        before = int(begins[real].max())
        behind = (torch.arange(before) < begins[..., None]) & real[..., None]
        keys, index_of_run = past
        device = keys[0][0].device
        visible = torch.cat([behind, same & real[..., None] | alone], -1)
        return Packing(places.to(device), visible.to(device), past_at(keys, index_of_run[runs], before))
