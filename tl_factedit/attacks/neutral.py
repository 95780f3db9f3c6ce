"""Neutral contexts: does the old object come back behind text that doesn't mention it?

A change may hold only where nothing stands before the prompt, or open behind some word: a mask with a keyhole. So each
fact is asked behind many short texts that name neither the fact nor its objects, and it counts if the old object comes
first behind *any* of them; the null is the same of control objects, each behind any of the same texts. Texts behind
which the unedited model doesn't name the old object either are strange to it, and say nothing of the fact. A key that
isn't among the texts stays unknown: what isn't found in the contexts tried may be there in others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import as_several
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import align
from tl_factedit.core.words import counted
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends, firsts, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population, Read, Settings

ASKED_OF_OTHERS = 4
"""About so many subjects who don't have its object each fact is asked, behind all texts."""


@dataclass(frozen=True)
class NeutralContexts:
    """Put texts that don't name the old object before each prompt of the changed model.

    There is one case. ``old_first`` is whether the old object comes first behind any of the texts, ``new_first``
    whether the new one does behind all of them, ``control_first`` the mean over the controls of whether that one does
    behind any. Texts that name one of a fact's objects are left out for it, and so are those that leave no room for the
    prompt or merge with it, and those behind which the unedited model names another of its objects. ``details`` has
    ``used``, how many texts each fact was asked behind.

    Attributes:
        prefixes: The texts, with whatever has to stand between them and the prompt.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    prefixes: Sequence[str]
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Ask behind each text.

        Raises:
            ValueError: A fact without ``target_new``; no texts, or none that can stand before some fact.
        """
        facts = with_new_objects(population.facts)
        prefixes = as_several(self.prefixes, str, "prefixes", "a text")
        if not prefixes:
            raise ValueError("prefixes is empty, needed one text at least")
        rows = self._rows(population)
        without = [fact.name for fact, mine in zip(facts, rows, strict=True) if not mine]
        if without:
            raise ValueError(f"none of the texts can stand before {without[0]!r}: give other prefixes")
        read, settings = self._read(population, rows), self._settings(rows)
        before, after = population.read("neutral contexts", read, settings=settings)
        used = before[..., 0] == 1  # behind these the unedited model says what it says without them
        found = Recovery.of(
            "neutral contexts",
            population,
            [Case("any", f"behind any of {counted(len(prefixes), 'text')}", "underneath")],
            _anywhere(before, used),
            _anywhere(after, used),
            details={"used": tuple(used.sum(1).tolist())},
            seed=self.seed,
        )

        def ask(others: Population) -> Float[Tensor, "asked case"]:
            theirs = self._rows(others)
            said = others.after(
                "neutral contexts, of others", self._read(others, theirs), settings=self._settings(theirs)
            )
            return _anywhere(said, ~said[..., 0].isnan())[..., 0]

        return found.in_excess_of_common(population, ask, most=ASKED_OF_OTHERS)

    def _rows(self, population: Population) -> list[list[Tensor]]:
        """Each fact's prompt behind each text that can stand there."""
        return [
            [row for prefix in self.prefixes if (row := _row(population, fact, one, prefix)) is not None]
            for fact, one in zip(population.facts, population.first_tokens, strict=True)
        ]

    def _read(
        self, population: Population, rows: Sequence[Sequence[Tensor]]
    ) -> Read[Float[Tensor, "fact text object"]]:
        """Reads which object comes first behind each text."""
        asked = population.first_tokens
        most = max((len(one.objects) for one in asked), default=0)

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact text object"]:
            found = torch.full((len(indices), len(self.prefixes), max(most, 2)), math.nan)
            owner = [(row, k) for row, i in enumerate(indices) for k in range(len(rows[i]))]
            ids = [rows[indices[row]][k] for row, k in owner]
            for place, logits in at_the_ends(runner, ids, self.batch_tokens):
                row, k = owner[place]
                objects = list(asked[indices[row]].objects)
                found[row, k, : len(objects)] = firsts(logits[objects])
            return found

        return read

    def _settings(self, rows: Sequence[Sequence[Tensor]]) -> Settings:
        return lambda indices: ([[ids.tolist() for ids in rows[i]] for i in indices], self.batch_tokens)

    def __repr__(self) -> str:
        """How many texts."""
        return f"NeutralContexts({counted(len(self.prefixes), 'text')})"


def neutral_prefixes(others: Sequence[Fact], *, most: int = 32, seed: int = 0) -> list[str]:
    """Short texts for `NeutralContexts`: objects of facts about other things, each with a full stop.

    Args:
        others: Facts of other relations.
        most: How many texts.
        seed: Seed of the draw.
    """
    objects = sorted({str(fact.target_true).strip() for fact in others if fact.target_true})
    random.Random(seed).shuffle(objects)
    return [f"{text}. " for text in objects[:most]]


def _anywhere(
    said: Float[Tensor, "fact text object"], used: Bool[Tensor, "fact text"]
) -> Float[Tensor, "fact case quantity"]:
    """Whether the old object comes first behind any of the texts, the new one behind all, each control behind any."""
    here = torch.where(used[..., None], said, math.nan)
    first = here.nan_to_num(-1.0).amax(1)
    least = here.nan_to_num(2.0).amin(1)
    controls = torch.where(here.isnan().all(1), math.nan, first)[:, 2:].nanmean(1)
    found = torch.stack([first[:, 0], least[:, 1], controls], -1)
    return torch.where(used.any(1)[:, None], found, math.nan)[:, None]


def _row(population: Population, fact: Fact, bare: FirstTokens, prefix: str) -> Tensor | None:
    """The ids of a prompt behind a text; None where it can't stand there."""
    names = (fact.subject, *(text.strip() for text in (fact.old, str(fact.target_new), *bare.named)))
    if any(name and name in prefix for name in names):
        return None
    try:
        row = align(population.model.tokenizer, fact, prepend_bos=population.prepend_bos, prefix=prefix)
    except ValueError:  # the two merge into one token
        return None
    room = getattr(population.model.cfg, "n_ctx", None)
    alike = row.new_ids is not None and (int(row.true_ids[0]), int(row.new_ids[0])) == (bare.old, bare.new)
    return row.ids if alike and (room is None or len(row.ids) <= room) else None
