"""Is a change still in force while something is silenced?

An edit of one layer fires where it reads its key. Silence what makes the key, a layer below, and the edit says little
or nothing, though none of the cells that it wrote are silenced: what comes back then doesn't lie underneath it. So it
is measured how much of what was written is still written: every component of the unedited model is given what the
changed model's own component reads under the silencing, and the two answers are compared as in a footprint::

    w(c, p)  =  c₁(x_p) − c₀(x_p)          x: as in the unedited model, nothing silenced
    v(c, p)  =  c₁(y_p) − c₀(y_p)          y: as in the changed model, with cells silenced; 0 in a silenced cell
    left     =  Σ ‖w‖² · clamp(⟨v, w⟩ / ‖w‖², 0, 1)²  /  Σ ‖w‖²

For cells that are silenced and a write that depends on nothing below, ``1 − left`` is the cover of those cells.

And what is left may do nothing: fine-tuning of one layer writes at every token, and is read at one. So it is asked,
too, whether the old object leads if nothing is silenced but the write in these cells is undone: each of them answers
what the unedited model's own component answers to the same input. If it does, that write was what the change consists
of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.asking import Asking, Standing
from tl_factedit.attacks.cells import Silenceable
from tl_factedit.attacks.footprints import Footprint, answers_of
from tl_factedit.attacks.silencing import Silencing, hooks_of, spots_of
from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.protocol import Hook, HookFn, Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.tokens import pad
from tl_factedit.measure.first_tokens import firsts
from tl_factedit.measure.population import Part, Population

HELD = 4
"""So many times as much is kept as in a footprint, whose passes have as many tokens as that makes fewer."""


def left_under(
    population: Population, asking: Asking, silencings: Sequence[Silencing], written: Footprint
) -> Float[Tensor, "fact silencing"]:
    """How much of what a change wrote is still written under each silencing, from 0 to 1; NaN where nothing was.

    What stands in for silenced cells is taken from the changed model if it is a model of its own, otherwise from the
    unedited one, once.

    Args:
        population: The facts and the change.
        asking: The facts' prompts and their references.
        silencings: What is silenced.
        written: The change's footprint.
    """
    settings = {**asking.settings(population), "silencings": silencings}
    out = torch.full((len(population.facts), len(silencings)), torch.nan)
    for part in population.parts:

        def compute(part: Part = part) -> Tensor:
            mine = torch.zeros(len(part.indices), len(silencings))
            place = {i: row for row, i in enumerate(part.indices)}
            with frozen(part.unedited), torch.no_grad():
                groups = asking.few_sources(Runner(part.unedited), part.indices)
            for some in groups:
                mine[[place[i] for i in some]] = _left(part, asking, list(some), silencings, written)
            return mine

        out[list(part.indices)] = population.keep("what is left of the change", part, compute, settings=settings)
    return out


def _left(
    part: Part, asking: Asking, chosen: list[int], silencings: Sequence[Silencing], written: Footprint
) -> Float[Tensor, "fact silencing"]:
    standing = _standing_in(part, asking, chosen)
    out = torch.zeros(len(chosen), len(silencings))
    lengths = [len(asking.rows[i].ids) for i in chosen]
    for attempt in that_fit(lengths, max(1, asking.batch_tokens // HELD)):
        with attempt as some:
            here = [chosen[j] for j in some]
            rows = [asking.rows[i] for i in here]
            tokens, ends = pad([row.ids for row in rows], 0), torch.tensor([[len(row.ids) - 1] for row in rows])
            asked, spots = [standing[0][j] for j in some], spots_of(rows)
            with frozen(part.unedited), torch.no_grad():
                clean = answers_of(Runner(part.unedited), tokens, ends, None)
            with part.applied() as tested, frozen(tested), torch.no_grad():
                changed = answers_of(Runner(tested), tokens, ends, clean)
                under = [
                    answers_of(Runner(tested), tokens, ends, None, hooks_of(asked, spots, [each], standing[1]))
                    for each in silencings
                ]
            with frozen(part.unedited), torch.no_grad():
                own = [answers_of(Runner(part.unedited), tokens, ends, states) for states in under]
            for s, each in enumerate(silencings):
                kept = torch.zeros(len(here), dtype=torch.float64)
                total = torch.zeros(len(here), dtype=torch.float64)
                for row, name in enumerate(_places(n_layers(part.unedited))):
                    share = _still(changed[name] - clean[name], under[s][name] - own[s][name])
                    counted, silenced = written.counted(row)[here], written.silenced(row, each.cells)[here]
                    if share.dim() == 1:  # the head, at the last token alone
                        kept += share * counted.sum(1)
                    else:
                        wide = share.shape[1]
                        kept += (share * torch.where(silenced, 0.0, counted)[:, :wide]).sum(1)
                    total += counted.sum(1)
                out[some, s] = (kept / total).float()
    return out


def back_undone(
    population: Population, asking: Asking, silencings: Sequence[Silencing], written: Footprint
) -> Float[Tensor, "fact silencing"]:
    """Whether the old object leads in the changed model if the write in each silencing's cells is undone.

    1 where it is the first of the fact's objects, 0 where it isn't, a share where it ties; NaN where objects can't be
    told apart. Nothing is silenced.

    Args:
        population: The facts and the change.
        asking: The facts' prompts.
        silencings: Whose cells' write is undone.
        written: The change's footprint.
    """
    settings = {**asking.settings(population), "silencings": silencings}
    out = torch.full((len(population.facts), len(silencings)), torch.nan)
    for part in population.parts:

        def compute(part: Part = part) -> Tensor:
            mine = torch.full((len(part.indices), len(silencings)), torch.nan)
            lengths = [len(asking.rows[i].ids) for i in part.indices]
            for attempt in that_fit(lengths, max(1, asking.batch_tokens // HELD)):
                with attempt as some:
                    mine[some] = _back(part, asking, [part.indices[j] for j in some], silencings, written)
            return mine

        out[list(part.indices)] = population.keep("what is left without a write", part, compute, settings=settings)
    return out


def _back(
    part: Part, asking: Asking, here: list[int], silencings: Sequence[Silencing], written: Footprint
) -> Float[Tensor, "fact silencing"]:
    rows = [asking.rows[i] for i in here]
    tokens, ends = pad([row.ids for row in rows], 0), torch.tensor([[len(row.ids) - 1] for row in rows])
    out = torch.full((len(here), len(silencings)), torch.nan)
    for s, each in enumerate(silencings):
        hooks: list[Hook] = []
        places: list[tuple[Silenceable, int]] = list({(cell.component, cell.layer): None for cell in each.cells})
        # What a layer's write does to the input of the next is undone with it, one layer at a time.
        for _ in range(len({layer for _, layer in places})):
            with part.applied() as tested, frozen(tested), torch.no_grad():
                states = answers_of(Runner(tested), tokens, ends, None, hooks)
            with frozen(part.unedited), torch.no_grad():
                own = answers_of(Runner(part.unedited), tokens, ends, states)
            hooks = []
            for component, layer in places:
                silenced = written.silenced(written.components.index((component, layer)), each.cells)[here]
                name = component_hook(component, layer)
                hooks.append((name, _put(own[name], silenced[:, : tokens.shape[1]])))
        with part.applied() as tested, frozen(tested), torch.no_grad():
            logits = Runner(tested).logits(tokens, at=ends, hooks=hooks)[:, 0].float().cpu()
        for row, i in enumerate(here):
            if asking.objects[i]:
                out[row, s] = firsts(logits[row, list(asking.objects[i])])[0]
    return out


def _put(value: Tensor, where: Tensor) -> HookFn:
    def hook_fn(own: Tensor, hook: Any = None) -> Tensor:
        return torch.where(where[..., None].to(own.device), value.to(own), own)

    return hook_fn


def _standing_in(part: Part, asking: Asking, chosen: Sequence[int]) -> Standing:
    if isinstance(part.changed, Model):
        with part.applied() as tested, frozen(tested), torch.no_grad():
            return asking.standing_in(Runner(tested), chosen)
    with frozen(part.unedited), torch.no_grad():
        return asking.standing_in(Runner(part.unedited), chosen)


def _places(layers: int) -> list[str]:
    """Where each row of a footprint is read, in order."""
    inside = [
        name
        for layer in range(layers)
        for name in (component_hook("attn", layer), component_hook("mlp", layer), resid_post(layer))
    ]
    return [resid_pre(0), *inside, "norm", "unembed"]


def _still(wrote: Tensor, writes: Tensor) -> Tensor:
    """How much of a write is still written, from 0 to 1; the last axis goes."""
    wrote, writes = wrote.double(), writes.double()
    size = wrote.square().sum(-1)
    share = torch.where(size > 0, (wrote * writes).sum(-1) / size.clamp(min=1e-300), 0.0)
    return share.clamp(0.0, 1.0).square().cpu()
