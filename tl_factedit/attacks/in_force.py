"""Is a change still in force while something is silenced?

An edit of one layer fires where it reads its key. Silence what makes the key, a layer below, and the edit says little
or nothing, though none of the cells that it wrote are silenced: what comes back then doesn't lie underneath it. So it
is measured how much of what was written is still written: every component of the unedited model is given what the
changed model's own component reads under the silencing, and the two answers are compared as in a footprint::

    w(c, p)  =  c₁(x_p) − c₀(x_p)          x: as in the unedited model, nothing silenced
    v(c, p)  =  c₁(y_p) − c₀(y_p)          y: as in the changed model, with cells silenced; 0 in a silenced cell
    left     =  Σ ‖w‖² · clamp(⟨v, w⟩ / ‖w‖², 0, 1)²  /  Σ ‖w‖²

For cells that are silenced and a write that depends on nothing below, ``1 − left`` is the cover of those cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.asking import Asking, Standing
from tl_factedit.attacks.footprints import Footprint, answers_of
from tl_factedit.attacks.silencing import Silencing, hooks_of, spots_of
from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.protocol import Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.tokens import pad
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
            for some in asking.few_sources(Runner(part.unedited), part.indices):
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
