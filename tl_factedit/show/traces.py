"""Pictures of causal traces."""

from __future__ import annotations

import math

from tl_factedit.locate.corruption import GaussianNoise, GivenNoise
from tl_factedit.locate.trace_result import ROLES, Trace
from tl_factedit.show.heat_map import Scale, heat_map
from tl_factedit.show.markup import join, number, tag, token
from tl_factedit.show.page import Picture
from tl_factedit.show.svg import NEUTRAL, box_swatch
from tl_factedit.show.tables import legend

_HUE = {"resid": "purple", "resid_pre": "purple", "resid_mid": "purple", "mlp": "green", "attn": "red"}

_WHAT = {
    "resid": "residual stream",
    "resid_pre": "residual stream before the block",
    "resid_mid": "residual stream between attention and MLP",
    "mlp": "MLP output",
    "attn": "attention output",
}

_UNITS = {"prob": "probability", "logprob": "nats", "logit_diff": "logits", "kl": "nats"}

_VERBS = {"denoise": ("restored", "restored − corrupted"), "noise": ("corrupted", "clean − corrupted there")}


def trace(trace: Trace, fact: int = 0) -> Picture:
    """A layer × token heat map of one fact's trace, as Meng et al. 2022, fig. 1.

    White is no effect; positions before the subject, 0 by construction, are grey. One unit has the
    same depth of colour on both sides of 0.

    Args:
        trace: From `causal_trace`.
        fact: Which of its facts.

    Raises:
        ValueError: The trace has no such fact.
    """
    if not 0 <= fact < len(trace.facts):
        raise ValueError(f"fact is {fact}, but the trace has {len(trace.facts)}: give 0 … {len(trace.facts) - 1}")
    if not trace.corruptible[fact]:
        raise ValueError(f"fact {fact}, {trace.facts[fact].name!r}, has no donor and wasn't traced: choose another")
    asked, pieces, (start, stop) = trace.facts[fact], trace.tokens[fact], trace.subject[fact]
    effect = trace.effect[fact, :, : len(pieces)]
    own = trace.sample_effect[fact, :, : len(pieces), ~trace.sample_corrupted[fact].isnan()]
    samples = own.shape[-1]
    spread = own.std(-1, correction=int(samples > 1))
    restored, difference = _VERBS[trace.direction]
    layers = effect.shape[0]
    at_subject = effect[:, stop - 1]
    peak = int(at_subject.nan_to_num(-math.inf).argmax())
    digits = 4 if trace.metric == "prob" else 3

    def tooltip(layer: int, position: int) -> str:
        value, sd = float(effect[layer, position]), float(spread[layer, position])
        if position < start:
            found = "0 exactly (before the subject)"
        else:
            found = number(value, digits, sign=True) + (f" ± {number(sd, digits)}" if samples > 1 else "")
        return f"layer {layer}, {token(pieces[position])} (position {position}): {found}"

    quantity = _quantity(trace, fact)
    title = f"Causal trace: {_WHAT[trace.component]}{_window(trace)}"
    hue = _HUE[trace.component]
    drawing = heat_map(
        effect.T.tolist(),
        scale=Scale.of(effect[:, start:].flatten().tolist(), hue),
        labels=[token(piece) for piece in pieces],
        tooltips=[[tooltip(layer, p) for layer in range(layers)] for p in range(len(pieces))],
        neutral=[p < start for p in range(len(pieces))],
        strong=[start <= p < stop for p in range(len(pieces))],
        hatched=trace.partial_window,
        outlined=(stop - 1, peak),
        x_label=("layer" if trace.window == 1 else "middle layer of the window")
        + f" at which the {_WHAT[trace.component]} is {restored}",
        unit=f"{difference}, {_UNITS.get(trace.metric, trace.metric)}",
        name=f"{title} of {asked.text!r}: largest effect at the last subject token in layer {peak}",
    )
    keys = [
        (tag("b", "*"), "token of the subject, which is corrupted"),
        (box_swatch("#fff", outlined=True), "largest effect at the last subject token"),
        (box_swatch(NEUTRAL), "before the subject: 0 exactly") if start else None,
        (box_swatch("#fff", hatched=True), "window cut by the model's end: fewer layers restored")
        if trace.partial_window
        else None,
    ]
    total = float(trace.total_effect[fact])
    highest, where = effect.nan_to_num(-math.inf).flatten().max(0)
    top_layer, top_position = divmod(int(where), len(pieces))
    caption = join(
        f"Colour: {quantity}, with one token's {_WHAT[trace.component]}{_window(trace)} {restored}: "
        f"{difference}.{_severed(trace)} ",
        tag("b", f"Clean {number(float(trace.clean[fact]))}"),
        f", corrupted {number(float(trace.corrupted[fact]))}: total effect {number(total)}. ",
        f"The last subject token peaks in layer {peak} with {number(float(at_subject[peak]))}",
        f" ± {number(float(spread[peak, stop - 1]))} (sd over samples)" if samples > 1 else "",
        f"; the largest of all is {number(float(highest))}, ",
        f"at {token(pieces[top_position])} in layer {top_layer}. ",
        _noise(trace, fact, samples),
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


def average(trace: Trace, *, normalised: bool = False) -> Picture:
    """The mean effects of many facts, by what a token is in its prompt and by layer.

    Args:
        trace: From `causal_trace`.
        normalised: Show shares of the total effect (`Trace.fraction`) instead.

    Raises:
        ValueError: The trace is of one fact, or no fact's total effect is large enough for shares of it.
    """
    if len(trace.facts) < 2:
        raise ValueError("the trace is of one fact, needed several to average: take show.trace(trace)")
    found = trace.average(normalised=normalised)
    rows = [r for r in range(len(ROLES)) if bool(found.n[r].any())]
    if not rows:
        raise ValueError("no fact has a total effect of 0.05, needed some for shares of it: take normalised=False")
    mean, low, high, n = (each[rows] for each in (found.mean, found.low, found.high, found.n))
    names = [ROLES[r] for r in rows]
    digits = 4 if trace.metric == "prob" and not normalised else 3
    restored, difference = _VERBS[trace.direction]
    unit = "share of the total effect" if normalised else f"mean effect, {_UNITS.get(trace.metric, trace.metric)}"
    at_subject = names.index("last subject") if "last subject" in names else 0
    peak = int(mean[at_subject].nan_to_num(-math.inf).argmax())

    def tooltip(row: int, layer: int) -> str:
        value = number(float(mean[row, layer]), digits, sign=True)
        interval = f"[{number(float(low[row, layer]), digits)}, {number(float(high[row, layer]), digits)}]"
        return f"layer {layer}, {names[row]}: {value} {interval} ({int(n[row, layer])} facts)"

    title = f"Causal trace of {len(trace.facts)} facts: {_WHAT[trace.component]}{_window(trace)}"
    drawing = heat_map(
        mean.tolist(),
        scale=Scale.of([x for x in mean.flatten().tolist() if math.isfinite(x)], _HUE[trace.component]),
        labels=names,
        tooltips=[[tooltip(r, layer) for layer in range(mean.shape[1])] for r in range(len(names))],
        neutral=[name == "before" for name in names],
        strong=[name.endswith("subject") for name in names],
        hatched=trace.partial_window,
        outlined=(at_subject, peak),
        x_label=("layer" if trace.window == 1 else "middle layer of the window")
        + f" at which the {_WHAT[trace.component]} is {restored}",
        unit=unit,
        name=f"{title}: largest mean effect at the last subject token in layer {peak}",
    )
    count = int(n.max())
    caption = join(
        f"Colour: {unit} ({difference}), mean over facts of the mean over a fact's tokens of this role.",
        f"{_severed(trace)} ",
        tag("b", f"Clean {number(float(trace.clean.nanmean()))}"),
        f", corrupted {number(float(trace.corrupted.nanmean()))}, over {sum(trace.corruptible)} facts. ",
        f"The last subject token peaks in layer {peak} with {number(float(mean[at_subject, peak]))} ",
        f"[{number(float(low[at_subject, peak]))}, {number(float(high[at_subject, peak]))}] "
        f"(95 % bootstrap over {count} facts).",
    )
    unknown = trace.known.count(False)
    warning = tag("p", f"{unknown} of the facts aren't what the clean model says first.") if unknown else None
    keys = [
        (tag("b", "*"), "token of the subject, which is corrupted"),
        (box_swatch("#fff", outlined=True), "largest mean effect at the last subject token"),
        (box_swatch("#fff", hatched=True), "window cut by the model's end: fewer layers restored")
        if trace.partial_window
        else None,
    ]
    body = tag("figure", warning, drawing, legend(keys), tag("figcaption", caption))
    return Picture(title, body, (trace.provenance,))


def _quantity(trace: Trace, fact: int) -> str:
    names = {
        "prob": "probability of {}",
        "logprob": "log-probability (nats) of {}",
        "logit_diff": "logit of {} minus that of the other answer",
        "kl": "minus KL divergence from the clean run (nats), in which {} is asked for",
    }
    return names.get(trace.metric, trace.metric + " of {}").format(repr(trace.facts[fact].target_true))


def _window(trace: Trace) -> str:
    return "" if trace.window == 1 else f" in a window of {trace.window} layers"


def _severed(trace: Trace) -> str:
    return f" The {_WHAT[trace.severed]}s above stay as in the corrupted run." if trace.severed else ""


def _noise(trace: Trace, fact: int, samples: int) -> str:
    noise = trace.corruption
    if trace.donors[fact]:
        return f"The subject's tokens are replaced by those of {', '.join(trace.donors[fact])}."
    mean = f"Mean over {samples} noise samples" if samples > 1 else "One noise sample"
    if isinstance(noise, GaussianNoise):
        sigma = "" if noise.sigma is None else f", σ = {noise.sigma:.4g}"
        return f"{mean}: Gaussian, {noise.scale:g} × the embeddings' spread{sigma} (seed {noise.seed})."
    return f"{mean}, {'given as numbers' if isinstance(noise, GivenNoise) else type(noise).__name__}."
