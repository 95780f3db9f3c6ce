"""Pictures of what a model says: answers in words, what follows from edits, and what comes when it is asked again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate
from tl_factedit.evaluation.elicitation import Elicited, Which
from tl_factedit.evaluation.in_words import Answer, Answers
from tl_factedit.evaluation.ripple_effects import Ripples
from tl_factedit.show.interval_chart import Interval, interval_chart
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import Html, join, tag
from tl_factedit.show.page import Picture
from tl_factedit.show.svg import FAINT, NEW, OLD
from tl_factedit.show.tables import table

KINDS = {"prompt": "prompt", "paraphrase": "paraphrases", "neighbour": "neighbours"}


@plain_torch()
def answers(found: Answers) -> Picture:
    """How often a model says what it should, and every answer; with those before beside.

    Args:
        found: From `tl_factedit.answers`.

    Raises:
        TypeError: What is given isn't `Answers`.
    """
    check_kind(found, Answers, "fe.answers(model, facts) gives them")
    both = [found] if found.before is None else [found.before, found]
    when = [""] if len(both) == 1 else [" before", " after"]
    rows = list[Interval]()
    for kind, name in KINDS.items():
        for each, then in zip(both, when, strict=True):
            said = each.share(kind, lambda answer: float(answer.names if found.chat else answer.begins))
            forced = each.share(kind, lambda answer: answer.tokens_right)
            colour = FAINT if then == " before" else NEW
            if said.n:
                rows.append(_interval(f"{name}{then}: said", said, colour, strong=then != " before"))
                rows.append(_interval(f"{name}{then}: teacher-forced", forced, colour))
    chart = interval_chart(
        rows, title="What is said, and what teacher forcing makes of it", x_label="share, over facts (95 % intervals)"
    )
    how = "names the wanted object" if found.chat else "begins with the wanted object"
    caption = (
        f"Said: the model's own answer {how}. Teacher-forced: the share of its tokens that come first when the ones "
        f"before are given. The gap after prompts is {found.gap:.2f}."
    )
    heads = ["", "asked", *(f"says{then}" for then in when), "wanted", "as wanted"]
    cells = [
        [
            answer.kind,
            tag("td", answer.asked, class_="t"),
            *(_said(each.each[i], found.facts[answer.fact].target_true) for each in both),
            answer.wanted.strip(),
            "yes" if (answer.names if found.chat else answer.begins) else "no",
        ]
        for i, answer in enumerate(found.each)
    ]
    body = join(
        tag("figure", chart, tag("figcaption", caption)),
        tag("h4", "Every answer"),
        table(heads, cells),
    )
    return Picture("What the model says", body, tuple(each.provenance for each in both))


@plain_torch()
def ripples(found: Ripples) -> Picture:
    """How often each kind of question is answered rightly before and after, and by the old answer.

    Args:
        found: From `tl_factedit.evaluation.ripples`.

    Raises:
        TypeError: What is given isn't `Ripples`.
    """
    check_kind(found, Ripples, "fe.evaluation.ripples(model, edits, cases) gives them")
    rows = list[Interval]()
    for kind in found.kinds:
        mine = [each for each in found.asked if each.kind == kind]
        count = sum(each.counts for each in mine)
        if not count:
            rows.append(Interval(kind, math.nan, note=f"none of {len(mine)} questions counts"))
            continue
        rows.append(
            _interval(f"{kind}: right", found.share(kind), NEW, strong=True, of=f"{count} of {len(mine)} count")
        )
        rows.append(_interval("right before", found.share(kind, "right_before"), FAINT))
        old = found.share(kind, "old")
        if old.n:
            rows.append(_interval("the old answer", old, OLD))
    chart = interval_chart(rows, title="What follows from the edits", x_label="share, over cases (95 % intervals)")
    held = sum(a and b for a, b in zip(found.holds, found.was_known, strict=True))
    caption = (
        f"{len(found.cases)} cases; {held} of their edits were known before and hold. A question counts where the "
        "unedited model answers its conditions."
    )
    heads = ["case", "kind", "asked", "said before", "says after", "right"]
    cells = [
        [
            found.cases[each.case].name,
            each.kind,
            *(tag("td", text, class_="t") for text in (asked, before, after)),
            ("yes" if each.right else "the old answer" if each.old else "no") if each.counts else "doesn't count",
        ]
        for each in found.asked
        for asked, before, after in zip(each.texts, each.said_before, each.said, strict=True)
    ]
    body = join(tag("figure", chart, tag("figcaption", caption)), tag("h4", "Every query"), table(heads, cells))
    return Picture("What follows", body, (found.provenance,))


@plain_torch()
def elicited(found: Elicited) -> Picture:
    """How often the old object comes in sampled answers, beside control objects, before and after.

    Args:
        found: From `tl_factedit.evaluation.elicit`.

    Raises:
        TypeError: What is given isn't `Elicited`.
    """
    check_kind(found, Elicited, "fe.evaluation.elicit(model, edit, facts) gives it")
    rows = list[Interval]()
    for ever, what in ((False, "of the samples"), (True, "ever, of the facts")):
        objects: tuple[tuple[Which, str, str], ...] = (
            ("old", "old object", OLD),
            ("new", "new object", NEW),
            ("control", "a control", FAINT),
        )
        for of, name, colour in objects:
            for before, when in ((True, "before"), (False, "after")):
                share = found.share(of, ever=ever, before=before)
                if share.n:
                    rows.append(_interval(f"{name}, {what}, {when}", share, colour, strong=of == "old" and not before))
    chart = interval_chart(rows, title="What comes when asked again", x_label="share, over facts (95 % intervals)")
    count = len(found.after[0][0])
    top = "all tokens" if found.top_k is None else f"the {found.top_k} likeliest tokens"
    caption = f"{count} samples of each prompt and paraphrase, at temperature {found.temperature:g} from {top}."
    return Picture("Asked again and again", tag("figure", chart, tag("figcaption", caption)), (found.provenance,))


def _interval(label: str, found: Estimate, colour: str, *, strong: bool = False, of: str = "") -> Interval:
    return Interval(label, found.mean, found.low, found.high, colour, of, strong)


def _said(answer: Answer, old: str | None) -> Html:
    """An answer in a cell, marked where it is the old object that it names."""
    says = answer.said.strip() or "(nothing)"
    marks: Sequence[str | Html] = [says]
    if answer.names_old and old is not None:
        at = says.casefold().find(old.strip().casefold())
        if at >= 0:
            end = at + len(old.strip())
            marks = [says[:at], tag("b", says[at:end], style=f"color:{OLD}"), says[end:]]
    return tag("td", *marks, class_="t")
