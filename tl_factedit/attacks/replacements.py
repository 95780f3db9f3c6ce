"""What a silenced component says instead: what it says of other subjects, token for token.

At each position of a prompt stands the mean, over references of the same relation, of what the component says at the
same *role*: an earlier subject token, the last subject token, or so many tokens before the prompt's end. Or what it
says of one of them, drawn by chance (a *resample*): a mean lies where no subject's state does, and the two may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.attacks.cells import COMPONENTS, Place, positions
from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook
from tl_factedit.backend.runner import Runner
from tl_factedit.core.tokens import Aligned, pad

EARLIER, LAST_OF_SUBJECT, FROM_END = 0, 1, 2
"""Roles: of a subject's earlier tokens, of its last, and of those after it by how far before the end they stand."""

MOST_AFTER = 24
"""Tokens further before the end than this share a role."""


def role_of(position: int, row: Aligned) -> int:
    """The role of a token from the subject's first on."""
    if position < row.last:
        return EARLIER
    if position == row.last:
        return LAST_OF_SUBJECT
    return FROM_END + min(len(row.ids) - 1 - position, MOST_AFTER)


def roles_at(place: Place, row: Aligned) -> list[tuple[int, int]]:
    """The positions of a place, each with its role."""
    return [(p, role_of(p, row)) for p in positions(place, row.subject, len(row.ids))]


@dataclass(frozen=True, eq=False)
class Replacements:
    """What stands in for silenced components.

    Attributes:
        values: [source role component layer d_model]; components in the order of `COMPONENTS`.
    """

    values: Float[Tensor, "source role component layer d_model"]

    def at(
        self, sources: Int[Tensor, "n"], roles: Int[Tensor, "n"], component: int, layer: int
    ) -> Float[Tensor, "n d_model"]:
        """Of some sources at some roles."""
        return self.values[sources, roles.clamp(max=self.values.shape[1] - 1), component, layer]

    @classmethod
    def read(
        cls, runner: Runner, rows: Sequence[Aligned], sources: Float[Tensor, "source row"], batch_tokens: int
    ) -> Replacements:
        """Run references, and average them.

        Args:
            runner: Runs the model; call inside `frozen` and ``torch.no_grad``.
            rows: The references' prompts.
            sources: How much each counts in each average; a row with a single 1 is that reference itself.
            batch_tokens: Most tokens in one forward pass.

        A role that no counted reference has is taken from the nearest that some has: an earlier subject token from the
        last one, a token after the subject from the one next to it.
        """
        places = [[component_hook(name, layer) for layer in range(runner.n_layers)] for name in COMPONENTS]
        needed = [i for i in range(len(rows)) if bool(sources[:, i].any())]
        n_roles = FROM_END + max(min(len(rows[i].ids) - 1 - rows[i].subject[0], MOST_AFTER) for i in needed) + 1
        total: Tensor | None = None
        weight = torch.zeros(len(sources), n_roles, dtype=torch.float64)
        kind = torch.float32
        for attempt in that_fit([len(rows[i].ids) for i in needed], batch_tokens):
            with attempt as some:
                here = [needed[i] for i in some]
                tokens = pad([rows[i].ids for i in here], 0)
                caught = runner.capture(tokens, [place for row in places for place in row])
                # Of a role among its tokens.
                share = torch.zeros(len(here), n_roles, tokens.shape[1], dtype=torch.float64)
                for r, i in enumerate(here):
                    for p, role in roles_at("all", rows[i]):
                        share[r, role, p] = 1.0
                there = share.sum(-1)
                share = share / there.clamp(min=1.0)[..., None]
                mine = sources[:, here].double()
                mixing = torch.einsum("sr,rkp->skrp", mine, share).flatten(2).flatten(0, 1)
                first = caught[places[0][0]]
                kind = first.dtype
                mixing = mixing.to(first.device)
                added = torch.stack(
                    [
                        torch.stack([mixing @ caught[place].double().flatten(0, 1) for place in row], 1)
                        for row in places
                    ],
                    1,
                )
                added = added.unflatten(0, (len(sources), n_roles))
                total = added if total is None else total + added
                weight += mine @ (there > 0).double()
        assert total is not None
        values = total / weight.to(total.device).clamp(min=1e-12)[:, :, None, None, None]
        for source in range(len(sources)):
            have = weight[source] > 0
            for role in range(n_roles):
                if not bool(have[role]):
                    nearest = [k for k in range(n_roles) if bool(have[k])]
                    values[source, role] = values[source, min(nearest, key=lambda k: abs(k - role))]
        return cls(values.to(kind))
