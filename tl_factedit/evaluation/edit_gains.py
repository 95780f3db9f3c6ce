"""The exact response of an edit: how much of it fires at each token of a text, and at which dose.

An edit ``W += left @ right`` adds ``g_t · right`` to the value at token t, with gain ``g_t = k_tᵀ left``:
1 at the key it was written for, 0 at keys it doesn't see. A weight edit is not confined to a
position: every token of every text has its gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.kinds import check_one
from tl_factedit.core.tokens import check_length, check_spelling, encode, spell
from tl_factedit.editing.edit import Edit


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
    @plain_torch()
    def strength(self) -> Float[Tensor, "pos"]:
        """One number a token: the gain of the first layer, largest over the facts of a batch edit (signed)."""
        first = self.gain[0]
        return first.gather(-1, first.abs().argmax(-1, keepdim=True))[:, 0]


@plain_torch()
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
    check_one(text, str, "text", "one text, such as fact.text")
    bos_policy(model, prepend_bos)  # it has a tokenizer
    bos = edit.provenance.prepend_bos if prepend_bos is None else prepend_bos
    check_length(model.tokenizer, text, "text", prepend_bos=bos, room=getattr(model.cfg, "n_ctx", None))
    ids, _ = encode(model.tokenizer, text, prepend_bos=bos)
    check_spelling(model.tokenizer, ids, text)
    edit.check(model)
    sites = {delta.layer: down_proj(model, delta.layer) for delta in edit.deltas}
    first = min(edit.deltas, key=lambda delta: delta.layer)
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        _, before = _keys_and_value(runner, ids, {first.layer: sites[first.layer]}, first.layer)
        with edit.applied(model):
            keys, after = _keys_and_value(runner, ids, sites, first.layer)
    found = [keys[delta.layer].double() @ delta.left.to(keys[delta.layer].device) for delta in edit.deltas]
    predicted = found[edit.deltas.index(first)].to(after.device) @ first.right.to(after.device)
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
