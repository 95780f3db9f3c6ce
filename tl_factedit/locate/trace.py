"""Causal tracing: which states, restored, bring the object back after the subject was corrupted.

Meng et al. 2022 (arXiv:2202.05262, sec. 2.1). Three kinds of run: clean; corrupted (other embeddings of the
subject's tokens); corrupted with the activations of some layers at one token restored to their clean values. With m
the metric (by default the probability of ``target_true``), averaged over samples of the corruption::

    total effect     TE      = m(clean)    − m(corrupted)
    indirect effect  IE(l,t) = m(restored) − m(corrupted)

The other way round (``direction="noise"``) corrupted values are put into the clean run, and
IE(l,t) = m(clean) − m(noised): what is lost with this state.

Positions before the subject can't have an effect in a causal model: theirs is exactly 0 and isn't run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.memory import budget, check_memory
from tl_factedit.backend.protocol import Component, Model, n_layers
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core import files
from tl_factedit.core.facts import Fact, as_facts, check_distinct
from tl_factedit.core.kinds import as_whole
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import Aligned, decided_at
from tl_factedit.locate.cells import Cell, Direction, Patch, Write
from tl_factedit.locate.corruption import Corruption, corruption_of
from tl_factedit.locate.inputs import align_all, ask, check_contrasts, donor_texts
from tl_factedit.locate.metrics import Metric, identity, metric_of
from tl_factedit.locate.patching import Patching
from tl_factedit.locate.resume import TraceFolder, TracePart
from tl_factedit.locate.trace_result import Trace, sample_means, window_layers


@plain_torch()
def causal_trace(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    component: Component = "resid",
    window: int = 1,
    severed: Literal["mlp", "attn"] | None = None,
    corruption: Corruption | None = None,
    metric: str | Metric = "prob",
    direction: Direction = "denoise",
    prepend_bos: bool | None = None,
    memory: float | None = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Trace where a model's recall of some facts passes through (Meng et al. 2022, arXiv:2202.05262, sec. 2.1).

    Args:
        model: Either class.
        facts: One fact or several; only ``target_true`` is asked for (``metric="logit_diff"`` may need ``target_new``).
        component: ``"resid"`` (the residual stream after a block), ``"resid_pre"`` (before it), ``"resid_mid"``
            (between attention and MLP, where they follow one another), ``"mlp"`` or ``"attn"`` (their outputs).
        window: Restore this many layers around each, ``l − w//2 … l + (w−1)//2``, fewer at the
            model's ends (`Trace.partial_window`). Meng et al. use 10 for MLP and attention.
        severed: Hold the outputs of ``"mlp"`` or ``"attn"`` of all layers at the restored token at what they are in the
            corrupted run (Meng et al., fig. 3): what is then left of an effect didn't pass through them. For
            single layers of the residual stream.
        corruption: Default: `GaussianNoise` (three standard deviations, ten samples).
        metric: ``"prob"``, ``"top_prob"``, ``"logprob"``, ``"logit_diff"``, ``"kl"``, or a function like those in
            `fe.locate.metrics`.
        direction: ``"denoise"`` restores clean values in corrupted runs (what suffices), ``"noise"`` puts corrupted
            values into the clean run (what is needed).
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        memory: What activations may take, in GiB (None for a share of what is free), beside the model: sets the size of
            batches.
        folder: Where to keep what is done; a call that was killed resumes there.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The trace; its ``effect`` is [fact layer pos], NaN at positions that a shorter prompt hasn't got.

    Raises:
        ValueError: A subject or target can't be aligned with its tokens; unknown component or metric; a fact given
            twice; no fact can be corrupted; `folder` holds another trace, or is given with a metric or corruption that
            can't be told from others.
        RuntimeError: What is measured of a run is NaN.
        UnsupportedModelError: The model has no such component.

    Example:
        >>> trace = fe.causal_trace(model, fact)                  # doctest: +SKIP
        >>> trace.peak_layer                                      # doctest: +SKIP
    """
    facts = as_facts(facts)
    window = as_whole(window, "window")
    _check(facts, component, window, severed, direction, memory)
    folder = None if folder is None else files.pinned_folder(folder)
    metric_name, measure = metric_of(metric)
    corruption = corruption_of(corruption)
    provenance = Provenance.of(model, prepend_bos, prompts=(fact.text for fact in facts))
    rows = align_all(model, facts, prepend_bos=provenance.prepend_bos)
    check_contrasts(facts, rows, measure, corruption)
    count = n_layers(model)
    with frozen(model), torch.no_grad():
        questions = ask(model, facts, rows, corruption)
        settings: dict[str, Any] = {
            "component": component,
            "window": window,
            "severed": severed,
            "direction": direction,
            "metric": metric_name,
        }
        told = settings | {"metric": metric_name if folder is None else identity(metric)}
        parts = TraceFolder.of(folder, questions, told, provenance)
        held = [component_hook(severed, layer) for layer in range(count)] if severed else []
        places = [component_hook(component, layer) for layer in range(count)]
        cells = {i: count * len(_positions(rows[i])) for i, q in enumerate(questions.each) if q.samples > 0}
        with tqdm(
            total=sum(cells.values()),
            initial=sum(cells[i] for i in parts.done),
            unit="cell",
            desc=f"tracing {component}",
            delay=1,
            disable=not progress,
        ) as bar:
            room = budget(model, memory)
            for attempt in questions.chunks(places, held, memory=room, skip=frozenset(parts.done)):
                with attempt as chunk:
                    mine = room * attempt.share
                    patching = questions.patching(chunk, places, held, measure, direction, memory=mine)
                    effects = _effects(
                        patching, [rows[i] for i in chunk], component, window, severed, count, bar.update
                    )
                    sign = -1 if direction == "noise" else 1
                    found = [
                        TracePart(sign * effect, clean, corrupted, top)
                        for effect, clean, corrupted, top in zip(
                            effects, patching.clean, patching.corrupted, patching.top, strict=True
                        )
                    ]
                    parts.add(chunk, found)
        top = [parts.done[i].top if i in parts.done else subject.top() for i, subject in enumerate(questions.subjects)]
    warn_of_unknown(facts, rows, top, model)
    samples = max(question.samples for question in questions.each)
    effect = torch.full((len(rows), count, max(len(row.ids) for row in rows), samples), torch.nan)
    corrupted = torch.full((len(rows), samples), torch.nan)
    clean = torch.full((len(rows),), torch.nan)
    for i, part in parts.done.items():
        _, length, own = part.effect.shape
        effect[i, :, :length, :own], corrupted[i, :own], clean[i] = part.effect, part.corrupted, part.clean.mean()
    return Trace(
        **sample_means(effect, corrupted),
        clean=clean,
        tokens=tuple(row.pieces for row in rows),
        subject=tuple(row.subject for row in rows),
        facts=facts,
        top=tuple(_said(model, said, row) for said, row in zip(top, rows, strict=True)),
        known=tuple(_knows(said, row) for said, row in zip(top, rows, strict=True)),
        donors=donor_texts(questions),
        corruption=questions.corruption,
        unpacked=questions.unpacked,
        provenance=provenance,
        **settings,
    )


