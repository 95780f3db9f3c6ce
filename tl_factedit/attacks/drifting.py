"""Drift: does the old object come back when the changed model is trained on, on text that has nothing to do with it?

A model that was changed is used on, fine-tuned and merged. What only lies over a fact may wear off then, and the fact
is back though nobody taught it. The unedited model is trained alike: where that loses the fact, that nothing comes back
says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery, why_masked
from tl_factedit.attacks.learner import Learner, Lesson, adding_hooks, check_one_change, learning_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.settings import check_settings
from tl_factedit.measure.first_tokens import FIRST, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.measure.strangers import Strangers, firsts_with_strangers
from tl_factedit.measure.texts import encode_texts


@dataclass(frozen=True)
class Drift:
    """Train the unedited and the changed model on plain text, and ask.

    The cases are numbers of steps. One change for all facts, or another model, can be asked: a change for each would
    have to be trained each by itself. A case in which the unedited model loses the facts too is masked. Nothing is
    written: what is learnt stands beside the weights. ``extra`` has ``survives``, the share of the known facts that the
    unedited model still names.

    Attributes:
        texts: Plain text that mentions none of the subjects, of two tokens at least each.
        steps: After how many steps to look, ascending.
        lr: Learning rate of Adam, as a share of the root mean square of the weights that learn: a model whose weights
            are larger all over says the same, and is trained alike.
        at_once: How many texts a step is over; they are gone through in their order, again and again.
        layers: Whose ``W_out`` may learn; None for all.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    texts: Sequence[str]
    steps: Sequence[int] = (20, 100)
    lr: float = 1e-3
    at_once: int = 8
    layers: Sequence[int] | None = None
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Train on, and ask.

        Raises:
            ValueError: A list of changes; no texts, or one that is too short or too long; steps that don't ascend; a
                rate that isn't above 0; no text in a step.
            RuntimeError: The learning is not finite.
        """
        with_new_objects(population.facts)
        check_one_change(population, "each would have to be trained by itself")
        steps, chosen = tuple(self.steps), learning_layers(population.model, self.layers)
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
            raise ValueError(f"steps are {steps}, needed numbers from 1 on that ascend")
        if not 0 < self.lr < math.inf or self.at_once < 1:
            raise ValueError(f"lr is {self.lr} and at_once {self.at_once}, needed more than 0 and 1 text at least")
        rows = encode_texts(population.model, self.texts, population.prepend_bos)
        lessons = [(row[:1], row[1:]) for row in rows]
        strangers = Strangers.of(population, seed=self.seed)

        def read(runner: Runner, _: tuple[int, ...]) -> Float[Tensor, "fact step quantity"]:
            found = torch.full((len(strangers.asked), 1 + len(steps), len(FIRST) + 1), math.nan)
            sites = [down_proj(runner.model, layer) for layer in chosen]
            size = float(torch.stack([site.W.float().square().mean() for site in sites]).mean().sqrt())
            learner = Learner(runner, sites, 1, self.lr * size)
            try:
                for when in range(steps[-1] + 1):
                    if when in (0, *steps):
                        place = 0 if when == 0 else 1 + steps.index(when)
                        hooks = adding_hooks(sites, learner.learnt)
                        found[:, place] = firsts_with_strangers(runner, strangers, self.batch_tokens, hooks)
                    if when < steps[-1]:
                        some = [lessons[(when * self.at_once + i) % len(lessons)] for i in range(self.at_once)]
                        widths = [len(target) for _, target in some]
                        learner.update(Lesson(runner, some, widths, chosen[0], self.batch_tokens))
            finally:
                detach_caches(runner.model)
            return found

        others = [row.tolist() for row in strangers.rows]
        settings = (others, tuple(self.texts), steps, self.lr, self.at_once, chosen, self.batch_tokens)
        before, after = population.read("drift under further training", read, settings=settings)
        known = before[:, 0, 0] == 1
        survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
        return Recovery.of(
            "drift",
            population,
            [
                Case(count, f"{count} steps on other text", "underneath", why_masked(share))
                for count, share in zip(steps, survives.tolist(), strict=True)
            ],
            before[:, 1:, : len(FIRST)],
            after[:, 1:, : len(FIRST)],
            known=known,
            common=after[:, 1:, len(FIRST)],
            subjects=strangers.fewest,
            extra={"survives": survives},
            seed=self.seed,
        )

    def __repr__(self) -> str:
        """Without the texts themselves."""
        return f"Drift({len(self.texts)} texts, steps={tuple(self.steps)}, lr={self.lr:g}, at_once={self.at_once})"
