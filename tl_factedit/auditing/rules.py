"""From findings to a verdict: the rules.

Two questions are kept apart. *Recoverable*: does the old object come back, by a way that goes past the change
(elsewhere) or while it is in force (underneath)? *Retained*: can the old object still be decoded, read or learnt? A
change that only lies over a fact leaves a way back; one that replaced it leaves none, though a decoder may still find a
residue. The rules are applied in this order (`RULES`)::

    FAILED        the new object doesn't lead where it should (of an erasure: the old one still leads)
    DAMAGED       neighbours, other facts about the subject or plain text suffer
    INSERTED      recoverable: an attack brings the old object back, elsewhere or underneath
    MOVED         not as facts are encoded here, but decodable in another code
    LATENT        still decodable as facts are encoded here, or a residue of it is found; no way back was
    SCARRED       decodable as what it is *not*: below its null; no way back was found
    ERASED        none of it, by intervals that would have shown it, and what follows from the fact followed
    INCONCLUSIVE  anything else, with what is missing

What a decoder finds alone is never INSERTED: an additive change keeps nearly everything decodable, a perfect one too.
And an absence is shown by an interval that excludes a stated size (equivalence), never by the lack of a finding.
An erasure (`objectives.Erase`) is judged by the same rules: INSERTED is then what only hides the old object.
Calibrated on models whose history is known: docs/audit.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, get_args

from tl_factedit.attacks.attack import AsksWeights
from tl_factedit.auditing.findings import (
    LEAST_ERASED,
    LEAST_FACTS,
    LEAST_ROUTES,
    AttackFinding,
    Findings,
    Judgement,
    Label,
    Thresholds,
)
from tl_factedit.auditing.power import Z_ONE_SIDED, has_interval, power_of, standard_error
from tl_factedit.core.estimate import Estimate


@dataclass(frozen=True)
class Ruling:
    """What one rule makes of some findings.

    Attributes:
        label: Its label if it applies; None where the next rule is to look.
        by: If INSERTED, which questions brought the old object back.
        reasons: What it found, with the numbers.
        missing: What it would have needed, or needed more precisely.
    """

    label: Label | None = None
    reasons: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    by: frozenset[str] = frozenset()


Rule: TypeAlias = Callable[[Findings, Thresholds], Ruling]


def judge(findings: Findings, thresholds: Thresholds | None = None) -> Judgement:
    """Apply the rules.

    Args:
        findings: What was measured. Of a single fact there are no intervals: its label is descriptive, and
            never more than INSERTED.
        thresholds: Default: `Thresholds()`.
    """
    thresholds = thresholds or Thresholds()
    reasons, missing = list[str](), list[str]()
    for rule in RULES:
        ruling = rule(findings, thresholds)
        reasons += ruling.reasons
        missing += [what for what in ruling.missing if what not in missing]
        if ruling.label is not None:
            return Judgement(ruling.label, tuple(reasons), tuple(missing), power_of(findings, thresholds), ruling.by)
    return Judgement("INCONCLUSIVE", tuple(reasons), tuple(missing), power_of(findings, thresholds))


def failed(f: Findings, t: Thresholds) -> Ruling:
    """The change doesn't do what it was made for."""
    es, ps = f.efficacy, f.paraphrase
    what = "the old object no longer leads: " if f.erasing else ""
    found = Ruling(reasons=[f"{what}efficacy {es:.2f}, paraphrase {ps:.2f}"])
    if not es.n:
        found.missing.append("facts whose old object led before, with other objects to compare: none, so no efficacy")
        return Ruling("INCONCLUSIVE", found.reasons, found.missing)
    if not ps.n:
        found.missing.append("whether the change holds under other words (paraphrases) wasn't measured")
    # Where every fact succeeds, a lower end below the threshold only says that the facts are few.
    low = es.mean if f.one or es.mean == 1.0 else es.low
    if low < (t.one if f.one else t.efficacy) or ps.mean < (-math.inf if f.one else t.paraphrase):
        found.reasons.append(
            "the old object still leads where it shouldn't: nothing was erased or hidden"
            if f.erasing
            else "the new object doesn't lead where it should: nothing was edited or inserted"
        )
        return Ruling("FAILED", found.reasons, found.missing)
    return found


