"""Some facts and the changed models that answer for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_factedit.backend.protocol import Model, bos_policy, kind, model_name
from tl_factedit.core.facts import Fact
from tl_factedit.measure.change import Change, Changed


@dataclass(frozen=True, eq=False)
class Part:
    """Some facts, and the changed model that answers for them.

    Attributes:
        facts: The facts it serves.
        indices: Their places among all facts.
        unedited: The model without the change.
        changed: The change, or the other model.
    """

    facts: tuple[Fact, ...]
    indices: tuple[int, ...]
    unedited: Model
    changed: Change | Model

    @property
    def touched(self) -> frozenset[str]:
        """The subjects that the change was made for, as far as is known; none of them is a reference or a control."""
        made_for = self.changed.facts if isinstance(self.changed, Change) else ()
        return frozenset(fact.subject for fact in (*self.facts, *made_for))

    @contextmanager
    def applied(self) -> Iterator[Model]:
        """The changed model for the length of a ``with`` block."""
        if isinstance(self.changed, Change):
            with self.changed.applied(self.unedited) as model:
                yield model
        else:
            yield self.changed


def each(model: Model, changed: Changed, facts: Sequence[Fact]) -> Iterator[Part]:
    """The parts of a population: one, or one for each change that serves a fact.

    Of several changes a fact belongs to the one that was made for its subject, prompt and new object; its paraphrases,
    neighbours and controls don't matter.

    Args:
        model: The unedited model.
        changed: The change, a list of them, or another model.
        facts: What is asked.

    Raises:
        ValueError: No facts or no changes; a fact that no change of the list was made for, or several; another model
            with another vocabulary. Nothing is applied before all is checked.
    """
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    if isinstance(changed, (str, Path)):
        raise ValueError(f"changed is {changed!r}, needed the change itself: fe.Edit.load({str(changed)!r})")
    if not isinstance(changed, (Sequence, Change)):
        kind(changed)
    if isinstance(changed, Sequence):
        return iter(_one_by_one(model, changed, facts))
    if not isinstance(changed, Change) and changed.cfg.d_vocab != model.cfg.d_vocab:
        raise ValueError(
            f"{model_name(changed)} has {changed.cfg.d_vocab} tokens and {model_name(model)} {model.cfg.d_vocab}, "
            "needed two models with one tokenizer"
        )
    return iter([Part(tuple(facts), tuple(range(len(facts))), model, changed)])


def _one_by_one(model: Model, changes: Sequence[Change], facts: Sequence[Fact]) -> list[Part]:
    if not changes:
        raise ValueError("the list of changes is empty, needed at least one")
    serving: dict[Any, list[int]] = {}
    for i, change in enumerate(changes):
        for key in {identity(fact) for fact in change.facts}:
            serving.setdefault(key, []).append(i)
    served: dict[int, list[int]] = {}
    for i, fact in enumerate(facts):
        # An erasure may have been made without a new object, which an audit wants to compare with.
        found = serving.get(identity(fact)) or serving.get((fact.subject, fact.prompt, None), [])
        if len(found) != 1:
            raise ValueError(
                f"fact {fact.name!r} is in {len(found)} of the {len(changes)} changes, needed exactly one that was "
                "made for its subject, prompt and new object"
            )
        served.setdefault(found[0], []).append(i)
    return [Part(tuple(facts[i] for i in mine), tuple(mine), model, changes[c]) for c, mine in served.items()]


def identity(fact: Fact) -> tuple[str, str, str | None]:
    """What makes two facts the same to a change: subject, prompt and new object."""
    return fact.subject, fact.prompt, fact.target_new


def bos_of_change(model: Model, changed: Changed, asked: bool | None = None) -> bool:
    """Whether prompts run with BOS: as the change was made, or for another model as asked.

    Raises:
        ValueError: It was made with another policy than asked, or some of a list with one and some with the other.
    """
    changes = changed if isinstance(changed, Sequence) else [changed] if isinstance(changed, Change) else []
    policies = {change.provenance.prepend_bos for change in changes}
    if len(policies) > 1:
        raise ValueError("some of the changes were made with BOS and some without, needed one policy: make them again")
    theirs = next(iter(policies), None)
    if asked is not None and theirs is not None and asked != theirs:
        raise ValueError(
            f"prepend_bos={asked}, but the change was made with {theirs}: audit it with its own policy, or make it "
            "with the other"
        )
    return bos_policy(model, asked if theirs is None else theirs)
