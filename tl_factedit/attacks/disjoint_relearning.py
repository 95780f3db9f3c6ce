"""Disjoint relearning: do the old objects of facts that nobody taught come back with those of others?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tl_factedit.attacks.learner import Group, Learner, adding_hooks, learning_layers
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, batches
from tl_factedit.measure.change import Changed
from tl_factedit.measure.excess import excess_of
from tl_factedit.measure.first_tokens import FirstTokens, are_known, at_the_ends, with_new_objects
from tl_factedit.measure.population import bos_of_change, each

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class DisjointRelearning:
    """What teaching the old objects of some facts does to others; descriptive.

    Attributes:
        taught: Whose objects were taught.
        looked_at: Whose weren't.
        updates: After how many updates was looked.
        old: How often the old object is first of the objects of a fact that was not taught, at each update.
        new: How often the new one is.
        excess: The old object's in excess of controls.
        learnt: How often the old object is first of the objects of a fact that *was* taught.
    """

    taught: tuple[Fact, ...]
    looked_at: tuple[Fact, ...]
    updates: tuple[int, ...]
    old: tuple[Estimate, ...]
    new: tuple[Estimate, ...]
    excess: tuple[Estimate, ...]
    learnt: tuple[Estimate, ...]

    def table(self) -> pd.DataFrame:
        """One row a look."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "updates": updates,
                    "old_first": self.old[i].mean,
                    "new_first": self.new[i].mean,
                    "excess": self.excess[i].mean,
                    "low": self.excess[i].low,
                    "high": self.excess[i].high,
                    "learnt": self.learnt[i].mean,
                }
                for i, updates in enumerate(self.updates)
            ]
        )

    def __repr__(self) -> str:
        """The last look in a line."""
        return (
            f"DisjointRelearning({len(self.taught)} taught, after {self.updates[-1]} updates {self.learnt[-1]:.2f} of "
            f"them learnt; excess of the old object in {len(self.looked_at)} others {self.excess[-1]:.2f})"
        )


def relearn_disjoint(
    model: Model,
    changed: Changed,
    teach: Sequence[Fact],
    look: Sequence[Fact],
    *,
    lr: float,
    layers: Sequence[int] | None = None,
    updates: Sequence[int] = (0, 5, 10, 20),
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> DisjointRelearning:
    """Teach the old objects of some facts together, and look whether those of others come along.

    Args:
        model: The unedited model.
        changed: One change for all facts, or another model: single edits have nothing in common that one could teach.
        teach: Whose old objects to teach.
        look: Other facts that were changed, about other subjects; those the unedited model knows count.
        lr: Of Adam, such as `relearning_rate` finds.
        layers: Whose ``W_out`` may learn; None for all.
        updates: After how many updates to look, ascending.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        batch_tokens: Most tokens in one forward pass.
        seed: Of the bootstrap.

    Raises:
        ValueError: A list of changes; no facts to teach or to look at, or the same subject in both; updates that don't
            ascend.
        RuntimeError: The learning is not finite.
    """
    teach, look = with_new_objects(teach), with_new_objects(look)
    parts = list(each(model, changed, [*teach, *look])) if teach and look else []
    if len(parts) != 1:
        raise ValueError(
            f"{len(parts)} models answer for {len(teach)} facts to teach and {len(look)} to look at, needed one for "
            "some of both: one change for all facts, or another model"
        )
    both = {fact.subject for fact in teach} & {fact.subject for fact in look}
    if both:
        raise ValueError(f"{sorted(both)[0]!r} is taught and looked at, needed other subjects")
    if not updates or list(updates) != sorted(set(updates)) or updates[0] < 0:
        raise ValueError(f"updates are {tuple(updates)}, needed numbers that ascend")
    chosen = learning_layers(model, layers)
    bos = bos_of_change(model, changed, prepend_bos)
    asked = [FirstTokens.of(model.tokenizer, fact, bos) for fact in (*teach, *look)]
    pupils = [
        (one.ids, align(model.tokenizer, fact, prepend_bos=bos).true_ids)
        for one, fact in zip(asked[: len(teach)], teach, strict=True)
    ]
    with frozen(model), torch.no_grad():
        known = are_known(Runner(model), asked, batch_tokens)
    firsts = torch.full((len(updates), len(asked), 3), math.nan)
    with parts[0].applied() as tested, frozen(tested):
        sites = [down_proj(tested, layer) for layer in chosen]
        learner = Learner(Runner(tested), sites, 1, lr)
        try:
            groups = [
                Group(learner.runner, [pupils[i] for i in some], chosen[0])
                for some in batches([len(ids) + len(target) - 1 for ids, target in pupils], batch_tokens)
            ]
            for when in range(updates[-1] + 1):
                if when in updates:
                    with torch.no_grad():
                        hooks = adding_hooks(sites, learner.learnt)
                        for i, logits in at_the_ends(learner.runner, [a.ids for a in asked], batch_tokens, hooks=hooks):
                            firsts[list(updates).index(when), i] = asked[i].first(logits)
                if when < updates[-1]:
                    learner.update(groups)
        finally:
            detach_caches(tested)
    firsts[:, ~known] = math.nan
    mine, others = firsts[:, : len(teach)], firsts[:, len(teach) :]
    return DisjointRelearning(
        taught=teach,
        looked_at=look,
        updates=tuple(updates),
        old=tuple(excess_of(at[:, 0], seed=seed) for at in others),
        new=tuple(excess_of(at[:, 1], seed=seed) for at in others),
        excess=tuple(excess_of(at[:, 0], at[:, 2], seed=seed) for at in others),
        learnt=tuple(excess_of(at[:, 0], seed=seed) for at in mine),
    )