def damaged(f: Findings, t: Thresholds) -> Ruling:
    """What should have stayed has suffered."""
    found, is_damaged = Ruling(), False
    for what, loss in (
        ("neighbourhood success", f.neighbour_loss),
        ("what else is known of the subject", f.specificity_loss),
    ):
        if loss is None or not loss.n:
            found.missing.append(f"whether {what} suffers wasn't measured")
        elif _enough(f, loss, what, found):
            found.reasons.append(f"{what} fell by {loss:.2f}")
            # A loss counts once all of its interval is beyond what is allowed.
            if (loss.mean if loss.n < 2 else loss.low) > t.loss + 1e-9:  # a mean's rounding is no loss
                is_damaged = True
    if f.perplexity is None:
        found.missing.append("whether plain text suffers (drift) wasn't measured")
    else:
        found.reasons.append(f"perplexity on plain text is {f.perplexity:.3f} times as large")
        least = f.perplexity.mean if f.perplexity.n < 2 else f.perplexity.low
        is_damaged = is_damaged or least > t.perplexity
    if is_damaged:
        found.reasons.append("the change isn't local: what became of the old object is beside the point")
        return Ruling("DAMAGED", found.reasons, found.missing)
    return found


def inserted(f: Findings, t: Thresholds) -> Ruling:
    """An attack brings the old object back."""
    found, ways, by = Ruling(), list[str](), set[str]()
    for finding in f.showing("elsewhere", "underneath"):
        value, name = finding.strongest, finding.attack
        if finding.covers is False:
            found.missing.append(
                f"{name} of all that the change wrote: the unedited model can't spare it, so that what lies over the "
                "fact there wouldn't show (full=True asks the weights instead)"
            )
        if not value.n:
            how = "that switches the change off" if finding.shows == "elsewhere" else "with the change in force"
            found.missing.append(f"{name}: no case {how} could be tested")
            continue
        corrected = f"the best of all attacks' {finding.tests} cases" + (", corrected" if value.n > 1 else "")
        found.reasons.append(
            f"{name} ({finding.case}): {_what_is_back(name)} is back in excess of its null in {value:.2f} ({corrected})"
        )
        if _enough(f, value, name, found) and _is_present(value, t):
            ways += [name] * (name not in ways)
            by.add(finding.shows)
    if not any(finding.strongest.n for finding in f.showing("elsewhere")):
        found.missing.append("knock-out of what the change wrote (needs references and controls)")
    if f.route_new is None and not any(finding.attack == "indirect routes" for finding in f.attacks):
        found.missing.append("indirect routes (two-hop, reverse): none were given, or the model knows none")
    if ways:
        verb = "brings" if len(ways) == 1 else "bring"
        what = "it was only hidden" if f.erasing else "the new one was laid over it"
        found.reasons.append(
            f"{' and '.join(ways)} {verb} {' and '.join(dict.fromkeys(map(_what_is_back, ways)))} back: {what}"
            + (" (one fact: descriptive)" if f.one else "")
        )
        return Ruling("INSERTED", found.reasons, found.missing, frozenset(by))
    return found


def moved(f: Findings, t: Thresholds) -> Ruling:
    """Gone from where facts are, and still decodable in another code."""
    found = Ruling()
    for what, rho in (
        ("as unchanged facts are encoded", f.native),
        ("in whatever code other changed facts keep theirs", f.adaptive),
    ):
        if rho is None or not rho.n:
            found.missing.append(f"a decoder of the old object {what}")
        else:
            found.reasons.append(f"retained {what}: ρ = {rho:.2f} (1: as before, 0: nothing)")
    if f.few or f.native is None or f.adaptive is None or not (has_interval(f.native) and has_interval(f.adaptive)):
        return found
    if _is_zero(f.native, t) and f.adaptive.low > t.retained and _no_way_back(f, t, found):
        found.reasons.append(
            "the old object is gone from where facts are, and still decodable in another code; no way back to it was "
            "found"
        )
        return Ruling("MOVED", found.reasons, found.missing)
    return found


