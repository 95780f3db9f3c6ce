"""Pieces of sequences side by side in rows: the one packer, of cells that are traced and of values that are fitted.

A *piece* is what has to be run of a sequence: its tokens from some place on. What comes before it is read from
attention keys and values that are known already (its past). Several pieces stand in one row, and each sees only itself
and what lies before it in its own sequence::

    sequence 0:  a b c d e        row:   d e | c d e | y z          past:  a b c | x
    sequence 1:  x y z                   piece 0, 1 of sequence 0, piece 2 of sequence 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.packing import Packing, Past


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Pieces of sequences, several in a row, each behind what comes before it in its own sequence.

    Attributes:
        row: In which row each piece stands, [piece].
        start: At which of the row's tokens it begins, [piece].
        owner: Which piece each token is of, [row query]; what fills a row up repeats the row's last token.
        places: Each token's place in its own sequence, [row query].
        visible: What each token attends to: what is behind its piece, then the row's tokens, [row query key].
        behind: What is behind the pieces of each row: of which sequence, [row past], −1 for nothing.
        behind_places: And its place in that sequence, [row past].
    """

    row: Int[Tensor, "piece"]
    start: Int[Tensor, "piece"]
    owner: Int[Tensor, "row query"]
    places: Int[Tensor, "row query"]
    visible: Bool[Tensor, "row query key"]
    behind: Int[Tensor, "row past"]
    behind_places: Int[Tensor, "row past"]

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        begins: Sequence[int],
        *,
        sequences: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        apart: bool = False,
        mixed: bool = True,
        most_keys: int | None = None,
    ) -> PackedRows:
        """Lay out pieces by how long they are and at which place of its sequence each begins.

        Unless `rows` says where each goes, rows are as wide as the longest piece, and a shorter one goes where there is
        room and the least behind.

        Args:
            lengths: Tokens of each piece.
            begins: How many tokens of its sequence come before it.
            sequences: Which sequence each piece is of: pieces of one share what is behind them. None: each of its own.
            rows: The row of each piece, from 0 without gaps; pieces stand in a row in the order given here.
            apart: Whether each gets a row of its own.
            mixed: Whether what is behind the pieces of a row may be of several sequences (`Runner.mixes_pasts`).
            most_keys: Most tokens of a row and behind it (`Runner.most_keys`); None for any number. With `rows` it is
                the caller who sees to it.
        """
        order = list(range(len(lengths)))
        if rows is None and apart:
            rows = order
        elif rows is None:
            order.sort(key=lambda piece: -lengths[piece])
            rows = _fitted(order, lengths, begins, mixed, most_keys)
        sequences = range(len(lengths)) if sequences is None else sequences
        start = _starts(order, lengths, rows)
        length, begin, row, first = (torch.tensor(numbers) for numbers in (lengths, begins, rows, start))
        piece = torch.arange(len(lengths)).repeat_interleave(length)
        offset = torch.arange(len(piece)) - (length.cumsum(0) - length)[piece]
        width = int((first + length).max())
        owner, places = torch.full((2, int(row.max()) + 1, width), -1)
        owner[row[piece], first[piece] + offset] = piece
        places[row[piece], first[piece] + offset] = begin[piece] + offset
        real = owner >= 0
        # What fills a row up repeats its last token, whose value exists, and sees itself.
        filled = torch.arange(width).minimum(real.sum(1, keepdim=True) - 1)
        owner, places = owner.gather(1, filled), places.gather(1, filled)
        behind, behind_places = _behind(order, begins, rows, sequences, len(owner))
        of_one = (owner[:, :, None] == owner[:, None]) & (places[:, :, None] >= places[:, None])
        own = of_one & real[:, :, None] & real[:, None] | torch.eye(width, dtype=torch.bool)
        of_sequence = torch.tensor(sequences)[owner][:, :, None] == behind[:, None]
        before = of_sequence & (behind_places[:, None] < begin[owner][:, :, None]) & real[:, :, None]
        return cls(row, first, owner, places, torch.cat([before, own], -1), behind, behind_places)

    def at(self, values: Float[Tensor, "row query *rest"], piece: Tensor, place: Tensor) -> Tensor:
        """The values of some pieces at some places, counted from the piece's beginning."""
        return values[self.row[piece].to(values.device), (self.start[piece] + place).to(values.device)]

    def packing(self, past: Past | None, device: torch.device) -> Packing:
        """What a `Runner` is told of these rows.

        Args:
            past: What is behind them, at `behind` and `behind_places`, [row past head d_head] for each layer (where
                `behind` is −1 nobody looks, and any values do).
            device: Where the model's inputs go.
        """
        return Packing(self.places.to(device), self.visible.to(device), past)


def _fitted(
    order: Sequence[int], lengths: Sequence[int], begins: Sequence[int], mixed: bool, most_keys: int | None
) -> list[int]:
    """A row for each piece, the longest first: where there is room and the least behind."""
    width = max(lengths)
    used: list[int] = []
    depth: list[int] = []
    rows = [0] * len(lengths)
    for piece in order:
        free = [
            r
            for r, taken in enumerate(used)
            if taken + lengths[piece] <= width
            and (mixed or not depth[r] or not begins[piece])
            and (most_keys is None or width + depth[r] + begins[piece] <= most_keys)
        ]
        if free:
            rows[piece] = min(free, key=lambda r: depth[r])
        else:
            rows[piece] = len(used)
            used.append(0)
            depth.append(0)
        used[rows[piece]] += lengths[piece]
        depth[rows[piece]] += begins[piece]
    return rows


def _starts(order: Sequence[int], lengths: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Where each piece begins in its row."""
    used: dict[int, int] = {}
    start = [0] * len(lengths)
    for piece in order:
        start[piece] = used.get(rows[piece], 0)
        used[rows[piece]] = start[piece] + lengths[piece]
    return start


def _behind(
    order: Sequence[int], begins: Sequence[int], rows: Sequence[int], sequences: Sequence[int], count: int
) -> tuple[Int[Tensor, "row past"], Int[Tensor, "row past"]]:
    """What is behind each row: of each sequence as much as the piece wants that begins last."""
    depth: list[dict[int, int]] = [{} for _ in range(count)]
    for piece in order:
        of_row, sequence = depth[rows[piece]], sequences[piece]
        of_row[sequence] = max(of_row.get(sequence, 0), begins[piece])
    deepest = max(sum(of_row.values()) for of_row in depth)
    behind, places = torch.full((count, deepest), -1), torch.zeros(count, deepest, dtype=torch.long)
    for r, of_row in enumerate(depth):
        if of_row:
            own = torch.tensor(list(of_row)).repeat_interleave(torch.tensor(list(of_row.values())))
            behind[r, : len(own)] = own
            places[r, : len(own)] = torch.cat([torch.arange(n) for n in of_row.values()])
    return behind, places
