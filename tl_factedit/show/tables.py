"""Tables of scores, facts and gains, and the small parts that pictures share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tl_factedit.auditing.verdict import Verdict
from tl_factedit.core.estimate import Estimate
from tl_factedit.evaluation.edit_gains import Gains
from tl_factedit.evaluation.scores import Answer, Scores
from tl_factedit.show.markup import Html, clip, join, number, rows, tag, token
from tl_factedit.show.svg import NEW, OLD

_MOST_ROWS = 60


def score_table(both: Sequence[Scores]) -> Html:
    """Efficacy, paraphrase, neighbourhood and probabilities; one column per model."""
    kinds = (
        ("Efficacy", "new object preferred on the rewrite prompt", "efficacy", 2),
        ("Paraphrase", "… on its paraphrases", "paraphrase", 2),
        ("Neighbourhood", "own object preferred for other subjects", "neighbourhood", 2),
        ("Score", "harmonic mean of the three", "score", 2),
        ("p(new)", "probability of the new object", "p_new", 3),
        ("p(old)", "probability of the old object", "p_old", 3),
    )
    several = len(both[0].facts) > 1
    note = "Mean with its 95% bootstrap interval over facts." if several else "One fact: no interval."

    def cell(estimate: Estimate, digits: int) -> Html:
        if several or not estimate.n:
            return tag("td", format(estimate, f".{digits}f").replace("-", "−"))
        return _number(estimate.mean, digits)

    found = [
        [tag("td", tag("b", name), " ", tag("small", why)), *(cell(getattr(s, key), digits) for s in both)]
        for name, why, key, digits in kinds
    ]
    heads = [when if several else tag("th", when, class_="n") for when in _when(both)]
    return join(table(["", *heads], found), tag("small", note))


def prompt_table(both: Sequence[Scores]) -> Html:
    """The probabilities of every prompt, before and after."""
    heads = [
        "",
        "prompt",
        *(tag("th", f"p(true) {when}", class_="n") for when in _when(both)),
        *(tag("th", f"p(new) {when}", class_="n") for when in _when(both)),
        "as wanted",
    ]
    cells = []
    for answers in zip(*(s.answers for s in both), strict=True):
        one: Answer = answers[0]
        cells.append(
            [
                one.ask,
                tag("td", one.prompt, " ", tag("i", f"{one.true.strip()} | {one.new.strip()}"), class_="t"),
                *(_probability(math.exp(-a.nll_true), OLD) for a in answers),
                *(_probability(math.exp(-a.nll_new), NEW) for a in answers),
                " → ".join("yes" if a.success else "no" for a in answers),
            ]
        )
    return join(
        tag("h4", "Every prompt"),
        tag("small", "p: geometric mean over the object's tokens. In grey: true | new object."),
        table(heads, cells),
    )


def fact_table(verdict: Verdict) -> Html:
    """One row per fact: probabilities, rank, margin, critical dose."""
    last = len(verdict.lens.after.axes["layer"]) - 1
    ranks = [r.at(layer=last, position="last", quantity="rank_old") for r in (verdict.lens.before, verdict.lens.after)]
    heads = ["fact", "old → new", "p(old)", "p(new)", "rank of old", "margin, nats", "critical dose", "works"]
    cells = []
    for i, fact in enumerate(verdict.facts):
        was, now = (
            next(a for a in s.answers if a.fact == i and a.ask == "rewrite") for s in (verdict.before, verdict.after)
        )
        margin, critical = (
            (math.nan, math.nan)
            if verdict.dose is None
            else (float(verdict.dose.override_margin[i]), float(verdict.dose.critical[i]))
        )
        cells.append(
            [
                fact.name,
                f"{(fact.target_true or '').strip()} → {(fact.target_new or '').strip()}",
                _change(math.exp(-was.nll_true), math.exp(-now.nll_true)),
                _change(math.exp(-was.nll_new), math.exp(-now.nll_new)),
                _change(float(ranks[0][i]), float(ranks[1][i]), 0),
                _number(margin, 1),
                _number(critical, 2),
                ("yes" if now.success else "no") + (" (same first token)" if now.same_first_token else ""),
            ]
        )
    return join(
        tag("h4", "Each fact"),
        table([heads[0], heads[1], *(tag("th", head, class_="n") for head in heads[2:7]), heads[7]], cells),
    )


def gain_table(fired: Gains) -> Html:
    """Every token with its gain in each edited layer."""
    heads = ["token", *(tag("th", f"gain, layer {layer}", class_="n") for layer in fired.layers)]
    values = largest_gain(fired).T.tolist()
    cells = [
        [_token(piece), *(_number(value) for value in row)] for piece, row in zip(fired.tokens, values, strict=True)
    ]
    return tag(
        "div", _plain_table(heads, cells), class_="tlf-columns", style=f"columns:{80 + 72 * len(fired.layers)}px"
    )


def legend(entries: Sequence[tuple[Html, str] | None]) -> Html:
    """A legend: small drawings with what they mean."""
    return tag("div", *(tag("span", *entry) for entry in entries if entry), class_="tlf-legend")


def bullets(entries: Sequence[str]) -> Html:
    """A bulleted list."""
    return tag("ul", *(tag("li", entry) for entry in entries))


def largest_gain(fired: Gains) -> Tensor:
    """The gain that is largest over the edit's keys, with its sign, [layer pos]."""
    return fired.gain.gather(-1, fired.gain.abs().argmax(-1, keepdim=True))[..., 0]


def _when(both: Sequence[Scores]) -> list[str]:
    return ["before", "after"] if len(both) == 2 else [""]


def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Html:
    """A table that may scroll; of very many rows the first."""
    more = len(cells) - _MOST_ROWS if len(cells) > 2 * _MOST_ROWS else 0
    return join(
        tag("div", _plain_table(heads, cells[:_MOST_ROWS] if more else cells), class_="tlf-wide"),
        tag("p", f"… and {more} more rows: .table() of the result has them all") if more else None,
    )


def _plain_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Html:
    return tag("table", tag("thead", rows([heads], "th")), tag("tbody", rows(cells)))


def _token(piece: str) -> Html:
    label = token(piece)
    shown = clip(label, 40)
    body = shown.lstrip("␣")
    spaces = tag("i", shown[: len(shown) - len(body)]) if body else None
    return tag("td", spaces, body or shown, title=label if shown != label else None)


def _number(value: float, digits: int = 3) -> Html:
    return tag("td", number(value, digits), class_="n")


def _change(before: float, after: float, digits: int = 3) -> Html:
    return tag("td", f"{number(before, digits)} → {number(after, digits)}", class_="n")


def _probability(p: float, colour: str) -> Html:
    """A number over a bar of its length."""
    return tag("td", number(p), class_="n p", style=f"--c:{colour}aa;--p:{100 * p:.0f}%")