def latent(f: Findings, t: Thresholds) -> Ruling:
    """A decoder or another residue, and no way back."""
    found = Ruling()
    if f.few:
        return found
    residues = [
        what
        for what, value in (("a decoder", f.native), ("an adaptive decoder", f.adaptive))
        if value is not None and has_interval(value) and value.low > t.retained
    ]
    for finding in f.showing("residue"):
        value = finding.strongest
        if value.n:
            found.reasons.append(f"{finding.attack}, in excess of control objects: {value:.2f}")
        if has_interval(value) and value.low > t.present:
            residues.append(finding.attack)
    if not any(finding.strongest.n for finding in f.showing("residue")):
        found.missing.append("read-outs or relearning, against control objects")
    if residues and _no_way_back(f, t, found):
        found.reasons.append(f"{' and '.join(residues)} still find the old object, but no way back to it was found")
        return Ruling("LATENT", found.reasons, found.missing)
    if residues:
        found.reasons.append(
            f"{' and '.join(residues)} still find the old object; whether it can come back was not established"
        )
        return Ruling("INCONCLUSIVE", found.reasons, found.missing)
    return found


def scarred(f: Findings, t: Thresholds) -> Ruling:
    """Marked as what the answer is not, and no way back."""
    found = Ruling()
    if f.few:
        return found
    scars = [
        f"{what} puts the old object below its null"
        for what, value in (("the decoder", f.native), ("the adaptive decoder", f.adaptive))
        if value is not None and has_interval(value) and value.high < -t.retained
    ]
    scars += [
        f"{finding.attack} finds the old object less than its controls"
        for finding in f.showing("residue")
        if finding.least < -t.retained
    ]
    if not scars:
        return found
    found.reasons.append(f"{' and '.join(scars)}: it is marked as what the answer is not")
    if _no_way_back(f, t, found):
        return Ruling("SCARRED", found.reasons, found.missing)
    found.reasons.append("whether it can come back was not established")
    return Ruling("INCONCLUSIVE", found.reasons, found.missing)


def erased(f: Findings, t: Thresholds) -> Ruling:
    """Nothing of it, by measurements that would have shown it."""
    found = Ruling()
    if f.few:
        found.missing.append(f"more facts: of fewer than {LEAST_FACTS}, an absence can't be shown")
        return found
    shown = _no_way_back(f, t, found)
    fewest = min([x.strongest.n for x in f.showing("elsewhere", "underneath") if x.strongest.n], default=0)
    if min(fewest, f.facts or f.efficacy.n) < LEAST_ERASED:
        shown = False
        found.missing.append(
            f"more facts that the unedited model knows: an absence is claimed of {LEAST_ERASED} in every attack"
        )
    if not f.paraphrase.n:
        shown = False
    elif f.paraphrase.mean < t.efficacy:
        shown = False
        found.missing.append(
            f"a change that holds in other words: paraphrase {f.paraphrase:.2f}, needed {t.efficacy:g}"
        )
    for what, rho in (("native", f.native), ("adaptive", f.adaptive)):
        if rho is None or not has_interval(rho):
            shown = False
        elif not _is_zero(rho, t) or rho.low > t.retained:
            shown = False
            found.missing.append(
                f"more facts: ρ of the {what} decoder, {rho:.2f}, isn't within ±{t.equal:g} by its 90 % interval"
            )
    if not f.erasing and (f.route_new is None or f.route_new.n < LEAST_ROUTES):
        shown = False
        found.missing.append(f"indirect routes to what follows from the new object, of {LEAST_ROUTES} facts at least")
    elif not f.erasing and f.route_new is not None and f.route_new.mean < t.follows:
        shown = False
        found.reasons.append(
            f"only {f.route_new:.2f} of indirect routes give what follows from the new object, needed {t.follows:g}"
        )
    for finding in f.showing("residue"):
        if finding.strongest.n and not _largest(finding) < t.equal:  # also where there is no interval
            shown = False
            may = "anything" if math.isnan(_largest(finding)) else f"{_largest(finding):.2f}"
            found.missing.append(
                f"more facts: {finding.attack} may still find {may} of the old object, needed less than {t.equal:g}"
            )
    for what, loss, most in (
        ("neighbours", f.neighbour_loss, t.loss),
        ("the subject's other facts", f.specificity_loss, t.loss),
        ("perplexity on plain text", f.perplexity, t.perplexity),
    ):
        if loss is None or not has_interval(loss):
            shown = False
            found.missing.append(f"{what}: a model that is broken as a whole has nothing of a fact")
        elif not loss.high <= most:
            shown = False
            found.missing.append(f"more of {what}: it may have suffered, {loss:.2f}, needed {most:g} at most")
    if not any(finding.strongest.n for finding in f.showing("residue")):
        shown = False
    if shown:
        found.reasons.append("nothing of the old object was found, by measurements that would have shown it")
        return Ruling("ERASED", found.reasons, found.missing)
    return found


