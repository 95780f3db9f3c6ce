"""What an edit is to bring about: Hase et al.'s five problems, as values that every editor takes.

    error injection    p(o_new | s, r) up               `Inject`, what editing usually means
    fact erasure       p(o_true | s, r) down            `Erase`
    amplification      p(o_true | s, r) up              `Amplify`
    fact forcing       p(o_true | s + noise, r) up      `Force`: the subject stays noised while the edit is made
    tracing reversal   p(o_noise | s, r) up             `Reverse`: o_noise is what the noised subject leads to

Hase et al. 2023 (arXiv:2301.04213, sec. 5). An objective turns facts into wishes, and an editor fulfils wishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.corruption import Corruption, GaussianNoise, subject_of
from tl_factedit.facts import Fact
from tl_factedit.model import EMBED, Model, Runner, quiet
from tl_factedit.tokens import align


@dataclass(frozen=True, eq=False)
class Wish:
    """What is wanted of one fact.

    Attributes:
        fact: It; ``target_new`` is what is to become likely (or unlikely).
        unlikely: Whether it is to become unlikely.
        embeddings: What the subject's token embeddings are while the edit is made, [position d_model]; None for what
            the model has.
    """

    fact: Fact
    unlikely: bool = False
    embeddings: Float[Tensor, "position d_model"] | None = None


@runtime_checkable
class Objective(Protocol):
    """Anything that says what is wanted of some facts."""

    def check(self, facts: Sequence[Fact]) -> None:
        """Refuse facts that lack what this objective needs, before anything is run."""
        ...

    def wishes(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[Wish, ...]:
        """One for each fact."""
        ...


@dataclass(frozen=True)
class Inject:
    """Write ``target_new``: what an edit usually is."""

    def check(self, facts: Sequence[Fact]) -> None:
        """Each fact needs a ``target_new``."""
        for fact in facts:
            if fact.target_new is None:
                raise ValueError(f"fact {fact.name!r} has no target_new, needed one to write: fact.but(target_new=...)")

    def wishes(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[Wish, ...]:  # noqa: ARG002
        """The facts as they are."""
        self.check(facts)
        return tuple(Wish(fact) for fact in facts)


@dataclass(frozen=True)
class Erase:
    """Make ``target_true`` unlikely, whatever comes instead."""

    def check(self, facts: Sequence[Fact]) -> None:
        """Every fact will do."""

    def wishes(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[Wish, ...]:  # noqa: ARG002
        """The old object, to become unlikely."""
        return tuple(Wish(fact.but(target_new=fact.target_true), unlikely=True) for fact in facts)


@dataclass(frozen=True)
class Amplify:
    """Make ``target_true`` still likelier."""

    def check(self, facts: Sequence[Fact]) -> None:
        """Every fact will do."""

    def wishes(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[Wish, ...]:  # noqa: ARG002
        """The old object."""
        return tuple(Wish(fact.but(target_new=fact.target_true)) for fact in facts)


@dataclass(frozen=True)
class Force:
    """Make the model say ``target_true`` of a noised subject.

    Attributes:
        corruption: What the noise is; its first sample is taken for each fact.
    """

    corruption: Corruption = field(default_factory=lambda: GaussianNoise(samples=1))

    def check(self, facts: Sequence[Fact]) -> None:
        """Every fact will do."""

    def wishes(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[Wish, ...]:
        """The old object, under noise."""
        noised = _noised(model, facts, self.corruption, prepend_bos)
        return tuple(
            Wish(fact.but(target_new=fact.target_true), embeddings=embeddings)
            for fact, embeddings in zip(facts, noised, strict=True)
        )


@dataclass(frozen=True)
class Reverse:
    """Make the model say of the subject what it says when the subject is noised: one token, its first choice.

    Attributes:
        corruption: What the noise is; its first sample is taken for each fact.
    """

    corruption: Corruption = field(default_factory=lambda: GaussianNoise(samples=1))

    def check(self, facts: Sequence[Fact]) -> None:
        """Every fact will do."""

    def wishes(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[Wish, ...]:
        """What the noised runs say."""
        noised = _noised(model, facts, self.corruption, prepend_bos)
        return tuple(
            Wish(fact.but(target_new=_said(model, fact, embeddings, prepend_bos)))
            for fact, embeddings in zip(facts, noised, strict=True)
        )


def _noised(
    model: Model, facts: Sequence[Fact], corruption: Corruption, prepend_bos: bool
) -> list[Float[Tensor, "position d_model"]]:
    """The first sample of each subject's corrupted embeddings."""
    with quiet(model), torch.no_grad():
        runner = Runner(model)
        subjects = [subject_of(runner, fact, align(model.tokenizer, fact, prepend_bos=prepend_bos)) for fact in facts]
        calibrated = corruption.calibrated(subjects)
        drawn = [calibrated.draw(subject) for subject in subjects]
    for fact, samples in zip(facts, drawn, strict=True):
        if not len(samples):
            raise ValueError(f"{type(corruption).__name__} has nothing to put in place of {fact.subject!r}: take noise")
    return [samples[0].float() for samples in drawn]


def _said(model: Model, fact: Fact, embeddings: Tensor, prepend_bos: bool) -> str:
    """The token that the model puts first after the fact's prompt with these embeddings."""
    row = align(model.tokenizer, fact, prepend_bos=prepend_bos)

    def put(value: Tensor, hook: object = None) -> Tensor:
        value = value.clone()
        value[:, slice(*row.subject)] = embeddings.to(value)
        return value

    with quiet(model), torch.no_grad():
        logits = Runner(model).logits(row.ids[None], at=torch.tensor([[len(row.ids) - 1]]), hooks=[(EMBED, put)])[0, 0]
    for token in logits.argsort(descending=True)[:20].tolist():
        said = model.tokenizer.decode([token])
        if said.strip() and "\ufffd" not in said:
            return said
    raise ValueError(f"what {fact.subject!r} leads to when noised can't be spelt: take another seed")
