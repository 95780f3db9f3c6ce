"""A fact: (subject, relation, object) as text. Nothing here knows a tokenizer or a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Fact:
    """One fact that a model may know, and what it is to be changed into.

    Targets are *continuations* of the prompt and are used letter for letter: after
    ``"{} is located in the city of"`` the target is ``" Paris"``, with its space.

    Attributes:
        subject: The subject as it stands in the text, e.g. ``"The Eiffel Tower"``.
        prompt: A template that holds exactly one ``"{}"``, where the subject goes.
        target_true: The object the model is asked for before any edit (o_old).
        target_new: The object an edit is to write (o_new); editors need it, tracing does not.
        paraphrases: Other ways to ask for the same object: templates with one ``"{}"``, or whole texts.
        neighbours: Whole prompts about *other* subjects, whose answers an edit must leave alone.
        neighbour_targets: The right answer of each neighbour; empty means `target_true` for all
            (as in CounterFact, whose neighbours share the object).
        controls: Other objects that the relation could have had: the null against which a score
            of `target_true` or `target_new` is read.
        relation: A name for the relation, e.g. ``"P276"`` or ``"located in"``.
        id: A name for the fact in tables.

    Raises:
        ValueError: The prompt has no ``"{}"`` or more than one; subject or a target is empty.

    Example:
        >>> fact = fe.Fact("The Eiffel Tower", "{} is located in the city of", " Paris", " Rome")
        >>> fact.text
        'The Eiffel Tower is located in the city of'
    """

    subject: str
    prompt: str
    target_true: str
    target_new: str | None = None
    _: KW_ONLY
    paraphrases: Sequence[str] = ()
    neighbours: Sequence[str] = ()
    neighbour_targets: Sequence[str] = ()
    controls: Sequence[str] = ()
    relation: str | None = None
    id: str | int | None = None

    def __post_init__(self) -> None:
        """Check the text, and freeze the sequences."""
        _one_slot(self.prompt, "prompt")
        if not self.subject.strip():
            raise ValueError(f"subject is {self.subject!r}, needed some text: give the subject's name")
        for name in ("target_true", "target_new"):
            target = getattr(self, name)
            if target is not None and not target.strip():
                raise ValueError(
                    f"{name} is {target!r}, needed some text: give the object as the continuation "
                    'of the prompt, such as " Paris"'
                )
        for name in ("paraphrases", "neighbours", "neighbour_targets", "controls"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"{name} is the string {given!r}, needed a list of strings: write [{given!r}]")
            object.__setattr__(self, name, tuple(given))
        for paraphrase in self.paraphrases:
            if paraphrase.count("{}") > 1:
                _one_slot(paraphrase, "paraphrase")
        if self.neighbour_targets and len(self.neighbour_targets) != len(self.neighbours):
            raise ValueError(
                f"{len(self.neighbour_targets)} neighbour_targets for {len(self.neighbours)} neighbours, "
                "needed one each (or none, when target_true answers all of them)"
            )
        _warn_of_glued_words(self)

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.fill(self.prompt)

    @property
    def group(self) -> str:
        """Which facts it can be compared with: those of its relation or, where none is named, of its prompt."""
        return self.prompt if self.relation is None else self.relation

    def fill(self, template: str) -> str:
        """`template` with the subject in the place of ``"{}"``, or as it is if it has none."""
        return template.replace("{}", self.subject, 1)

    def but(self, **changes: Any) -> Fact:
        """A copy with some fields changed, e.g. ``fact.but(target_new=" Rome")``."""
        return replace(self, **changes)

    @property
    def name(self) -> str:
        """What tables call this fact: its id, or its subject."""
        return str(self.subject if self.id is None else self.id)


def _one_slot(template: str, what: str) -> None:
    slots = template.count("{}")
    if slots != 1:
        raise ValueError(
            f'{what} {template!r} holds {slots} "{{}}", needed exactly one: put "{{}}" where the subject goes'
        )


def _warn_of_glued_words(fact: Fact) -> None:
    """Warn of ``"… city of" + "Paris"``: the model would be asked to go on as "ofParis"."""
    end = fact.text[-1]
    for target in (fact.target_true, fact.target_new or " "):
        if end.isascii() and end.isalnum() and target[0].isascii() and target[0].isalnum():
            warnings.warn(
                f"target {target!r} goes on inside the prompt's last word "
                f"({fact.text.split()[-1] + target!r}): begin it with a space if it is a new word",
                stacklevel=4,
            )


def as_facts(facts: Fact | Iterable[Fact]) -> tuple[Fact, ...]:
    """Some facts, or a single one, as a tuple."""
    return (facts,) if isinstance(facts, Fact) else tuple(facts)


def check_distinct(facts: Sequence[Fact]) -> None:
    """See that there are facts, each once: an interval over facts takes them for different ones.

    Raises:
        ValueError: None is given, or one twice.
    """
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    seen: list[Fact] = []
    known: set[str] = set()
    for fact in facts:
        if fact.text in known and fact in seen:
            raise ValueError(f"fact {fact.name!r} is given twice, needed each once: it would count as two facts")
        known.add(fact.text)
        seen.append(fact)
