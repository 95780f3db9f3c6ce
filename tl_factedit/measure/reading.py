"""Probes: what can be read of a fact in one model, and how two models compare.

A probe sees one model, edited or not, and returns numbers with named axes. `compare` runs it
before and after a change.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.measure.change import Changed
from tl_factedit.measure.population import Population

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Reading:
    """Numbers read from one model.

    Attributes:
        name: The probe's name.
        values: The numbers, one axis for each of `axes`.
        axes: Axis names with their labels, in the order of the values' axes.
        unit: What the numbers are in.
    """

    name: str
    values: Float[Tensor, "..."]
    axes: Mapping[str, Sequence[Hashable]]
    unit: str

    def __post_init__(self) -> None:
        """Check that labels and numbers fit."""
        shape = tuple(len(labels) for labels in self.axes.values())
        if tuple(self.values.shape) != shape:
            raise ValueError(
                f"{self.name}: values are {tuple(self.values.shape)}, the axes {dict(self.axes)} say {shape}"
            )

    @plain_torch()
    def at(self, **labels: Hashable) -> Float[Tensor, "..."]:
        """The numbers at some labels, e.g. ``reading.at(position="last", quantity="rank_old")``."""
        values = self.values
        for dim, (axis, names) in reversed(list(enumerate(self.axes.items()))):
            if axis in labels:
                values = values.select(dim, list(names).index(labels[axis]))
        unknown = set(labels) - set(self.axes)
        if unknown:
            raise ValueError(f"{self.name} has no axis {sorted(unknown)}, its axes are {list(self.axes)}")
        return values

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a number, one column an axis."""
        import pandas as pd

        index = pd.MultiIndex.from_tuples(list(itertools.product(*self.axes.values())), names=list(self.axes))
        return pd.DataFrame({"value": self.values.flatten().tolist()}, index=index).reset_index()


@dataclass(frozen=True)
class Comparison:
    """One probe's readings before and after a change."""

    before: Reading
    after: Reading

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """Both readings side by side."""
        table = self.before.table().rename(columns={"value": "before"})
        return table.assign(after=self.after.table()["value"])


@runtime_checkable
class Probe(Protocol):
    """Anything that reads one model: a frozen value with its settings as fields."""

    def __call__(self, model: Model, facts: Sequence[Fact]) -> Reading:
        """Read the model; nothing about it changes."""
        ...


@plain_torch()
def compare(
    probe: Probe,
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    prepend_bos: bool | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Run a probe on a model, and on the same model edited, or on another model.

    Args:
        probe: What to read.
        model: The unchanged model.
        changed: An edit of it (or a router; applied and taken back here), a list with one for each fact, or the changed
            model itself.
        facts: What to read about.
        prepend_bos: BOS policy that the change has to agree with; a probe runs prompts by its own.
        folder: Where to keep the readings; a call that was killed resumes there. The probe's ``repr`` has to say all
            that they depend on.
        progress: Whether to show a bar on several changes that take longer than a second.

    Raises:
        ValueError: As in `Population.of`; or a list of changes, and a probe whose reading has no axis ``"fact"``.
    """
    population = Population.of(
        model, changed, facts, prepend_bos=prepend_bos, folder=folder, progress=progress, force=True
    )

    def read(runner: Runner, indices: tuple[int, ...]) -> Tensor:
        found = probe(runner.model, [population.facts[i] for i in indices])
        if "fact" not in found.axes and len(indices) < len(population.facts):
            raise ValueError(
                f"{found.name} has no axis 'fact' but {list(found.axes)}: what single changes give can't be put "
                "together, needed one change for all facts"
            )
        return found.values

    # What the axes say is the same before and after; without a folder the probe runs once on each model.
    with frozen(model), torch.no_grad():
        before = probe(model, population.facts)
    dim = list(before.axes).index("fact") if "fact" in before.axes else None
    values = before.values.clone()
    for part, found in population.each(before.name, read, settings=repr(probe)):
        if dim is None:
            values = found
        else:
            values.index_copy_(dim, torch.tensor(part.indices), found.to(values))
    return Comparison(before, replace(before, values=values))
