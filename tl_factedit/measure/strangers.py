"""How often an object comes first for subjects who don't have it: the null of an object that is merely common.

A model that was changed, or that is attacked, may fall back on what is frequent: then the old object comes first as
many subjects have it, and control objects, which are rarer, don't. So a few reference subjects of each relation are
asked under the same attack, and for each fact it is looked how often its old object comes first of its objects for
those of them who have another. An attack on the weights asks them their own prompts (`Strangers`); one on what is
asked, such as a paraphrase or a context, asks each fact about them (`about_strangers`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.protocol import Hook
from tl_factedit.backend.runner import Runner
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends
from tl_factedit.measure.population import Population

MOST = 16
"""So many subjects of a relation are asked."""


@dataclass(frozen=True, eq=False)
class Strangers:
    """Reference subjects that are asked beside the facts.

    Attributes:
        references: Their places among the population's references.
        rows: Their prompts' token ids.
        asked: The facts with their objects.
        of_fact: For each fact, the places of those of its relation who have another object, and that the change which
            serves it wasn't made for.
    """

    references: tuple[int, ...]
    rows: tuple[Int[Tensor, "_"], ...]
    asked: tuple[FirstTokens, ...]
    of_fact: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, population: Population, *, seed: int = 0) -> Strangers:
        """Drawn from a population's references: rather those no change was made for, then others'."""
        reference = population.reference
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed)).tolist()
        touched = [population.touched_with(i) for i in range(len(population.facts))]
        of_any = frozenset[str]().union(*touched)
        order.sort(key=lambda r: reference[r].subject in of_any)
        chosen: dict[object, list[int]] = {fact.group: [] for fact in population.facts}
        for r in order:
            of_relation = chosen.get(reference[r].group)
            if of_relation is not None and len(of_relation) < MOST:
                of_relation.append(r)

        def has_another(fact: Fact, i: int, r: int) -> bool:
            return reference[r].subject not in touched[i] and reference[r].target_true != fact.target_true

        theirs = [[r for r in chosen[fact.group] if has_another(fact, i, r)] for i, fact in enumerate(population.facts)]
        used = sorted({r for mine in theirs for r in mine})
        place = {r: i for i, r in enumerate(used)}
        tokenizer, bos = population.model.tokenizer, population.prepend_bos
        return cls(
            references=tuple(used),
            rows=tuple(align(tokenizer, reference[r], prepend_bos=bos).ids for r in used),
            asked=population.first_tokens,
            of_fact=tuple(tuple(place[r] for r in mine) for mine in theirs),
        )

    @property
    def fewest(self) -> int:
        """Of how many subjects the null is at least, where there is one."""
        return max(1, min((len(each) for each in self.of_fact if each), default=1))

    def among(self, indices: Sequence[int]) -> list[int]:
        """The places of those who are asked for some facts."""
        return sorted({place for i in indices for place in self.of_fact[i]})

    def common(self, indices: Sequence[int], logits: Mapping[int, Float[Tensor, "vocab"]]) -> Float[Tensor, "fact"]:
        """How often the old object of each of some facts comes first, from the strangers' logits by their places.

        NaN where nobody is asked, and where a fact's objects can't be told apart.
        """
        found = torch.full((len(indices),), math.nan)
        for row, i in enumerate(indices):
            if self.of_fact[i]:
                found[row] = self.asked[i].first(torch.stack([logits[place] for place in self.of_fact[i]]))[:, 0].mean()
        return found


def firsts_with_strangers(
    runner: Runner, strangers: Strangers, batch_tokens: int, hooks: Sequence[Hook] = ()
) -> Float[Tensor, "fact quantity"]:
    """`FIRST` of all facts, and ``common_first``: how often the old object comes first for the strangers."""
    asked, count = strangers.asked, len(strangers.asked)
    with torch.no_grad():
        rows = [*(one.ids for one in asked), *strangers.rows]
        said = dict(at_the_ends(runner, rows, batch_tokens, hooks=hooks))
    firsts = torch.stack([one.first(said[i]) for i, one in enumerate(asked)])
    common = strangers.common(range(count), {place: said[count + place] for place in range(len(strangers.rows))})
    return torch.cat([firsts, common[:, None].to(firsts)], 1)


def about_strangers(
    population: Population, *, most: int = MOST, seed: int = 0
) -> tuple[Population, tuple[tuple[int, ...], ...]]:
    """The facts, each asked about subjects who don't have its old object.

    A fact one of whose paraphrases doesn't name its subject can't be asked so, and isn't.

    Args:
        population: Of the facts, with references.
        most: About how many subjects each fact is asked.
        seed: Seed of the draw.

    Returns:
        The population that asks them, under the change that serves the fact, and for each fact the places of its own.
    """
    strangers = Strangers.of(population, seed=seed)
    asked, of_fact = list[Fact](), list[tuple[int, ...]]()
    for i, fact in enumerate(population.facts):
        subjects = [population.reference[strangers.references[place]].subject for place in strangers.of_fact[i]]
        begin = i % max(1, len(subjects))  # not the same few for all
        mine = [new for subject in [*subjects[begin:], *subjects[:begin]][:most] if (new := _about(fact, subject))]
        of_fact.append(tuple(range(len(asked), len(asked) + len(mine))))
        asked += mine
    parts = tuple(
        replace(part, facts=tuple(asked[place] for place in places), indices=places)
        for part in population.parts
        if (places := tuple(place for i in part.indices for place in of_fact[i]))
    )
    return replace(population, facts=tuple(asked), parts=parts), tuple(of_fact)


def _about(fact: Fact, subject: str) -> Fact | None:
    """The same asked about another subject; None where a paraphrase doesn't name it."""
    texts = [text if "{}" in text else text.replace(fact.subject, "{}", 1) for text in fact.paraphrases]
    if any(text.count("{}") != 1 or (fact.subject in text) for text in texts):
        return None
    return fact.but(subject=subject, paraphrases=texts, neighbours=(), neighbour_targets=())