RULES: tuple[Rule, ...] = (failed, damaged, inserted, moved, latent, scarred, erased)
"""The rules in their order; the first that gives a label decides."""


def _what_is_back(attack: str) -> str:
    """What an attack brings back, in words."""
    return "what follows from the old object" if attack == "indirect routes" else "the old object"


def _enough(f: Findings, value: Estimate, what: str, found: Ruling) -> bool:
    """Whether a population's number is over more than one fact: one says nothing."""
    if f.one or value.n > 1:
        return True
    found.missing.append(f"{what} of more than one fact: the others don't count, as the unedited model lacks them")
    return False


def _is_present(value: Estimate, t: Thresholds) -> bool:
    return value.mean > t.one if value.n < 2 else value.low > t.present


def _is_zero(rho: Estimate, t: Thresholds) -> bool:
    """Whether ρ lies within ± `equal` by its 90 % interval: two one-sided tests."""
    reach = Z_ONE_SIDED * standard_error(rho)
    return rho.mean - reach > -t.equal and rho.mean + reach < t.equal


def _no_way_back(f: Findings, t: Thresholds, found: Ruling) -> bool:
    """Whether attacks of both questions were run, and each bounds what it may bring back.

    Without all that was written there must be no way back; where not all of it can be silenced, the weights are asked
    instead: by their largest directions, and by teaching other facts. All attacks of `NEEDED` must have been tried, and
    what asks the weights must find an override that is known to be one, where that was looked into.
    """
    tested = [finding for finding in f.showing("elsewhere", "underneath") if finding.strongest.n > 1]
    switched_off = any(finding.shows == "elsewhere" and finding.covers for finding in tested)
    shown = switched_off or set(get_args(AsksWeights)) <= {finding.asks_weights for finding in tested}
    if not shown and tested:
        found.missing.append(
            "the changed weights themselves (full=True; of what is hooked into a model they say nothing): not all that "
            "was written can be silenced"
        )
    shown = shown and any(finding.shows == "underneath" for finding in tested)
    if f.untried and tested:
        shown = False
        found.missing.append(f"attacks that an absence needs (full=True, routes=, texts=): {', '.join(f.untried)}")
    if f.control is not None and not switched_off:
        # Silencing all that was written would show any override; where that can't be, those that ask the weights must.
        asking = sorted({finding.attack for finding in tested if finding.asks_weights is not None})
        blind = [name for name in asking if not f.finds_control(name)]
        if blind:
            shown = False
            found.missing.append(
                f"{' and '.join(blind)} isn't shown to find an override of these facts that was made as a control: "
                "what it doesn't find may be there"
            )
    for finding in tested:
        if not finding.at_most <= t.absent:
            shown = False
            found.missing.append(
                f"more facts: {finding.attack} may still bring back the old object in {finding.at_most:.2f}, needed "
                f"{t.absent:g} at most"
            )
    return shown


def _largest(finding: AttackFinding) -> float:
    """The most that an attack may find, not corrected: of a bound on each case none is due."""
    return finding.at_most
