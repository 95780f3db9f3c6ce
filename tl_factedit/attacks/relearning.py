"""Relearning: is the old object learnt again sooner than an object that was never taught?

From the changed model on, a fact's prompt is taught an object by Adam on ``W_out`` of some layers, once the old object
and once control objects, each from the same start::

    s(o)     updates until p(o | prompt) > ½, between two updates by the line through their log p
    savings  mean over controls c of s(c) − s(old)

(after Ebbinghaus' savings). Above 0: something of the old object is left that learning can use. Below 0: the old object
is harder to learn than any, it is marked as what the answer is not. The learning rate decides how finely this is
measured: with a large one everything takes one update. It is found on the unedited model beforehand, where control
objects must take eight at least.

The disjoint form teaches the old objects of some facts and looks at others, which nobody taught; only one model for all
facts can be asked this, and while some are taught the others collapse, so that it is descriptive.

No weight of any model is written. What is learnt stands beside ``W_out``, whose output a hook adds it to, so that it
goes together with edits and routers; every row of a batch learns a change of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.attacks.learner import Lessons, learning_layers, updates_until_learnt
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.measure.change import Changed
from tl_factedit.measure.first_tokens import are_known, with_new_objects
from tl_factedit.measure.population import bos_of_change, each

if TYPE_CHECKING:
    import pandas as pd

LEAST_STEPS = 8.0
"""What control objects have to take in the unedited model for differences to show."""

RATES = tuple(1e-2 * 2.0**-i for i in range(14))
"""Learning rates to choose from, the largest first."""

TRIED = 12
"""Facts on which the rate is found."""


@dataclass(frozen=True, eq=False)
class Relearning:
    """How many updates it takes to learn the old objects again, and control objects.

    Facts that the unedited model doesn't know (old object first of all), and facts without a control of as many tokens
    as the old object, are left out.

    Attributes:
        facts: What was asked.
        layers: Whose ``W_out`` learnt.
        lr: Of Adam.
        steps: Most updates; what isn't learnt by then counts one more.
        known: Whether a fact counts, [fact].
        old: Updates for the old object, [fact]; 0 if it is there already, NaN if not asked.
        control: The mean over the fact's controls, [fact].
        controls: The control objects, for each fact.
        unlearnt: Share of all objects that were not learnt in time.
        savings: Updates saved, with sign, over facts.
    """

    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    lr: float
    steps: int
    known: Bool[Tensor, "fact"]
    old: Float[Tensor, "fact"]
    control: Float[Tensor, "fact"]
    controls: tuple[tuple[str, ...], ...]
    unlearnt: float
    savings: Estimate

    def table(self) -> pd.DataFrame:
        """One row a fact."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "fact": fact.name,
                    "known": bool(self.known[i]),
                    "steps_old": float(self.old[i]),
                    "steps_control": float(self.control[i]),
                    "savings": float(self.control[i] - self.old[i]),
                    "controls": ", ".join(text.strip() for text in self.controls[i]),
                }
                for i, fact in enumerate(self.facts)
            ]
        )

    def __repr__(self) -> str:
        """The savings in a line."""
        counted = self.known & ~(self.old.isnan() | self.control.isnan())
        old, control = (float(values[counted].mean()) for values in (self.old, self.control))
        return (
            f"Relearning(savings {self.savings:.1f} updates: {old:.1f} for the old object, {control:.1f} for controls; "
            f"lr {self.lr:.2g}, layers {list(self.layers)})"
        )


