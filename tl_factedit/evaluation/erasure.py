"""What an erasure is to bring about: the old object no longer leads, whatever comes instead.

Efficacy asks whether a *new* object leads, and an erasure (`objectives.Erase`) writes none. Of the facts whose old
object was the first of all objects before (old, new, controls, by their first tokens), this is the share in which it
isn't any more, at the prompt and at the paraphrases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import continuation, encode
from tl_factedit.core.words import counted
from tl_factedit.measure.first_tokens import firsts
from tl_factedit.measure.likelihood import Request, log_probs
from tl_factedit.measure.population import BATCH_TOKENS, Population


@dataclass(frozen=True, eq=False)
class ErasureSuccess:
    """Of the facts whose old object led, those in which it doesn't any more.

    Attributes:
        facts: What was asked.
        before: Whether the old object led at the prompt in the unedited model, [fact].
        after: Whether it does in the changed one, [fact].
        prompt: The share of the first that aren't of the second, over facts.
        paraphrase: The same at the paraphrases, a mean over those of a fact first.
    """

    facts: tuple[Fact, ...]
    before: Bool[Tensor, "fact"]
    after: Bool[Tensor, "fact"]
    prompt: Estimate
    paraphrase: Estimate

    @plain_torch()
    def gone(self, fact: int) -> float:
        """1 if the old object led and doesn't any more, 0 if it still does, NaN if it never led."""
        return float(not self.after[fact]) if bool(self.before[fact]) else math.nan

    def __repr__(self) -> str:
        """Both shares in a line."""
        facts = counted(len(self.facts), "fact")
        return f"ErasureSuccess({facts}: prompt {self.prompt:.2f}, paraphrase {self.paraphrase:.2f})"


@plain_torch()
def erasure_success(population: Population, *, batch_tokens: int = BATCH_TOKENS) -> ErasureSuccess:
    """Ask whether the old object still leads, before and after a change.

    Args:
        population: The changed facts. The old object is compared with ``target_new``, if there is one, and
            ``controls``; a prompt with nothing to compare doesn't count.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: An object that isn't a continuation of a prompt.
    """
    facts, model, bos = population.facts, population.model, population.prepend_bos
    asked = [[_requests(model, fact, text, bos) for text in (fact.text, *_paraphrases(fact))] for fact in facts]

    def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "prompt"]:
        return _leads(runner, [asked[i] for i in indices], batch_tokens)

    before = population.unedited("erasure success", read, settings=batch_tokens)
    after = [torch.empty(0)] * len(facts)
    lengths = list(map(len, asked))
    for part, found in population.each("erasure success", read, settings=batch_tokens):
        pieces = found.split([lengths[i] for i in part.indices])
        for i, piece in zip(part.indices, pieces, strict=True):
            after[i] = piece
    gone = [torch.where(was == 1, 1 - now, math.nan) for was, now in zip(before.split(lengths), after, strict=True)]
    at_prompt = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return ErasureSuccess(
        facts=facts,
        before=before[at_prompt] == 1,
        after=torch.stack([each_fact[0] for each_fact in after]) == 1,
        prompt=over_facts([float(each_fact[0]) for each_fact in gone]),
        paraphrase=over_facts([float(each_fact[1:].nanmean()) for each_fact in gone]),
    )


def _paraphrases(fact: Fact) -> list[str]:
    return [fact.fill(template) for template in fact.paraphrases]


def _requests(model: Model, fact: Fact, text: str, bos: bool) -> list[Request]:
    """The first tokens of all objects after a text, the old one's first; each once."""
    ids, _ = encode(model.tokenizer, text, prepend_bos=bos)
    offered = [fact.old, *([] if fact.target_new is None else [fact.target_new]), *fact.controls]
    firsts = [int(continuation(model.tokenizer, text, fact.after(text, each), prepend_bos=bos)[0]) for each in offered]
    return [(ids, torch.tensor([token])) for token in dict.fromkeys(firsts)]


def _leads(runner: Runner, asked: Sequence[Sequence[Sequence[Request]]], batch_tokens: int) -> Float[Tensor, "prompt"]:
    """Whether the old object is the likeliest, 0 or 1, of all facts' prompts in order; NaN with nothing to compare."""
    prompts = [prompt for of_fact in asked for prompt in of_fact]
    found = iter(log_probs(runner, [request for prompt in prompts for request in prompt], batch_tokens=batch_tokens))
    log_p = [torch.cat([next(found) for _ in prompt]) for prompt in prompts]
    return torch.tensor([math.nan if len(each) < 2 else float(firsts(each)[0]) for each in log_p])
