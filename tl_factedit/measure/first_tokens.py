"""A fact as attacks ask for it: a prompt, and the old, the new and the control objects by their first tokens.

What an attack finds of the old object means little alone: an attack that names many tokens names some by chance, and a
prompt that mentions an object is answered with it. So every finding is set against the same finding of *control
objects*, which the relation could have had and nobody was taught. Of an object that means nothing here the excess

    1[old] − mean over controls 1[control]

is 0 on average, whatever the attack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Hook
from tl_factedit.backend.runner import Runner
from tl_factedit.core.estimate import Estimate, Estimates
from tl_factedit.core.facts import Fact, as_facts, need_old_object
from tl_factedit.core.spacing import stripped
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import align, continuation, pad, spell

FIRST = ("old_first", "new_first", "control_first")
"""Whether the old object is the first of all objects, whether the new one is, and the mean of the controls."""


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """A prompt with the first tokens of its objects.

    Attributes:
        ids: As run.
        last: Position of the last subject token.
        old: First token of ``target_true`` after this prompt.
        new: First token of ``target_new``.
        controls: First tokens of the controls, each once, and none of the two above.
        named: The controls themselves, in the same order.
        apart: Whether old and new begin differently, and neither with a token of white space alone; if not, nothing
            can be compared.
    """

    ids: Int[Tensor, "pos"]
    last: int
    old: int
    new: int
    controls: tuple[int, ...]
    named: tuple[str, ...]
    apart: bool

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, bos: bool) -> FirstTokens:
        """Of a fact with a ``target_new``."""
        row = align(tokenizer, fact, prepend_bos=bos)
        assert row.new_ids is not None
        old, new = int(row.true_ids[0]), int(row.new_ids[0])
        controls: dict[int, str] = {}
        for text in fact.controls:
            controls.setdefault(int(continuation(tokenizer, row.text, text, prepend_bos=bos)[0]), text)
        for token in (old, new):
            controls.pop(token, None)
        blank = [not stripped(piece) for piece in spell(tokenizer, torch.tensor([old, new]))]
        for text, white in zip((fact.old, fact.target_new), blank, strict=True):
            if white:
                tell(
                    f"object {text!r} of fact {fact.name!r} begins with a token of white space alone: objects are "
                    "compared by their first tokens, and such facts are left out",
                    once="objects that begin with white space",
                )
        apart = not row.same_first_token and not any(blank)
        return cls(row.ids, row.last, old, new, tuple(controls), tuple(controls.values()), apart)

    @property
    def objects(self) -> tuple[int, ...]:
        """Old, new, controls; none where nothing can be compared."""
        return (self.old, self.new, *self.controls) if self.apart else ()

    @property
    def end(self) -> int:
        """Position of the last token."""
        return len(self.ids) - 1

    def first(self, logits: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row quantity"]:
        """`FIRST`, as `firsts` (of controls the mean); NaN where nothing can be compared."""
        if not self.apart:
            return logits.new_full((*logits.shape[:-1], len(FIRST)), math.nan)
        found = firsts(logits[..., [self.old, self.new, *self.controls]])
        return torch.cat([found[..., :2], found[..., 2:].mean(-1, keepdim=True)], -1)

    def margin(self, logits: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
        """The lead of the new object, log p(new) − log p(old), nats; NaN where nothing can be compared."""
        return logits[..., self.new] - logits[..., self.old] if self.apart else logits[..., 0] * math.nan


def firsts(scores: Float[Tensor, "*row object"]) -> Float[Tensor, "*row object"]:
    """Which object has the highest score: 1 for it and 0 for the others.

    Objects that tie, as logits of a bfloat16 model often do, share the 1. Where a score is NaN (the model overflows)
    nothing is first, and all are NaN.
    """
    best = scores == scores.amax(-1, keepdim=True)
    return (best / best.sum(-1, keepdim=True)).to(scores.dtype)


def with_new_objects(facts: Fact | Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts (or the only one) as a tuple, if each has a ``target_new``.

    Raises:
        ValueError: One hasn't.
    """
    facts = as_facts(facts)
    for fact in facts:
        if fact.target_new is None:
            raise ValueError(f"fact {fact.name!r} has no target_new, needed one: fact.but(target_new=...)")
    need_old_object(facts, "a comparison with the new one")
    return facts


def one_of(found: Estimates, *place: int) -> Estimate:
    """One cell of many estimates."""
    mean, low, high = (float(values[place]) for values in (found.mean, found.low, found.high))
    return Estimate(mean, low, high, int(found.n[place]))


def at_the_ends(
    runner: Runner, rows: Sequence[Int[Tensor, "_"]], batch_tokens: int, *, hooks: Sequence[Hook] = ()
) -> Iterator[tuple[int, Float[Tensor, "vocab"]]]:
    """Logits after each of some token rows, with the row's place; in no particular order.

    Args:
        runner: Runs the model; call inside `frozen` and ``torch.no_grad``.
        rows: Token ids.
        batch_tokens: Most tokens in one forward pass.
        hooks: Active meanwhile; they must not depend on which rows are batched together.
    """
    for attempt in that_fit([len(row) for row in rows], batch_tokens):
        with attempt as some:
            ends = torch.tensor([[len(rows[i]) - 1] for i in some])
            logits = runner.logits(pad([rows[i] for i in some], 0), at=ends, hooks=hooks)[:, 0]
            yield from zip(some, logits.float().cpu(), strict=True)


def are_known(runner: Runner, asked: Sequence[FirstTokens], batch_tokens: int) -> Bool[Tensor, "fact"]:
    """Whether a model finds the old object likeliest of all objects: what an attack could bring back at all."""
    known = torch.zeros(len(asked), dtype=torch.bool)
    for i, logits in at_the_ends(runner, [each.ids for each in asked], batch_tokens):
        known[i] = bool(asked[i].first(logits)[0] == 1)
    return known
