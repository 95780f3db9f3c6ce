"""The numbers that a verdict rests on, and what counts as how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tl_factedit.core.estimate import Estimate

Label = Literal["FAILED", "DAMAGED", "ERASED", "MOVED", "INSERTED", "LATENT", "SCARRED", "INCONCLUSIVE"]


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
        savings: For an absence, the steps that relearning may save at most, if it was tried (upper end).
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
    savings: float = 3.0


@dataclass(frozen=True)
class Findings:
    """The numbers that a verdict rests on; None: not gathered.

    Attributes:
        efficacy: Share of facts whose new object leads, after the change; of an erasure, whose old object doesn't.
        paraphrase: The same over paraphrases.
        neighbour_loss: By how much neighbourhood success fell.
        specificity_loss: By how much the share of right answers about the subject's other facts fell.
        perplexity: Perplexity on plain text, after over before.
        knock_out: Excess of the old object under the strongest knock-out, corrected for all that were tried.
        knock_out_at_most: The largest upper end of any knock-out, not corrected: for "none of them brings it back" each has
            to show it, and no correction is due.
        knock_out_tests: How many knock-outs were tried (on layers that the unedited model can spare).
        knock_out_holds: Whether one of them took out all the layers that the change wrote; None where it isn't known which
            those are (another model, trained as a whole).
        route_old: Excess of what follows from the old object, on indirect routes.
        route_new: Share of what follows from the new one there.
        native: ρ by a decoder trained on how unchanged facts are encoded in the changed model.
        adaptive: ρ by a decoder of the old object trained on other people's changed facts.
        readout: Excess of the best white-box read-out of the old object.
        readout_at_most: The largest upper end of any read-out, not corrected, as of knock-outs.
        savings: Steps saved in learning the old object again, over a control object.
        erasing: Whether the change was to erase, not to write a new object: nothing new is to follow then.
        facts: How many facts were asked; 0 for those that efficacy is over.
    """

    efficacy: Estimate
    paraphrase: Estimate
    neighbour_loss: Estimate | None = None
    specificity_loss: Estimate | None = None
    perplexity: Estimate | None = None
    knock_out: Estimate | None = None
    knock_out_at_most: float = math.nan
    knock_out_tests: int = 0
    knock_out_holds: bool | None = None
    route_old: Estimate | None = None
    route_new: Estimate | None = None
    native: Estimate | None = None
    adaptive: Estimate | None = None
    readout: Estimate | None = None
    readout_at_most: float = math.nan
    savings: Estimate | None = None
    erasing: bool = False
    facts: int = 0


@dataclass(frozen=True)
class Judgement:
    """What the rules make of some findings.

    Attributes:
        label: The verdict.
        reasons: Why, with the numbers.
        missing: What was not gathered, or not precisely enough, for a stronger label.
        power: The smallest effects that these findings would have shown, with 80 % probability.
    """

    label: Label
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    power: tuple[str, ...]
