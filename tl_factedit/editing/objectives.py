"""What an edit is to bring about: Hase et al.'s five problems, as values that every editor takes.

    error injection    p(o_new | s, r) up               `Inject`, what editing usually means
    fact erasure       p(o_true | s, r) down            `Erase`
    amplification      p(o_true | s, r) up              `Amplify`
    fact forcing       p(o_true | s + noise, r) up      `Force`: the subject stays noised while the edit is made
    tracing reversal   p(o_noise | s, r) up             `Reverse`: o_noise is what the noised subject leads to

Hase et al. 2023 (arXiv:2301.04213, sec. 5). An objective turns facts into targets, and an editor writes what they want.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.hook_names import EMBED
from tl_factedit.backend.protocol import Hook, Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, need_old_object
from tl_factedit.core.tokens import align, continuation
from tl_factedit.locate.corruption import Corruption, GaussianNoise, subject_of


@dataclass(frozen=True, eq=False)
class EditTarget:
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

    def spelt(self, length: int) -> Float[Tensor, "position d_model"] | None:
        """The embeddings for a text in which the subject has so many tokens.

        A subject may be spelt in other tokens after a space than at the beginning of a text. They are counted from
        the last token, where a fact is looked up; the first stands for all that come before it.
        """
        if self.embeddings is None or len(self.embeddings) == length:
            return self.embeddings
        return self.embeddings[(torch.arange(length) - length + len(self.embeddings)).clamp(min=0)]


@runtime_checkable
class Objective(Protocol):
    """Anything that says what is wanted of some facts."""

    def check(self, facts: Sequence[Fact]) -> None:
        """Refuse facts that lack what this objective needs, before anything is run."""
        ...

    def targets(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[EditTarget, ...]:
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

    @plain_torch()
    def targets(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[EditTarget, ...]:  # noqa: ARG002
        """The facts as they are."""
        self.check(facts)
        return tuple(EditTarget(fact) for fact in facts)


@dataclass(frozen=True)
class Erase:
    """Make ``target_true`` unlikely, whatever comes instead."""

    def check(self, facts: Sequence[Fact]) -> None:
        """Each fact needs a ``target_true``."""
        need_old_object(facts, "Erase")

    @plain_torch()
    def targets(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[EditTarget, ...]:  # noqa: ARG002
        """The old object, to become unlikely."""
        return tuple(EditTarget(fact.but(target_new=fact.target_true), unlikely=True) for fact in facts)


@dataclass(frozen=True)
class Amplify:
    """Make ``target_true`` still likelier."""

    def check(self, facts: Sequence[Fact]) -> None:
        """Each fact needs a ``target_true``."""
        need_old_object(facts, "Amplify")

    @plain_torch()
    def targets(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[EditTarget, ...]:  # noqa: ARG002
        """The old object."""
        return tuple(EditTarget(fact.but(target_new=fact.target_true)) for fact in facts)


@dataclass(frozen=True)
class Force:
    """Make the model say ``target_true`` of a noised subject.

    Attributes:
        corruption: What the noise is; its first sample is taken for each fact. Noise that measures its size measures it
            on the facts of the edit (``GaussianNoise(sigma=...)`` fixes it: of a trace, ``trace.corruption``).
    """

    corruption: Corruption = field(default_factory=lambda: GaussianNoise(samples=1))

    def check(self, facts: Sequence[Fact]) -> None:
        """Each fact needs a ``target_true``."""
        need_old_object(facts, "Force")

    @plain_torch()
    def targets(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[EditTarget, ...]:
        """The old object, under noise."""
        noised = _noised(model, facts, self.corruption, prepend_bos)
        return tuple(
            EditTarget(fact.but(target_new=fact.target_true), embeddings=embeddings)
            for fact, embeddings in zip(facts, noised, strict=True)
        )


@dataclass(frozen=True)
class Reverse:
    """Make the model say of the subject what it says when the subject is noised: one token, its first choice.

    Tokens that are no text of their own (parts of a character, BOS) are passed over.

    Attributes:
        corruption: What the noise is; its first sample is taken for each fact. Noise that measures its size measures it
            on the facts of the edit (``GaussianNoise(sigma=...)`` fixes it: of a trace, ``trace.corruption``).
    """

    corruption: Corruption = field(default_factory=lambda: GaussianNoise(samples=1))

    def check(self, facts: Sequence[Fact]) -> None:
        """Every fact will do."""

    @plain_torch()
    def targets(self, model: Model, facts: Sequence[Fact], *, prepend_bos: bool) -> tuple[EditTarget, ...]:
        """What the noised runs say."""
        noised = _noised(model, facts, self.corruption, prepend_bos)
        said = [_said(model, fact, embeddings, prepend_bos) for fact, embeddings in zip(facts, noised, strict=True)]
        return tuple(EditTarget(fact.told_to_say(each)) for fact, each in zip(facts, said, strict=True))


def set_subjects(rows: Sequence[tuple[EditTarget, tuple[int, int]]]) -> list[Hook]:
    """What puts the embeddings that targets give into a batch.

    Args:
        rows: For each row, the target it is of, and where its subject lies, (start, stop).

    Returns:
        A hook at the embeddings; none if no target gives any.
    """
    given = [
        (row, start, stop, embeddings)
        for row, (target, (start, stop)) in enumerate(rows)
        if (embeddings := target.spelt(stop - start)) is not None
    ]
    if not given:
        return []

    def put(value: Tensor, hook: object = None) -> Tensor:
        value = value.clone()
        for row, start, stop, embeddings in given:
            value[row, start:stop] = embeddings.to(value)
        return value

    return [(EMBED, put)]


def _noised(
    model: Model, facts: Sequence[Fact], corruption: Corruption, prepend_bos: bool
) -> list[Float[Tensor, "position d_model"]]:
    """The first sample of each subject's corrupted embeddings."""
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        subjects = [subject_of(runner, fact, align(model.tokenizer, fact, prepend_bos=prepend_bos)) for fact in facts]
        calibrated = corruption.calibrated(subjects)
        drawn = [calibrated.draw(subject) for subject in subjects]
    for fact, samples in zip(facts, drawn, strict=True):
        if not len(samples):
            raise ValueError(f"{type(corruption).__name__} has nothing to put in place of {fact.subject!r}: take noise")
    return [samples[0].float() for samples in drawn]


def _said(model: Model, fact: Fact, embeddings: Tensor, prepend_bos: bool) -> str:
    """The token that the model puts first after the fact's prompt with these embeddings, of those that can be spelt."""
    row = align(model.tokenizer, fact, prepend_bos=prepend_bos)
    hooks = set_subjects([(EditTarget(fact, embeddings=embeddings), row.subject)])
    with frozen(model), torch.no_grad():
        logits = Runner(model).logits(row.ids[None], at=torch.tensor([[len(row.ids) - 1]]), hooks=hooks)[0, 0]
    ids = row.ids.tolist()
    before = _spell(model, ids)
    for token in logits.argsort(descending=True)[:20].tolist():
        # Within the text, as some tokenizers spell a token that stands alone without the space before it.
        said = _spell(model, [*ids, token])[len(before) :]
        if token not in model.tokenizer.all_special_ids and said.strip() and _reads(model, row.text, said) == [token]:
            return said
    raise ValueError(f"what {fact.subject!r} leads to when noised can't be spelt: take another seed")


def _spell(model: Model, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _reads(model: Model, text: str, said: str) -> list[int]:
    """The tokens that go on after a text; none if they merge with its own."""
    try:
        return continuation(model.tokenizer, text, said).tolist()
    except ValueError:
        return []
