"""The parts of pictures: tables and charts of scores, gains, lens readings and doses.

Each takes a result's numbers and returns a piece of a page, with its heading where it needs one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tl_factedit.auditing.audit import Verdict
from tl_factedit.core.estimate import Estimate
from tl_factedit.evaluation.scores import Answer, Scores
from tl_factedit.evaluation.gains import Dose, Gains
from tl_factedit.attacks.knockout import SURVIVES, KnockOut
from tl_factedit.show.markup import Html, clip, join, number, rows, tag, token
from tl_factedit.show.page import coloured_tokens
from tl_factedit.measure.reading import Comparison, Reading
from tl_factedit.show.svg import NEW, OLD, Line, Rule, line_chart, line_swatch

_MOST_ROWS = 60


def score_table(both: Sequence[Scores]) -> Html:
    """Efficacy, paraphrase, neighbourhood and probabilities; one column a model."""
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
    return join(_table(["", *heads], found), tag("small", note))


def prompt_table(both: Sequence[Scores]) -> Html:
    """Every prompt's own probabilities, before and after."""
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
        _table(heads, cells),
    )


def fact_table(verdict: Verdict) -> Html:
    """One row a fact: probabilities, rank, margin, critical dose."""
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
                f"{fact.target_true.strip()} → {(fact.target_new or '').strip()}",
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
        _table([heads[0], heads[1], *(tag("th", head, class_="n") for head in heads[2:7]), heads[7]], cells),
    )


def token_strips(fired: Gains, *, live: bool = True) -> list[Html]:
    """The coloured tokens, once for each edited layer."""
    values = _strongest(fired)
    limit = max(1.0, float(values.nan_to_num(0).abs().max()))
    out = []
    for layer, row in zip(fired.layers, values, strict=True):
        if len(fired.layers) > 1:
            out.append(tag("h4", f"Layer {layer}"))
        out.append(coloured_tokens(fired.tokens, row.tolist(), limit=limit, live=live))
    return out


def gain_table(fired: Gains) -> Html:
    """Every token with its gain in each edited layer."""
    heads = ["token", *(tag("th", f"gain, layer {layer}", class_="n") for layer in fired.layers)]
    values = _strongest(fired).T.tolist()
    cells = [
        [_token(piece), *(_number(value) for value in row)] for piece, row in zip(fired.tokens, values, strict=True)
    ]
    return tag(
        "div", _plain_table(heads, cells), class_="tlf-columns", style=f"columns:{80 + 72 * len(fired.layers)}px"
    )


def fired_strips(fired: Sequence[Gains]) -> Html:
    """Where an edit fires in some texts, without numbers beside them."""
    return join(
        tag("h4", "Where the edit fires"),
        *(strip for one in fired[:6] for strip in token_strips(one, live=False)),
        tag(
            "small",
            "Gain: vermilion −1, white 0, blue 1 (as at its key); a pointer shows the number.",
        ),
    )


def lens_charts(verdict: Verdict) -> Html:
    """The logit lens by layer, at the last subject token and the last token, against controls where there are any."""
    lens, n = verdict.lens, len(verdict.facts)
    edited = [] if verdict.upstream is None else [Rule(float(verdict.upstream.layer), "x", "edited layer", high=True)]
    places = (("subject", "at the last subject token"), ("last", "at the last token"))
    charts = [
        line_chart(
            _lens_lines(lens, place, "logp_old", "logp_new"),
            title=f"Log-probability {where}",
            x_label="after layer",
            y_label="log p, nats",
            y_range=_shared_range(lens, "logp_old", "logp_new"),
            rules=edited,
        )
        for place, where in places
    ]
    ranked = _shared_range(lens, "percentile_old", "percentile_new") is not None
    if ranked:
        null = Rule(0.5, "y", "null")
        charts += [
            line_chart(
                _lens_lines(lens, place, "percentile_old", "percentile_new"),
                title=f"Share of controls below, {place} token",
                x_label="after layer",
                y_label="share of controls",
                y_range=(-0.03, 1.03),
                rules=[null, *(Rule(r.at, "x") for r in edited)],
            )
            for place, _ in places
        ]
    keys = [
        (line_swatch(colour, dashed=dashed), f"{name} object, {when}")
        for name, colour in (("old", OLD), ("new", NEW))
        for when, dashed in (("before", True), ("after", False))
    ]
    caption = (
        f"The model's own head read off the residual stream{'' if n == 1 else f' (mean over {n} facts)'}; "
        "objects by their first token. At the subject this measures which attributes the stream holds, "
        "not a prediction."
    )
    if ranked:
        caption += " A share of 0.5 is what a stream that knows nothing of the object would give."
    return join(
        tag("h4", "Logit lens, layer by layer"),
        tag("figure", legend(keys), tag("div", *charts, class_="tlf-charts"), tag("figcaption", caption)),
    )


