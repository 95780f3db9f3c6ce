"""What an edit cannot have changed, checked bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tl_factedit.backend.hook_names import component_hook, resid_pre
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align
from tl_factedit.editing.edit import Edit
from tl_factedit.measure.population import Population


@dataclass(frozen=True)
class Upstream:
    """What an edit cannot have changed, and the check that it didn't.

    Attributes:
        layer: The first edited layer.
        invariant: Whether all residuals and attention outputs up to that layer, and its key, are
            equal bit for bit with and without the edit, at every position of every fact's prompt.
        changed_after: Whether its MLP output is *not* equal: the check can see a change.
        positions: How many token positions were compared.
    """

    layer: int
    invariant: bool
    changed_after: bool
    positions: int


def check_upstream(model: Model, edit: Edit, facts: Sequence[Fact]) -> Upstream:
    """Compare everything up to the first edited key with and without the edit, bit for bit."""
    first = edit.layers[0]
    site = down_proj(model, first)
    places = [
        *(resid_pre(layer) for layer in range(first + 1)),
        *(component_hook("attn", layer) for layer in range(first + 1)),
        site.key_hook,
    ]
    mlp_out = component_hook("mlp", first)
    rows = [align(model.tokenizer, fact, prepend_bos=edit.provenance.prepend_bos) for fact in facts]

    def all_rows(runner: Runner) -> list[dict[str, torch.Tensor]]:
        # Each alone, as bits are compared: what a row is computed beside may change them.
        return [runner.capture(row.ids[None], [*places, mlp_out], stop=first + 1) for row in rows]

    with frozen(model), torch.no_grad():
        before = all_rows(Runner(model))
        with edit.applied(model):
            after = all_rows(Runner(model))
    both = list(zip(before, after, strict=True))
    return Upstream(
        first,
        invariant=all(torch.equal(was[place], now[place]) for was, now in both for place in places),
        changed_after=not any(torch.equal(was[mlp_out], now[mlp_out]) for was, now in both),
        positions=sum(len(row.ids) for row in rows),
    )


def all_upstream(population: Population) -> Upstream:
    """The same of all edits of a population."""
    found = [
        check_upstream(population.model, part.changed, part.facts)
        for part in population.parts
        if isinstance(part.changed, Edit)
    ]
    return Upstream(
        min(each.layer for each in found),
        all(each.invariant for each in found),
        all(each.changed_after for each in found),
        sum(each.positions for each in found),
    )
