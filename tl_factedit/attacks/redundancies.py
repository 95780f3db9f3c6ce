"""Redundancy: what the unedited model can spare, and so what an edit of some cells can at best earn.

With cells silenced everything above them is the unedited model's own function of the same input. So, if a change writes
in some cells only, and these are silenced in the changed model by the same replacements, the changed model *is* the
unedited one with the same cells silenced:

    footprint(M₁) ⊆ C    ⇒    M₁ without C  =  M₀ without C

Where M₀ without C still names the old object, so does M₁: the old object is back, whatever was written into C. An edit
of cells that the unedited model can spare can't be more than INSERTED (elsewhere), and that is known before it is made.

The *support* of a fact is the other side of it: a small set of cells whose silencing, from the subject on, kills the
fact. It isn't where restoring helps, but what would have to be changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.attacks.asking import Asking
from tl_factedit.attacks.attack import SURVIVES
from tl_factedit.attacks.cells import (
    COMPONENTS,
    PLACES,
    Cell,
    Cells,
    Place,
    Silenceable,
    describe,
    in_order,
    singles_of,
)
from tl_factedit.attacks.silencing import NOTHING, Silencing
from tl_factedit.backend.protocol import Model, n_layers
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.words import counted
from tl_factedit.measure.population import BATCH_TOKENS, Population

if TYPE_CHECKING:
    import pandas as pd

KILLED = 0.1
"""A set of cells supports the facts if without it no more than this share of them is still named."""


@dataclass(frozen=True)
class Expected:
    """What a change confined to some cells can at best earn.

    Attributes:
        label: ``"INSERTED (elsewhere)"`` where the unedited model can spare them; ``"any"`` where it can't.
        spared: The share of facts that the unedited model still names without them.
        says: The same in a sentence.
    """

    label: str
    spared: Estimate
    says: str


@dataclass(frozen=True, eq=False)
class Redundancy:
    """What the unedited model can spare.

    Attributes:
        facts: What was asked; those that the model doesn't know count nowhere.
        known: Which of them the model knows, [fact].
        silenced: The sets of cells that were silenced.
        named: Whether the old object still comes first of all objects without each set, [fact silenced]; NaN for facts
            that aren't known.
        support: The fewest cells found (greedily, then pruned) whose silencing leaves no more than a tenth of the
            facts; None if `most_cells` were not enough.
        curve: The share of facts that is still named as cells are silenced one after the other, with the cell that came
            last: [(cell, share)].
    """

    facts: tuple[Fact, ...]
    known: Bool[Tensor, "fact"]
    silenced: tuple[Cells, ...]
    named: Float[Tensor, "fact silenced"]
    support: Cells | None
    curve: tuple[tuple[Cell, float], ...]

    @plain_torch()
    def spared(self, cells: Sequence[Cell]) -> Estimate:
        """The share of the known facts that is still named without some cells.

        Raises:
            ValueError: They weren't silenced together.
        """
        wanted = in_order(cells)
        if wanted not in self.silenced:
            raise ValueError(
                f"{describe(wanted)} wasn't silenced, needed one of the sets in .silenced: redundancy(..., "
                "cells=[these])"
            )
        return over_facts(self.named[:, self.silenced.index(wanted)].tolist())

    def expected(self, cells: Sequence[Cell]) -> Expected:
        """What a change that writes in some cells only can at best earn, whatever it writes.

        Args:
            cells: Where it writes: ``fe.attacks.footprint(...).whole()`` of a change that is made already.

        Raises:
            ValueError: They weren't silenced together.
        """
        spared = self.spared(cells)
        without = f"Without {describe(in_order(cells))} the unedited model names {spared.mean:.0%} of the facts"
        if spared.mean >= SURVIVES:
            says = f"{without}: so will any model that was changed there alone, whatever was written."
            return Expected("INSERTED (elsewhere)", spared, says)
        return Expected("any", spared, f"{without}: what becomes of a change there can't be foreseen from it.")

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a set of cells: the share of facts that can spare it, and what a change of it can at best earn."""
        import pandas as pd

        rows = []
        for cells in self.silenced:
            expected = self.expected(cells)
            rows.append(
                {
                    "cells": describe(cells),
                    "layers": ", ".join(str(layer) for layer in sorted({cell.layer for cell in cells})),
                    "spared": expected.spared.mean,
                    "low": expected.spared.low,
                    "high": expected.spared.high,
                    "n": expected.spared.n,
                    "at_best": expected.label,
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """How much can be spared, and the support."""
        asked = f"{int(self.known.sum())} of {counted(len(self.facts), 'fact')} known"
        can = sum(self.spared(cells).mean >= SURVIVES for cells in self.silenced)
        support = "no support found" if self.support is None else f"support: {describe(self.support)}"
        return f"Redundancy({asked}; {can} of {len(self.silenced)} sets of cells can be spared; {support})"

    def _repr_html_(self) -> str:
        """The sets that can't be spared, and the support."""
        found = self.table()
        return f"<p>{self!r}</p>" + str(
            found[found.spared < SURVIVES].to_html(float_format="{:.3f}".format, index=False)
        )


@plain_torch()
def redundancy(
    model: Model,
    facts: Fact | Sequence[Fact],
    reference: Sequence[Fact],
    *,
    components: Sequence[Silenceable] = COMPONENTS,
    places: Sequence[Place] = PLACES,
    widths: Sequence[int] = (1,),
    cells: Sequence[Sequence[Cell]] = (),
    support: bool = True,
    most_cells: int = 12,
    most_references: int = 100,
    prepend_bos: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    folder: str | Path | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Redundancy:
    """What a model can spare of its components, and the smallest set of cells that some facts rest on.

    Every component of every layer at every place is silenced alone (`widths`: neighbouring ones together), and the sets
    that are asked for. The support is then grown from the components that matter most, silenced from the subject on,
    one after the other, and pruned of those that aren't needed after all: small, but nobody can say that it is the
    smallest.

    Args:
        model: The unedited model; nothing about it changes.
        facts: Each with ``target_new`` and ``controls``, as for an audit: what the old object is compared with.
        reference: Facts of the same relations about other subjects, whose means stand in for what is silenced.
        components: ``"mlp"``, ``"attn"``.
        places: ``"subject"``, ``"last"``, ``"all"``, as in `KnockOut`.
        widths: How many neighbouring layers to silence together.
        cells: Further sets, such as a footprint's.
        support: Whether to look for the support.
        most_cells: Most cells in it.
        most_references: How many references a mean is over at most.
        prepend_bos: BOS policy; None for the model's.
        batch_tokens: Most tokens in one forward pass.
        folder: Where to keep what was read.
        progress: Whether to show a bar.
        seed: Seed of the draw of references.

    Raises:
        ValueError: As in `KnockOut`.

    Example:
        >>> found = fe.attacks.redundancy(model, facts, reference)         # doctest: +SKIP
        >>> found.support, found.expected([fe.attacks.Cell("mlp", 5, "subject")]).label      # doctest: +SKIP
    """
    population = Population.of(
        model, model, as_facts(facts), reference=reference, prepend_bos=prepend_bos, folder=folder, progress=progress
    )
    layers = n_layers(model)
    sets = [*singles_of(layers, components, places, widths), *map(in_order, cells)]
    sets = list(dict.fromkeys(sets))
    asking = Asking.of(population, most_references, batch_tokens, seed)

    def still_named(silenced: Sequence[Cells]) -> Float[Tensor, "fact silenced"]:
        silencings = [NOTHING, *map(Silencing, silenced)]
        settings = {**asking.settings(population), "silencings": silencings, "means": most_references, "seed": seed}
        found = population.unedited("knock-out", asking.reader(silencings), settings=settings)[..., 0]
        return torch.where((found[:, 0] == 1)[:, None], found[:, 1:], math.nan)

    named = still_named(sets)
    known = ~named.isnan().all(1)
    grown: list[tuple[Cell, float]] = []
    found: Cells | None = None
    if support and bool(known.any()):
        grown, found = _grown(
            still_named,
            [Cell(c, layer, "all") for layer in range(layers) for c in components],
            min(most_cells, layers * len(components)),
            progress,
        )
    return Redundancy(population.facts, known, tuple(sets), named, found, tuple(grown))


def _grown(
    still_named: Callable[[Sequence[Cells]], Float[Tensor, "fact silenced"]],
    candidates: list[Cell],
    most: int,
    progress: bool,
) -> tuple[list[tuple[Cell, float]], Cells | None]:
    """Cells silenced one after the other, each the one that costs most; and those of them that are needed."""
    chosen: list[Cell] = []
    curve: list[tuple[Cell, float]] = []
    with tqdm(total=most, desc="support", unit="cell", delay=1, disable=not progress, leave=False) as bar:
        while len(chosen) < most:
            left = [cell for cell in candidates if cell not in chosen]
            shares = still_named([in_order([*chosen, cell]) for cell in left]).nanmean(0)
            best = int(shares.argmin())
            chosen.append(left[best])
            curve.append((left[best], float(shares[best])))
            bar.update()
            if curve[-1][1] <= KILLED:
                break
        else:
            return curve, None
    for cell in list(chosen):
        without = in_order(other for other in chosen if other != cell)
        if without and float(still_named([without]).nanmean()) <= KILLED:
            chosen.remove(cell)
    return curve, in_order(chosen)
