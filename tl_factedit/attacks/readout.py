"""Read-out attacks: can whoever sees the states of the changed model name the old object?

At the last token of the prompt the model's own head reads every layer, D_l = softmax(W_U LN_f(h_l)), and each
attack makes a set C of candidates of it::

    head projection     C = ∪_l  top-k tokens of D_l
    probability delta   C = ∪_l  top-k and bottom-k tokens of D_{l+1} − D_l
    runner-up           C = { the likeliest object at the output, the new one left out }

Patil et al. 2023 (arXiv:2309.17410, sec. 4); the third is what hides directly beneath the new object. A set that holds
many tokens holds the old object by chance, and unions over layers hold what is frequent. So k is 1 by default, and what
counts is the excess over control objects.

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
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.backend.hook_names import resid_post
from tl_factedit.backend.protocol import Model, check_layer, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.estimate import Estimate, Estimates
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import batches, pad
from tl_factedit.measure.cache import read_each
from tl_factedit.measure.change import Changed
from tl_factedit.measure.excess import excess
from tl_factedit.measure.first_tokens import FirstTokens, one_of, with_new_objects
from tl_factedit.measure.population import Part, bos_of_change, each
from tl_factedit.measure.reading import Reading

if TYPE_CHECKING:
    import pandas as pd

ATTACKS = ("head_projection", "probability_delta", "runner_up")
QUANTITIES = ("old", "new", "control", "size")


@dataclass(frozen=True, eq=False)
class ReadOut:
    """What three read-outs of the states name.

    Objects count by their first tokens. Facts whose objects share one, and facts that the unedited model doesn't know
    (old object first of all objects), are left out.

    Attributes:
        facts: What was asked.
        k: Tokens a layer.
        layers: Whose residual stream (after the block) was read.
        known: Whether a fact counts, [fact].
        before: The unedited model: axes fact, attack, quantity. ``old`` and ``new`` are 1 where the object is in C,
            ``control`` is the mean of this over the controls, ``size`` is how many C holds.
        after: The changed model, the same.
        excess: In the changed model, with 95 % intervals, [attack].
        corrected: The same with intervals that hold for the three attacks together (Bonferroni).
        by_layer: Excess of the head projection at each layer alone, [layer]; descriptive.
    """

    facts: tuple[Fact, ...]
    k: int
    layers: tuple[int, ...]
    known: Bool[Tensor, "fact"]
    before: Reading
    after: Reading
    excess: Estimates
    corrected: Estimates
    by_layer: Estimates

    def at(self, attack: str, *, corrected: bool = False) -> Estimate:
        """The excess of one attack."""
        return one_of(self.corrected if corrected else self.excess, ATTACKS.index(attack))

    @property
    def best(self) -> str:
        """The attack with the largest excess."""
        return ATTACKS[int(self.excess.mean.nan_to_num(-math.inf).argmax())]

    @property
    def strongest(self) -> Estimate:
        """The excess of the best attack, with its corrected interval."""
        return self.at(self.best, corrected=True)

    def table(self) -> pd.DataFrame:
        """One row an attack."""
        import pandas as pd

        def share(reading: Reading, attack: str, quantity: str) -> float:
            return float(reading.at(attack=attack, quantity=quantity)[self.known].nanmean())

        return pd.DataFrame(
            [
                {
                    "attack": attack,
                    "candidates": share(self.after, attack, "size"),
                    "old": share(self.after, attack, "old"),
                    "new": share(self.after, attack, "new"),
                    "control": share(self.after, attack, "control"),
                    "excess": (found := self.at(attack)).mean,
                    "low": found.low,
                    "high": found.high,
                    "corrected_low": self.at(attack, corrected=True).low,
                    "corrected_high": self.at(attack, corrected=True).high,
                    "excess_before": share(self.before, attack, "old") - share(self.before, attack, "control"),
                    "n": found.n,
                }
                for attack in ATTACKS
            ]
        )

    def __repr__(self) -> str:
        """The excess of each attack."""
        shown = ", ".join(f"{attack} {self.at(attack):.2f}" for attack in ATTACKS)
        return f"ReadOut(excess: {shown}; {int(self.known.sum())} of {len(self.facts)} facts known, k = {self.k})"


def read_out(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    k: int = 1,
    layers: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> ReadOut:
    """Attack the states at the last token of each prompt, in the unedited and in the changed model.

    Args:
        model: The unedited model.
        changed: A change of it for all facts, a list with a change for each, or another model.
        facts: What to ask, each with ``target_new`` and with ``controls``.
        k: How many tokens each layer names.
        layers: Which layers are read, ascending; None for all. The last one's reading is the model's output.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        batch_tokens: Most tokens in one forward pass.
        seed: Of the bootstrap.
        folder: Where to keep what is read of each change; a call that was killed goes on from there.
        progress: Whether to show a bar on several changes that take longer than a second.

    Raises:
        ValueError: No facts; a fact without ``target_new``; k below 1; a layer outside the model, or none.
    """
    facts = with_new_objects(facts)
    parts = list(each(model, changed, facts))
    if k < 1:
        raise ValueError(f"k is {k}, needed 1 token a layer at least")
    chosen = tuple(sorted(set(range(n_layers(model)) if layers is None else layers)))
    if not chosen:
        raise ValueError("layers is empty, needed one at least")
    for layer in chosen:
        check_layer(model, layer)
    bos = bos_of_change(model, changed, prepend_bos)
    asked = [FirstTokens.of(model.tokenizer, fact, bos) for fact in facts]
    with frozen(model), torch.no_grad():
        before = _read(Runner(model), asked, chosen, k, batch_tokens)

    def read(tested: Model, part: Part) -> _Found:
        return _read(Runner(tested), [asked[i] for i in part.indices], chosen, k, batch_tokens)

    settings = {"settings": (k, chosen, bos, batch_tokens)}
    after = _Found.empty(len(facts), len(chosen))
    for part, found in read_each(
        parts, read, what="read-out", asked=settings, folder=folder, kinds=(_Found,), progress=progress
    ):
        after.put(part.indices, found)
    known = before.known
    old, control = (
        torch.where(known[:, None], after.sets[..., QUANTITIES.index(q)], math.nan) for q in ("old", "control")
    )
    each_layer = torch.where(known[:, None, None], after.layers, math.nan)
    return ReadOut(
        facts=facts,
        k=k,
        layers=chosen,
        known=known,
        before=_reading(facts, before.sets),
        after=_reading(facts, after.sets),
        excess=excess(old, control, seed=seed),
        corrected=excess(old, control, tests=len(ATTACKS), seed=seed),
        by_layer=excess(each_layer[..., 0], each_layer[..., 1], seed=seed),
    )


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


def _read(runner: Runner, asked: Sequence[FirstTokens], layers: Sequence[int], k: int, batch_tokens: int) -> _Found:
    found = _Found.empty(len(asked), len(layers))
    # The output is needed too: for the runner-up, and for what the model knows.
    read = [*layers, *([] if runner.n_layers - 1 in layers else [runner.n_layers - 1])]
    for some in batches([max(len(one.ids), len(read)) for one in asked], batch_tokens):
        caught = runner.capture(pad([asked[i].ids for i in some], 0), [resid_post(layer) for layer in read])
        ends = torch.tensor([asked[i].end for i in some])
        rows = torch.arange(len(some))
        stream = torch.stack([caught[resid_post(layer)][rows, ends] for layer in read], 1).flatten(0, 1)
        tokens = torch.zeros(len(stream), 1, dtype=torch.long)
        logits = runner.logits(tokens, start=(runner.n_layers, stream[:, None]))[:, 0].float().cpu()
        for i, of_fact in zip(some, logits.split(len(read)), strict=True):
            # Of a stream that overflows nothing can be read: NaN would be the likeliest of all tokens.
            if asked[i].apart and not bool(of_fact.isnan().any()):
                _attack(found, i, asked[i], of_fact, len(layers), k)
    return found


def _attack(
    found: _Found, i: int, asked: FirstTokens, logits: Float[Tensor, "layer vocab"], count: int, k: int
) -> None:
    """Fill in one fact; the last row of logits is the output."""
    output, lens = logits[-1], logits[:count]
    step = lens.softmax(-1).diff(dim=0)
    top = lens.topk(min(k, lens.shape[-1])).indices
    ends = [step.topk(min(k, step.shape[-1]), largest=largest).indices for largest in (True, False)]
    rivals = [asked.old, *asked.controls]
    sets = (
        set(top.flatten().tolist()),
        set(torch.cat(ends).flatten().tolist()),
        {rivals[int(output[rivals].argmax())]},
    )
    found.sets[i] = torch.tensor([[*_named(asked, named), float(len(named))] for named in sets])
    for row, tokens in enumerate(top.tolist()):
        old, _, control = _named(asked, set(tokens))
        found.layers[i, row] = torch.tensor([old, control])
    found.known[i] = bool(asked.first(output)[0] == 1)


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
        axes={"fact": range(len(facts)), "attack": ATTACKS, "quantity": QUANTITIES},
        unit="1 where named (of controls the mean), tokens (size)",
    )
