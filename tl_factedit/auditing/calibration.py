"""Calibration: the same kind of change made for other subjects, and the references that no change has touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.measure.change import Change, Changed


@dataclass(frozen=True)
class Calibration:
    """The same kind of change, made for other subjects of the relation: what an adaptive probe is trained on.

    Attributes:
        changed: One change for all of them, a change for each, or the model in which they are changed.
        facts: The facts it was made for.
    """

    changed: Changed
    facts: Sequence[Fact]

    def __post_init__(self) -> None:
        """Check that its facts are facts."""
        object.__setattr__(self, "facts", as_facts(self.facts, "calibration.facts"))


def unchanged(reference: Sequence[Fact], changed: Changed, calibration: Calibration | None) -> list[Fact]:
    """The references, without the calibration's subjects where another model is given: those are changed in it too."""
    if calibration is None or isinstance(changed, (Change, Sequence)):
        return list(reference)
    subjects = {fact.subject for fact in calibration.facts}
    return [fact for fact in reference if fact.subject not in subjects]


def check_apart(calibration: Calibration, facts: Sequence[Fact]) -> None:
    """Check that no subject is both among the facts and in the calibration.

    Raises:
        ValueError: One is.
    """
    overlap = sorted({fact.subject for fact in facts} & {fact.subject for fact in calibration.facts})
    if overlap:
        raise ValueError(
            f"{len(overlap)} subjects, such as {overlap[0]!r}, are in the calibration and among the facts, needed "
            "others: a probe recognises those it was trained on"
        )
