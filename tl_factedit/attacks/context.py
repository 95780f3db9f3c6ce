"""Context attacks: does the old object come back when the text before the prompt mentions it?

Prefixes a(o) that name an object o are put before the prompt. Of the changed model is read, over facts::

    OM = P( old object first | a(old) + prompt )         OP = P( p(old) > p(new) | a(old) + prompt )

Xie et al. 2025 (arXiv:2505.12636, sec. 3), with their three kinds of prefix: the object repeated, a question that
names it, a text about it. The old object is *in the text* then, and a model that copies what it has just read says any
object in this way. So each rate is set against the same prefix with control objects in the same model::

    excess = OM of the old object − mean over controls c of P( c first | a(c) + prompt )

"First" is among the fact's objects. As with every attack, what it finds is left of the old object; it doesn't show that
the change lies over it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.backend.protocol import Model, model_name
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import align
from tl_factedit.measure.excess import excess
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population, Read, Settings
from tl_factedit.measure.reading import Reading

QUANTITIES = ("old_first", "control_first", "old_over_new", "control_over_new", "new_first")


@runtime_checkable
class Prefix(Protocol):
    """Makes the text that goes before a fact's prompt and names an object; None where there is none."""

    def __call__(self, fact: Fact, obj: str, /) -> str | None:
        """The text, with whatever has to stand between it and the prompt."""
        ...


@dataclass(frozen=True)
class RepeatPrefix:
    """The object, some times over: "Paris . Paris . Paris . "."""

    times: int = 3
    separator: str = ". "

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self)
        if self.times < 1:
            raise ValueError(f"times is {self.times}, needed 1 at least")

    def __call__(self, _fact: Fact, obj: str, /) -> str:
        """The text."""
        return (obj.strip() + self.separator) * self.times


@dataclass(frozen=True)
class QuestionPrefix:
    """A question that names subject, relation and object: "Is it true that The Eiffel Tower is in Paris? ".

    Attributes:
        template: With one ``"{}"``, where the prompt goes with the object after it.
    """

    template: str = "Is it true that {}? "

    def __post_init__(self) -> None:
        """Check the template."""
        check_settings(self)
        if self.template.count("{}") != 1:
            raise ValueError(f'template {self.template!r} needs exactly one "{{}}", where the statement goes')

    def __call__(self, fact: Fact, obj: str, /) -> str:
        """The text."""
        return self.template.replace("{}", fact.text + obj)


@dataclass(frozen=True)
class TextPrefix:
    """A given text about each object, such as the beginning of an encyclopedia's article on it.

    Attributes:
        texts: By object, spelt as targets are (or without the space before); what follows each text is `separator`.
        separator: What stands between it and the prompt.
    """

    texts: Mapping[str, str]
    separator: str = " "

    def __call__(self, _fact: Fact, obj: str, /) -> str | None:
        """The text; None for an object that has none."""
        text = self.texts.get(obj, self.texts.get(obj.strip()))
        return None if text is None else text + self.separator

    def __repr__(self) -> str:
        """How many there are."""
        return f"TextPrefix({len(self.texts)} texts)"


