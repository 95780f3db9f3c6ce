"""Read-out attacks: can whoever sees the states of the changed model name the old object?

At the last token of the prompt the model's own head reads every layer, D_l = softmax(W_U LN_f(h_l)), and each
attack makes a set C of candidates of it::

    head projection     C = ∪_l  top-k tokens of D_l
    probability delta   C = ∪_l  top-k and bottom-k tokens of D_{l+1} − D_l
    runner-up           C = { the likeliest object at the output, the new one left out }

Patil et al. 2023 (arXiv:2309.17410, sec. 4); the third is what hides directly beneath the new object. A set that holds
many tokens holds the old object by chance, and unions over layers hold what is frequent. So k is 1 by default, and what
counts is the excess over control objects. With a *budget* B, as theirs, the first of all layers are taken, from the
last layer down, then the second of all, until C holds B tokens; with paraphrases C is of all texts together.

It is evidence that something of the old object is left, never that the change lies over it: of a model retrained in
full the layers can still tell what it used to say.

At the last *subject* token nothing is offered. What the head reads there is no prediction of the object, and in an
unedited model that knows its facts the old object ranks there as its controls do: the attack is blind, and its zero
says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import resid_post
from tl_factedit.backend.protocol import check_layer, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import pad
from tl_factedit.measure.excess import excess
from tl_factedit.measure.first_tokens import FIRST, FirstTokens, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.measure.reading import Reading

ATTACKS = ("head_projection", "probability_delta", "runner_up")
QUANTITIES = (*FIRST, "size")

ASKED_OF_OTHERS = 4
"""About so many subjects who don't have its object each fact is asked: all layers are read for each."""


