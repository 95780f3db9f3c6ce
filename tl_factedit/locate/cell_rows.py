"""The tokens that cells change, in rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tl_factedit.backend.packed_rows import PackedRows
from tl_factedit.backend.packing import Packing
from tl_factedit.locate.cells import Cell, Question


@dataclass(frozen=True, eq=False)
class CellRows:
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
    tokens: Int[Tensor, "row query"]
    runs: Int[Tensor, "row"]
    places: Int[Tensor, "row query"]
    own: tuple[Tensor, Tensor]
    own_runs: Tensor
    own_places: Tensor
    own_units: Tensor | None
    at: tuple[Tensor, Tensor]
    at_of_own: Tensor
    sizes: list[int]
    packing: Packing | None

    @classmethod
    def of(
        cls,
        groups: Sequence[tuple[Sequence[Cell], Question, range]],
        packing: Callable[[PackedRows, Tensor], Packing] | None,
    ) -> CellRows:
        """Put all samples of some cells into rows.

        Args:
            groups: Cells of one question each, the question, and its runs, one for each sample.
            packing: Makes the packing of rows, given the run of each: the pieces of a group's cells then stand side by
                side, a row for each sample. None: each cell and sample is a whole sequence, in a row of its own.
        """
        packed = packing is not None
        lengths: list[int] = []
        begins: list[int] = []
        rows: list[int] = []
        runs: list[int] = []  # of each row
        pieces: list[tuple[int, int, int]] = []  # run, position, unit
        read: list[tuple[int, int]] = []  # piece, and place in it
        for cells, question, of_question in groups:
            first = len(runs)
            for c, cell in enumerate(cells):
                begin = cell.position if packed else 0
                for sample, run in enumerate(of_question):
                    row = first + sample + (0 if packed else c * len(of_question))
                    if row == len(runs):
                        runs.append(run)
                    read += [(len(pieces), place - begin) for place in question.logits_at]
                    pieces.append((run, cell.position, -1 if cell.unit is None else cell.unit))
                    rows.append(row)
                    begins.append(begin)
                    lengths.append(len(question.ids) - begin)
        laid = PackedRows.of(lengths, begins, sequences=[run for run, _, _ in pieces], rows=rows)
        run_of_row, (own_runs, own_places, units) = torch.tensor(runs), torch.tensor(pieces).unbind(1)
        at_of_own, place = torch.tensor(read).unbind(1)
        ids = [question.ids for _, question, _ in groups]
        of_group = torch.tensor([g for g, (cells, _, of) in enumerate(groups) for _ in range(len(cells) * len(of))])
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)[of_group[laid.owner], laid.places]
        return cls(
            groups=tuple(tuple(cells) for cells, _, _ in groups),
            tokens=tokens,
            runs=run_of_row,
            places=laid.places,
            own=(laid.row, laid.start + own_places - torch.tensor(begins)),
            own_runs=own_runs,
            own_places=own_places,
            own_units=None if bool((units < 0).any()) else units,
            at=(laid.row[at_of_own], laid.start[at_of_own] + place),
            at_of_own=at_of_own,
            sizes=[len(cells) * len(of) * len(question.logits_at) for cells, question, of in groups],
            packing=None if packing is None else packing(laid, run_of_row),
        )
