"""A positive control: what the attacks find of an override of the same facts that is known to be one.

An attack that finds nothing proves nothing unless it finds something where something is. So where an absence would be
claimed, the same facts are overridden in the unedited model's weights, by the closed form: ``W_out`` of one layer
answers their keys by values that make it say the new objects, and every other weight is as it was. The old facts are
all there. The layer is the first whose MLP the unedited model can't spare at the subject, where no knock-out can show
them; or, if it can spare all, the first. Attacks that ask the weights and don't find that one are tried on an override
of the first layer that can be spared, too.

A change may also hide what it wrote: a large matrix that no key reads takes the place of the largest directions. So
attacks that drop directions are tried on an override *in the changed model* as well, of references whose objects it
still names, and have to find that one too.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import Attack, Recovery
from tl_factedit.attacks.cells import Cell
from tl_factedit.attacks.knockout import KnockOut
from tl_factedit.attacks.silencing import Silencing
from tl_factedit.auditing.findings import IN_CHANGED
from tl_factedit.auditing.gather import with_controls
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editors.emmet import Emmet
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.stats.key_stats import KeyStats

WEIGHT = 1e-4
"""Of all other keys beside those of the facts: so little that each fact is overridden."""

FIT = ValueFit(kl_weight=0.0, kl_prompts=())
"""What else the model says of the subjects is no matter here."""


def found_in_an_override(
    population: Population, attacks: Sequence[Attack], recoveries: Sequence[Recovery]
) -> Mapping[str, Estimate]:
    """What attacks bring back of an override that is known to be one, by their names; all but knock-outs.

    A knock-out of an override brings back what the unedited model says without the same cells: that is known.

    Args:
        population: The facts.
        attacks: What the population was attacked by.
        recoveries: What they brought back; where the override goes is chosen by the knock-out among them.
    """
    hidden, spared = _layers(recoveries)
    known = [fact for fact, yes in zip(population.facts, population.known.tolist(), strict=True) if yes]
    found = _found_in(_overridden(population, population.model, known, hidden, population.reference), attacks)
    named = {recovery.attack: recovery.strongest for _, recovery in found}
    blind = [attack for attack, recovery in found if recovery.asks_weights and not recovery.strongest.low > 0]
    if blind and spared is not None:
        again = _found_in(_overridden(population, population.model, known, spared, population.reference), blind)
        named |= {f"{recovery.attack} (layer {spared})": recovery.strongest for _, recovery in again}
    dropping = [attack for attack, recovery in found if recovery.asks_weights == "directions"]
    if dropping:
        # A changed model that can't be edited (written to by hand on top of an edit) has no control: no absence then.
        with population.parts[0].applied() as changed, suppress(ValueError):
            mine, rest = _still_known(population, changed, len(known))
            beside = _found_in(_overridden(population, changed, mine, hidden, rest), dropping)
            named |= {recovery.attack + IN_CHANGED: recovery.strongest for _, recovery in beside}
    return named


def _overridden(
    population: Population, model: Model, facts: Sequence[Fact], layer: int, reference: Sequence[Fact]
) -> Population | None:
    """Facts that an override of one layer made a model answer otherwise; None where it did of none."""
    if not facts:
        return None
    stats = {layer: KeyStats.identity(model, layer)}
    bos = population.prepend_bos
    editor = Emmet(stats, weight=WEIGHT, fit=FIT, contexts=("",), prepend_bos=bos, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an override that nobody asked for
        override = editor(model, facts)
    there = Population.of(model, override, facts, reference=reference, progress=population.progress)
    overridden = there.after("override", _new_first(there), settings=())
    held = [fact for fact, yes in zip(facts, overridden.tolist(), strict=True) if yes == 1]
    return there.asking(held) if held else None


def _found_in(there: Population | None, attacks: Sequence[Attack]) -> list[tuple[Attack, Recovery]]:
    """What each attack brings back of an override; empty where none could be made."""
    found = list[tuple[Attack, Recovery]]()
    if there is None:
        return found
    for attack in attacks:
        if not isinstance(attack, KnockOut):
            with suppress(ValueError):  # what can't be run on the control finds nothing of it, and grants no absence
                found.append((attack, attack(there)))
    return found


def _still_known(population: Population, changed: Model, most: int) -> tuple[list[Fact], list[Fact]]:
    """Some references whose objects a changed model names first, each with another's as the new one; and the others.

    Half of the references at most, so that others are left for the attacks' own nulls.
    """
    relations = {fact.group for fact in population.facts}
    able = [fact for fact in population.reference if fact.group in relations]
    able = random.Random(0).sample(able, min(2 * most, len(able) // 2))
    asked = [
        fact.but(target_new=fact.controls[i % len(fact.controls)])
        for i, fact in enumerate(with_controls(each, population.reference) for each in able)
        if len(fact.controls) > 1
    ]
    tokens = [FirstTokens.of(changed.tokenizer, fact, population.prepend_bos) for fact in asked]
    rows = at_the_ends(Runner(changed), [one.ids for one in tokens], BATCH_TOKENS)
    named = {row for row, logits in rows if tokens[row].apart and tokens[row].first(logits)[0] == 1}
    chosen = [fact for row, fact in enumerate(asked) if row in named][:most]
    subjects = {fact.subject for fact in chosen}
    return chosen, [fact for fact in population.reference if fact.subject not in subjects]


def _new_first(population: Population) -> Callable[[Runner, tuple[int, ...]], Float[Tensor, "fact"]]:
    """A reading of whether the new object is the first of all objects."""
    asked = population.first_tokens

    def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact"]:
        found = torch.zeros(len(indices))
        for row, logits in at_the_ends(runner, [asked[i].ids for i in indices], BATCH_TOKENS):
            found[row] = asked[indices[row]].first(logits)[1]
        return found

    return read


def _layers(recoveries: Sequence[Recovery]) -> tuple[int, int | None]:
    """The first layer whose MLP can't be spared at the subject (0 if all can), and the first whose can."""
    hidden, spared = list[int](), list[int]()
    for recovery in recoveries:
        for case in recovery.cases:
            key = case.key
            if isinstance(key, Silencing) and len(key.cells) == 1 and key.by == "mean":
                (cell,) = key.cells
                if cell == Cell("mlp", cell.layer, "subject") and "nothing reads" not in case.masked:
                    (hidden if case.masked else spared).append(cell.layer)
    return min(hidden, default=0), min(spared, default=None)
