"""What an audit will cost, reckoned before it is made: tokens that attacks send through the model, at its own speed.

A reckoning, good to a factor of two or three: it knows the attacks of this package by their settings and none of one's
own, counts a backward pass as two forward ones, and times one pass of the facts' own prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tl_factedit.attacks.attack import Attack
from tl_factedit.attacks.context import ContextAttack
from tl_factedit.attacks.disjoint_relearning import RATES, TIMES, DisjointRelearning
from tl_factedit.attacks.drifting import Drift
from tl_factedit.attacks.knockout import KnockOut
from tl_factedit.attacks.neutral import NeutralContexts
from tl_factedit.attacks.readout import ReadOut
from tl_factedit.attacks.relearning import LEAST_STEPS
from tl_factedit.attacks.reversal import DROPPED, MOST_ALONE, WeightReversal
from tl_factedit.attacks.rewording import Paraphrases
from tl_factedit.attacks.rounding import Rounding
from tl_factedit.attacks.routes import FollowRoutes
from tl_factedit.backend.protocol import Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.tokens import encode
from tl_factedit.measure.change import Change
from tl_factedit.measure.first_tokens import at_the_ends
from tl_factedit.measure.population import BATCH_TOKENS, Population

TIMED = 32
"""So many prompts are timed, the same again where there are fewer: a lone one is slow for its tokens."""

TRAINED = 3
"""Passes that a step of training is worth: one forward, and a backward that is two."""


def reckoned(population: Population, attacks: Sequence[Attack]) -> dict[str, float]:
    """Seconds that each attack will take, by its name; attacks that aren't known here are left out."""
    rows = [each.ids for each in population.first_tokens]
    speed = _tokens_a_second(population.model, (rows * TIMED)[:TIMED])
    found: dict[str, float] = {}
    for attack in attacks:
        tokens = _tokens(attack, population, sum(map(len, rows)))
        if tokens is not None:
            name = type(attack).__name__
            found[name] = found.get(name, 0.0) + tokens / speed
    return found


def announced(seconds: dict[str, float]) -> str:
    """The whole and the dearest of it, in words."""
    dear = sorted(seconds.items(), key=lambda each: -each[1])[:3]
    each = ", ".join(f"{name} {_in_words(cost)}" for name, cost in dear)
    return f"audit: its attacks will take some {_in_words(sum(seconds.values()))} here ({each})"


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _tokens_a_second(model: Model, rows: Sequence[torch.Tensor]) -> float:
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for _ in at_the_ends(runner, rows[:1], BATCH_TOKENS):
            pass  # what a first pass sets up isn't timed
        began = time.perf_counter()
        for _ in at_the_ends(runner, rows, BATCH_TOKENS):
            pass
    return sum(map(len, rows)) / max(time.perf_counter() - began, 1e-9)


def _tokens(attack: Attack, population: Population, asked: int) -> float | None:
    """Tokens through the whole model, the unedited and the changed one together; `asked` are those of the prompts."""
    changes, layers = len(population.parts), n_layers(population.model)
    if isinstance(attack, KnockOut):
        # Each case runs the layers above its own: half of them. One in three is asked in three ways.
        cases = len(attack.components) * len(attack.places) * len(attack.widths) * layers * 4 / 3
        references = min(attack.most_references, len(population.reference)) * asked / len(population.facts)
        return cases * asked + references * (1 + changes)
    if isinstance(attack, ReadOut):
        return 2.0 * asked * (1 + attack.paraphrases)
    if isinstance(attack, Paraphrases):
        return 2.0 * asked * sum(len(fact.paraphrases) for fact in population.facts) / len(population.facts)
    if isinstance(attack, NeutralContexts):
        return 1.5 * asked * len(attack.prefixes)
    if isinstance(attack, FollowRoutes):
        return 2.0 * asked * len(attack.routes) / len(population.facts)
    if isinstance(attack, ContextAttack):
        return 4.0 * asked * len(attack.prefixes) * (1 + (attack.controls or 4))
    if isinstance(attack, WeightReversal):
        alone = isinstance(population.changed, Change) or changes > 1
        matrices = len(population.parts[0].changed.layers) if alone else MOST_ALONE  # type: ignore[union-attr]
        counts = len(attack.dropped or DROPPED)
        return 2.0 * asked * (1 + attack.neighbours) * counts * (1 + (matrices if matrices > 1 else 0))
    if isinstance(attack, Rounding):
        return 2.0 * asked * (1 + len(attack.bits))
    if isinstance(attack, DisjointRelearning):
        rates = len(RATES) if attack.lr is None else len(attack.lr) if isinstance(attack.lr, Sequence) else 1
        updates = min(attack.most, LEAST_STEPS * TIMES[-1]) * rates
        return TRAINED * updates * asked * (1 + attack.paraphrases)
    if isinstance(attack, Drift):
        texts = [len(encode(population.model.tokenizer, text, prepend_bos=False)[0]) for text in attack.texts]
        return 2.0 * TRAINED * max(attack.steps) * attack.at_once * sum(texts) / max(1, len(texts))
    return None