def relearn(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    lr: float | None = None,
    steps: int = 40,
    controls: int = 2,
    prepend_bos: bool | None = None,
    memory: float = 1.0,
    seed: int = 0,
) -> Relearning:
    """Teach a changed model the old object of each fact, and control objects, each alone and from the same start.

    Args:
        model: The unedited model.
        changed: A change of it for all facts, a list with a change for each, or another model.
        facts: Each with ``target_new`` and with ``controls``.
        layers: Whose ``W_out`` may learn; None for all. A layer that a router answers for learns on top of its answer.
        lr: Of Adam; None finds one with `relearning_rate` on the unedited model.
        steps: Most updates.
        controls: How many control objects for each fact, drawn by `seed`.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        memory: What the learnt changes and activations may take, in GiB: sets how many facts learn at once, which
            changes the result by rounding alone.
        seed: Of the draw and the bootstrap.

    Raises:
        ValueError: No facts; a fact without ``target_new``; no layers, or one outside the model; or, for `lr`, as in
            `relearning_rate`.
        RuntimeError: The learning is not finite.
    """
    facts = with_new_objects(facts)
    parts = list(each(model, changed, facts))
    chosen = learning_layers(model, layers)
    bos = bos_of_change(model, changed, prepend_bos)
    if lr is None:
        lr = relearning_rate(model, facts, layers=chosen, steps=steps, prepend_bos=bos, memory=memory, seed=seed)
    lessons = [Lessons.of(model.tokenizer, fact, bos, controls, f"{seed} {fact.name}") for fact in facts]
    with frozen(model), torch.no_grad():
        known = are_known(Runner(model), [each.asked for each in lessons], 4096)
    old, control = (torch.full((len(facts),), math.nan) for _ in range(2))
    late, total = 0, 0
    for part in parts:
        mine = [i for i in part.indices if known[i] and lessons[i].controls]
        if not mine:
            continue
        pupils = [(lessons[i].ids, target) for i in mine for target in lessons[i].targets]
        with part.applied() as tested, frozen(tested):
            taken = updates_until_learnt(tested, pupils, chosen, lr, steps, memory)
        late, total = late + int((taken > steps).sum()), total + len(taken)
        for i, own in zip(mine, taken.split([len(lessons[i].targets) for i in mine]), strict=True):
            old[i], control[i] = own[0], own[1:].mean()
    return Relearning(
        facts=facts,
        layers=chosen,
        lr=lr,
        steps=steps,
        known=known,
        old=old,
        control=control,
        controls=tuple(each.named for each in lessons),
        unlearnt=late / total if total else math.nan,
        savings=over_facts((control - old).tolist(), span=None, seed=seed),
    )


def relearning_rate(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    least: float = LEAST_STEPS,
    rates: Sequence[float] = RATES,
    steps: int = 40,
    prepend_bos: bool | None = None,
    memory: float = 1.0,
    seed: int = 0,
) -> float:
    """The largest learning rate at which the unedited model needs at least so many updates for a control object.

    A median over a few of the facts, one control each.

    Args:
        model: The unedited model.
        facts: Those to be asked, each with ``controls``.
        layers: As in `relearn`.
        least: So many updates.
        rates: To choose from.
        steps: Most updates.
        prepend_bos: BOS policy; None for the model's.
        memory: As in `relearn`.
        seed: Of the draw of controls.

    Raises:
        ValueError: No fact has a control of as many tokens as its old object; or at no rate control objects take
            `least` to `steps` updates.
    """
    facts = with_new_objects(facts)
    chosen = learning_layers(model, layers)
    bos = bos_of_change(model, model, prepend_bos)
    lessons = [Lessons.of(model.tokenizer, fact, bos, 1, f"{seed} {fact.name}") for fact in facts]
    pupils = [(each.ids, each.targets[1]) for each in lessons if each.controls][:TRIED]
    if not pupils:
        raise ValueError(
            "no fact has a control of as many tokens as its old object, needed one at least: give controls"
        )
    with frozen(model):
        for lr in sorted(rates, reverse=True):
            # Whether it is too large shows after a few updates; whether it is too small, only after all of them.
            enough = math.ceil(least)
            if float(updates_until_learnt(model, pupils, chosen, lr, enough, memory).median()) < least:
                continue
            median = float(updates_until_learnt(model, pupils, chosen, lr, steps, memory).median())
            if least <= median <= steps:
                return lr
    raise ValueError(
        f"at none of the learning rates {min(rates):.2g} to {max(rates):.2g} control objects take {least:g} to {steps} "
        "updates: allow more steps, or give other rates"
    )
