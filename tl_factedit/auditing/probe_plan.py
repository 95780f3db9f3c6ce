"""Which relations a linear probe of the old objects can be trained for, and on which references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tl_factedit.core.facts import Fact
from tl_factedit.core.words import counted

LEAST_FOR_AN_OBJECT = 4
"""Training subjects that an object needs to be a class; a probe of few is blind and would find nothing anywhere."""

LEAST_OBJECTS = 8
"""With fewer objects, the new one says much about the old one (of two, everything)."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Which facts of a relation are read, and by probes of what.

    Attributes:
        relation: Name of the relation.
        objects: The classes.
        facts: The facts that are read: those whose old object is a class.
        others: The references that the native probe is trained on.
        several: Whether there are other relations.
    """

    relation: str
    objects: tuple[str, ...]
    facts: tuple[Fact, ...]
    others: tuple[Fact, ...]
    several: bool

    @property
    def of(self) -> str:
        """The relation in words, where there are several."""
        return f" of {self.relation!r}" if self.several else ""


def plan_by_relation(facts: Sequence[Fact], others: Sequence[Fact]) -> tuple[list[Plan], list[str]]:
    """A plan for each relation that a probe can be trained for, and the reasons why others have none.

    Args:
        facts: The changed facts.
        others: References of the same relations about other subjects.
    """
    relations = list(dict.fromkeys(fact.group for fact in facts))
    plans, notes = list[Plan](), list[str]()
    for relation in relations:
        of_relation = [fact for fact in facts if fact.group == relation]
        known = [fact for fact in others if fact.group == relation]
        objects = objects_with_subjects(known)
        if len(objects) < LEAST_OBJECTS:
            notes.append(
                f"the references give {len(objects)} objects of {relation!r} with {LEAST_FOR_AN_OBJECT} or more other "
                f"subjects each, needed {LEAST_OBJECTS}: no decoder was trained"
                + (f" for its {counted(len(of_relation), 'fact')}" if len(relations) > 1 else "")
            )
            continue
        kept = [fact for fact in of_relation if fact.target_true in objects]
        plan = Plan(
            relation,
            tuple(objects),
            tuple(kept),
            tuple(fact for fact in known if fact.target_true in objects),
            len(relations) > 1,
        )
        if left := len(of_relation) - len(kept):
            notes.append(
                f"{counted(left, 'fact')}{plan.of} {'was' if left == 1 else 'were'} left out: too few other subjects "
                "have their old objects"
            )
        if kept:
            plans.append(plan)
    return plans, notes


def objects_with_subjects(facts: Sequence[Fact], *, least: int = LEAST_FOR_AN_OBJECT) -> list[str]:
    """The objects that enough different subjects have, in the order of their names."""
    counts = Counter(target for target in {fact.subject: fact.old for fact in facts}.values())
    return sorted(target for target, count in counts.items() if count >= least)
