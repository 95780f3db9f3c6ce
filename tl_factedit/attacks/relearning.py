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

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.attacks.learner import Lessons, learning_layers, updates_until_learnt
from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.estimate import over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.measure.first_tokens import with_new_objects
from tl_factedit.measure.population import Population

LEAST_STEPS = 8.0
"""What control objects have to take in the unedited model for differences to show."""

RATES = tuple(1e-2 * 2.0**-i for i in range(14))
"""Learning rates to choose from, the largest first."""

TRIED = 12
"""Facts on which the rate is found."""


@dataclass(frozen=True)
class Relearn:
    """Teach a changed model the old object of each fact, and control objects, each alone and from the same start.

    The cases are numbers of updates: ``old_first`` is whether the old object is learnt within so many,
    ``control_first`` the share of the fact's controls that are. Facts that the unedited model doesn't know, and facts
    without a control of as many tokens as the old object, are left out. The unedited model isn't taught (``before`` is
    NaN). ``details`` has ``savings`` (updates saved over a control, with sign, over facts), ``old`` and ``control``
    (updates taken, [fact]; what isn't learnt counts one more than `steps`), ``controls`` (the control objects of each
    fact), ``unlearnt`` (share of all objects that weren't learnt in time), ``lr`` and ``layers``.

    Attributes:
        layers: Whose ``W_out`` may learn; None for all. A layer that a router answers for learns on top of its answer.
        lr: Learning rate of Adam; None finds one with `relearning_rate` on the unedited model.
        steps: Most updates.
        looks: After how many updates to look, beside after `steps`.
        controls: How many control objects for each fact, drawn with `seed`.
        memory: What the learnt changes and activations may take, in GiB (None for a share of what is free): sets how
            many facts learn at once, which changes the result by rounding alone.
        seed: Seed of the draw and of the bootstrap.
    """

    layers: Sequence[int] | None = None
    lr: float | None = None
    steps: int = 40
    looks: Sequence[int] = (2, 5, 10, 20)
    controls: int = 2
    memory: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self)

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Teach.

        Raises:
            ValueError: A fact without ``target_new``; no layers, or one outside the model; or, for `lr`, as in
                `relearning_rate`.
            RuntimeError: The learning is not finite.
        """
        facts, model = with_new_objects(population.facts), population.model
        chosen = learning_layers(model, self.layers)
        lr = self.lr
        if lr is not None and (not isinstance(lr, (int, float)) or not 0 < lr < math.inf):
            raise ValueError(f"lr is {lr!r}, needed a learning rate above 0, or None to find one")
        if lr is None:
            lr = relearning_rate(
                model,
                facts,
                layers=chosen,
                steps=self.steps,
                prepend_bos=population.prepend_bos,
                memory=self.memory,
                seed=self.seed,
            )
        lessons = [
            Lessons.of(model.tokenizer, fact, population.prepend_bos, self.controls, f"{self.seed} {fact.name}")
            for fact in facts
        ]
        known = population.known

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact object"]:
            """Updates taken: the old object, then the fact's controls; NaN where not asked."""
            taken = torch.full((len(indices), 1 + self.controls), math.nan)
            rows = [row for row, i in enumerate(indices) if known[i] and lessons[i].controls]
            pupils = [(lessons[indices[row]].ids, target) for row in rows for target in lessons[indices[row]].targets]
            if pupils:
                found = updates_until_learnt(runner.model, pupils, chosen, lr, self.steps, self.memory)
                counts = [len(lessons[indices[row]].targets) for row in rows]
                for row, own in zip(rows, found.split(counts), strict=True):
                    taken[row, : len(own)] = own
            return taken

        # Not the memory: it changes the result by rounding alone.
        settings = (chosen, lr, self.steps, self.controls, self.seed)
        taken = population.after("relearning", read, settings=settings)
        looks = sorted({look for look in self.looks if look < self.steps} | {self.steps})
        within = torch.stack([torch.where(taken.isnan(), math.nan, (taken <= look).float()) for look in looks], 1)
        nothing = torch.full((len(facts), len(looks)), math.nan)
        after = torch.stack([within[..., 0], nothing, within[..., 1:].nanmean(-1)], -1)
        old, control = taken[:, 0], taken[:, 1:].nanmean(-1)
        asked = ~taken.isnan()
        return Recovery.of(
            "relearning",
            population,
            [Case(look, f"within {look} updates", "residue") for look in looks],
            torch.full_like(after, math.nan),
            after,
            known=known,
            details={
                "savings": over_facts((control - old).tolist(), span=None, seed=self.seed),
                "old": old,
                "control": control,
                "controls": tuple(each.named for each in lessons),
                "unlearnt": float((taken[asked] > self.steps).float().mean()) if bool(asked.any()) else math.nan,
                "lr": lr,
                "layers": chosen,
            },
            seed=self.seed,
        )


@plain_torch()
def relearning_rate(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    least: float = LEAST_STEPS,
    rates: Sequence[float] = RATES,
    steps: int = 40,
    prepend_bos: bool | None = None,
    memory: float | None = 1.0,
    seed: int = 0,
) -> float:
    """The largest learning rate at which the unedited model needs at least so many updates for a control object.

    A median over a few of the facts, one control each.

    Args:
        model: The unedited model.
        facts: Those to be asked, each with ``controls``.
        layers: As in `Relearn`.
        least: So many updates.
        rates: To choose from.
        steps: Most updates.
        prepend_bos: BOS policy; None for the model's.
        memory: As in `Relearn`.
        seed: Seed of the draw of controls.

    Raises:
        ValueError: No fact has a control of as many tokens as its old object; or at no rate control objects take
            `least` to `steps` updates.
    """
    facts = with_new_objects(facts)
    chosen = learning_layers(model, layers)
    bos = bos_policy(model, prepend_bos)
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