@dataclass(frozen=True)
class ContextAttack:
    """Put prefixes that name the old object before each prompt, in the unedited and in the changed model.

    The cases are the prefixes, by their places. In ``before`` and ``after``, ``old_first`` and ``old_over_new`` are 0
    or 1 with the old object in the prefix; ``control_first`` and ``control_over_new`` are means over the controls, each
    in a prefix of its own: what mere copying gives. Facts for which a prefix has no text are left out. ``extra``
    has ``excess_over_new`` (OP in excess of the controls) and ``excess_before``; ``details`` has ``controls``, the
    control objects that stood in the prefixes, for each fact, and ``excess_over_new`` with intervals (`Estimates`).

    Attributes:
        prefixes: What to put before. A text that tells the model the old object again tests copying more than memory;
            the excess takes out as much of it as controls show.
        controls: How many control objects to try for each fact, drawn with `seed`; None for all.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the draw and of the bootstrap.
    """

    prefixes: Sequence[Prefix] = (RepeatPrefix(), QuestionPrefix())
    controls: int | None = 4
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Ask with each prefix.

        Raises:
            ValueError: No prefixes; a fact without ``target_new``; a prefix that merges with its prompt's tokens, or is
                longer than the model's context.
        """
        facts, prefixes = with_new_objects(population.facts), tuple(self.prefixes)
        if not prefixes:
            raise ValueError("prefixes is empty, needed one at least")
        if self.controls is not None and self.controls < 1:
            raise ValueError(f"controls is {self.controls}, needed 1 at least, or None for all")
        asked = self._asked(population)
        before, after = population.read("context attack", self._read(asked), settings=self._settings(asked))
        # An object that isn't in the prefix (the new one) is not read.
        counted = torch.where(population.known[:, None, None], after, math.nan)
        over_new = excess(counted[..., 2], counted[..., 3], seed=self.seed)
        found = Recovery.of(
            "context attack",
            population,
            [Case(i, repr(prefix), "underneath") for i, prefix in enumerate(prefixes)],
            _reading(facts, len(prefixes), before),
            _reading(facts, len(prefixes), after),
            details={
                "controls": tuple(tuple(one.bare.named[i] for i in one.named) for one in asked),
                "excess_over_new": over_new,
            },
            seed=self.seed,
        )
        gap = torch.where(found.known[:, None], before[..., 0] - before[..., 1], math.nan).nanmean(0)
        found = replace(found, extra={"excess_over_new": over_new.mean, "excess_before": gap})

        def ask(others: Population) -> Float[Tensor, "asked prefix"]:
            theirs = replace(self, controls=1)._asked(others)
            read, settings = self._read(theirs), self._settings(theirs)
            return others.after("context attack, of others", read, settings=settings)[..., 0]

        return found.in_excess_of_common(population, ask)

    def _asked(self, population: Population) -> list[_Attack]:
        """The prompts of each fact."""
        return [
            _Attack.of(population.model, fact, tuple(self.prefixes), self.controls, population.prepend_bos, self.seed)
            for fact in population.facts
        ]

    def _read(self, asked: Sequence[_Attack]) -> Read[Float[Tensor, "fact prefix quantity"]]:
        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact prefix quantity"]:
            return _read(runner, [asked[i] for i in indices], self.batch_tokens)

        return read

    def _settings(self, asked: Sequence[_Attack]) -> Settings:
        return lambda indices: ([asked[i].prompt_ids for i in indices], self.batch_tokens)


@dataclass(frozen=True, eq=False)
class _Attack:
    """The prompts of one fact.

    Attributes:
        bare: Without a prefix.
        named: The control objects that stand in prefixes, by their places in `bare`.
        prompts: For each prefix, token ids with the old object in it, then with each control; None without a text.
    """

    bare: FirstTokens
    named: tuple[int, ...]
    prompts: tuple[tuple[Int[Tensor, "_"] | None, ...], ...]

    @property
    def prompt_ids(self) -> list[list[list[int] | None]]:
        """The token ids of all prompts, as plain data."""
        return [[None if ids is None else ids.tolist() for ids in of_prefix] for of_prefix in self.prompts]

    @classmethod
    def of(
        cls, model: Model, fact: Fact, prefixes: Sequence[Prefix], controls: int | None, bos: bool, seed: int
    ) -> _Attack:
        bare = FirstTokens.of(model.tokenizer, fact, bos)
        places = range(len(bare.named))
        if controls is not None and controls < len(places):
            places = random.Random(f"{seed} {fact.name}").sample(places, controls)
        objects = [fact.old, *(bare.named[i] for i in places)]
        prompts = tuple(tuple(_ids(model, fact, prefix(fact, o), bos, bare) for o in objects) for prefix in prefixes)
        return cls(bare, tuple(places), prompts)


def _ids(model: Model, fact: Fact, prefix: str | None, bos: bool, bare: FirstTokens) -> Int[Tensor, "_"] | None:
    if prefix is None:
        return None
    row = align(model.tokenizer, fact, prepend_bos=bos, prefix=prefix)
    if row.new_ids is None or (int(row.true_ids[0]), int(row.new_ids[0])) != (bare.old, bare.new):
        raise ValueError(f"the objects of {fact.name!r} are spelt otherwise after {prefix!r}: give another prefix")
    room = getattr(model.cfg, "n_ctx", None)
    if room is not None and len(row.ids) > room:
        raise ValueError(
            f"{fact.name!r} has {len(row.ids)} tokens after {prefix[:40]!r}…, but {model_name(model)} reads {room}: "
            "give shorter prefixes"
        )
    return row.ids


def _read(runner: Runner, asked: Sequence[_Attack], batch_tokens: int) -> Float[Tensor, "fact prefix quantity"]:
    rows, owner = [], []
    for i, one in enumerate(asked):
        for p, prompts in enumerate(one.prompts):
            for j, ids in enumerate(prompts if one.bare.apart else ()):
                if ids is not None:
                    rows.append(ids)
                    owner.append((i, p, j))
    out = torch.full((len(asked), len(asked[0].prompts), len(QUANTITIES)), math.nan)
    by_control: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row, logits in at_the_ends(runner, rows, batch_tokens):
        i, p, j = owner[row]
        objects = asked[i].bare
        # The object that the prefix names: the old one, or a control.
        token = objects.old if j == 0 else objects.controls[asked[i].named[j - 1]]
        first = max((objects.old, objects.new, *objects.controls), key=lambda each: float(logits[each]))
        found = float(first == token), float(logits[token] > logits[objects.new])
        if j == 0:
            out[i, p, 0], out[i, p, 2] = found
            out[i, p, 4] = float(first == objects.new)
        else:
            by_control.setdefault((i, p), []).append(found)
    for (i, p), of_controls in by_control.items():
        out[i, p, 1], out[i, p, 3] = torch.tensor(of_controls).mean(0)
    return out


def _reading(facts: Sequence[Fact], prefixes: int, values: Tensor) -> Reading:
    return Reading(
        name="context attack",
        values=values,
        axes={"fact": range(len(facts)), "case": range(prefixes), "quantity": QUANTITIES},
        unit="1 where so (of controls the mean)",
    )