@dataclass(frozen=True)
class ReadOut:
    """Attack the states at the last token of each prompt, in the unedited and in the changed model.

    The cases are `ATTACKS`. In ``before`` and ``after``, ``old_first`` and ``new_first`` are 1 where the object is in
    C, ``control_first`` is the mean of this over the controls, and ``size`` is how many tokens C holds; ``extra`` has
    ``candidates``, the mean size; ``details`` has ``by_layer``, the excess of the head projection at each layer alone
    (`Estimates`, [layer]; descriptive), and ``layers``.

    Attributes:
        k: How many tokens each layer names, where there is no budget.
        budget: How many tokens a set holds at most; None for those that k gives.
        paraphrases: How many of each fact's paraphrases are read beside its prompt.
        layers: Which layers' residual streams (after the block) are read; None for all. The last one's reading is the
            model's output.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    k: int = 1
    budget: int | None = None
    paraphrases: int = 0
    layers: Sequence[int] | None = None
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Read the states.

        Raises:
            ValueError: A fact without ``target_new``; k or a budget below 1, or paraphrases below 0; a layer outside
                the model, or none.
        """
        with_new_objects(population.facts)
        if self.k < 1:
            raise ValueError(f"k is {self.k}, needed 1 token a layer at least")
        if (self.budget is not None and self.budget < 1) or self.paraphrases < 0:
            raise ValueError(
                f"budget is {self.budget} and paraphrases {self.paraphrases}, needed 1 token and 0 paraphrases at least"
            )
        chosen = tuple(sorted(set(range(n_layers(population.model)) if self.layers is None else self.layers)))
        if not chosen:
            raise ValueError("layers is empty, needed one at least")
        for layer in chosen:
            check_layer(population.model, layer)
        name = "read-out" if self.budget is None else f"read-out of {self.budget}"
        asked = [self._texts(population, i) for i in range(len(population.facts))]

        def read(runner: Runner, indices: tuple[int, ...]) -> _Found:
            return self._read(runner, [asked[i] for i in indices], chosen)

        settings = (self.k, self.budget, self.paraphrases, chosen, self.batch_tokens)
        before = population.unedited(name, read, settings=settings, kinds=(_Found,))
        after = _Found.empty(len(asked), len(chosen))
        for part, mine in population.each(name, read, settings=settings, kinds=(_Found,)):
            after.put(part.indices, mine)
        each_layer = torch.where(before.known[:, None, None], after.layers, math.nan)
        size = torch.where(before.known[:, None], after.sets[..., QUANTITIES.index("size")], math.nan)
        found = Recovery.of(
            name,
            population,
            [Case(attack, attack.replace("_", " "), "residue") for attack in ATTACKS],
            _reading(population.facts, before.sets),
            _reading(population.facts, after.sets),
            known=before.known,
            extra={"candidates": size.nanmean(0)},
            details={
                "by_layer": excess(each_layer[..., 0], each_layer[..., 1], seed=self.seed),
                "layers": chosen,
            },
            seed=self.seed,
        )

        def ask(others: Population) -> Float[Tensor, "asked attack"]:
            theirs = [self._texts(others, i) for i in range(len(others.facts))]

            def read_theirs(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "asked attack"]:
                return self._read(runner, [theirs[i] for i in indices], chosen).sets[..., 0]

            return others.after(f"{name}, of others", read_theirs, settings=settings)

        return found.in_excess_of_common(population, ask, most=ASKED_OF_OTHERS)

    def _texts(self, population: Population, fact: int) -> tuple[FirstTokens, ...]:
        """The prompt, and the paraphrases in which the objects begin alike."""
        prompt, of = population.first_tokens[fact], population.facts[fact]
        others = [of.asked(text) for text in of.paraphrases[: self.paraphrases]]
        spelt = [FirstTokens.of(population.model.tokenizer, other, population.prepend_bos) for other in others]
        return (prompt, *(each for each in spelt if each.objects == prompt.objects))

    def _read(self, runner: Runner, asked: Sequence[Sequence[FirstTokens]], layers: Sequence[int]) -> _Found:
        found = _Found.empty(len(asked), len(layers))
        # The output is needed too: for the runner-up, and for what the model knows.
        read = [*layers, *([] if runner.n_layers - 1 in layers else [runner.n_layers - 1])]
        texts = [text for each in asked for text in each]
        seen: dict[int, Tensor] = {}
        first = [sum(len(each) for each in asked[:i]) for i in range(len(asked) + 1)]
        for attempt in that_fit([max(len(text.ids), len(read)) for text in texts], self.batch_tokens):
            with attempt as some:
                caught = runner.capture(pad([texts[i].ids for i in some], 0), [resid_post(layer) for layer in read])
                ends = torch.tensor([texts[i].end for i in some])
                rows = torch.arange(len(some))
                stream = torch.stack([caught[resid_post(layer)][rows, ends] for layer in read], 1).flatten(0, 1)
                tokens = torch.zeros(len(stream), 1, dtype=torch.long)
                logits = runner.logits(tokens, start=(runner.n_layers, stream[:, None]))[:, 0].float().cpu()
                seen |= dict(zip(some, logits.split(len(read)), strict=True))
                for i in range(len(asked)):  # as soon as all texts of a fact were read, so that no more is kept
                    mine = range(first[i], first[i + 1])
                    if all(j in seen for j in mine):
                        self._attack(found, i, asked[i][0], [seen.pop(j) for j in mine], len(layers))
        return found

    def _attack(self, found: _Found, i: int, asked: FirstTokens, logits: Sequence[Tensor], count: int) -> None:
        """Fill in one fact from the logits of its texts, [layer vocab]; their last row is the output."""
        # Of a stream that overflows nothing can be read: NaN would be the likeliest of all tokens.
        if not asked.apart or any(bool(each.isnan().any()) for each in logits):
            return
        output, lens = logits[0][-1], [each[:count] for each in logits]
        steps = [each.softmax(-1).diff(dim=0) for each in lens]
        rivals = [asked.old, *asked.controls]
        sets = (
            self._named_by(torch.cat([each.flip(0) for each in lens])),
            self._named_by(torch.cat([part.flip(0) for each in steps for part in (each, -each)])),
            {rivals[int(output[rivals].argmax())]},
        )
        found.sets[i] = torch.tensor([[*_named(asked, named), float(len(named))] for named in sets])
        for row, tokens in enumerate(lens[0].topk(min(self.k, lens[0].shape[-1])).indices.tolist()):
            old, _, control = _named(asked, set(tokens))
            found.layers[i, row] = torch.tensor([old, control])
        found.known[i] = bool(asked.first(output)[0] == 1)

    def _named_by(self, scores: Float[Tensor, "row vocab"]) -> set[int]:
        """The tokens that rows of scores name."""
        width = scores.shape[-1]
        if self.budget is None:
            return set(scores.topk(min(self.k, width)).indices.flatten().tolist())
        ranked = scores.topk(min(self.budget, width)).indices.T.flatten().tolist()  # the first of all rows first
        return set(list(dict.fromkeys(ranked))[: self.budget])


@dataclass(frozen=True, eq=False)
class _Found:
    """What was read in one model.

    Attributes:
        sets: `QUANTITIES` by attack.
        layers: Whether the old object is among a layer's top-k, and the mean of the controls.
        known: Whether the old object is the first of all objects at the output.
    """

    sets: Float[Tensor, "fact attack quantity"]
    layers: Float[Tensor, "fact layer 2"]
    known: Bool[Tensor, "fact"]

    @classmethod
    def empty(cls, count: int, layers: int) -> _Found:
        return cls(
            torch.full((count, len(ATTACKS), len(QUANTITIES)), math.nan),
            torch.full((count, layers, 2), math.nan),
            torch.zeros(count, dtype=torch.bool),
        )

    def put(self, places: Sequence[int], other: _Found) -> None:
        chosen = list(places)
        self.sets[chosen], self.layers[chosen], self.known[chosen] = other.sets, other.layers, other.known


def _named(asked: FirstTokens, named: set[int]) -> tuple[float, float, float]:
    controls = [float(token in named) for token in asked.controls]
    return (
        float(asked.old in named),
        float(asked.new in named),
        sum(controls) / len(controls) if controls else math.nan,
    )


def _reading(facts: Sequence[Fact], values: Tensor) -> Reading:
    return Reading(
        name="read-out at the last token",
        values=values,
        axes={"fact": range(len(facts)), "case": ATTACKS, "quantity": QUANTITIES},
        unit="1 where named (of controls the mean), tokens (size)",
    )
