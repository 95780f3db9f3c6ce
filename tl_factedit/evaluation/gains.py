"""The exact response of an edit: how much of it fires at each token of a text, and at which dose.

An edit ``W += left @ right`` adds ``g_t · right`` to the value at token t, with gain ``g_t = k_tᵀ left``:
1 at the key it was written for, 0 at keys it doesn't see. A weight edit is not confined to a
position: every token of every text has its gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from tl_factedit.editing.edit import Delta, Edit
from tl_factedit.core.facts import Fact
from tl_factedit.backend.model import DownProj, Hook, Model, Runner, down_proj, quiet
from tl_factedit.measure.first_tokens import with_new_objects
from tl_factedit.core.tokens import align, encode, spell


@dataclass(frozen=True)
class Gains:
    """The gains of an edit over a text.

    Attributes:
        text: The text.
        tokens: Its token strings, BOS included if there is one.
        gain: g, [layer pos rank]; for a rank-one edit the last axis has length 1. Layers of a lower rank than others
            have zeros behind theirs.
        layers: The edited layers, in the order of the first axis.
        predicted_error: Largest difference between the predicted change of the first edited
            layer's value, g · right, and the measured one, relative to the largest change.
    """

    text: str
    tokens: tuple[str, ...]
    gain: Float[Tensor, "layer pos rank"]
    layers: tuple[int, ...]
    predicted_error: float

    @property
    def strength(self) -> Float[Tensor, "pos"]:
        """One number a token: the gain of the first layer, largest over the facts of a batch edit (signed)."""
        first = self.gain[0]
        return first.gather(-1, first.abs().argmax(-1, keepdim=True))[:, 0]


def gains(model: Model, edit: Edit, text: str, *, prepend_bos: bool | None = None) -> Gains:
    """How much of an edit fires at each token of a text.

    Args:
        model: The model the edit was made on, without it.
        edit: The edit; it is applied and taken back here.
        text: Any text.
        prepend_bos: Whether BOS goes in front; None for the edit's own policy.

    Returns:
        The gains. Those of later layers are of the keys in the edited model.
    """
    bos = edit.provenance.prepend_bos if prepend_bos is None else prepend_bos
    ids, _ = encode(model.tokenizer, text, prepend_bos=bos)
    edit.check(model)
    sites = {delta.layer: down_proj(model, delta.layer) for delta in edit.deltas}
    first = min(edit.deltas, key=lambda delta: delta.layer)
    with quiet(model), torch.no_grad():
        runner = Runner(model)
        _, before = _keys_and_value(runner, ids, {first.layer: sites[first.layer]}, first.layer)
        with edit.applied(model):
            keys, after = _keys_and_value(runner, ids, sites, first.layer)
    found = [keys[delta.layer].double() @ delta.left.to(keys[delta.layer].device) for delta in edit.deltas]
    predicted = found[edit.deltas.index(first)] @ first.right.to(after.device)
    measured = (after - before).double()
    rank = max(g.shape[-1] for g in found)
    return Gains(
        text=text,
        tokens=spell(model.tokenizer, ids),
        gain=torch.stack([torch.nn.functional.pad(g.cpu(), (0, rank - g.shape[-1])) for g in found]),
        layers=tuple(delta.layer for delta in edit.deltas),
        predicted_error=float((predicted - measured).abs().max() / predicted.abs().max().clamp(min=1e-300)),
    )


def _keys_and_value(
    runner: Runner, ids: Tensor, sites: dict[int, DownProj], layer: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Keys of some layers over a text, and the value of one of them."""
    value: list[Tensor] = []
    caught = runner.capture(
        ids[None],
        [site.key_hook for site in sites.values()],
        stop=max(sites) + 1,
        hooks=[(sites[layer].value_at, lambda out, hook=None: value.append(out.detach().clone()))],
    )
    return {layer: caught[site.key_hook][0] for layer, site in sites.items()}, value[0][0]


