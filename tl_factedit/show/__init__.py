"""Pictures of results: heat maps of traces, edits' gains on a text, verdicts, scores, and reports of them.

Each function takes a result and returns a `Picture`, which a notebook shows and a file holds,
complete and offline. Nothing is computed here but `edit`'s gains; nothing inside the package
imports this file. Colours stand for numbers that are there to read as well (in tooltips and tables).
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from tl_factedit.auditing.audit import Verdict
from tl_factedit.locate.corruption import GaussianNoise, GivenNoise
from tl_factedit.editing.edit import Edit
from tl_factedit.core.estimate import Estimate
from tl_factedit.evaluation.scores import Scores
from tl_factedit.show.evidence import (
    bullets,
    dose_chart,
    fact_table,
    fired_strips,
    gain_table,
    knock_out_chart,
    legend,
    lens_charts,
    prompt_table,
    score_table,
    token_strips,
)
from tl_factedit.evaluation.gains import gains
from tl_factedit.show.markup import Html, join, number, tag, token
from tl_factedit.backend.model import Model
from tl_factedit.show.page import Picture, document
from tl_factedit.show.svg import NEUTRAL, Scale, box_swatch, heat_map
from tl_factedit.locate.trace import ROLES, Trace

__all__ = ["Picture", "edit", "report", "scores", "trace", "verdict"]

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


# ---------------------------------------------------------------------------------------- traces


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


# ----------------------------------------------------------------------------------------- edits


def edit(model: Model, edit: Edit, text: str, *, prepend_bos: bool | None = None) -> Picture:
    """The tokens of a text, coloured by how much of an edit fires at each.

    Args:
        model: The model the edit was made on, without it.
        edit: The edit; it is applied and taken back here.
        text: Any text.
        prepend_bos: Whether BOS goes in front; None for the edit's own policy.
    """
    fired = gains(model, edit, text, prepend_bos=prepend_bos)
    names = ", ".join(f"{f.subject}:{f.target_true} → {f.target_new}" for f in edit.facts[:3])
    more = f" and {len(edit.facts) - 3} more" if len(edit.facts) > 3 else ""
    caption = (
        "Gain: how much of the edit fires at a token. 1 (blue): as at the key it was written for; 0 (white): not "
        "at all; negative (vermilion): the other way round. A weight edit is confined to no position. "
        f"Predicted and measured change of the value differ by {fired.predicted_error:.1e} of the largest."
    )
    each = fired.gain.shape[-1] > 1 and " (of several keys, the one that fires most)"
    body = tag(
        "figure",
        tag("p", f"Edit of {names}{more}" + (each or "")),
        *token_strips(fired),
        tag("figcaption", caption),
        tag("h4", "The same in numbers"),
        gain_table(fired),
    )
    return Picture("Where the edit fires", body, (edit.provenance,), live=True)


# ---------------------------------------------------------------------------------------- scores


def scores(before: Scores, after: Scores | None = None) -> Picture:
    """Scores as a table, of one model or before and after a change, and every prompt's own numbers.

    Args:
        before: From `evaluate`.
        after: Of the same facts, on the changed model.

    Raises:
        ValueError: The two were not asked the same prompts and objects.
    """
    both = [before] if after is None else [before, after]
    for a, b in pairwise(both):
        asked = [[(x.fact, x.ask, x.prompt, x.true, x.new) for x in scores.answers] for scores in (a, b)]
        if asked[0] != asked[1]:
            raise ValueError(
                f"before has {len(a.answers)} prompts and after {len(b.answers)}, needed the same prompts with the "
                "same objects: evaluate both models on the same facts"
            )
    body = join(score_table(both), prompt_table(both))
    title = "Scores" if after is None else "Scores before and after"
    return Picture(title, body, tuple(score.provenance for score in both))


# --------------------------------------------------------------------------------------- verdict


def verdict(verdict: Verdict) -> Picture:
    """An audit's verdict on a page: label, axes, reasons, what is missing, and the evidence.

    Args:
        verdict: From `audit`.
    """
    n = len(verdict.facts)
    level = "one fact: descriptive" if verdict.level == "per edit" else f"population of {n} facts"
    axes = [
        tag("div", tag("b", name), tag("span", *_axis(axis.estimate, axis.says)))
        for name, axis in (("Retained", verdict.retained), ("Recoverable", verdict.recoverable))
    ]
    body = join(
        tag(
            "p",
            tag("span", verdict.label, class_="tlf-badge", style=f"background:{_BADGE[verdict.label]}"),
            f"  {level}",
        ),
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
        knock_out_chart(verdict.knock_out) if verdict.knock_out is not None else None,
        lens_charts(verdict),
        dose_chart(verdict.dose) if verdict.dose is not None else None,
        fired_strips(verdict.gains) if verdict.gains else None,
    )
    return Picture("Verdict of the audit", body, (verdict.before.provenance, verdict.after.provenance))


def _axis(estimate: Estimate | None, says: str) -> list[Html | str]:
    return [says] if estimate is None else [tag("b", format(estimate, ".2f")), says]


# ---------------------------------------------------------------------------------------- report

_Item = Picture | Trace | Verdict | Scores | str


def report(path: str | Path, *items: _Item | tuple[str, _Item], title: str = "Fact editing report") -> Path:
    """Write one HTML file that needs nothing else: no network, no other file.

    Args:
        path: The file; one that exists is replaced.
        items: Pictures and results (a `Trace`, `Verdict` or `Scores` is drawn as it is here, a trace of several
            facts as their `average`), plain text (an empty line begins a paragraph), or ``(heading, item)``.
        title: Of the page.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to write.
        TypeError: An item is none of these.

    Example:
        >>> fe.show.report("report.html", "What I did.", ("Where it is", trace), verdict)  # doctest: +SKIP
    """
    if not items:
        raise ValueError("the report is empty, needed at least one picture, result or text")
    sections, pictures = [], []
    for item in items:
        heading, what = item if isinstance(item, tuple) else (None, item)
        if isinstance(what, str):
            sections.append(tag("section", heading and tag("h2", heading), *_paragraphs(what)))
            continue
        picture = _drawn(what)
        pictures.append(picture)
        sections.append(
            tag(
                "section",
                tag("h2", heading or picture.title),
                heading and tag("h3", picture.title),
                picture.body,
            )
        )
    path = Path(path).expanduser()
    provenance = [one for picture in pictures for one in picture.provenance]
    page = document(title, join(*sections, between="\n"), provenance, live=any(p.live for p in pictures))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _drawn(what: object) -> Picture:
    if isinstance(what, Picture):
        return what
    if isinstance(what, Trace):
        return trace(what) if len(what.facts) == 1 else average(what)
    if isinstance(what, Verdict):
        return verdict(what)
    if isinstance(what, Scores):
        return scores(what)
    hint = ": draw it with fe.show.edit(model, edit, text)" if isinstance(what, Edit) else ""
    raise TypeError(
        f"a report can't hold a {type(what).__name__}, needed a Picture, Trace, Verdict, Scores or text{hint}"
    )


def _paragraphs(text: str) -> list[Html]:
    return [tag("p", part) for part in text.split("\n\n") if part.strip()]
