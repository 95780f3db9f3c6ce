"""A positive control: what the attacks find of an override of the same facts that is known to be one.

An attack that finds nothing proves nothing unless it finds something where something is. So where an absence would be
claimed, the same facts are overridden in the unedited model's weights, by the closed form: ``W_out`` of one layer
answers their keys by values that make it say the new objects, and every other weight is as it was. The old facts are
all there. The layer is the first whose MLP the unedited model can't spare at the subject, where no knock-out can show
them; or, if it can spare all, the first. Attacks that ask the weights and don't find that one are tried on an override
of the first layer that can be spared, too.
"""

from __future__ import annotations

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
from tl_factedit.backend.runner import Runner
from tl_factedit.core.estimate import Estimate
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editors.emmet import Emmet
from tl_factedit.measure.first_tokens import at_the_ends
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.stats.key_stats import KeyStats

WEIGHT = 1e-4
"""Of all other keys beside those of the facts: so little that each fact is overridden."""

FIT = ValueFit(kl_weight=0.0, kl_prompts=())
"""What else the model says of the subjects is no matter here."""


def found_in_an_override(
    population: Population, attacks: Sequence[Attack], recoveries: Sequence[Recovery]
) -> Mapping[str, Estimate]:
    """What attacks bring back of an override of a population's facts, by their names; all but knock-outs.

    A knock-out of an override brings back what the unedited model says without the same cells: that is known.

    Args:
        population: The facts.
        attacks: What the population was attacked by.
        recoveries: What they brought back; where the override goes is chosen by the knock-out among them.
    """
    hidden, spared = _layers(recoveries)
    found = _found_in(population, attacks, hidden)
    named = {recovery.attack: recovery.undivided.strongest for _, recovery in found}
    blind = [attack for attack, recovery in found if recovery.asks_weights and not recovery.undivided.strongest.low > 0]
    if blind and spared is not None:
        again = _found_in(population, blind, spared)
        named |= {f"{recovery.attack} (layer {spared})": recovery.undivided.strongest for _, recovery in again}
    return named


def _found_in(population: Population, attacks: Sequence[Attack], layer: int) -> list[tuple[Attack, Recovery]]:
    """What each attack brings back of an override of one layer; empty where none could be made."""
    model, bos = population.model, population.prepend_bos
    known = [fact for fact, yes in zip(population.facts, population.known.tolist(), strict=True) if yes]
    stats = {layer: KeyStats.identity(model, layer)}
    editor = Emmet(stats, weight=WEIGHT, fit=FIT, contexts=("",), prepend_bos=bos, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an override that nobody asked for
        override = editor(model, known)
    there = Population.of(model, override, known, reference=population.reference, progress=population.progress)
    overridden = there.after("override", _new_first(there), settings=())
    facts = [fact for fact, yes in zip(known, overridden.tolist(), strict=True) if yes == 1]
    if not facts:
        return []
    there, found = there.asking(facts), list[tuple[Attack, Recovery]]()
    for attack in attacks:
        if not isinstance(attack, KnockOut):
            with suppress(ValueError):  # what can't be run on the control finds nothing of it, and grants no absence
                found.append((attack, attack(there)))
    return found


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
