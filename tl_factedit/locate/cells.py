"""What is patched: cells of a trace, and what is written into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import Aligned

Direction = Literal["denoise", "noise"]

Source = Literal["donor", "base"]


@dataclass(frozen=True, eq=False)
class Question:
    """A fact ready to be run.

    Attributes:
        fact: The fact.
        row: Its prompt.
        corrupted: Its subject's corrupted embeddings, [sample position d_model].
        contrast: As in `metrics.MetricInput`.
    """

    fact: Fact
    row: Aligned
    corrupted: Float[Tensor, "sample position d_model"]
    contrast: Int[Tensor, "#sample"] | None

    @property
    def ids(self) -> Int[Tensor, "pos"]:
        """The prompt and all but the last token of the target."""
        return torch.cat([self.row.ids, self.row.true_ids[:-1]])

    @property
    def samples(self) -> int:
        """How many corrupted runs it has."""
        return len(self.corrupted)

    @property
    def logits_at(self) -> range:
        """The positions whose logits are asked for."""
        return range(len(self.row.ids) - 1, len(self.row.ids) - 1 + len(self.row.true_ids))


@dataclass(frozen=True)
class Cell:
    """One change: of which question, at which token, of which head or neuron (None: of all)."""

    question: int
    position: int
    unit: int | None = None


@dataclass(frozen=True)
class Write:
    """At `place`, the cell's token gets the value it has in the donor run (or, to freeze it, in the base run)."""

    place: str
    source: Source = "donor"


@dataclass(frozen=True)
class Patch:
    """What the cells of a layer change.

    Attributes:
        begin: The first block that has to be run again; as many as the model has: none.
        stream: Where the residual stream before that block gets its changed value from; None: it stays.
        writes: What is changed from there on.
    """

    begin: int
    stream: str | None
    writes: tuple[Write, ...]
