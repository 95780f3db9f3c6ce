"""A change of a model, in any of three forms.

    one change for all facts      Edit, RoutedEdit, anything with .applied(model)
    a change for each fact        a list of them, each applied alone
    another model                 fine-tuned, retrained, edited elsewhere

`measure.population` goes through all three in one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, runtime_checkable

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import Provenance
from tl_factedit.core.facts import Fact


@runtime_checkable
class Change(Protocol):
    """Anything that can be laid on a model and taken off again: an `Edit`, a router."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What it was made for."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers it changes, ascending."""
        ...

    @property
    def provenance(self) -> Provenance:
        """Of the model it was made on, with its BOS policy."""
        ...

    def applied(self, model: Model) -> AbstractContextManager[Model]:
        """The changed model for the length of a ``with`` block; weights and hooks as before afterwards."""
        ...


@runtime_checkable
class Digested(Protocol):
    """A change that can be told from others: an `Edit`, a router."""

    @property
    def digest(self) -> str:
        """Equal for equal changes only."""
        ...


Changed: TypeAlias = Change | Sequence[Change] | Model
"""One change for all facts, a change for each, or another model."""


def identity(fact: Fact) -> tuple[str, str, str | None]:
    """What makes two facts the same to a change: subject, prompt and new object."""
    return fact.subject, fact.prompt, fact.target_new


def asked_as(fact: Fact) -> tuple[tuple[str, str, str | None], ...]:
    """The identities of facts that a change may have been made for, to be asked about this one.

    An erasure may have been made without a new object, which an audit wants to compare with.
    """
    return identity(fact), (fact.subject, fact.prompt, None)


def check_made_for(change: Change, facts: Sequence[Fact], what: str) -> None:
    """Check that a change was made for some facts: by subject, prompt and new object (if a fact has one).

    Args:
        change: One change.
        facts: What it is to be asked about.
        what: The call, in an error.

    Raises:
        ValueError: It wasn't made for one of them; the message names the fact.
    """
    made = {identity(fact) for fact in change.facts}
    asked = {(fact.subject, fact.prompt) for fact in change.facts}
    others = [
        fact
        for fact in facts
        if made.isdisjoint(asked_as(fact)) and (fact.target_new is not None or (fact.subject, fact.prompt) not in asked)
    ]
    if others:
        known = ", ".join(repr(fact.text) for fact in change.facts[:3])
        raise ValueError(
            f"fact {others[0].name!r} ({others[0].text!r} -> {others[0].target_new!r}) isn't one that the change was "
            f"made for ({known}{' …' if len(change.facts) > 3 else ''}), so that {what} would say nothing about the "
            "change: give facts with its subjects, prompts and new objects, or force=True to ask all the same"
            + (f" ({len(others)} of {len(facts)} facts)" if len(others) > 1 else "")
        )
