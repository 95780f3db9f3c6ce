"""A picture of the causal traces of many facts."""

from __future__ import annotations

import math

from tl_factedit.backend.state import plain_torch
from tl_factedit.locate.trace_result import ROLES, Trace
from tl_factedit.show.heat_map import Scale, heat_map
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import join, number, tag
from tl_factedit.show.page import Picture
from tl_factedit.show.svg import box_swatch
from tl_factedit.show.tables import legend
from tl_factedit.show.trace_words import (
    COMPONENTS,
    HOW,
    HUES,
    UNITS,
    VERBS,
    at_last_subject_token,
    severed_of,
    window_of,
)


@plain_torch()
def average(trace: Trace, *, normalised: bool = False) -> Picture:
    """The mean effects of many facts, by what a token is in its prompt and by layer.

    The box marks the largest of them anywhere but at the prompts' last token, where the last layers have all of the
    effect whatever the facts. What the last subject token carries stands below the drawing.

    Args:
        trace: A trace of several facts, from `causal_trace`.
        normalised: Whether to show shares of the total effect (`Trace.fraction`) instead.

    Raises:
        TypeError: What is given isn't a `Trace`.
        ValueError: The trace is of one fact, or no fact's total effect is large enough for shares of it.
    """
    check_kind(trace, Trace, HOW)
    if len(trace.facts) < 2:
        raise ValueError("the trace is of one fact, needed several to average: take show.trace(trace)")
    found = trace.average(normalised=normalised)
    rows = [r for r in range(len(ROLES)) if bool(found.n[r].any())]
    if not rows:
        raise ValueError("no fact has a total effect of 0.05, needed some for shares of it: take normalised=False")
    mean, low, high, n = (each[rows] for each in (found.mean, found.low, found.high, found.n))
    names = [ROLES[r] for r in rows]
    digits = 4 if trace.metric == "prob" and not normalised else 3
    restored, difference = VERBS[trace.direction]
    unit = "share of the total effect" if normalised else f"mean effect, {UNITS.get(trace.metric, trace.metric)}"
    at_subject = names.index("last subject") if "last subject" in names else 0
    peak = int(mean[at_subject].nan_to_num(-math.inf).argmax())
    earlier = mean[: len(names) - (names[-1] == ROLES[-1])].nan_to_num(-math.inf)
    best_row, best_layer = divmod(int(earlier.argmax()), earlier.shape[1])

    def tooltip(row: int, layer: int) -> str:
        value = number(float(mean[row, layer]), digits, sign=True)
        interval = f"[{number(float(low[row, layer]), digits)}, {number(float(high[row, layer]), digits)}]"
        return f"layer {layer}, {names[row]}: {value} {interval} ({int(n[row, layer])} facts)"

    title = f"Causal trace of {len(trace.facts)} facts: {COMPONENTS[trace.component]}{window_of(trace)}"
    drawing = heat_map(
        mean.tolist(),
        scale=Scale.of([x for x in mean.flatten().tolist() if math.isfinite(x)], HUES[trace.component]),
        labels=names,
        tooltips=[[tooltip(r, layer) for layer in range(mean.shape[1])] for r in range(len(names))],
        neutral=[name == "before" for name in names],
        strong=[name.endswith("subject") for name in names],
        hatched=trace.partial_window,
        outlined=(best_row, best_layer),
        x_label=("layer" if trace.window == 1 else "middle layer of the window")
        + f" at which the {COMPONENTS[trace.component]} is {restored}",
        unit=unit,
        name=f"{title}: largest mean effect at the token that is {names[best_row]}, in layer {best_layer}",
    )
    count = int(n.max())
    total = 1.0 if normalised else float(trace.total_effect.nanmean())
    caption = join(
        f"Colour: {unit} ({difference}), mean over facts of the mean over a fact's tokens of this role.",
        f"{severed_of(trace)} ",
        tag("b", f"Clean {number(float(trace.clean.nanmean()))}"),
        f", corrupted {number(float(trace.corrupted.nanmean()))}, over {sum(trace.corruptible)} facts. ",
        f"The largest mean effect before the last token is {number(float(mean[best_row, best_layer]))} ",
        f"[{number(float(low[best_row, best_layer]))}, {number(float(high[best_row, best_layer]))}] ",
        f"(95 % bootstrap over {count} facts), at the token that is {names[best_row]}, in layer {best_layer}; ",
        at_last_subject_token(
            float(mean[at_subject, peak]), peak, total, best=(best_row, best_layer) == (at_subject, peak)
        ),
    )
    unknown = trace.known.count(False)
    warning = tag("p", f"{unknown} of the facts aren't what the clean model says first.") if unknown else None
    keys = [
        (tag("b", "*"), "token of the subject, which is corrupted"),
        (box_swatch("#fff", outlined=True), "largest mean effect before the last token"),
        (box_swatch("#fff", hatched=True), "window cut by the model's end: fewer layers restored")
        if trace.partial_window
        else None,
    ]
    body = tag("figure", warning, drawing, legend(keys), tag("figcaption", caption))
    return Picture(title, body, (trace.provenance,))
