"""Disjoint relearning: do the old objects of facts that nobody taught come back with those of others?

Deeb & Roger 2024 (arXiv:2410.08827): a change that removed facts from the weights leaves nothing that teaching *other*
facts could bring back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.attacks.learner import Group, Learner, adding_hooks, learning_layers
from tl_factedit.attacks.relearning import relearning_rate
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, batches
from tl_factedit.measure.first_tokens import FIRST, at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population


@dataclass(frozen=True)
class DisjointRelearning:
    """Teach the old objects of some facts together, and look whether those of others come along.

    The population's facts are split by `seed`; the cases are numbers of updates, and the facts that aren't taught
    count. One change for all facts, or another model, can be asked: single edits have nothing in common that one could
    teach. ``extra`` has ``learnt``, how often the old object is first of the objects of a fact that *was* taught;
    ``details`` has ``taught`` and ``looked_at``, places in the population's facts.

    Attributes:
        lr: Learning rate of Adam, such as `relearning_rate` finds; None finds one on the unedited model.
        taught: Share of the subjects whose old objects are taught.
        layers: Whose ``W_out`` may learn; None for all.
        updates: After how many updates to look, ascending.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the split and of the bootstrap.
    """

    lr: float | None = None
    taught: float = 0.5
    layers: Sequence[int] | None = None
    updates: Sequence[int] = (5, 10, 20)
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Teach, and look at the others.

        Raises:
            ValueError: A list of changes; fewer than two subjects; updates that don't ascend; a share that leaves
                nobody to teach or to look at.
            RuntimeError: The learning is not finite.
        """
        facts, model = with_new_objects(population.facts), population.model
        if len(population.parts) != 1:
            raise ValueError(
                f"{len(population.parts)} changes answer for {len(facts)} facts, needed one for all: single edits have "
                "nothing in common that one could teach"
            )
        updates = tuple(self.updates)
        if not updates or list(updates) != sorted(set(updates)) or updates[0] < 1:
            raise ValueError(f"updates are {updates}, needed numbers from 1 on that ascend")
        teach, look = self._split(facts)
        chosen = learning_layers(model, self.layers)
        lr = self.lr or relearning_rate(model, facts, layers=chosen, prepend_bos=population.prepend_bos, seed=self.seed)
        asked = population.first_tokens
        pupils = [
            (asked[i].ids, align(model.tokenizer, facts[i], prepend_bos=population.prepend_bos).true_ids) for i in teach
        ]

        def read(runner: Runner, _: tuple[int, ...]) -> Float[Tensor, "fact update quantity"]:
            found = torch.full((len(asked), len(updates), len(FIRST)), math.nan)
            sites = [down_proj(runner.model, layer) for layer in chosen]
            learner = Learner(runner, sites, 1, lr)
            try:
                groups = [
                    Group(runner, [pupils[i] for i in batch], chosen[0])
                    for batch in batches([len(ids) + len(target) - 1 for ids, target in pupils], self.batch_tokens)
                ]
                for when in range(1, updates[-1] + 1):
                    learner.update(groups)
                    if when in updates:
                        with torch.no_grad():
                            hooks = adding_hooks(sites, learner.learnt)
                            rows = [one.ids for one in asked]
                            for i, logits in at_the_ends(runner, rows, self.batch_tokens, hooks=hooks):
                                found[i, updates.index(when)] = asked[i].first(logits)
            finally:
                detach_caches(runner.model)
            return found

        settings = (lr, teach, chosen, updates, self.batch_tokens)
        after = population.after("disjoint relearning", read, settings=settings)
        known = population.known.clone()
        learnt = torch.where(known[:, None], after[..., 0], math.nan)[teach].nanmean(0)
        known[teach] = False
        return Recovery.of(
            "disjoint relearning",
            population,
            [Case(when, f"{when} update{'s' * (when > 1)} on other facts", "underneath") for when in updates],
            torch.full_like(after, math.nan),
            after,
            known=known,
            extra={"learnt": learnt},
            details={"taught": tuple(teach), "looked_at": tuple(look), "lr": lr, "layers": chosen},
            asks_weights="teaching",
            seed=self.seed,
        )

    def _split(self, facts: Sequence[Fact]) -> tuple[list[int], list[int]]:
        """Places of the facts to teach and of those to look at; no subject is on both sides."""
        subjects = list(dict.fromkeys(fact.subject for fact in facts))
        count = round(self.taught * len(subjects))
        if not 0 < count < len(subjects):
            raise ValueError(
                f"taught={self.taught} of {len(subjects)} subjects are {count} to teach, needed some to teach and some "
                "to look at"
            )
        chosen = set(random.Random(f"disjoint {self.seed}").sample(subjects, count))
        teach = [i for i, fact in enumerate(facts) if fact.subject in chosen]
        return teach, [i for i in range(len(facts)) if i not in set(teach)]