def knock_out_chart(knocked: KnockOut) -> Html:
    """Which object comes first when a layer is knocked out, by layer, beside how the unedited model fares."""
    single = [(i, window[0]) for i, window in enumerate(knocked.windows) if len(window) == 1]
    layers = [float(layer) for _, layer in single]

    def share(reading: Reading, quantity: str, label: str, colour: str, *, dashed: bool = False) -> Line:
        values = reading.at(quantity=quantity)[knocked.known, 1:].nanmean(0)
        return Line(label, layers, [float(values[i]) for i, _ in single], colour, dashed, 1.6 if dashed else 2.2)

    chart = line_chart(
        [
            share(knocked.before, "old_first", "old object, unedited model", OLD, dashed=True),
            share(knocked.after, "old_first", "old object", OLD),
            share(knocked.after, "new_first", "new object", NEW),
            share(knocked.after, "control_first", "a control object, on average", "#9a9aa5"),
        ],
        title="First among the objects, one layer's MLP knocked out",
        x_label="layer knocked out at the last subject token",
        y_label="share of facts",
        y_range=(-0.03, 1.03),
        rules=[Rule(SURVIVES, "y", "needed of the unedited model")],
        width=480.0,
        height=270.0,
    )
    keys = [
        (line_swatch(OLD, dashed=True), "old object, unedited model"),
        (line_swatch(OLD, dashed=False), "old object, changed model"),
        (line_swatch(NEW, dashed=False), "new object, changed model"),
        (line_swatch("#9a9aa5", dashed=False), "a control object, changed model"),
    ]
    best = "" if knocked.best is None else f" Strongest: layers {list(knocked.best)}, excess {knocked.strongest:.2f}."
    caption = (
        "The MLP's output at the last subject token is replaced by its mean over other subjects. Layers that the "
        f"unedited model can't spare tell nothing.{best}"
    )
    return join(tag("h4", "Knock-out"), tag("figure", legend(keys), chart, tag("figcaption", caption)))


def dose_chart(dose: Dose) -> Html:
    """The lead of the new object by dose, with the critical doses marked."""
    n, doses, critical = len(dose.margin), dose.doses.tolist(), dose.critical
    known = critical[~critical.isnan()]
    lines = [
        Line(f"fact {i}, dose", doses, m, "#9a9aa5", width=1.2) for i, m in enumerate(dose.margin.tolist()) if n > 1
    ]
    lines.append(Line("mean, dose" if n > 1 else "dose", doses, dose.margin.nanmean(0).tolist(), width=2.4))
    tie = (
        [Rule(float(known[0]), "x", f"critical dose {number(float(known[0]), 2)}", high=True)]
        if n == 1 and len(known)
        else []
    )
    chart = line_chart(
        lines,
        title="Lead of the new object by dose",
        x_label="dose a: share of the edit at the last subject token",
        y_label="log p(new) − log p(old), nats",
        rules=[Rule(0.0, "y", "tie"), *tie, Rule(1.0, "x", "as edited")],
        dots=[(float(a), 0.0, f"critical dose {number(float(a), 2)}") for a in known],
        width=480.0,
        height=270.0,
    )
    where = (
        "they never do here" if not len(known) else f"{number(float(known.mean()), 2)}{' on average' if n > 1 else ''}"
    )
    caption = (
        f"Critical dose (circles): the least share of the edit at which both objects tie: {where}. "
        "Descriptive: at dose 0 the model is nearly the unedited one by construction."
    )
    return join(tag("h4", "Dose curve"), tag("figure", chart, tag("figcaption", caption)))


def legend(entries: Sequence[tuple[Html, str] | None]) -> Html:
    """Small drawings with what they mean."""
    return tag("div", *(tag("span", *entry) for entry in entries if entry), class_="tlf-legend")


def bullets(entries: Sequence[str]) -> Html:
    """A list."""
    return tag("ul", *(tag("li", entry) for entry in entries))


def _lens_lines(lens: Comparison, place: str, old: str, new: str) -> list[Line]:
    return [
        Line(
            f"{name} object, {when}",
            [float(layer) for layer in reading.axes["layer"]],  # type: ignore[arg-type]
            reading.at(position=place, quantity=quantity).nanmean(0).tolist(),
            colour,
            dashed=when == "before",
            width=1.6 if when == "before" else 2.2,
        )
        for name, quantity, colour in (("old", old, OLD), ("new", new, NEW))
        for when, reading in (("before", lens.before), ("after", lens.after))
    ]


def _shared_range(lens: Comparison, *quantities: str) -> tuple[float, float] | None:
    """One vertical axis for the charts that stand side by side; None if there are no numbers."""
    values = torch.stack([r.at(quantity=q).nanmean(0) for r in (lens.before, lens.after) for q in quantities])
    known = values[values.isfinite()]
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def _strongest(fired: Gains) -> Tensor:
    """The gain that is largest over the edit's keys, with its sign, [layer pos]."""
    return fired.gain.gather(-1, fired.gain.abs().argmax(-1, keepdim=True))[..., 0]


def _when(both: Sequence[Scores]) -> list[str]:
    return ["before", "after"] if len(both) == 2 else [""]


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Html:
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
