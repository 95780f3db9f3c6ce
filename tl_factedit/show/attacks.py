"""A picture of what an attack brings back."""

from __future__ import annotations

import math

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.backend.state import plain_torch
from tl_factedit.show.interval_chart import Interval, interval_chart
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import Html, join, tag
from tl_factedit.show.page import Picture

COLOURS = {"elsewhere": "#b34b00", "underneath": "#0072b2", "residue": "#6a51a3"}
MOST = 16
"""Most cases in one picture."""

QUESTIONS = {
    "elsewhere": "what the change wrote is switched off",
    "underneath": "the change is in force",
    "residue": "what is left of the old object is read or learnt",
}


@plain_torch()
def attack(recovery: Recovery) -> Picture:
    """What an attack brings back, case by case: the excess of the old object over its controls, with its interval.

    Args:
        recovery: From an attack.

    Raises:
        TypeError: What is given isn't a `Recovery`.
    """
    check_kind(recovery, Recovery, "recovery = attack(population), such as fe.attacks.KnockOut()(population)")
    return Picture(f"Attack: {recovery.attack}", attack_chart(recovery), ())


def attack_chart(recovery: Recovery, *, present: float | None = None) -> Html:
    """The same as a figure, with what counts as present marked."""
    rows = []
    shown, left = _most_telling(recovery)
    for case in shown:
        found = recovery.at(case.key, corrected=True)
        best = recovery.best is not None and case.key == recovery.best.key
        mean, low, high = (math.nan,) * 3 if case.masked else (found.mean, found.low, found.high)
        rows.append(Interval(case.label, mean, low, high, COLOURS[case.shows], case.masked, best))
    chart = interval_chart(
        rows,
        title=f"{recovery.attack}: excess of the old object over its controls",
        x_label="excess, share of facts (corrected 95 % intervals)",
        rule=present,
        rule_label="" if present is None else "counts as present",
    )
    asked = [QUESTIONS[shows] for shows in COLOURS if any(case.shows == shows for case in recovery.cases)]
    best = "no case could be tested"
    if recovery.best is not None:
        best = f"strongest: {recovery.best.label}, {recovery.strongest:.2f}"
    count = f"{int(recovery.known.sum())} of {len(recovery.facts)} facts count"
    caption = f"{'; '.join(asked).capitalize()}. {count}; {best}."
    if left:
        most = f"the {len(shown)} with the largest excess are drawn"
        caption += f" Of {len(recovery.cases)} cases {most}; the table has all."
    return join(tag("h4", recovery.attack.capitalize()), tag("figure", chart, tag("figcaption", caption)))


def _most_telling(recovery: Recovery) -> tuple[list[Case], int]:
    """The cases to draw, in their order, and how many are left out: of many, those with the largest excess."""
    cases = list(recovery.cases)
    if len(cases) <= MOST:
        return cases, 0
    excess = dict(zip(recovery.keys, recovery.excess.mean.nan_to_num(-math.inf).tolist(), strict=True))
    drawn: list[Case] = []
    for shows in COLOURS:  # some of each question, or the strongest would leave no room for the other
        mine = sorted((case for case in cases if case.shows == shows), key=lambda case: -excess[case.key])
        drawn += [case for case in mine if not case.masked][: MOST // 2]
    return [case for case in cases if case in drawn], len(cases) - len(drawn)
