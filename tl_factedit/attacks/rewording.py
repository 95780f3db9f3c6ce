"""Other words: does the old object still lead where the fact is asked otherwise?

A change may hold for the wording that it was made with and some others, and leave the old object under the rest. So
every paraphrase of each fact is asked by itself; no mean over them can hide one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery, why_masked
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import of_all
from tl_factedit.measure.first_tokens import FIRST, FirstTokens, at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population, Read


@dataclass(frozen=True)
class Paraphrases:
    """Ask each of the facts' paraphrases, in the unedited and in the changed model.

    The cases are the paraphrases by their places in ``fact.paraphrases``; facts that have fewer don't count in the
    later ones. A case in which the unedited model doesn't know the facts is masked. ``extra`` has ``survives``, the
    share of the known facts whose old object is first in the unedited model in these words.

    Attributes:
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Ask.

        Raises:
            ValueError: A fact without ``target_new``; no fact has paraphrases.
        """
        facts = with_new_objects(population.facts)
        most = max(len(fact.paraphrases) for fact in facts)
        if not most:
            raise ValueError("no fact has paraphrases, needed some: fact.but(paraphrases=[...])")
        before, after = population.read("paraphrases", self._read(population, most), settings=self.batch_tokens)
        survives = torch.where(population.known[:, None], before[..., 0], math.nan).nanmean(0)
        found = Recovery.of(
            "paraphrases",
            population,
            [
                Case(place, f"paraphrase {place + 1}", "underneath", why_masked(share))
                for place, share in enumerate(survives.tolist())
            ],
            before,
            after,
            extra={"survives": survives},
            seed=self.seed,
        )
        found = replace(found, details={"texts": tuple(fact.paraphrases for fact in facts)})

        def ask(others: Population) -> Float[Tensor, "asked case"]:
            read = self._read(others, most)
            return others.after("paraphrases, of others", read, settings=self.batch_tokens)[..., 0]

        return found.in_excess_of_common(population, ask)

    def _read(self, population: Population, most: int) -> Read[Float[Tensor, "fact case quantity"]]:
        """Reads `FIRST` behind each paraphrase."""
        tokenizer, bos = population.model.tokenizer, population.prepend_bos
        asked: Sequence[tuple[FirstTokens, ...]] = of_all(
            population.facts,
            lambda fact: tuple(FirstTokens.of(tokenizer, fact.asked(text), bos) for text in fact.paraphrases),
        )

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact case quantity"]:
            found = torch.full((len(indices), most, len(FIRST)), math.nan)
            owner = [(row, place) for row, i in enumerate(indices) for place in range(len(asked[i]))]
            texts = [asked[indices[row]][place] for row, place in owner]
            for k, logits in at_the_ends(runner, [text.ids for text in texts], self.batch_tokens):
                found[owner[k]] = texts[k].first(logits)
            return found

        return read
