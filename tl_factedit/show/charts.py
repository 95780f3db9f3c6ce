"""Charts of a verdict's evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tl_factedit.attacks.attack import SURVIVES, Recovery
from tl_factedit.attacks.cells import COMPONENTS, PLACES
from tl_factedit.attacks.silencing import Silencing
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.evaluation.dose import Dose
from tl_factedit.evaluation.edit_gains import Gains
from tl_factedit.measure.reading import Comparison
from tl_factedit.show.heat_map import Scale, heat_map
from tl_factedit.show.line_chart import Line, Rule, line_chart
from tl_factedit.show.markup import Html, join, number, tag
from tl_factedit.show.page import coloured_tokens
from tl_factedit.show.svg import NEW, OLD, line_swatch
from tl_factedit.show.tables import largest_gain, legend

NAMES = {"mlp": "MLP", "attn": "attn"}
WHERE = {"subject": "subject", "last": "last token", "all": "subject on"}


def token_strips(fired: Gains, *, live: bool = True) -> list[Html]:
    """The coloured tokens, once for each edited layer."""
    values = largest_gain(fired)
    limit = max(1.0, float(values.nan_to_num(0).abs().max()))
    out = []
    for layer, row in zip(fired.layers, values, strict=True):
        if len(fired.layers) > 1:
            out.append(tag("h4", f"Layer {layer}"))
        out.append(coloured_tokens(fired.tokens, row.tolist(), limit=limit, live=live))
    return out


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


def knock_out_chart(knocked: Recovery) -> Html | None:
    """How often the old object is first with one component silenced, by layer and place; None if none was alone."""
    combinations = [(c, p) for c in COMPONENTS for p in PLACES]
    cases = {
        (key.cells[0].component, key.cells[0].place, key.cells[0].layer): key
        for key in knocked.keys
        if isinstance(key, Silencing) and key.by == "mean" and len(key.cells) == 1
    }
    rows = [each for each in combinations if any((*each, layer) in cases for *_, layer in cases)]
    if not rows:
        return None
    layers = sorted({layer for *_, layer in cases})
    shows = {case.key: case for case in knocked.cases}

    def share(row: tuple[str, str], layer: int) -> float:
        key = cases.get((*row, layer))
        return math.nan if key is None or shows[key].masked else knocked.share("old_first", key)

    def tooltip(row: tuple[str, str], layer: int) -> str:
        key = cases.get((*row, layer))
        if key is None:
            return "not asked"
        case, before = shows[key], knocked.share("old_first", key, before=True)
        told = case.masked or f"old object first in {number(knocked.share('old_first', key), 2)} of the facts"
        return (
            f"{case.label}: {told} (unedited model {number(before, 2)}); {'off' if case.shows == 'elsewhere' else 'on'}"
        )

    best = knocked.best
    drawing = heat_map(
        [[share(row, layer) for layer in layers] for row in rows],
        scale=Scale.of([0.0, 1.0], "orange"),
        labels=[f"{NAMES[component]}, {WHERE[place]}" for component, place in rows],
        tooltips=[[tooltip(row, layer) for layer in layers] for row in rows],
        neutral=[False] * len(rows),
        strong=[False] * len(rows),
        outlined=next(
            (
                (rows.index((cell.component, cell.place)), layers.index(cell.layer))
                for cell in (best.key.cells if best is not None and isinstance(best.key, Silencing) else ())
                if len(best.key.cells) == 1  # type: ignore[union-attr]
            ),
            None,
        ),
        x_label="layer silenced",
        unit="share of facts",
        name="How often the old object is first with one component silenced",
    )
    caption = (
        "What a component says is replaced by what it says of other subjects. White: never, or it can't tell, as the "
        f"unedited model doesn't spare it in {SURVIVES:.0%} of the facts (a pointer says which). Framed: the strongest."
    )
    return tag("figure", drawing, tag("figcaption", caption))


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


def _lens_lines(lens: Comparison, place: str, old: str, new: str) -> list[Line]:
    return [
        Line(
            f"{name} object, {when}",
            [float(layer) for layer in reading.axes["layer"]],  # type: ignore[arg-type] (this axis has numbers)
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
