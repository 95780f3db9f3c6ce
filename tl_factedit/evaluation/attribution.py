"""Position attribution: at which tokens does an edit do its work?

A weight edit isn't confined to the token it was made for. In the edited model its contribution, k_t ΔW, is taken away
at some positions P and left at the others::

    share(P) = (m_edited − m_without P) / (m_edited − m_unedited),        m = log p(new) − log p(old)

Taken away everywhere it gives the unedited model, exactly; that is an identity and the check of the measurement.
Shares of sets that complete each other needn't add up to 1. Descriptive: nothing corresponds to it in a model that was
retrained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Hook
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.estimate import Estimate, Estimates
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import pad
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.edit import Edit
from tl_factedit.evaluation.mediation import share_undone
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends, one_of, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population

if TYPE_CHECKING:
    import pandas as pd

SETS = ("subject", "but_subject", "before", "after", "last", "all")
"""The last subject token; all others; those before it; those after it; the last token; all."""


@dataclass(frozen=True, eq=False)
class PositionAttribution:
    """Which share of an edit's effect is undone when it is taken away at some tokens only.

    Objects count by their first tokens; facts whose objects share one, and facts that the unedited model doesn't know,
    are left out. A set without a token (nothing stands before the subject, or after it) gives NaN.

    Attributes:
        facts: What was asked.
        known: Whether a fact counts, [fact].
        unedited: m of the unedited model, nats, [fact].
        edited: m of the edited model, [fact].
        without: m of the edited model with the edit taken away at each of `SETS`, [fact set].
        share: Over facts (a ratio of means), [set].
    """

    facts: tuple[Fact, ...]
    known: Bool[Tensor, "fact"]
    unedited: Float[Tensor, "fact"]
    edited: Float[Tensor, "fact"]
    without: Float[Tensor, "fact set"]
    share: Estimates

    @plain_torch()
    def at(self, positions: str) -> Estimate:
        """The share of one of `SETS`."""
        return one_of(self.share, SETS.index(positions))

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a set of positions."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"positions": name, "share": (found := self.at(name)).mean, "low": found.low, "high": found.high}
                for name in SETS
            ]
        )

    def __repr__(self) -> str:
        """The shares in a line."""
        return f"PositionAttribution({', '.join(f'{name} {self.at(name).mean:.2f}' for name in SETS)})"


@plain_torch()
def attribute_positions(
    population: Population, *, batch_tokens: int = BATCH_TOKENS, seed: int = 0
) -> PositionAttribution:
    """Take an edit away at some tokens of each fact's prompt.

    Args:
        population: An edit, or one for each fact (of other changes it isn't known what they add at a token), and what
            to ask, each fact with ``target_new``.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: A fact without ``target_new``; a change that isn't an `Edit`.
    """
    facts = with_new_objects(population.facts)
    for part in population.parts:
        if not isinstance(part.changed, Edit):
            raise ValueError(f"{type(part.changed).__name__} isn't an Edit, needed one, whose contribution is known")
    asked, known = population.first_tokens, population.known
    edited = torch.full((len(facts),), math.nan)
    without = torch.full((len(facts), len(SETS)), math.nan)

    def plain(runner: Runner, _: tuple[int, ...]) -> Float[Tensor, "fact"]:
        found = torch.full((len(facts),), math.nan)
        for i, logits in at_the_ends(runner, [one.ids for one in asked], batch_tokens):
            found[i] = asked[i].margin(logits)
        return found

    unedited = population.unedited("position attribution", plain, settings=batch_tokens)
    edit_of = {part.indices: part.changed for part in population.parts}

    def read(runner: Runner, indices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        edit = edit_of[indices]
        assert isinstance(edit, Edit)
        sites = [(down_proj(runner.model, delta.layer), delta) for delta in edit.deltas]
        return _read(runner, [asked[i] for i in indices], sites, batch_tokens)

    for part, found in population.each("position attribution", read, settings=batch_tokens):
        edited[list(part.indices)], without[list(part.indices)] = found
    counted = torch.where(known[:, None], without, math.nan)
    return PositionAttribution(
        facts, known, unedited, edited, without, share_undone(unedited, edited, counted, seed=seed)
    )


def _sets(one: FirstTokens) -> list[range | list[int]]:
    n = len(one.ids)
    return [
        [one.last],
        [t for t in range(n) if t != one.last],
        range(one.last),
        range(one.last + 1, n),
        [one.end],
        range(n),
    ]


def _read(
    runner: Runner, asked: Sequence[FirstTokens], sites: Sequence[tuple[DownProj, Delta]], batch_tokens: int
) -> tuple[Float[Tensor, "fact"], Float[Tensor, "fact set"]]:
    """The lead m with the edit as it is, and with it taken away at each set of positions."""
    rows = len(SETS) + 1
    edited, without = torch.full((len(asked),), math.nan), torch.full((len(asked), len(SETS)), math.nan)
    for attempt in that_fit([rows * len(one.ids) for one in asked], batch_tokens):
        with attempt as some:
            tokens = pad([asked[i].ids for i in some for _ in range(rows)], 0)
            away = torch.zeros(tokens.shape, dtype=torch.bool)
            for j, i in enumerate(some):
                for s, positions in enumerate(_sets(asked[i])):
                    away[j * rows + s, list(positions)] = True
            ends = torch.tensor([[asked[i].end] for i in some for _ in range(rows)])
            hooks = [hook for site, delta in sites for hook in _taking(site, delta, away)]
            logits = runner.logits(tokens, at=ends, hooks=hooks)[:, 0].float().cpu()
            for i, of_fact in zip(some, logits.split(rows), strict=True):
                m = asked[i].margin(of_fact)
                empty = torch.tensor([not len(positions) for positions in _sets(asked[i])])
                edited[i], without[i] = m[-1], torch.where(empty, math.nan, m[:-1])
    return edited, without


def _taking(site: DownProj, delta: Delta, away: Bool[Tensor, "row pos"]) -> list[Hook]:
    """What takes the edit's contribution out of a value at some tokens."""

    def take(key: Tensor, value: Tensor) -> Tensor:
        added = key.double() @ delta.left.to(value.device) @ delta.right.to(value.device)
        where = away.to(value.device)[..., None]
        return torch.where(where, (value.double() - added).to(value.dtype), value)

    return site.hooks(take)