@dataclass(frozen=True)
class Dose:
    """How the answer depends on how much of the edit fires at the last subject token.

    Descriptive, and no evidence by itself: at dose 0 the model is nearly the unedited one by
    construction.

    Attributes:
        doses: a, from none (0) to all (1) of the edit and beyond.
        margin: m(a) = log p(new) − log p(old) of the whole objects, [fact dose], nats.
    """

    doses: Float[Tensor, "dose"]
    margin: Float[Tensor, "fact dose"]

    @property
    def override_margin(self) -> Float[Tensor, "fact"]:
        """m(1): by how many nats the new object leads in the edited model."""
        return self.margin[:, int((self.doses - 1).abs().argmin())]

    @property
    def critical(self) -> Float[Tensor, "fact"]:
        """a*, the smallest dose at which new and old tie (linear between doses); NaN if they never do."""
        out = torch.full((len(self.margin),), float("nan"))
        for i, m in enumerate(self.margin):
            crossing = (m[:-1] * m[1:] <= 0).nonzero()
            if len(crossing):
                j = int(crossing[0])
                a, b = self.doses[j], self.doses[j + 1]
                step = m[j + 1] - m[j]
                out[i] = a if float(step) == 0 else a - m[j] * (b - a) / step
        return out


DOSES = tuple(round(-0.5 + 0.1 * i, 1) for i in range(21))


def dose_curve(
    model: Model, edit: Edit, facts: Fact | Sequence[Fact], *, doses: Sequence[float] = DOSES, batch_tokens: int = 4096
) -> Dose:
    """Margin of the new object over the old as the edit's share at the last subject token grows.

    In the edited model the value at that token is moved by ``(a − 1) · g · right``.

    Args:
        model: The model the edit was made on, without it.
        edit: The edit; it is applied and taken back here.
        facts: Each with a ``target_new``.
        doses: The a's; 1 is the edit as it is.
        batch_tokens: Most tokens in one forward pass.
    """
    facts = with_new_objects(facts)
    sites = {delta.layer: down_proj(model, delta.layer) for delta in edit.deltas}
    rows = []
    with quiet(model), torch.no_grad(), edit.applied(model):
        runner = Runner(model)
        for fact in facts:
            row = align(model.tokenizer, fact, prepend_bos=edit.provenance.prepend_bos)
            if row.new_ids is None:
                raise ValueError(f"fact {fact.name!r} has no target_new, needed one: fact.but(target_new=...)")
            per_object = []
            for target in (row.new_ids, row.true_ids):
                ids = torch.cat([row.ids, target[:-1]])
                at = torch.arange(len(target)) + len(row.ids) - 1
                parts = []
                for some in torch.tensor(doses).split(max(1, batch_tokens // len(ids))):
                    logits = runner.logits(
                        repeat(ids, "pos -> row pos", row=len(some)),
                        at=at.expand(len(some), -1),
                        hooks=[h for delta in edit.deltas for h in _scale(sites[delta.layer], delta, some, row.last)],
                    )
                    log_p = logits.float().log_softmax(-1).cpu()
                    parts.append(log_p[:, torch.arange(len(target)), target].sum(-1))
                per_object.append(torch.cat(parts))
            rows.append(per_object[0] - per_object[1])
    return Dose(torch.tensor(doses), torch.stack(rows))


def _scale(site: DownProj, delta: Delta, doses: Tensor, position: int) -> list[Hook]:
    """Hooks that leave only a share of the edit at one position; one dose a row."""
    seen: list[Tensor] = []

    def read_key(key: Tensor, hook: Any = None) -> None:
        seen[:] = [key[:, position]]

    def move_value(value: Tensor, hook: Any = None) -> Tensor:
        moved = value.clone()
        change = seen[0].double() @ delta.left.to(value.device) @ delta.right.to(value.device)
        moved[:, position] += ((doses.to(value.device) - 1)[:, None] * change).to(value.dtype)
        return moved

    return [(site.key_hook, read_key), (site.value_at, move_value)]
