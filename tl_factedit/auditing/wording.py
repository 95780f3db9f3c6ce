"""What evidence and findings mean, in words."""

from __future__ import annotations

from collections.abc import Iterator

from tl_factedit.auditing.findings import Findings
from tl_factedit.auditing.gather import Evidence
from tl_factedit.auditing.retained import Retention
from tl_factedit.auditing.verdict import Axis
from tl_factedit.evaluation.scores import Scores


def what_is_missing(evidence: Evidence) -> Iterator[str]:
    """What was left out, and what couldn't tell anything."""
    yield from evidence.not_run
    for recovery in evidence.attacks:
        yield from recovery.details.get("left_out", ())
    if evidence.retention is not None:
        yield from evidence.retention.why
    for recovery in evidence.attacks:
        why: dict[str, list[str]] = {}
        for case in recovery.cases:
            # What is on, and untested, is in nobody's way; that half of a silencing wasn't needed is no gap.
            if case.masked and case.shows == "elsewhere" and "can spare it whole" not in case.masked:
                why.setdefault(case.masked, []).append(case.label)
        for reason, labels in why.items():
            few = "; ".join(labels[:3]) + (f" and {len(labels) - 3} more" if labels[3:] else "")
            yield f"{recovery.attack} of {few}: no conclusion, as {reason}"
        if recovery.details.get("disagree"):
            yield f"{recovery.attack}: mean and resample disagree on {'; '.join(recovery.details['disagree'])}"


def not_compared(scores: Scores) -> Iterator[str]:
    """Which facts no attack could ask about, as their two objects begin alike."""
    same = [answer for answer in scores.answers if answer.ask == "rewrite" and answer.same_first_token]
    if same:
        count = len(scores.facts)
        which = f"{len(same)} of {count} facts" if len(same) < count else "all facts" if count > 1 else "the fact"
        yield (
            f"the objects of {which} begin with one token ({same[0].true!r} and {same[0].new!r}), which is what "
            "attacks and read-outs compare: left out; give new objects that begin with another"
        )


def of_what_was_written(evidence: Evidence) -> Iterator[str]:
    """What was foreseeable: what comes back without the change is what the unedited model says without it too."""
    for recovery in evidence.attacks:
        off = recovery.showing("elsewhere")
        if off is None or off.best is None or "of_unedited" not in off.extra:
            continue
        place = off.keys.index(off.best.key)
        survives, share = (float(off.extra[name][place]) for name in ("survives", "of_unedited"))
        if off.best.covers:
            yield (
                f"the strongest {recovery.attack} takes out all that the change wrote ({off.best.label}), and the "
                f"unedited model keeps {survives:.0%} of its answers under it: that such ways exist was foreseeable "
                f"from it alone; the change left {share:.2f} of what it says there"
            )


def retained_axis(findings: Findings, kept: Retention | None) -> Axis:
    """Is the old object still decodable?"""
    if kept is None:
        return Axis(None, "not gathered: decoders want facts of the same relation about other subjects (reference=)")
    rho = findings.native or findings.adaptive
    if rho is None:
        return Axis(None, f"not gathered: {'; '.join(kept.why)}")
    return Axis(rho, f"ρ = {rho:.2f} (1: as before the change, 0: nothing; retained is not used)")


def recoverable_axis(findings: Findings) -> Axis:
    """Does it come back?"""
    measured = [finding for finding in findings.showing("elsewhere", "underneath") if finding.strongest.n]
    if not measured:
        return Axis(None, "not gathered: no way back to the old object was tried (reference=, routes=)")
    best = max(measured, key=lambda finding: finding.strongest.mean)
    return Axis(
        best.strongest,
        f"the old object is back in excess of its null in {best.strongest:.2f}, by the best way tried "
        f"({best.attack}, {best.case}: {best.shows})",
    )


def describe_context(evidence: Evidence) -> Iterator[str]:
    """What is shown beside, and never judged."""
    upstream, dose, lens = evidence.upstream, evidence.dose, evidence.lens
    if upstream is not None:
        state = "equal bit for bit" if upstream.invariant else "NOT EQUAL, which should be impossible: report this"
        yield (
            f"everything up to the key of layer {upstream.layer} is {state} ({upstream.positions} positions): "
            "what is decodable there is a property of the unedited model and no finding about the edit"
        )
    if dose is not None:
        a = dose.critical[~dose.critical.isnan()]
        tie = "never ties" if not len(a) else f"ties at dose {float(a.mean()):.2f} on average"
        yield f"the new object leads by {float(dose.override_margin.mean()):.1f} nats and {tie} (descriptive: no null)"
    for reading, when in ((lens.before, "before"), (lens.after, "after")):
        at_end = reading.at(position="last", quantity="percentile_old")[:, -1]
        known = at_end[~at_end.isnan()]
        if len(known):
            yield (
                f"lens after the last block, {when}: old object above {float(known.mean()):.0%} of its controls "
                "(null 50%)"
            )
