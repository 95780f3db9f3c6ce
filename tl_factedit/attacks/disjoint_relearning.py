"""Disjoint relearning: do the old objects of facts that nobody taught come back with those of others?

Deeb & Roger 2024 (arXiv:2410.08827): a change that removed facts from the weights leaves nothing that teaching *other*
facts could bring back. Some facts' old objects are taught together, under their prompts and some paraphrases, until
they are learnt, and beyond; then the facts that nobody taught are asked.

How fast one learns decides what comes along: gentle updates learn each fact by itself, and large ones take down what
the facts have in common, such as a change that lies over them. So several rates are tried. What comes back must exceed
the control objects, as teaching one relation's objects makes all of them likelier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.attacks.learner import LEARNT, Learner, Lesson, Pupil, adding_hooks, check_one_change, learning_layers
from tl_factedit.attacks.relearning import relearning_rate
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import continuation, encode
from tl_factedit.core.words import counted
from tl_factedit.measure.first_tokens import FIRST, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.measure.reading import Reading
from tl_factedit.measure.strangers import Strangers, firsts_with_strangers

ENOUGH = 0.9
"""The lessons are learnt when this share of them is."""

TIMES = (1, 3)
"""The others are asked when the lessons are learnt, and after so many times as many updates."""

RATES = (10.0, 30.0)
"""Times the rate at which control objects take eight updates in the changed model (`relearning_rate`).

