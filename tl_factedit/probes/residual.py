"""Residual knowledge: how much of what could be read of the old objects can still be read after a change.

With a the mean percentile of the old object over facts and over some cells, before (0) and after (e)::

    ρ = (a_e − ½) / (a_0 − ½)

1 means untouched, 0 that nothing is left, above 1 more than before, and below 0 that the old object is *avoided*: it
ranks below objects that are neither old nor new, which is a trace as well. Cells where a_0 − ½ is small have no ρ, as a
small denominator makes anything of noise; they are masked, never clipped.

A high ρ says that the old object can be read, not that the model uses it: an edit that adds to the residual stream
keeps whatever was there.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, Estimates, jointly, over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.probes.linear import ProbeReadout

if TYPE_CHECKING:
    import pandas as pd

LEAST = 0.25
"""The least a_0 − ½ of a cell that counts, in units of the percentile."""
NULL = 0.5


@dataclass(frozen=True, eq=False)
class Residual:
    """ρ, pooled and by cell.

    Attributes:
        pooled: ρ over all cells that count: the ratio of the means over facts and cells, both resampled together by
            fact.
        by_position: The same over the cells of one position; ``n`` is 0 where none counts.
        by_cell: ρ of each cell, [layer position]; NaN where a cell doesn't count.
        cells: Which cells count.
        before: a_0 over these cells.
        after: a_e over these cells.
        spread: Standard deviation over facts of each fact's mean percentile after the change, over the cells that
            count; the number of facts needed for an interval of some width follows from it.
        layers: Labels of the layers.
        positions: Labels of the positions.
    """

    pooled: Estimate
    by_position: Mapping[Hashable, Estimate]
    by_cell: Estimates
    cells: Bool[Tensor, "layer position"]
    before: Estimate
    after: Estimate
    spread: float
    layers: tuple[Hashable, ...]
    positions: tuple[Hashable, ...]

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a cell."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": layer,
                "position": position,
                "counts": bool(self.cells[i, j]),
                "rho": float(self.by_cell.mean[i, j]),
                "low": float(self.by_cell.low[i, j]),
                "high": float(self.by_cell.high[i, j]),
            }
            for i, layer in enumerate(self.layers)
            for j, position in enumerate(self.positions)
        )

    def __repr__(self) -> str:
        """ρ with its interval, and over how many cells."""
        return f"Residual(ρ {self.pooled:.2f} over {int(self.cells.sum())} of {self.cells.numel()} cells)"


@plain_torch()
def residual_knowledge(
    before: ProbeReadout | Sequence[ProbeReadout],
    after: ProbeReadout | Sequence[ProbeReadout],
    *,
    floor: float | Float[Tensor, "layer position"] = NULL,
    least: float = LEAST,
    cells: Bool[Tensor, "layer position"] | None = None,
    seed: int = 0,
) -> Residual:
    """ρ of some facts.

    Args:
        before: Their readout in the unchanged model. For facts of several relations, a readout for each relation; the
            facts are pooled, as a percentile is ½ where nothing is known, whatever the relation.
        after: Their readout in the changed model: by the same probe, by one trained on calibration edits, or, for a
            separately trained model, by its own. As many as `before`, in the same order.
        floor: What is read where nothing is known: ½ by construction, or the mean of several oracles' readouts.
        least: The least a_0 − floor of a cell that counts.
        cells: Look at these cells only, such as those after the edit; None for all.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: The readouts are of different facts or cells.
    """
    was, now = _Pooled.of(before), _Pooled.of(after)
    if was.facts != now.facts or was.percentile.shape != now.percentile.shape:
        raise ValueError(
            f"readouts are of {len(was.facts)} facts, {tuple(was.percentile.shape[1:])} cells and of "
            f"{len(now.facts)} facts, {tuple(now.percentile.shape[1:])} cells, needed the same facts in the same "
            "order, at the same layers and positions"
        )
    ground = torch.as_tensor(floor, dtype=torch.float64).expand(was.percentile.shape[1:])
    a_0, a_e = was.percentile - ground, now.percentile - ground
    counts = a_0.mean(0) >= least
    if cells is not None:
        counts = counts & cells

    def over(some: Bool[Tensor, "layer position"]) -> Estimate:
        if not bool(some.any()):
            return Estimate(math.nan, math.nan, math.nan, 0)
        columns = [a_e[:, some].mean(-1).tolist(), a_0[:, some].mean(-1).tolist()]
        return jointly(columns, lambda means: means[0] / means[1], seed=seed)

    ends = [over(_only(counts, divmod(i, len(was.positions)))) for i in range(counts.numel())]
    table = torch.tensor([[e.mean, e.low, e.high] for e in ends], dtype=torch.float64).reshape(*counts.shape, 3)
    mean, low, high = table.unbind(-1)
    of_each = now.percentile[:, counts].mean(-1)
    return Residual(
        pooled=over(counts),
        by_position={
            label: over(counts & (torch.arange(len(was.positions)) == j)) for j, label in enumerate(was.positions)
        },
        by_cell=Estimates(mean, low, high, torch.tensor([e.n for e in ends]).reshape(counts.shape)),
        cells=counts,
        before=over_facts(was.percentile[:, counts].mean(-1).tolist(), seed=seed),
        after=over_facts(of_each.tolist(), seed=seed),
        spread=float(of_each.std()) if len(of_each) > 1 else math.nan,
        layers=was.layers,
        positions=was.positions,
    )


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Readouts of one or several relations as one table."""

    percentile: Float[Tensor, "fact layer position"]
    facts: tuple[Fact, ...]
    layers: tuple[Hashable, ...]
    positions: tuple[Hashable, ...]

    @classmethod
    def of(cls, read: ProbeReadout | Sequence[ProbeReadout]) -> _Pooled:
        readouts = [read] if isinstance(read, ProbeReadout) else list(read)
        probe = readouts[0].probe
        return cls(
            torch.cat([readout.percentile for readout in readouts]),
            tuple(fact for readout in readouts for fact in readout.facts),
            probe.layers,
            probe.positions,
        )


def _only(counts: Bool[Tensor, "layer position"], cell: tuple[int, int]) -> Bool[Tensor, "layer position"]:
    alone = torch.zeros_like(counts)
    alone[cell] = counts[cell]
    return alone
