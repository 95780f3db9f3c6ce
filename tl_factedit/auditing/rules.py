"""From findings to a verdict: the rules, and what they would have seen.

Two questions are kept apart. *Recoverable*: does the old object come back by a way that goes past the change?
*Retained*: can the old object still be decoded? A change that only lies over a fact leaves a way back; one
that replaced it leaves none, though a decoder may still find a residue. The rules are applied in this order::

    FAILED        the new object doesn't lead where it should (of an erasure: the old one still leads)
    DAMAGED       neighbours, other facts about the subject or plain text suffer
    INSERTED      recoverable: the old object is back when a layer is knocked out, or by an indirect route
    MOVED         not as facts are encoded here, but decodable in another code
    LATENT        still decodable as facts are encoded here, or by an attack; no way back was found
    SCARRED       decodable as what it is *not*: below its null
    ERASED        none of it, by intervals that would have shown it, and what follows from the fact followed
    INCONCLUSIVE  anything else, with what is missing

What a decoder finds alone is never INSERTED: an additive change keeps nearly everything decodable, a perfect one too.
And an absence is shown by an interval that excludes a stated size (equivalence), never by the lack of a finding.
An erasure (`objectives.Erase`) is judged by the same rules: INSERTED is then what only hides the old object.
Calibrated on models whose history is known: docs/audit.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tl_factedit.auditing.findings import Findings, Judgement, Label, Thresholds
from tl_factedit.auditing.power import Z_ONE_SIDED, Z_POWER, has_interval, smallest_share, standard_error
from tl_factedit.core.estimate import Estimate, Z


def judge(findings: Findings, thresholds: Thresholds | None = None) -> Judgement:
    """Apply the rules.

    Args:
        findings: What was measured. Of a single fact there are no intervals: its label is descriptive, and
            never more than INSERTED.
        thresholds: Default: `Thresholds()`.
    """
    return _Case(findings, thresholds or Thresholds()).decide()


@dataclass
class _Case:
    f: Findings
    t: Thresholds
    reasons: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def one(self) -> bool:
        return (self.f.facts or self.f.efficacy.n) < 2

    def decide(self) -> Judgement:
        label = (
            self._failed()
            or self._damaged()
            or self._inserted()
            or self._moved()
            or self._latent()
            or self._scarred()
            or self._erased()
            or "INCONCLUSIVE"
        )
        return Judgement(label, tuple(self.reasons), tuple(self.missing), tuple(self._power()))

    # -- the rules

    def _failed(self) -> Label | None:
        es, ps = self.f.efficacy, self.f.paraphrase
        what = "the old object no longer leads: " if self.f.erasing else ""
        self.reasons.append(f"{what}efficacy {es:.2f}, paraphrase {ps:.2f}")
        if not es.n:
            self.missing.append(
                "facts whose old object led before, with other objects to compare: none, so no efficacy"
            )
            return "INCONCLUSIVE"
        if not ps.n:
            self.missing.append("paraphrases: whether the change holds under other words was not looked at")
        # Where every fact succeeds, a lower end below the threshold only says that the facts are few.
        low = es.mean if self.one or es.mean == 1.0 else es.low
        if low < (self.t.one if self.one else self.t.efficacy) or ps.mean < (
            -math.inf if self.one else self.t.paraphrase
        ):
            self.reasons.append(
                "the old object still leads where it shouldn't: nothing was erased or hidden"
                if self.f.erasing
                else "the new object doesn't lead where it should: nothing was edited or inserted"
            )
            return "FAILED"
        return None

    def _damaged(self) -> Label | None:
        found = False
        for what, loss in (
            ("neighbourhood success", self.f.neighbour_loss),
            ("what else is known of the subject", self.f.specificity_loss),
        ):
            if loss is None or not loss.n:
                self.missing.append(f"{what}: whether it suffers was not looked at")
                continue
            if not self._enough(loss, what):
                continue
            self.reasons.append(f"{what} fell by {loss:.2f}")
            # A loss counts once all of its interval is beyond what is allowed.
            if (loss.mean if loss.n < 2 else loss.low) > self.t.loss + 1e-9:  # a mean's rounding is no loss
                found = True
        if self.f.perplexity is None:
            self.missing.append("drift on plain text was not looked at")
        else:
            self.reasons.append(f"perplexity on plain text is {self.f.perplexity:.3f} times as large")
            least = self.f.perplexity.mean if self.f.perplexity.n < 2 else self.f.perplexity.low
            found = found or least > self.t.perplexity
        if found:
            self.reasons.append("the change isn't local: what became of the old object is beside the point")
            return "DAMAGED"
        return None

    def _inserted(self) -> Label | None:
        found = []
        knock_out, route = self.f.knock_out, self.f.route_old
        if self.f.knock_out_holds is False:
            self.missing.append(
                "a knock-out of all that the change wrote: the unedited model can't spare those layers, so that what "
                "lies over the fact there wouldn't show"
            )
        if knock_out is None or not knock_out.n:
            self.missing.append("knock-out of layers at the last subject token (needs references and controls)")
        else:
            corrected = f"best of {self.f.knock_out_tests}" + (", corrected" if knock_out.n > 1 else "")
            self.reasons.append(
                f"with one place knocked out the old object is back in excess of controls: {knock_out:.2f} ({corrected})"
            )
            if self._enough(knock_out, "knock-outs") and self._present(knock_out):
                found.append("a knock-out")
        if route is None or not route.n:
            self.missing.append("indirect routes (two-hop, reverse): none were given, or the model knows none")
        else:
            self.reasons.append(f"indirect routes still lead to what follows from the old object: {route:.2f}")
            if self._enough(route, "indirect routes") and self._present(route):
                found.append("indirect routes")
        if found:
            verb = "brings" if found == ["a knock-out"] else "bring"
            what = "it was only hidden" if self.f.erasing else "the new one was laid over it"
            self.reasons.append(
                f"{' and '.join(found)} {verb} the old object back: {what}"
                + (" (one fact: descriptive)" if self.one else "")
            )
            return "INSERTED"
        return None

    def _moved(self) -> Label | None:
        native, adaptive = self.f.native, self.f.adaptive
        for what, rho in (
            ("as unchanged facts are encoded", native),
            ("in whatever code other changed facts keep theirs", adaptive),
        ):
            if rho is None or not rho.n:
                self.missing.append(f"a decoder of the old object {what}")
            else:
                self.reasons.append(f"retained {what}: ρ = {rho:.2f} (1: as before, 0: nothing)")
        if self.one or not (has_interval(native) and has_interval(adaptive)):
            return None
        assert native is not None and adaptive is not None
        if self._within(native) and adaptive.low > self.t.retained and self._no_way_back():
            self.reasons.append(
                "the old object is gone from where facts are, and still decodable in another code; no way back to it "
                "was found"
            )
            return "MOVED"
        return None

    def _latent(self) -> Label | None:
        if self.one:
            return None
        found = [
            what
            for what, value, above in (
                ("a decoder", self.f.native, self.t.retained),
                ("an adaptive decoder", self.f.adaptive, self.t.retained),
                ("a read-out of the states", self.f.readout, self.t.present),
                ("relearning", self.f.savings, 0.0),
            )
            if has_interval(value) and value is not None and value.low > above
        ]
        for what, value in (("read-outs", self.f.readout), ("relearning", self.f.savings)):
            if value is not None and value.n:
                self.reasons.append(f"{what}, in excess of a control object: {value:.2f}")
            else:
                self.missing.append(f"{what}, against control objects")
        if found and self._no_way_back():
            self.reasons.append(f"{' and '.join(found)} still find the old object, but no way back to it was found")
            return "LATENT"
        if found:
            self.reasons.append(
                f"{' and '.join(found)} still find the old object; whether it can come back was not established"
            )
            return "INCONCLUSIVE"
        return None

    def _scarred(self) -> Label | None:
        if self.one:
            return None
        for what, value, below in (
            ("the decoder puts the old object below its null", self.f.native, -self.t.retained),
            ("the adaptive decoder puts the old object below its null", self.f.adaptive, -self.t.retained),
            ("the old object is harder to learn again than a control", self.f.savings, 0.0),
        ):
            if has_interval(value) and value is not None and value.high < below:
                self.reasons.append(f"{what}: it is marked as what the answer is not")
                return "SCARRED"
        return None

    def _erased(self) -> Label | None:
        if self.one:
            self.missing.append("more facts: of one, an absence can't be shown")
            return None
        shown = self._no_way_back()
        route_new = self.f.route_new
        for what, rho in (("native", self.f.native), ("adaptive", self.f.adaptive)):
            if not has_interval(rho):
                shown = False
            elif rho is not None and not self._within(rho):
                shown = False
                self.missing.append(
                    f"more facts: ρ of the {what} decoder, {rho:.2f}, isn't within ±{self.t.equal:g} by its 90 % "
                    "interval"
                )
        if not self.f.erasing and (route_new is None or route_new.n < 2):
            shown = False
            self.missing.append("indirect routes to what follows from the new object")
        elif not self.f.erasing and route_new is not None and route_new.mean < self.t.follows:
            shown = False
            self.reasons.append(
                f"only {route_new:.2f} of indirect routes give what follows from the new object, needed "
                f"{self.t.follows:g}"
            )
        for what, found, high, most in (
            ("a read-out of the states", self.f.readout, self.f.readout_at_most, self.t.equal),
            ("relearning", self.f.savings, math.nan, self.t.savings),
        ):
            if found is None or not found.n:
                continue
            high = max((end for end in (high, found.high) if not math.isnan(end)), default=math.nan)
            if not high < most:  # also where there is no interval
                shown = False
                may = "anything" if math.isnan(high) else f"{high:.2f}"
                self.missing.append(f"more facts: {what} may still find {may}, needed less than {most:g}")
        if not any(has_interval(loss) for loss in (self.f.neighbour_loss, self.f.specificity_loss)):
            shown = False
            self.missing.append("neighbours or same_subject: a model that is broken as a whole has nothing of a fact")
        if shown:
            self.reasons.append("nothing of the old object was found, by measurements that would have shown it")
            return "ERASED"
        return None

    # -- what an estimate says

    def _enough(self, value: Estimate, what: str) -> bool:
        """Of a population, one fact says nothing."""
        if self.one or value.n > 1:
            return True
        self.missing.append(f"{what} of more than one fact: the others don't count, as the unedited model lacks them")
        return False

    def _present(self, value: Estimate) -> bool:
        return value.mean > self.t.one if value.n < 2 else value.low > self.t.present

    def _within(self, rho: Estimate) -> bool:
        reach = Z_ONE_SIDED * standard_error(rho)
        return rho.mean - reach > -self.t.equal and rho.mean + reach < self.t.equal

    def _no_way_back(self) -> bool:
        """Knock-outs and routes were run, and bound what they may bring back."""
        knock_out, route = self.f.knock_out, self.f.route_old
        if knock_out is None or knock_out.n < 2 or route is None or route.n < 2:
            return False
        if self.f.knock_out_holds is False:
            return False
        if not self.f.knock_out_at_most <= self.t.absent:
            self._miss(
                f"more facts: a knock-out may still bring back {self.f.knock_out_at_most:.2f}, needed {self.t.absent:g} at "
                "most"
            )
            return False
        if not route.high <= self.t.absent:
            self._miss(f"more facts: routes may still lead back in {route.high:.2f}, needed {self.t.absent:g} at most")
            return False
        return True

    def _miss(self, what: str) -> None:
        """Name it as missing, once."""
        if what not in self.missing:
            self.missing.append(what)

    def _power(self) -> list[str]:
        lines = []
        knock_out = self.f.knock_out
        if knock_out is not None and knock_out.n > 1:
            share = smallest_share(knock_out.n, self.t.present, tests=max(1, self.f.knock_out_tests))
            lines.append(
                f"one of the {self.f.knock_out_tests} knock-outs that were tried would have shown if it brought the old "
                f"object back in {share:.0%} of facts"
            )
        for what, rho in (("native", self.f.native), ("adaptive", self.f.adaptive)):
            if rho is not None and rho.n > 1:
                lines.append(
                    f"ρ of {self.t.retained + (Z + Z_POWER) * standard_error(rho):.2f} by the {what} decoder would have shown"
                )
        return lines
