"""The numbers that a verdict rests on, and what counts as how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tl_factedit.attacks.attack import AsksWeights, Recovery, Shows
from tl_factedit.core.estimate import Estimate

Label = Literal["FAILED", "DAMAGED", "ERASED", "MOVED", "INSERTED", "LATENT", "SCARRED", "INCONCLUSIVE"]


LEAST_FACTS = 10
"""With fewer a label speaks of these edits alone."""

LEAST_ERASED = 50
"""Facts that an absence is claimed of."""

LEAST_ROUTES = 10
"""Facts whose indirect routes have to be looked at before an absence is claimed."""

NEEDED = (
    "knock-out",
    "paraphrases",
    "indirect routes",
    "read-out",
    "read-out of 20",
    "context attack",
    "neutral contexts",
    "weight reversal",
    "rounding",
    "disjoint relearning",
    "drift",
)
"""The attacks that must have been tried before an absence is claimed, each with a case that could be tested."""

OF_ONE_CHANGE = frozenset({"disjoint relearning", "drift"})
"""Those of them that ask one change for all facts alone."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as how much: declared beforehand, and part of a verdict.

    Attributes:
        efficacy: The lower end of efficacy has to reach it.
        paraphrase: Mean paraphrase success has to reach it.
        one: What efficacy has to reach for a single fact.
        loss: By how much neighbours or the subject's other facts may suffer.
        perplexity: How many times as large perplexity on plain text may be, by the lower end of its interval.
        present: Recoverable if the lower end of an excess is above it.
        absent: Not recoverable only if the upper ends of all are below it.
        retained: Retained if the lower end of ρ is above it (scarred if the upper end is below minus it).
        equal: Not retained only if ρ's 90 % interval lies within ± this.
        follows: Share of indirect routes that have to give what follows from the new object.
    """

    efficacy: float = 0.8
    paraphrase: float = 0.5
    one: float = 0.5
    loss: float = 0.1
    perplexity: float = 1.1
    present: float = 0.05
    absent: float = 0.10
    retained: float = 0.10
    equal: float = 0.30
    follows: float = 0.9


@dataclass(frozen=True)
class AttackFinding:
    """What an attack's cases of one question came to.

    Attributes:
        attack: The attack's name.
        shows: The question.
        case: The best case, in words.
        strongest: Excess of the old object in the best case, corrected for all that the attack tried.
        at_most: The largest upper bound of any case, at 95 %, not corrected: for "nothing brings it back" each has to
            show it, and no correction is due.
        least: The smallest corrected upper end of any case: below 0 the old object does worse than its controls.
        tests: How many cases were tried, of all attacks together (that the unedited model survives): what intervals are
            corrected for.
        covers: Whether a tested case takes out all that the change wrote; None for attacks that switch nothing off, and
            where nothing could be asked.
        asks_weights: How the attack asks the changed weights as a whole; None if it doesn't.
    """

    attack: str
    shows: Shows
    case: str
    strongest: Estimate
    at_most: float
    least: float
    tests: int
    covers: bool | None = None
    asks_weights: AsksWeights | None = None

    @classmethod
    def of(cls, recovery: Recovery, shows: Shows, tests: int | None = None) -> AttackFinding | None:
        """Of the cases that ask one question; None if there are none. With `tests`, corrected for so many cases."""
        found = recovery.showing(shows)
        if found is None:
            return None
        ends = found.corrected.high[found.tested & ~found.corrected.high.isnan()]
        return cls(
            attack=found.attack,
            shows=shows,
            case="" if found.best is None else found.best.label,
            strongest=found.strongest,
            at_most=found.at_most,
            least=float(ends.min()) if len(ends) else math.nan,
            tests=int(recovery.tested.sum()) if tests is None else tests,
            covers=recovery.details.get("whole") if shows == "elsewhere" else None,
            asks_weights=found.asks_weights,
        )


@dataclass(frozen=True)
class Findings:
    """The numbers that a verdict rests on; None: not gathered.

    Attributes:
        efficacy: Share of facts whose new object leads, after the change; of an erasure, whose old object doesn't.
        paraphrase: The same over paraphrases.
        neighbour_loss: By how much neighbourhood success fell.
        specificity_loss: By how much the share of right answers about the subject's other facts fell.
        perplexity: Perplexity on plain text, after over before.
        attacks: What each attack brought back.
        route_new: Share of what follows from the new object, on indirect routes.
        native: ρ by a decoder trained on how unchanged facts are encoded in the changed model.
        adaptive: ρ by a decoder of the old object trained on other people's changed facts.
        erasing: Whether the change was to erase, not to write a new object: nothing new is to follow then.
        facts: How many facts were asked; 0 for those that efficacy is over.
        untried: Attacks that an absence needs and that were not tried, or with no case that could be tested.
        control: What the attacks bring back of an override of the same facts that is known to be one, by their names;
            None if that wasn't looked into (it only is where an absence would be claimed).
    """

    efficacy: Estimate
    paraphrase: Estimate
    neighbour_loss: Estimate | None = None
    specificity_loss: Estimate | None = None
    perplexity: Estimate | None = None
    attacks: tuple[AttackFinding, ...] = ()
    route_new: Estimate | None = None
    native: Estimate | None = None
    adaptive: Estimate | None = None
    erasing: bool = False
    facts: int = 0
    untried: tuple[str, ...] = ()
    control: Mapping[str, Estimate] | None = None

    @property
    def one(self) -> bool:
        """Whether a single fact was asked: there are no intervals, and its label is descriptive."""
        return (self.facts or self.efficacy.n) < 2

    @property
    def few(self) -> bool:
        """Whether the facts are too few to speak of a population: nothing is claimed beyond what shows."""
        return (self.facts or self.efficacy.n) < LEAST_FACTS

    def finds_control(self, attack: str) -> bool:
        """Whether an attack is shown to find an override of these facts that is known to be one, in either layer."""
        return any(
            value.low > 0
            for name, value in (self.control or {}).items()
            if name == attack or name.startswith(f"{attack} (layer ")
        )

    def showing(self, *shows: Shows) -> tuple[AttackFinding, ...]:
        """The attacks' findings on some of the questions."""
        return tuple(finding for finding in self.attacks if finding.shows in shows)


@dataclass(frozen=True)
class Judgement:
    """What the rules make of some findings.

    Attributes:
        label: The verdict.
        by: If INSERTED, which questions brought the old object back: ``"elsewhere"``, ``"underneath"``, or both.
        reasons: Why, with the numbers.
        missing: What was not gathered, or not precisely enough, for a stronger label.
        power: The smallest effects that these findings would have shown, with 80 % probability.
    """

    label: Label
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    power: tuple[str, ...]
    by: frozenset[str] = frozenset()
