"""Attribute rate: how many of the tokens that a lens puts first at the subject are attributes of the subject?

Geva et al. 2023 (arXiv:2304.14767, sec. 5): with T the k tokens that the head ranks first on the stream at the last
subject token, and A a set of attributes of the subject, ``rate = |T ∩ A| / k``. It rises over the layers in which the
subject is *enriched*.

The user gives the attributes, in sets: those that go with the old object, those that go with the new one, and the same
for control objects, which are the null. A rate alone says little: frequent words are often on top, and a large set has
a large rate. So the null compares the shares *of each set* that were found, and gives a percentile, ½ if nothing is
known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import continuation
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.lens import unembed
from tl_factedit.probes.states import POSITIONS, read_states
from tl_factedit.probes.tuned_lens import TunedLens

QUANTITIES = ("rate_old", "rate_new", "rate_control", "percentile_old", "percentile_new")


@dataclass(frozen=True)
class Attributes:
    """What goes with each object that a fact could have: words as they continue the prompt, with their space.

    Attributes:
        old: Words that go with the old object, itself included if wanted, e.g. ``(" Paris", " France", " French")``.
        new: Words that go with the new object.
        controls: One set of words for each control object.
    """

    old: Sequence[str]
    new: Sequence[str] = ()
    controls: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        """Refuse a string where words are meant, and freeze the sequences."""
        for words in (self.old, self.new, self.controls, *self.controls):
            if isinstance(words, str):
                raise ValueError(f"attributes are the string {words!r}, needed several words: write [{words!r}]")
        object.__setattr__(self, "old", tuple(self.old))
        object.__setattr__(self, "new", tuple(self.new))
        object.__setattr__(self, "controls", tuple(tuple(words) for words in self.controls))


def attributes_by_object(facts: Sequence[Fact], words: Mapping[str, Sequence[str]]) -> dict[str, Attributes]:
    """Attributes of facts whose subjects have them through their objects.

    Args:
        facts: Facts with ``target_true``, ``target_new`` and ``controls``.
        words: The words that go with each object, by the object letter for letter; controls that aren't in it are left
            out.

    Returns:
        The attributes by the fact's name, as `AttributeRate` takes them.

    Raises:
        ValueError: An old or new object isn't in `words`, or two facts with different objects have one name.
    """
    asked: dict[str, tuple[str | None, str | None]] = {}
    for fact in facts:
        for target in (fact.target_true, fact.target_new):
            if target is not None and target not in words:
                raise ValueError(f"object {target!r} of fact {fact.name!r} has no attributes, needed some in words")
        objects = (fact.target_true, fact.target_new)
        if asked.setdefault(fact.name, objects) != objects:
            raise ValueError(f"two facts are called {fact.name!r}, needed one each: give them an id, fact.but(id=...)")
    return {
        fact.name: Attributes(
            tuple(words[fact.old]),
            () if fact.target_new is None else tuple(words[fact.target_new]),
            tuple(tuple(words[text]) for text in fact.controls if text in words),
        )
        for fact in facts
    }


@dataclass(frozen=True)
class AttributeRate:
    """Share of a lens's top k tokens that are attributes of a fact's old, new and control objects, by layer.

    Attributes count by their first token after the fact's prompt. A token that is in the old and in the new set tells
    nothing apart and counts for neither; in control sets neither old nor new tokens count. ``rate_control`` is the mean
    over the control sets. ``percentile_old`` is the share of control sets of which a smaller share is found than of the
    old set (ties half), ``percentile_new`` the same for the new set; NaN without controls.

    Attributes:
        attributes: The attributes of each fact, by its name (its id, or its subject).
        k: How many tokens count as the top.
        lens: A tuned lens to read with; None for the logit lens.
        prepend_bos: BOS policy; None for the lens's own, or the model's default.
    """

    attributes: Mapping[str, Attributes]
    k: int = 50
    lens: TunedLens | None = None
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.k < 1:
            raise ValueError(f"k is {self.k}, needed at least 1")
        if self.lens is not None and self.prepend_bos not in (None, self.lens.provenance.prepend_bos):
            raise ValueError(f"prepend_bos={self.prepend_bos}, but the lens was trained with the other policy")

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Reading:
        """Read some facts; axes are fact, layer (after that block), position, quantity.

        Raises:
            ValueError: A fact has no attributes, or the vocabulary has fewer than k tokens.
        """
        facts = as_facts(facts)
        lacking = [fact.name for fact in facts if fact.name not in self.attributes]
        if lacking:
            raise ValueError(f"fact {lacking[0]!r} has no attributes, needed some: give attributes[{lacking[0]!r}]")
        bos = bos_policy(model, self.prepend_bos) if self.lens is None else self.lens.provenance.prepend_bos
        if self.lens is None:
            states = read_states(model, facts, prepend_bos=bos)
            layers, streams = states.layers[1:], iter(states.values[:, 1:])
        else:
            layers, streams = self.lens.layers, self.lens.streams(model, facts)
        with frozen(model), torch.no_grad():
            runner = Runner(model)
            values = []
            for fact, stream in zip(facts, streams, strict=True):
                logits = unembed(runner, stream)
                if logits.shape[-1] < self.k:
                    raise ValueError(f"k is {self.k}, but the vocabulary has {logits.shape[-1]} tokens: take fewer")
                first = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
                first = first.scatter_(-1, logits.topk(self.k).indices, True).cpu()
                values.append(self._rates(first, *_tokens(model, fact, self.attributes[fact.name], bos)))
        return Reading(
            name="attribute rate",
            values=torch.stack(values),
            axes={
                "fact": [fact.name for fact in facts],
                "layer": layers,
                "position": POSITIONS,
                "quantity": QUANTITIES,
            },
            unit=f"share of the first {self.k} tokens, share of control sets below",
        )

    def _rates(
        self, first: Tensor, old: set[int], new: set[int], controls: Sequence[set[int]]
    ) -> Float[Tensor, "layer position quantity"]:
        nothing = torch.full(first.shape[:2], float("nan"))

        def found(words: set[int]) -> Tensor:
            return first[..., sorted(words)].sum(-1).float() if words else nothing

        null = [found(words) / len(words) for words in controls]

        def percentile(words: set[int]) -> Tensor:
            if not words or not null:
                return nothing
            own, controls_own = found(words) / len(words), torch.stack(null)
            return ((controls_own < own).float() + 0.5 * (controls_own == own).float()).mean(0)

        mean = torch.stack([found(words) for words in controls]).mean(0) if controls else nothing
        columns = [found(old) / self.k, found(new) / self.k, mean / self.k, percentile(old), percentile(new)]
        return torch.stack(columns, -1)


def _tokens(model: Model, fact: Fact, words: Attributes, bos: bool) -> tuple[set[int], set[int], list[set[int]]]:
    """First tokens of the old set, the new set and the control sets, without those that tell nothing apart."""

    def first(texts: Sequence[str]) -> set[int]:
        return {int(continuation(model.tokenizer, fact.text, text, prepend_bos=bos)[0]) for text in texts}

    old, new = first(words.old), first(words.new)
    controls = [first(texts) - old - new for texts in words.controls]
    return old - new, new - old, [tokens for tokens in controls if tokens]
