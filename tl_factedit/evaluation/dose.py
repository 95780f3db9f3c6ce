"""How the answer depends on how much of an edit acts at the last subject token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Hook, Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import as_finite, as_whole
from tl_factedit.core.tokens import align_all
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.edit import Edit
from tl_factedit.measure.change import check_made_for
from tl_factedit.measure.first_tokens import with_new_objects


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
    @plain_torch()
    def override_margin(self) -> Float[Tensor, "fact"]:
        """m(1): by how many nats the new object leads in the edited model."""
        return self.margin[:, int((self.doses - 1).abs().argmin())]

    @property
    @plain_torch()
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


@plain_torch()
def dose_curve(
    model: Model,
    edit: Edit,
    facts: Fact | Sequence[Fact],
    *,
    doses: Sequence[float] = DOSES,
    batch_tokens: int = 4096,
    force: bool = False,
) -> Dose:
    """Margin of the new object over the old as the edit's share at the last subject token grows.

    In the edited model the value at that token is moved by ``(a − 1) · g · right``.

    Args:
        model: The model the edit was made on, without it.
        edit: The edit; it is applied and taken back here.
        facts: Each with a ``target_new``.
        doses: The a's; 1 is the edit as it is.
        batch_tokens: Most tokens in one forward pass.
        force: Whether to ask about facts that the edit wasn't made for.

    Raises:
        ValueError: No facts; no doses, or one that is not finite; a fact without one of its objects, with a text that
            is longer than the model's context, or (unless `force`) that the edit wasn't made for.
    """
    facts = with_new_objects(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    if not force:
        check_made_for(edit, facts, "a dose curve")
    needed = "some finite numbers, such as (0.0, 0.5, 1.0)"
    doses = tuple(as_finite(dose, f"doses[{i}]", needed) for i, dose in enumerate(doses))
    if not doses:
        raise ValueError(f"doses is empty, needed {needed}")
    room = getattr(model.cfg, "n_ctx", None)
    prompts = align_all(model.tokenizer, facts, prepend_bos=edit.provenance.prepend_bos, room=room)
    as_whole(batch_tokens, "batch_tokens", what="a whole number of tokens")
    sites = {delta.layer: down_proj(model, delta.layer) for delta in edit.deltas}
    rows = []
    with frozen(model), torch.no_grad(), edit.applied(model):
        runner = Runner(model)
        for fact, row in zip(facts, prompts, strict=True):
            if row.new_ids is None:
                raise ValueError(f"fact {fact.name!r} has no target_new, needed one: fact.but(target_new=...)")
            per_object = []
            for target in (row.new_ids, row.true_ids):
                ids = torch.cat([row.ids, target[:-1]])
                at = torch.arange(len(target)) + len(row.ids) - 1
                parts = []
                for attempt in that_fit([len(ids)] * len(doses), batch_tokens):  # of one length: in their order
                    with attempt as batch:
                        some = torch.tensor(doses)[batch]
                        scaled = [_scale(sites[delta.layer], delta, some, row.last) for delta in edit.deltas]
                        logits = runner.logits(
                            repeat(ids, "pos -> row pos", row=len(some)),
                            at=at.expand(len(some), -1),
                            hooks=[hook for hooks in scaled for hook in hooks],
                        )
                        log_p = logits.float().log_softmax(-1).cpu()
                        parts.append(log_p[:, torch.arange(len(target)), target].sum(-1))
                per_object.append(torch.cat(parts))
            rows.append(per_object[0] - per_object[1])
    return Dose(torch.tensor(doses), torch.stack(rows))


def _scale(site: DownProj, delta: Delta, doses: Tensor, position: int) -> list[Hook]:
    """Hooks that leave only a share of the edit at one position; one dose a row."""

    def move_value(key: Tensor, value: Tensor) -> Tensor:
        moved = value.clone()
        change = key[:, position].double() @ delta.left.to(value.device) @ delta.right.to(value.device)
        moved[:, position] += ((doses.to(value.device) - 1)[:, None] * change).to(value.dtype)
        return moved

    return site.hooks(move_value)
