"""What findings mean, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tl_factedit.attacks.knockout import KnockOut
from tl_factedit.auditing.findings import Findings
from tl_factedit.auditing.retained import Retention
from tl_factedit.auditing.upstream import Upstream
from tl_factedit.auditing.verdict import Axis
from tl_factedit.evaluation.dose import Dose
from tl_factedit.measure.reading import Comparison


def masked_windows(
    knocked: KnockOut | None, written: Sequence[tuple[int, ...] | None], widths: Sequence[int] | None
) -> Iterator[str]:
    if knocked is None:
        return
    for window, why in knocked.masked.items():
        yield f"knock-out of layers {list(window)} tells nothing: {why}"
    if widths is None and None in written:
        yield "knock-outs of several layers together (widths=): what is in two of them wouldn't show in one"


def own_layers_caveat(knocked: KnockOut | None, written: Sequence[tuple[int, ...] | None]) -> Iterator[str]:
    """What a knock-out of the changed layers themselves says less of."""
    if knocked is None or knocked.best is None:
        return
    changed = {layer for layers in written for layer in layers or ()}
    if changed and changed <= set(knocked.best):
        share = float(knocked.of_unedited[knocked.windows.index(knocked.best)])
        yield (
            f"the strongest knock-out takes out all that the change wrote: what comes back ({share:.2f} of what the "
            "unedited model says under it) is what that model knows by other ways; it shows that such ways exist, and "
            "that the change left them"
        )


def retained_axis(findings: Findings, kept: Retention | None) -> Axis:
    if kept is None:
        return Axis(None, "not gathered: decoders want facts of the same relation about other subjects (reference=)")
    rho = findings.native or findings.adaptive
    if rho is None:
        return Axis(None, f"not gathered: {'; '.join(kept.why)}")
    return Axis(rho, f"ρ = {rho:.2f} (1: as before the change, 0: nothing; retained is not used)")


def recoverable_axis(findings: Findings) -> Axis:
    measured = [each for each in (findings.knock_out, findings.route_old) if each is not None and each.n]
    if not measured:
        return Axis(None, "not gathered: no way back to the old object was tried (reference=, routes=)")
    strongest = max(measured, key=lambda each: each.mean)
    return Axis(strongest, f"the old object is back in excess of controls by {strongest:.2f}, by the best way tried")


def describe_context(upstream: Upstream | None, dose: Dose | None, lens: Comparison) -> list[str]:
    lines = []
    if upstream is not None:
        state = "equal bit for bit" if upstream.invariant else "NOT EQUAL, which should be impossible: report this"
        lines.append(
            f"everything up to the key of layer {upstream.layer} is {state} ({upstream.positions} positions): "
            "what is decodable there is a property of the unedited model and no finding about the edit"
        )
    if dose is not None:
        a = dose.critical[~dose.critical.isnan()]
        tie = "never ties" if not len(a) else f"ties at dose {float(a.mean()):.2f} on average"
        lines.append(
            f"the new object leads by {float(dose.override_margin.mean()):.1f} nats and {tie} (descriptive: no null)"
        )
    for reading, when in ((lens.before, "before"), (lens.after, "after")):
        at_end = reading.at(position="last", quantity="percentile_old")[:, -1]
        known = at_end[~at_end.isnan()]
        if len(known):
            lines.append(
                f"lens after the last block, {when}: old object above {float(known.mean()):.0%} of its controls "
                "(null 50%)"
            )
    return lines
