"""A picture of a verdict."""

from __future__ import annotations

from tl_factedit.attacks.attack import Recovery
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate
from tl_factedit.show.attacks import attack_chart
from tl_factedit.show.charts import dose_chart, fired_strips, knock_out_chart, lens_charts
from tl_factedit.show.footprints import footprint_chart
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import Html, join, tag
from tl_factedit.show.page import Picture
from tl_factedit.show.tables import bullets, fact_table, score_table

_BADGE = {
    "FAILED": "#5c5c66",
    "DAMAGED": "#b8321a",
    "ERASED": "#00704f",
    "MOVED": "#6a51a3",
    "INSERTED": "#b34b00",
    "LATENT": "#8a5a00",
    "SCARRED": "#8c2d5a",
    "INCONCLUSIVE": "#24618f",
}


@plain_torch()
def verdict(verdict: Verdict) -> Picture:
    """An audit's verdict on a page: label, axes, reasons, what is missing, and the evidence.

    Args:
        verdict: A verdict from `audit`.

    Raises:
        TypeError: What is given isn't a `Verdict`.
    """
    check_kind(verdict, Verdict, "verdict = fe.audit(model, changed, facts)")
    n = len(verdict.facts)
    asked = "one fact" if n == 1 else f"{n} facts"
    level = f"population of {asked}" if verdict.level == "population" else f"{asked}: descriptive"
    axes = [
        tag("div", tag("b", name), tag("span", *_axis(axis.estimate, axis.says)))
        for name, axis in (("Retained", verdict.retained), ("Recoverable", verdict.recoverable))
    ]
    body = join(
        tag(
            "p",
            tag("span", verdict.label, class_="tlf-badge", style=f"background:{_BADGE[verdict.label]}"),
            f"  ({' and '.join(sorted(verdict.by))}) {level}" if verdict.by else f"  {level}",
        ),
        tag("p", verdict.explain()),
        tag("div", *axes, class_="tlf-axes"),
        tag("h4", "Why"),
        bullets(verdict.reasons),
        join(tag("h4", "What would have shown, with 80 % probability"), bullets(verdict.power))
        if verdict.power
        else None,
        join(tag("h4", "Not gathered, or not precisely enough, for a stronger label"), bullets(verdict.missing))
        if verdict.missing
        else None,
        tag("h4", "Before and after"),
        score_table([verdict.before, verdict.after]),
        fact_table(verdict),
        *(_pictured(recovery, verdict.thresholds.present) for recovery in verdict.attacks),
        lens_charts(verdict),
        dose_chart(verdict.dose) if verdict.dose is not None else None,
        fired_strips(verdict.gains) if verdict.gains else None,
    )
    return Picture("Verdict of the audit", body, (verdict.before.provenance, verdict.after.provenance))


def _pictured(recovery: Recovery, present: float) -> Html:
    """What an attack brought back; of knock-outs also what was silenced, and where the change writes."""
    written = recovery.details.get("footprint")
    return join(
        None if written is None else join(tag("h4", "Where the change writes"), footprint_chart(written)),
        attack_chart(recovery, present=present),
        knock_out_chart(recovery),
    )


def _axis(estimate: Estimate | None, says: str) -> list[Html | str]:
    return [says] if estimate is None else [tag("b", format(estimate, ".2f")), says]
