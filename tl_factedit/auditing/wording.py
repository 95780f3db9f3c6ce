"""What evidence and findings mean, in words."""

from __future__ import annotations

from collections.abc import Iterator

from tl_factedit.auditing.findings import Findings
from tl_factedit.auditing.gather import Evidence
from tl_factedit.auditing.retained import Retention
from tl_factedit.auditing.verdict import Axis


def what_is_missing(evidence: Evidence, *, widths_given: bool) -> Iterator[str]:
    """What was left out, and what couldn't tell anything."""
    for recovery in evidence.attacks:
        yield from recovery.details.get("left_out", ())
    if evidence.retention is not None:
        yield from evidence.retention.why
    for recovery in evidence.attacks:
        for case in recovery.cases:
            if case.masked:
                yield f"{recovery.attack} of {case.label} tells nothing: {case.masked}"
    switches_off = any(case.layers for recovery in evidence.attacks for case in recovery.cases)
    if switches_off and not widths_given and None in evidence.written:
        yield "knock-outs of several layers together (widths=): what is in two of them wouldn't show in one"


def of_written_layers(evidence: Evidence) -> Iterator[str]:
    """What an attack that switches off the changed layers themselves says less of."""
    changed = {layer for layers in evidence.written for layer in layers or ()}
    for recovery in evidence.attacks:
        best = recovery.best
        if best is None or not changed or not changed <= set(best.layers) or "of_unedited" not in recovery.extra:
            continue
        share = float(recovery.extra["of_unedited"][recovery.keys.index(best.key)])
        yield (
            f"the strongest {recovery.attack} takes out all that the change wrote: what comes back ({share:.2f} of "
            "what the unedited model says under it) is what that model knows by other ways; it shows that such ways "
            "exist, and that the change left them"
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
        f"the old object is back in excess of controls in {best.strongest:.2f}, by the best way tried "
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
