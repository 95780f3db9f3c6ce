"""The tokens that a value can change, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Pieces of sequences, several in a row, each behind what comes before it in its own sequence.

    Attributes:
        row: In which row each piece stands, [piece].
        start: At which of the row's tokens it begins, [piece].
        owner: Which piece each token is of, [row query]; what fills a row up repeats the row's last token.
        places: Each token's place in its own sequence, [row query].
        visible: What each token attends to: what is behind its piece, then the row's tokens, [row query key].
        behind: What is behind the pieces of each row: of which piece, [row past], −1 for nothing.
        behind_places: And its place in that piece's sequence, [row past].
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
        cls, lengths: Sequence[int], begins: Sequence[int], *, apart: bool = False, mixed: bool = True
    ) -> PackedRows:
        """Lay out pieces by how long they are and at which place of its sequence each begins.

        Rows are as wide as the longest piece. A shorter one goes where there is room and the least behind.

        Args:
            lengths: Of each piece.
            begins: How many tokens of its sequence come before it.
            apart: Whether each gets a row of its own.
            mixed: Whether what is behind the pieces of a row may be of several sequences.
        """
        width = max(lengths)
        rows: list[list[int]] = []
        used: list[int] = []
        depth: list[int] = []
        for piece in range(len(lengths)) if apart else sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            free = [
                r
                for r, taken in enumerate(used)
                if taken + lengths[piece] <= width and (mixed or not depth[r] or not begins[piece])
            ]
            if free and not apart:
                r = min(free, key=lambda r: depth[r])
            else:
                r = len(rows)
                rows.append([])
                used.append(0)
                depth.append(0)
            rows[r].append(piece)
            used[r] += lengths[piece]
            depth[r] += begins[piece]
        deepest = max(depth)
        row, start = torch.zeros(len(lengths), dtype=torch.long), torch.zeros(len(lengths), dtype=torch.long)
        owner, places = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        behind = torch.full((len(rows), deepest), -1)
        behind_places = torch.zeros(len(rows), deepest, dtype=torch.long)
        for r, pieces in enumerate(rows):
            here = before = 0
            for piece in pieces:
                n, b = lengths[piece], begins[piece]
                row[piece], start[piece] = r, here
                owner[r, here:] = piece
                places[r, here : here + n] = torch.arange(b, b + n)
                places[r, here + n :] = b + n - 1
                behind[r, before : before + b] = piece
                behind_places[r, before : before + b] = torch.arange(b)
                here += n
                before += b
            real[r, :here] = True
        of_one = (owner[:, :, None] == owner[:, None]) & (places[:, :, None] >= places[:, None])
        alone = torch.eye(width, dtype=torch.bool)  # what fills a row up sees itself
        own = of_one & real[:, :, None] & real[:, None] | alone
        visible = torch.cat([(behind[:, None] == owner[:, :, None]) & real[:, :, None], own], -1)
        return cls(row, start, owner, places, visible, behind, behind_places)

    def at(self, values: Float[Tensor, "row query *rest"], piece: Tensor, place: Tensor) -> Tensor:
        """The values of some pieces at some places, counted from the piece's beginning."""
        return values[self.row[piece].to(values.device), (self.start[piece] + place).to(values.device)]
