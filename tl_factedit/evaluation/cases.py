"""Edits with what should follow from them, as benchmarks of ripple effects give them: plain data.

A *case* is some facts that are edited together, and questions that each hold for a kind of consequence. A question may
be asked in several texts, and may count only where the unedited model answers others: what an edit should carry over to
is nothing that the model never knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

from tl_factedit.core.facts import Fact, as_facts, check_text
from tl_factedit.core.kinds import as_several
from tl_factedit.core.spacing import stripped

Names: TypeAlias = tuple[str, ...]
"""One thing by all its names."""


@dataclass(frozen=True)
class Query:
    """A text that a model is asked, and what is right.

    Attributes:
        text: As it is asked, a question or the beginning of a sentence.
        answers: What has to be named: a name, a list of names of one thing (any counts), or a list of such lists, all
            of which have to be named.
        old: Names of what was right before the edit, where that is something else.

    Raises:
        ValueError: A text is empty, or there is no answer.

    Example:
        >>> fe.evaluation.Query("Germany's capital is", ["Bonn", "Federal City of Bonn"]).answers
        (('Bonn', 'Federal City of Bonn'),)
    """

    text: str
    answers: Sequence[Any]
    _: KW_ONLY
    old: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the texts, and freeze the lists."""
        _check(self.text, "text")
        given: Any = self.answers
        if not isinstance(given, (str, list, tuple)):
            raise ValueError(f"answers is {given!r}, needed names")
        several = [given] if isinstance(given, str) else list(given)
        groups = several if several and all(isinstance(each, (list, tuple)) for each in several) else [several]
        object.__setattr__(self, "answers", tuple(_named(group, "answers") for group in groups))
        object.__setattr__(
            self, "old", _named([self.old] if isinstance(self.old, str) else self.old, "old", some=False)
        )


@dataclass(frozen=True)
class Question:
    """One consequence of a case's edits, or something that they should leave alone.

    Attributes:
        kind: What it asks for, such as ``"multi-hop"`` or ``"relation specificity"``: what tables are sorted by.
        queries: How it is asked; it is answered rightly if any of them is.
        every: Whether all of them have to be.
        conditions: What the unedited model has to answer rightly for it to count.

    Raises:
        ValueError: No queries, or something else than queries.
    """

    kind: str
    queries: Sequence[Query]
    _: KW_ONLY
    every: bool = False
    conditions: Sequence[Query] = ()

    def __post_init__(self) -> None:
        """Check the queries, and freeze the lists."""
        _check(self.kind, "kind")
        for name in ("queries", "conditions"):
            object.__setattr__(self, name, as_several(getattr(self, name), Query, name, "a Query(text, answers)"))
        if not self.queries:
            raise ValueError("queries is empty, needed at least one")


@dataclass(frozen=True)
class EditCase:
    """Facts that are edited together, and what is asked then.

    Attributes:
        facts: The edits, each with a ``target_new``.
        questions: What follows, and what should stay.
        id: Its name in tables.

    Raises:
        ValueError: No facts or no questions; a fact without ``target_new``.
    """

    facts: Sequence[Fact]
    questions: Sequence[Question]
    id: str | int | None = None

    def __post_init__(self) -> None:
        """Check the parts, and freeze the lists."""
        object.__setattr__(self, "facts", as_facts(self.facts))
        how = "a Question(kind, queries)"
        object.__setattr__(self, "questions", as_several(self.questions, Question, "questions", how))
        for name in ("facts", "questions"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, needed at least one")
        for fact in self.facts:
            if fact.target_new is None:
                raise ValueError(f"fact {fact.name!r} has no target_new, needed one: a case is of edits")

    @property
    def name(self) -> str:
        """Its id, or its first fact's name."""
        return self.facts[0].name if self.id is None else str(self.id)


def _check(text: Any, name: str) -> None:
    check_text(text, name)
    if not stripped(text):
        raise ValueError(f"{name} is {text!r}, needed some text")


def _named(given: Any, name: str, *, some: bool = True) -> Names:
    """Names, without those that are given twice."""
    if not isinstance(given, (list, tuple)) or (some and not given):
        raise ValueError(f"{name} is {given!r}, needed names")
    for each in given:
        _check(each, name)
    return tuple(dict.fromkeys(each.strip() for each in given))
