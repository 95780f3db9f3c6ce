"""Causal tracing: which states, restored, bring the object back after the subject was corrupted.

Meng et al. 2022 (arXiv:2202.05262, sec. 2.1). Three kinds of run: clean; corrupted (noise on the
subject's token embeddings); corrupted with the activations of some layers at one token restored
to their clean values. With p the probability of ``target_true``, averaged over noise samples::

    total effect     TE      = p(clean)    − p(corrupted)
    indirect effect  IE(l,t) = p(restored) − p(corrupted)

A cell is run from the first restored layer on, all cells of a layer together; positions before the
subject can't have an effect in a causal model, so theirs is exactly 0 and isn't run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.corruption import Corruption, GaussianNoise
from tl_factedit.facts import Fact
from tl_factedit.hooks import noise_hook
from tl_factedit.model import (
    EMBED,
    Component,
    Hook,
    Model,
    Runner,
    component_hook,
    quiet,
    resid_post,
    resid_pre,
)
from tl_factedit.provenance import Provenance
from tl_factedit.tokens import Aligned, align

if TYPE_CHECKING:
    import pandas as pd

Metric = Literal["prob", "logprob"]


@dataclass(frozen=True, eq=False)  # by identity: == of tensors is no truth value
class Trace:
    """The result of `causal_trace`.

    Attributes:
        effect: IE, restored minus corrupted in units of `metric`, mean over samples,
            [fact layer pos]; NaN where a shorter fact has no token.
        sample_effect: The same for each noise sample, [fact layer pos sample].
        clean: The metric of the clean run, [fact].
        corrupted: Of the corrupted runs, mean over samples, [fact].
        sample_corrupted: For each noise sample, [fact sample].
        tokens: Token strings of each fact's prompt.
        subject: (start, stop) of the subject in each fact's tokens.
        facts: What was traced.
        top: For each fact, the token that the clean model puts first.
        known: Whether that is the first token of ``target_true``; where it isn't, there is little to trace.
        component: ``"resid"`` (the stream after the block), ``"mlp"`` or ``"attn"`` (outputs).
        window: How many layers are restored together.
        metric: ``"prob"`` or ``"logprob"`` of the whole ``target_true``.
        corruption: With its scale as it was used.
        provenance: Model, weights, BOS policy, versions.
    """

    effect: Float[Tensor, "fact layer pos"]
    sample_effect: Float[Tensor, "fact layer pos sample"]
    clean: Float[Tensor, "fact"]
    corrupted: Float[Tensor, "fact"]
    sample_corrupted: Float[Tensor, "fact sample"]
    tokens: tuple[tuple[str, ...], ...]
    subject: tuple[tuple[int, int], ...]
    facts: tuple[Fact, ...]
    top: tuple[str, ...]
    known: tuple[bool, ...]
    component: Component
    window: int
    metric: Metric
    corruption: Corruption
    provenance: Provenance

    @property
    def total_effect(self) -> Float[Tensor, "fact"]:
        """TE = clean minus corrupted."""
        return self.clean - self.corrupted

    @property
    def at_last_subject_token(self) -> Float[Tensor, "fact layer"]:
        """IE at each fact's last subject token."""
        last = torch.tensor([stop - 1 for _, stop in self.subject])
        return self.effect[torch.arange(len(last)), :, last]

    @property
    def peak_layer(self) -> int:
        """The layer of the largest mean effect at the last subject token."""
        return int(self.at_last_subject_token.mean(0).argmax())

    @property
    def partial_window(self) -> tuple[int, ...]:
        """Layers whose window is cut by the model's ends: their cells restore fewer layers."""
        count = self.effect.shape[1]
        return tuple(layer for layer in range(count) if len(window_layers(layer, self.window, count)) < self.window)

    def table(self) -> pd.DataFrame:
        """One row a (fact, layer, token): effect, its spread over samples, and whether it is the subject's."""
        import pandas as pd

        rows = []
        for i, (fact, pieces, (start, stop)) in enumerate(zip(self.facts, self.tokens, self.subject, strict=True)):
            spread = self.sample_effect[i].std(-1, correction=int(self.sample_effect.shape[-1] > 1))
            for layer in range(self.effect.shape[1]):
                rows += [
                    {
                        "fact": fact.name,
                        "layer": layer,
                        "position": p,
                        "token": piece,
                        "subject": start <= p < stop,
                        "effect": float(self.effect[i, layer, p]),
                        "sample_sd": float(spread[layer, p]),
                    }
                    for p, piece in enumerate(pieces)
                ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """Size, effects and peak in a line."""
        what = self.facts[0].text if len(self.facts) == 1 else f"{len(self.facts)} facts"
        return (
            f"Trace({what!r}, {self.component}, window {self.window}: clean {float(self.clean.mean()):.3f}, corrupted "
            f"{float(self.corrupted.mean()):.3f}; last subject token peaks at layer {self.peak_layer} with "
            f"{float(self.at_last_subject_token.mean(0).max()):.3f})"
        )


def causal_trace(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    component: Component = "resid",
    window: int = 1,
    corruption: Corruption | None = None,
    metric: Metric = "prob",
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Trace:
    """Trace where a model's recall of some facts passes through.

    Args:
        model: Either class.
        facts: One fact or several; only ``target_true`` is asked for.
        component: ``"resid"``, ``"mlp"`` or ``"attn"``.
        window: Restore this many layers around each, ``l − w//2 … l + (w−1)//2``, fewer at the
            model's ends (`Trace.partial_window`). Meng et al. use 10 for MLP and attention.
        corruption: `GaussianNoise` (three standard deviations, ten samples) or `GivenNoise`.
        metric: ``"prob"`` or ``"logprob"`` of the whole target, teacher-forced.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        batch_tokens: Most tokens in one forward pass: bounds the memory.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The trace.

    Raises:
        ValueError: A subject or target can't be aligned with its tokens; unknown component or metric.

    Example:
        >>> trace = fe.causal_trace(model, fact)                  # doctest: +SKIP
        >>> trace.peak_layer                                      # doctest: +SKIP
    """
    facts = (facts,) if isinstance(facts, Fact) else tuple(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    if window < 1:
        raise ValueError(f"window is {window}, needed at least 1")
    if metric not in ("prob", "logprob"):
        raise ValueError(f"metric {metric!r} is unknown, needed 'prob' or 'logprob'")
    component_hook(component, 0)
    provenance = Provenance.of(model, prepend_bos)
    rows = [align(model.tokenizer, fact, prepend_bos=provenance.prepend_bos) for fact in facts]
    with quiet(model), torch.no_grad():
        runner = Runner(model)
        embeddings = torch.cat([_embeddings(runner, row)[row.subject[0] : row.subject[1]] for row in rows])
        corruption = (corruption or GaussianNoise()).calibrated(embeddings)
        # Drawn for all facts first, so that a noise that fits none of them is found before any work.
        noises = [corruption.draw(row.subject[1] - row.subject[0], embeddings.shape[-1]) for row in rows]
        with tqdm(
            total=len(rows) * runner.n_layers, unit="layer", desc=f"tracing {component}", delay=1, disable=not progress
        ) as bar:
            parts = [
                _trace_one(runner, row, noise, component, window, metric, batch_tokens, bar.update)
                for row, noise in zip(rows, noises, strict=True)
            ]
    longest = max(len(row.ids) for row in rows)
    effects = torch.full((len(rows), runner.n_layers, longest, len(noises[0])), float("nan"))
    for i, part in enumerate(parts):
        effects[i, :, : part.effect.shape[1]] = part.effect
    corrupted = torch.stack([part.corrupted for part in parts])
    return Trace(
        effect=effects.mean(-1),
        sample_effect=effects,
        clean=torch.stack([part.clean for part in parts]),
        corrupted=corrupted.mean(-1),
        sample_corrupted=corrupted,
        tokens=tuple(row.pieces for row in rows),
        subject=tuple(row.subject for row in rows),
        facts=facts,
        top=tuple(model.tokenizer.decode([part.top]) for part in parts),
        known=tuple(part.top == int(row.true_ids[0]) for part, row in zip(parts, rows, strict=True)),
        component=component,
        window=window,
        metric=metric,
        corruption=corruption,
        provenance=provenance,
    )


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """The layers restored for a cell at `layer`: a window of 10 is l−5 … l+4, cut at the model's ends."""
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))


# ------------------------------------------------------------------------------------ one fact


@dataclass(frozen=True)
class _Part:
    effect: Float[Tensor, "layer pos sample"]
    clean: Float[Tensor, ""]
    corrupted: Float[Tensor, "sample"]
    top: int


def _embeddings(runner: Runner, row: Aligned) -> Float[Tensor, "pos d_model"]:
    return runner.capture(row.ids[None], [EMBED], stop=0)[EMBED][0]


def _trace_one(
    runner: Runner,
    row: Aligned,
    noise: Float[Tensor, "sample position d_model"],
    component: Component,
    window: int,
    metric: Metric,
    batch_tokens: int,
    done: Callable[[int], Any],
) -> _Part:
    ids = torch.cat([row.ids, row.true_ids[:-1]])
    at = torch.arange(len(row.true_ids)) + len(row.ids) - 1

    def score(tokens: Tensor, start: tuple[int, Tensor] | None, hooks: Sequence[Hook]) -> Float[Tensor, "row"]:
        logits = runner.logits(tokens, at=repeat(at, "k -> row k", row=len(tokens)), start=start, hooks=hooks)
        return _metric(logits, row.true_ids, metric)

    layers = range(runner.n_layers)
    outputs = [component_hook(component, layer) for layer in layers]
    last = resid_post(runner.n_layers - 1)
    clean = runner.capture(ids[None], [*dict.fromkeys([*outputs, last])])
    clean_logits = runner.logits(ids[None], at=at[None], start=(runner.n_layers, clean[last]))
    corrupted_ids = repeat(ids, "pos -> sample pos", sample=len(noise))
    corrupted = runner.capture(
        corrupted_ids,
        [*(resid_pre(layer) for layer in layers), last],
        hooks=[(EMBED, noise_hook(noise, range(*row.subject)))],
    )
    stream = [*(corrupted[resid_pre(layer)] for layer in layers), corrupted[last]]
    low = score(corrupted_ids, (runner.n_layers, stream[-1]), ())

    start, stop = row.subject[0], len(row.ids)
    effect = torch.zeros(runner.n_layers, stop, len(noise))
    cells_at_once = max(1, batch_tokens // (len(ids) * len(noise)))
    for layer in layers:
        restored = window_layers(layer, window, runner.n_layers)
        for cells in torch.arange(start, stop).split(cells_at_once):
            scores = _restore(score, ids, stream, clean, component, restored, cells)
            effect[layer, cells] = scores - low.cpu()
        done(1)
    return _Part(
        effect, _metric(clean_logits, row.true_ids, metric)[0].cpu(), low.cpu(), int(clean_logits[0, 0].argmax())
    )


def _restore(
    score: Callable[[Tensor, tuple[int, Tensor], Sequence[Hook]], Tensor],
    ids: Tensor,
    stream: Sequence[Float[Tensor, "sample pos d_model"]],
    clean: dict[str, Tensor],
    component: Component,
    layers: range,
    cells: Tensor,
) -> Float[Tensor, "cell sample"]:
    """The metric with some layers' activations at one token restored, for each of some tokens."""
    samples = len(stream[0])
    tokens = repeat(ids, "pos -> row pos", row=len(cells) * samples)
    rows = torch.arange(len(tokens))
    where = repeat(cells, "cell -> (cell sample)", sample=samples)

    def put_clean(value: Tensor, layer: int) -> Tensor:
        value = value.clone()
        value[rows, where] = clean[component_hook(component, layer)][0, where.to(value.device)].to(value)
        return value

    first, hooked = layers[0], list(layers)
    if component == "resid":
        # The stream after a block is the stream before the next: begin there, one block later.
        begin, hooked = first + 1, hooked[1:]
        resid = put_clean(repeat(stream[begin], "sample ... -> (cell sample) ...", cell=len(cells)), first)
    else:
        begin, resid = first, repeat(stream[first], "sample ... -> (cell sample) ...", cell=len(cells))
    hooks: list[Hook] = [
        (component_hook(component, layer), lambda value, hook=None, layer=layer: put_clean(value, layer))
        for layer in hooked
    ]
    return rearrange(score(tokens, (begin, resid), hooks), "(cell sample) -> cell sample", sample=samples).cpu()


def _metric(logits: Float[Tensor, "row target vocab"], target: Tensor, metric: Metric) -> Float[Tensor, "row"]:
    log_p = logits.float().log_softmax(-1)
    total = log_p[:, torch.arange(len(target)), target.to(log_p.device)].sum(-1)
    return total.exp() if metric == "prob" else total
