"""Crossed Patchscopes: states of the unedited and of the changed model, each read by both.

The target prompt is run by a model too, and that may be the edited one. **After block l' the vector runs through blocks
l'+1 and on: if the edited layer is among them, it is edited (again).** An old object that is found only at l' ≥ the
edited layer is in the state; one that isn't found at l' below it may have been overwritten on the way. So read into the
unedited model as well, and look at both sides. The target prompt's *other* tokens run through the edited layer at every
l', but see little of an edit that was made for one subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.measure.change import Change, Changed
from tl_factedit.measure.population import bos_of_change, parts_of
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.patchscope import Patchscope
from tl_factedit.probes.states import INPUT, read_states

MODELS = ("unedited", "changed")


@dataclass(frozen=True, eq=False)
class CrossedPatchscope:
    """States of the unedited and of the changed model, each read by both.

    Attributes:
        reading: Its axes are source_model, target_model (``"unedited"``, ``"changed"``), fact, source_layer,
            target_layer, quantity.
        edited_layers: The layers that the change writes to; None if another model was given, where all may differ.
    """

    reading: Reading
    edited_layers: tuple[int, ...] | None

    @property
    @plain_torch()
    def passes_again(self) -> Bool[Tensor, "target_layer"]:
        """The target layers from which a vector still runs through a changed layer, if the changed model reads it."""
        targets: Any = self.reading.axes["target_layer"]
        last = math.inf if self.edited_layers is None else max(self.edited_layers, default=INPUT)
        return torch.tensor([layer < last for layer in targets], dtype=torch.bool)

    @plain_torch()
    def clear(self) -> Reading:
        """Only the target layers from which no vector runs through a changed layer.

        Raises:
            ValueError: There are none.
        """
        keep = (~self.passes_again).nonzero()[:, 0]
        if not len(keep):
            raise ValueError(
                f"vectors run through the changed layers {self.edited_layers} at every target layer, needed some at or "
                "after the last of them: give such target_layers (with another model there are none)"
            )
        axes = dict(self.reading.axes)
        dim = list(axes).index("target_layer")
        axes["target_layer"] = tuple(axes["target_layer"][i] for i in keep.tolist())
        return replace(self.reading, values=self.reading.values.index_select(dim, keep), axes=axes)


@plain_torch()
def crossed_patchscope(
    scope: Patchscope, model: Model, changed: Changed, facts: Fact | Sequence[Fact]
) -> CrossedPatchscope:
    """Read states of the unedited and of the changed model by both models.

    Args:
        scope: The Patchscope to read with.
        model: The unedited model.
        changed: One change, a change for each fact, or another model.
        facts: What to read about.

    Raises:
        ValueError: A list of changes that isn't as long as the facts, another BOS policy than the change was made
            with, or as in `Patchscope.read`.
    """
    facts = as_facts(facts)
    bos = bos_of_change(model, changed, scope.prepend_bos)
    scope = replace(scope, prepend_bos=bos)
    before = read_states(model, facts, prepend_bos=bos)
    reading = scope.read(model, before)
    values = reading.values.new_full((2, 2, *reading.values.shape), math.nan)
    values[0, 0] = reading.values
    for part in parts_of(model, changed, facts):
        rows = list(part.indices)
        with part.applied() as other:
            after = read_states(other, part.facts, prepend_bos=bos)
            values[1, 1, rows] = scope.read(other, after).values
            values[0, 1, rows] = scope.read(other, before.take(rows)).values
        values[1, 0, rows] = scope.read(model, after).values
    axes = {"source_model": MODELS, "target_model": MODELS, **reading.axes}
    return CrossedPatchscope(replace(reading, values=values, axes=axes), _edited(changed))


def _edited(changed: Changed) -> tuple[int, ...] | None:
    if isinstance(changed, Sequence):
        return tuple(sorted({layer for change in changed for layer in change.layers}))
    return changed.layers if isinstance(changed, Change) else None
