"""Asking facts with components silenced: which references stand in for what, and what the model says then."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.attacks.replacements import Replacements
from tl_factedit.attacks.silencing import SilencedPrompt, Silencing, says_under
from tl_factedit.backend.runner import Runner
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import Aligned, align, check_length
from tl_factedit.measure.first_tokens import firsts
from tl_factedit.measure.population import Population, Read

QUANTITIES = ("old_first", "new_first", "control_first", "logp_old", "logp_new", "logp_control")
"""Whether the old object is the first of all objects, whether the new one is, the mean of the controls; log p, nats."""

LEAST_REFERENCES = 5
"""With fewer, the mean is still about somebody."""

ROOM = 2**29
"""Bytes that what stands in may take."""

Standing: TypeAlias = tuple[list[SilencedPrompt], Replacements]
"""The prompts of some facts, and what stands in for what they say."""


@dataclass(frozen=True, eq=False)
class Asking:
    """The facts and their references, as they are run.

    Attributes:
        rows: The facts' prompts.
        objects: The first tokens of each fact's old, new and control objects; empty where they can't be told apart.
        references: The references' prompts.
        use: Which references are averaged for which fact.
        drawn: The reference that stands in alone for each fact.
        batch_tokens: Most tokens in one forward pass.
    """

    rows: Sequence[Aligned]
    objects: Sequence[tuple[int, ...]]
    references: Sequence[Aligned]
    use: Bool[Tensor, "fact reference"]
    drawn: Sequence[int]
    batch_tokens: int

    @classmethod
    def of(cls, population: Population, most_references: int, batch_tokens: int, seed: int) -> Asking:
        """Of a population: which references are averaged for which fact; the same of a relation, as far as can be.

        Raises:
            ValueError: Fewer than five references of a fact's relation, or one longer than the model's context.
        """
        facts, reference = population.facts, population.reference
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
        use = torch.stack(
            [
                _first_of(_uses(fact, reference, population.touched_with(i)), order, most_references)
                for i, fact in enumerate(facts)
            ]
        )
        tokenizer, bos = population.model.tokenizer, population.prepend_bos
        room = getattr(population.model.cfg, "n_ctx", None)
        for fact in reference:
            check_length(tokenizer, fact.text, f"reference {fact.name!r}", prepend_bos=bos, room=room)
        return cls(
            rows=[align(tokenizer, fact, prepend_bos=bos) for fact in facts],
            objects=[row.objects for row in population.first_tokens],
            references=[align(tokenizer, fact, prepend_bos=bos) for fact in reference],
            use=use,
            drawn=[_drawn(fact, reference, used, seed) for fact, used in zip(facts, use, strict=True)],
            batch_tokens=batch_tokens,
        )

    def settings(self, population: Population) -> dict[str, Any]:
        """What a reading depends on beside the facts, the models and what is silenced."""
        return {
            "reference": [asdict(fact) for fact in population.reference] if population.cache else (),
            "batch_tokens": self.batch_tokens,
        }

    def reader(self, silencings: Sequence[Silencing], given: Standing | None = None) -> Read[Tensor]:
        """Reads `QUANTITIES` of facts under silencings; what stands in comes from the model itself, unless given."""

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact silencing quantity"]:
            out = torch.full((len(indices), len(silencings), len(QUANTITIES)), math.nan)
            for some in self.few_sources(runner, [i for i in indices if self.objects[i]]):
                asked, replacements = self.standing_in(runner, some) if given is None else _some_of(given, some)

                def quantities(i: int, log_p: Float[Tensor, "vocab"], some: Sequence[int] = some) -> Tensor:
                    found = log_p[list(self.objects[some[i]])]
                    first = firsts(found)
                    return torch.stack([*first[:2], first[2:].mean(), *found[:2], found[2:].mean()])

                says = says_under(runner, asked, replacements, silencings, quantities, self.batch_tokens)
                out[[indices.index(i) for i in some]] = says
            return out

        return read

    def strangers_under(
        self,
        runner: Runner,
        indices: tuple[int, ...],
        strangers: Sequence[Sequence[int]],
        silencings: Sequence[Silencing],
    ) -> Float[Tensor, "fact silencing"]:
        """How often each fact's old object leads for references who don't have it; NaN where there are none."""
        out = torch.full((len(indices), len(silencings)), math.nan)
        for some in self.few_sources(runner, [i for i in indices if self.objects[i] and strangers[i]]):
            asked, replacements = self.standing_in(runner, some)
            asking: dict[int, list[int]] = {}  # the facts that ask each reference
            for place, i in enumerate(some):
                for r in strangers[i]:
                    asking.setdefault(r, []).append(place)
            # A reference is silenced by what stands in for the first fact that asks it: those of a relation share it.
            prompts = [replace(asked[places[0]], row=self.references[r]) for r, places in asking.items()]
            ask = list(asking.values())

            def leads(p: int, log_p: Tensor, some: Sequence[int] = some, ask: list[list[int]] = ask) -> Tensor:
                found = torch.full((len(some),), math.nan)
                for place in ask[p]:
                    found[place] = firsts(log_p[list(self.objects[some[place]])])[0]
                return found

            says = says_under(runner, prompts, replacements, silencings, leads, self.batch_tokens)
            out[[indices.index(i) for i in some]] = says.nanmean(0).T
        return out

    def few_sources(self, runner: Runner, chosen: Sequence[int]) -> list[Sequence[int]]:
        """The facts in as many at once as what stands in for them leaves room for."""
        length = max((len(row.ids) for row in self.references), default=1)
        numbers = 2 * 2 * runner.n_layers * length * int(runner.model.cfg.d_model)
        at_once = max(1, ROOM // (8 * numbers))
        return [chosen[i : i + at_once] for i in range(0, len(chosen), at_once)]

    def standing_in(self, runner: Runner, chosen: Sequence[int]) -> Standing:
        """The prompts of some facts, and what stands in for what they say."""
        sources: dict[tuple[int, ...], int] = {}

        def source(counted: Sequence[int]) -> int:
            return sources.setdefault(tuple(counted), len(sources))

        asked = [
            SilencedPrompt(self.rows[i], source(self.use[i].nonzero()[:, 0].tolist()), source([self.drawn[i]]))
            for i in chosen
        ]
        weights = torch.zeros(len(sources), len(self.references))
        for counted, s in sources.items():
            weights[s, list(counted)] = 1.0
        return asked, Replacements.read(runner, self.references, weights, self.batch_tokens)


def _some_of(given: Standing, chosen: Sequence[int]) -> Standing:
    return [given[0][i] for i in chosen], given[1]


# ------------------------------------------------------------------------------------ references


def _uses(fact: Fact, reference: Sequence[Fact], touched: frozenset[str]) -> Bool[Tensor, "reference"]:
    """Which references a fact's mean is over."""
    # A subject asked under several prompts counts under each: the state depends on what stands before it.
    use = torch.tensor([r.group == fact.group and r.subject not in touched for r in reference], dtype=torch.bool)
    subjects = len({r.subject for r, yes in zip(reference, use.tolist(), strict=True) if yes})
    if subjects < LEAST_REFERENCES:
        raise ValueError(
            f"{int(use.sum())} of {len(reference)} reference facts, about {subjects} subjects, are of the relation "
            f"{fact.group!r} of {fact.name!r} and about a subject that isn't changed, needed {LEAST_REFERENCES} "
            "subjects at least: give more facts of this relation"
        )
    return use


def _first_of(use: Bool[Tensor, "reference"], order: Tensor, most: int) -> Bool[Tensor, "reference"]:
    """As many of those that can be used as are wanted, the first in some order."""
    if most < LEAST_REFERENCES:
        raise ValueError(f"most_references is {most}, needed {LEAST_REFERENCES} at least")
    return torch.zeros_like(use).index_fill(0, order[use[order]][:most], True)


def _drawn(fact: Fact, reference: Sequence[Fact], use: Bool[Tensor, "reference"], seed: int) -> int:
    """One of a fact's references, whatever their order and whichever facts are asked beside it."""

    def chance(*text: str) -> bytes:
        return hashlib.sha256(repr((seed, *text)).encode()).digest()

    used = use.nonzero()[:, 0].tolist()
    return min(used, key=lambda r: chance(fact.subject, fact.prompt, reference[r].subject, reference[r].prompt))