Where overrides come back most; and of the changed model, as its weights may be larger all over, and then the same steps
are smaller for them.
"""

QUANTITIES = (*FIRST, "common_first", "updates", "lr")


@dataclass(frozen=True)
class DisjointRelearning:
    """Teach the old objects of some facts together, and look whether those of others come along.

    The population's facts are split by `seed`: half of the subjects are taught and the others looked at, and then the
    other way round, from the changed model again. The cases are pairs of a rate (or how many times the gentle one it
    is) and of 1 or 3: the lessons are learnt (nine in ten of them likelier than ½), or as many updates twice more. One
    change for all facts, or another model, can be asked: single edits have nothing in common that one could teach. A
    case in which the lessons aren't learnt after `most` updates is masked. ``extra`` has ``learnt``, how often the old
    object is first of the objects of a fact that *was* taught, and ``updates`` and ``lr``, the means of both halves;
    ``details`` has ``halves`` (places in the population's facts) and ``layers``.

    Attributes:
        lr: Learning rates of Adam; None for ten and thirty times what `relearning_rate` finds on the changed model.
        paraphrases: How many of each taught fact's paraphrases are taught beside its prompt.
        layers: Whose ``W_out`` may learn; None for all.
        most: Most updates.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the split and of the bootstrap.
    """

    lr: float | Sequence[float] | None = None
    paraphrases: int = 1
    layers: Sequence[int] | None = None
    most: int = 100
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Teach, and look at the others.

        Raises:
            ValueError: A list of changes; fewer than two subjects; no rate, or no updates.
            RuntimeError: The learning is not finite.
        """
        facts, model, bos = with_new_objects(population.facts), population.model, population.prepend_bos
        check_one_change(population, "single edits have nothing in common that one could teach")
        if self.most < 1 or self.paraphrases < 0:
            raise ValueError(
                f"most is {self.most} and paraphrases {self.paraphrases}, needed 1 update and 0 paraphrases at least"
            )
        halves = self._halves(facts)
        chosen, rates = learning_layers(model, self.layers), self._rates()
        strangers = Strangers.of(population, seed=self.seed)
        pupils = [[pupil for i in half for pupil in self._lessons(model.tokenizer, facts[i], bos)] for half in halves]

        def read(runner: Runner, _: tuple[int, ...]) -> Float[Tensor, "fact half case quantity"]:
            least = 1.0 if self.lr is not None else self._gentle(runner.model, population)
            of_half = [
                torch.cat([self._taught(runner, mine, strangers, chosen, rate * least) for rate in rates], 1)
                for mine in pupils
            ]
            return torch.stack(of_half, 1)

        others = [row.tolist() for row in strangers.rows]
        settings = (others, rates, halves, chosen, self.paraphrases, self.most, self.batch_tokens)
        found = population.after("disjoint relearning", read, settings=settings)
        # Of a case in which one half isn't learnt nothing counts: the others would be half of the facts.
        untaught = found[..., 0].isnan().all(0).any(0)
        after, taught = found[:, 0].clone(), found[:, 1].clone()
        after[list(halves[0])], taught[list(halves[0])] = found[list(halves[0]), 1], found[list(halves[0]), 0]
        known = population.known
        learnt = torch.where(known[:, None], taught[..., 0], math.nan).nanmean(0)
        cases = [
            Case(
                (rate, times),
                f"others learnt at {rate:g} "
                + ("as rate" if self.lr is not None else "times the gentle rate")
                + (f", and {times} times as long" if times > 1 else ""),
                "underneath",
                f"what was taught isn't learnt in {counted(self.most, 'update')}" if bool(untaught[c]) else "",
            )
            for c, (rate, times) in enumerate((rate, times) for rate in rates for times in TIMES)
        ]
        reading = Reading(
            name="disjoint relearning",
            values=after,
            axes={"fact": range(len(facts)), "case": [case.key for case in cases], "quantity": QUANTITIES},
            unit="1 where first among the objects (of controls the mean), updates",
        )
        return Recovery.of(
            "disjoint relearning",
            population,
            cases,
            replace(reading, values=torch.full_like(after, math.nan)),
            reading,
            common=after[..., QUANTITIES.index("common_first")],
            subjects=strangers.fewest,
            extra={
                "learnt": learnt,
                **{name: found[0, ..., QUANTITIES.index(name)].nanmean(0) for name in ("updates", "lr")},
            },
            details={"halves": halves, "layers": chosen},
            asks_weights="teaching",
            seed=self.seed,
        )

    def _taught(
        self, runner: Runner, pupils: Sequence[Pupil], strangers: Strangers, layers: Sequence[int], lr: float
    ) -> Float[Tensor, "fact time quantity"]:
        """What all facts say once the lessons are learnt, and later; NaN where they weren't."""
        found = torch.full((len(strangers.asked), len(TIMES), len(QUANTITIES)), math.nan)
        sites = [down_proj(runner.model, layer) for layer in layers]
        learner = Learner(runner, sites, 1, lr)
        lengths = [len(ids) + len(target) - 1 for ids, target in pupils]
        try:
            lesson = Lesson(runner, pupils, lengths, layers[0], self.batch_tokens)
            due: dict[int, int] = {}
            for when in range(self.most + 1):
                for time in [time for time, update in due.items() if update == when]:
                    self._look(found[:, time], runner, learner, strangers, float(when))
                if due and when >= max(due.values()):
                    break
                share = float((learner.update(lesson).exp() > LEARNT).double().mean())
                if not due and share >= ENOUGH:
                    due = {t: min(self.most, (when + 1) * times) for t, times in enumerate(TIMES)}
        finally:
            detach_caches(runner.model)
        return found

    def _look(
        self,
        found: Tensor,
        runner: Runner,
        learner: Learner,
        strangers: Strangers,
        update: float,
    ) -> None:
        hooks = adding_hooks(learner.sites, learner.learnt)
        found[:, : len(FIRST) + 1] = firsts_with_strangers(runner, strangers, self.batch_tokens, hooks)
        found[:, QUANTITIES.index("updates")] = update
        found[:, QUANTITIES.index("lr")] = learner.adam.lr

    def _rates(self) -> tuple[float, ...]:
        """The rates, or how many times the gentle one they are."""
        given = self.lr
        rates = RATES if given is None else (float(given),) if isinstance(given, (int, float)) else tuple(given)
        if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"lr is {self.lr}, needed one learning rate above 0, or several different ones")
        return rates

    def _gentle(self, model: Model, population: Population) -> float:
        return relearning_rate(
            model, population.facts, layers=self.layers, prepend_bos=population.prepend_bos, seed=self.seed
        )

    def _lessons(self, tokenizer: object, fact: Fact, bos: bool) -> list[Pupil]:
        texts = (fact.text, *map(fact.fill, fact.paraphrases[: self.paraphrases]))
        return [
            (
                encode(tokenizer, text, prepend_bos=bos)[0],
                continuation(tokenizer, text, fact.after(text, fact.old), prepend_bos=bos),
            )
            for text in texts
        ]

    def _halves(self, facts: Sequence[Fact]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Places of the facts of either half; no subject is in both."""
        subjects = list(dict.fromkeys(fact.subject for fact in facts))
        if len(subjects) < 2:
            raise ValueError(
                f"the facts are about {counted(len(subjects), 'subject')}, needed 2 at least: some to teach and some "
                "to look at"
            )
        chosen = set(random.Random(f"disjoint {self.seed}").sample(subjects, len(subjects) // 2))
        one = tuple(i for i, fact in enumerate(facts) if fact.subject in chosen)
        return one, tuple(i for i in range(len(facts)) if i not in set(one))
