"""A picture of one fact's causal trace."""

from __future__ import annotations

import math

from tl_factedit.backend.state import plain_torch
from tl_factedit.locate.trace_result import Trace
from tl_factedit.show.heat_map import Scale, heat_map
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import join, number, tag, token
from tl_factedit.show.page import Picture
from tl_factedit.show.svg import NEUTRAL, box_swatch
from tl_factedit.show.tables import legend
from tl_factedit.show.trace_words import (
    COMPONENTS,
    HOW,
    HUES,
    UNITS,
    VERBS,
    at_last_subject_token,
    corruption_of,
    quantity_of,
    severed_of,
    window_of,
)


@plain_torch()
def trace(trace: Trace, fact: int = 0) -> Picture:
    """A layer × token heat map of one fact's trace, as in Meng et al. 2022 (arXiv:2202.05262), fig. 1.

    White is no effect; positions before the subject, 0 by construction, are grey. One unit has the same depth of colour
    on both sides of 0. The box marks the largest effect anywhere but at the prompt's last token, where the last layers
    have all of it whatever the fact. What the last subject token carries stands below the drawing.

    Args:
        trace: A trace from `causal_trace`.
        fact: Index of one of its facts.

    Raises:
        TypeError: What is given isn't a `Trace`.
        ValueError: The trace has no such fact, or couldn't corrupt it.
    """
    check_kind(trace, Trace, HOW)
    if not 0 <= fact < len(trace.facts):
        raise ValueError(f"fact is {fact}, but the trace has {len(trace.facts)}: give 0 … {len(trace.facts) - 1}")
    if not trace.corruptible[fact]:
        raise ValueError(f"fact {fact}, {trace.facts[fact].name!r}, has no donor and wasn't traced: choose another")
    asked, pieces, (start, stop) = trace.facts[fact], trace.tokens[fact], trace.subject[fact]
    effect = trace.effect[fact, :, : len(pieces)]
    own = trace.sample_effect[fact, :, : len(pieces), ~trace.sample_corrupted[fact].isnan()]
    samples = own.shape[-1]
    spread = own.std(-1, correction=int(samples > 1))
    restored, difference = VERBS[trace.direction]
    layers = effect.shape[0]
    at_subject = effect[:, stop - 1]
    peak = int(at_subject.nan_to_num(-math.inf).argmax())
    earlier = effect[:, : max(stop, len(pieces) - 1)].nan_to_num(-math.inf)
    best_layer, best_position = divmod(int(earlier.argmax()), earlier.shape[1])
    digits = 4 if trace.metric == "prob" else 3

    def tooltip(layer: int, position: int) -> str:
        value, sd = float(effect[layer, position]), float(spread[layer, position])
        if position < start:
            found = "0 exactly (before the subject)"
        else:
            found = number(value, digits, sign=True) + (f" ± {number(sd, digits)}" if samples > 1 else "")
        return f"layer {layer}, {token(pieces[position])} (position {position}): {found}"

    quantity = quantity_of(trace, fact)
    title = f"Causal trace: {COMPONENTS[trace.component]}{window_of(trace)}"
    hue = HUES[trace.component]
    drawing = heat_map(
        effect.T.tolist(),
        scale=Scale.of(effect[:, start:].flatten().tolist(), hue),
        labels=[token(piece) for piece in pieces],
        tooltips=[[tooltip(layer, p) for layer in range(layers)] for p in range(len(pieces))],
        neutral=[p < start for p in range(len(pieces))],
        strong=[start <= p < stop for p in range(len(pieces))],
        hatched=trace.partial_window,
        outlined=(best_position, best_layer),
        x_label=("layer" if trace.window == 1 else "middle layer of the window")
        + f" at which the {COMPONENTS[trace.component]} is {restored}",
        unit=f"{difference}, {UNITS.get(trace.metric, trace.metric)}",
        name=f"{title} of {asked.text!r}: largest effect at {token(pieces[best_position])} in layer {best_layer}",
    )
    keys = [
        (tag("b", "*"), "token of the subject, which is corrupted"),
        (box_swatch("#fff", outlined=True), "largest effect before the last token"),
        (box_swatch(NEUTRAL), "before the subject: 0 exactly") if start else None,
        (box_swatch("#fff", hatched=True), "window cut by the model's end: fewer layers restored")
        if trace.partial_window
        else None,
    ]
    total = float(trace.total_effect[fact])
    caption = join(
        f"Colour: {quantity}, with one token's {COMPONENTS[trace.component]}{window_of(trace)} {restored}: "
        f"{difference}.{severed_of(trace)} ",
        tag("b", f"Clean {number(float(trace.clean[fact]))}"),
        f", corrupted {number(float(trace.corrupted[fact]))}: total effect {number(total)}. ",
        f"The largest effect before the last token is {number(float(effect[best_layer, best_position]))}",
        f" ± {number(float(spread[best_layer, best_position]))} (sd over samples)" if samples > 1 else "",
        f", at {token(pieces[best_position])} in layer {best_layer}; ",
        at_last_subject_token(
            float(at_subject[peak]), peak, total, best=(best_layer, best_position) == (peak, stop - 1)
        ),
        corruption_of(trace, fact, samples),
    )
    warning = None
    if not trace.known[fact]:
        warning = tag(
            "p",
            f"The clean model doesn't put {asked.target_true!r} first but {trace.top[fact]!r}: "
            "there is little to trace.",
        )
    prompt = tag("p", tag("code", asked.text), " → ", tag("code", asked.target_true))
    body = tag("figure", prompt, warning, drawing, legend(keys), tag("figcaption", caption))
    return Picture(title, body, (trace.provenance,))
