"""Several edits as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.kinds import as_several
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.outcome import unmeasured


@plain_torch()
def compose(edits: Sequence[Edit]) -> Edit:
    """Several edits of the same base weights as one: their changes of a layer added up, which no order matters to.

    Facts, fits and diagnostics stand one after the other, as each edit was made, and so do `keys` and `values` of a
    layer. What became of the targets, and how much isn't met, was measured of each edit alone and isn't known of them
    together: it is left out, and `Edit.concerns` say so. Applied, it may differ in the last bit from the edits applied
    one by one, which round each time. Where the ranks add up to more than a matrix can have, the changes are kept as
    one matrix.

    Raises:
        ValueError: No edit is given, one is given twice (itself, scaled, or inside a composed one), or they are of
            different weights or BOS policies.
    """
    if isinstance(edits, Edit):
        raise ValueError("edits is one Edit, needed a list of them: write [edit]")
    edits = list(as_several(edits, Edit, "edits", "an Edit"))
    if not edits:
        raise ValueError("edits is empty, needed at least one")
    changes = [digest for edit in edits for digest in edit.changes]
    if len(set(changes)) < len(changes):
        raise ValueError(
            "one change is in several of the edits, needed it once: leave it out of the others; for more of it scale "
            "it (edit.scaled(1.5), not the edit and half of it)"
        )
    held = [digest for edit in edits for digest in (edit.digest, *edit.parts)]
    scaled_from = sorted(set(changes).difference(held))
    first = edits[0]
    for edit in edits[1:]:
        if not edit.provenance.weights.matches(first.provenance.weights):
            raise ValueError(
                f"the edits are of weights {first.provenance.weights} and {edit.provenance.weights}, needed the same: "
                "make them on one model (an edit made while another is applied is still of the base)"
            )
        if edit.provenance.prepend_bos != first.provenance.prepend_bos:
            raise ValueError(
                "some of the edits were made with BOS and some without, needed one policy: make them again"
            )
    layers = sorted({layer for edit in edits for layer in edit.layers})
    factors = {layer: [d for edit in edits for d in edit.deltas if d.layer == layer] for layer in layers}
    diagnostics = tuple(each for edit in edits for each in edit.diagnostics)
    fits = tuple(fit for edit in edits for fit in edit.fits)
    alone = len(edits) == 1
    return Edit(
        facts=tuple(fact for edit in edits for fact in edit.facts),
        deltas=tuple(_sum(layer, parts) for layer, parts in factors.items()),
        keys={layer: torch.cat([edit.keys[layer] for edit in edits if layer in edit.keys]) for layer in layers},
        values={layer: torch.cat([edit.values[layer] for edit in edits if layer in edit.values]) for layer in layers},
        editor={
            "name": "composed",
            "of": [dict(edit.editor) for edit in edits],
            "digests": held,
            **({"scaled_from": scaled_from} if scaled_from else {}),
        },
        contexts=tuple(dict.fromkeys(context for edit in edits for context in edit.contexts)),
        diagnostics=diagnostics if alone else tuple(replace(each, unmet=()) for each in diagnostics),
        fits=fits if alone else unmeasured(fits),
        provenance=replace(
            first.provenance,
            edits=tuple(dict.fromkeys(below for edit in edits for below in edit.provenance.edits if below not in held)),
        ),
    )


def _sum(layer: int, parts: Sequence[Delta]) -> Delta:
    """Changes of one layer as one, in the smaller of two forms: factors side by side, or one matrix."""
    if len(parts) == 1:
        return parts[0]
    rank = sum(part.left.shape[1] for part in parts)
    if rank > min(len(parts[0].left), parts[0].right.shape[1]):
        total = torch.zeros_like(parts[0].dense)
        for part in parts:
            total += part.dense
        return Delta.full(layer, total)
    return Delta(layer, torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts]))