def warn_of_unknown(
    facts: Sequence[Fact], rows: Sequence[Aligned], top: Sequence[tuple[int, ...]], model: Model
) -> None:
    """Say once which facts the model doesn't know: there is little to trace, and what is found is noise."""
    wrong = [i for i, (said, row) in enumerate(zip(top, rows, strict=True)) if not _knows(said, row)]
    if wrong:
        said = _said(model, top[wrong[0]], rows[wrong[0]])
        tell(
            f"the model doesn't know {len(wrong)} of {len(facts)} facts, such as {facts[wrong[0]].name!r}: it says "
            f"{said!r} and not {facts[wrong[0]].target_true!r}; a trace of what isn't known shows noise (Trace.known)",
        )


def _knows(said: Sequence[int], row: Aligned) -> bool:
    return list(said) == row.true_ids[: row.old_word].tolist()


def _said(model: Model, said: Sequence[int], row: Aligned) -> str:
    """What a model says after a prompt, up to where it is decided whether that is the object."""
    at = decided_at(said, row.true_ids[: row.old_word].tolist())
    return model.tokenizer.decode(list(said[: at + 1]))


def _effects(
    patching: Patching,
    rows: Sequence[Aligned],
    component: Component,
    window: int,
    severed: Literal["mlp", "attn"] | None,
    count: int,
    done: Any,
) -> list[Float[Tensor, "layer pos sample"]]:
    """For each question, the metric with a cell changed minus that of the base run."""
    effects = [torch.zeros(count, len(row.ids), len(base)) for row, base in zip(rows, patching.base, strict=True)]
    cells = [Cell(i, p) for i, row in enumerate(rows) for p in _positions(row)]
    everywhere = patching.sheets(cells)
    at_the_end = patching.sheets([cell for cell in cells if patching.at_the_end(cell)])
    patches = [_patch(component, layer, window, severed, count) for layer in range(count)]
    # Where no attention comes after it, a change elsewhere than at the end is never read.
    carried = [patch for patch, carries in patches if carries]
    for sheet in everywhere:
        for layer, cell, scores in patching.run(sheet, carried):
            effects[cell.question][layer, cell.position] = scores - patching.base[cell.question]
            done()
    for layer in range(len(carried), count):
        for sheet in at_the_end:
            for _, cell, scores in patching.run(sheet, [patches[layer][0]]):
                effects[cell.question][layer, cell.position] = scores - patching.base[cell.question]
        done(len(cells))
    return effects


def _positions(row: Aligned) -> range:
    """Where a change has an effect: what lies before the subject is the same in all runs."""
    return range(row.subject[0], len(row.ids))


def _patch(
    component: Component, layer: int, window: int, severed: Literal["mlp", "attn"] | None, count: int
) -> tuple[Patch, bool]:
    """What the cells of a layer change, and whether an attention comes after it that can carry it to other tokens."""
    layers = window_layers(layer, window, count)
    first = layers[0]
    writes = tuple(Write(component_hook(component, each)) for each in layers)
    hold = tuple(Write(component_hook(severed, each), "base") for each in range(layer + 1, count)) if severed else ()
    if component == "resid":
        # The stream after a block is the stream before the next: begin there, one block later.
        return Patch(first + 1, resid_post(first), writes[1:] + hold), first + 1 < count
    if component == "resid_pre":
        hold = (Write(component_hook(severed, layer), "base"), *hold) if severed else ()
        return Patch(first, resid_pre(first), writes[1:] + hold), True
    return Patch(first, None, writes), first + 1 < count


def _check(
    facts: Sequence[Fact],
    component: Component,
    window: int,
    severed: str | None,
    direction: str,
    memory: float | None,
) -> None:
    check_distinct(facts)
    component_hook(component, 0)
    if severed not in (None, "mlp", "attn"):
        raise ValueError(f"severed is {severed!r}, needed 'mlp', 'attn' or None")
    if severed and (component not in ("resid", "resid_pre") or window > 1):
        raise ValueError(
            f"severed={severed!r} is for single layers of the residual stream, but component is {component!r} and "
            f"window {window}: take component='resid', window=1"
        )
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is {direction!r}, needed 'denoise' or 'noise'")
    check_memory(memory)
