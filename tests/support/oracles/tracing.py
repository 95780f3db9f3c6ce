"""Causal tracing cell by cell, as written: one whole forward pass a cell, with TransformerLens' hooks alone.

Meng et al. 2022 (arXiv:2202.05262, sec. 2.1; their experiments/causal_trace.py). For a prompt x with subject
tokens S and object o, noise ε_s, and P(o) the product of the probabilities of o's tokens::

    low(s)      = P(o) with ε_s added to the token embeddings of S
    IE(l, t, s) = P(o) with the same ε_s, and the outputs of the layers
                  range(max(0, l − w//2), min(L, l − (−w//2))) at token t set to the clean run's
                − low(s)

Severed (fig. 3; experiments/causal_trace.py, trace_with_repatch): as above, with the outputs of one kind of module at
token t set to the corrupted run's in all layers. Noising: the corrupted run's outputs put into the clean run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HOOK = {
    "resid": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
}


@dataclass(frozen=True)
class TracedPrompt:
    """A prompt's ids, its subject's (start, stop) and the ids of its object."""

    ids: Tensor
    subject: tuple[int, int]
    target: Tensor

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.ids, self.target[:-1]])


@dataclass(frozen=True)
class Cells:
    effect: Tensor  # [layer pos sample]
    clean: Tensor  # []
    low: Tensor  # [sample]


def trace(model: Any, asked: TracedPrompt, noise: Tensor, *, component: str = "resid", window: int = 1) -> Cells:
    count = model.cfg.n_layers
    low = corrupted(model, asked, noise)
    cache = clean_cache(model, asked, [f"blocks.{layer}.{HOOK[component]}" for layer in range(count)])
    effect = torch.zeros(count, len(asked.ids), len(noise))
    for layer in range(count):
        layers = range(max(0, layer - window // 2), min(count, layer - (-window // 2)))
        for position in range(len(asked.ids)):
            effect[layer, position] = restored(model, asked, noise, component, layers, position, cache)
            effect[layer, position] -= low
    return Cells(effect, clean(model, asked), low)


def clean(model: Any, asked: TracedPrompt) -> Tensor:
    with torch.no_grad():
        return probability(model(asked.tokens[None]), asked)[0]


def corrupted(model: Any, asked: TracedPrompt, noise: Tensor, hooks: Sequence[tuple[str, Any]] = ()) -> Tensor:
    """P(o) for each noise sample, with further hooks if there are any."""
    start, stop = asked.subject

    def add_noise(embeddings, hook):
        embeddings = embeddings.clone()
        embeddings[:, start:stop] += noise
        return embeddings

    with torch.no_grad():
        logits = model.run_with_hooks(asked.tokens.repeat(len(noise), 1), fwd_hooks=[("hook_embed", add_noise), *hooks])
    return probability(logits, asked)


def restored(
    model: Any,
    asked: TracedPrompt,
    noise: Tensor,
    component: str,
    layers: Sequence[int],
    position: int,
    cache: Any = None,
) -> Tensor:
    """P(o) for each noise sample, with some layers' outputs at one position as in the clean run."""
    names = [f"blocks.{layer}.{HOOK[component]}" for layer in layers]
    cache = cache or clean_cache(model, asked, names)

    def put_clean(name):
        def hook_fn(value, hook):
            value = value.clone()
            value[:, position] = cache[name][:, position]
            return value

        return name, hook_fn

    return corrupted(model, asked, noise, [put_clean(name) for name in names])


def clean_cache(model: Any, asked: TracedPrompt, names: Sequence[str]) -> Any:
    with torch.no_grad():
        return model.run_with_cache(asked.tokens[None], names_filter=list(names))[1]


def probability(logits: Tensor, asked: TracedPrompt) -> Tensor:
    p = torch.ones(len(logits))
    for i, token in enumerate(asked.target.tolist()):
        p = p * logits[:, len(asked.ids) - 1 + i].softmax(-1)[:, token]
    return p


# ------------------------------------------------------------------------------------ metrics, severed paths, noising


def scored(logits: Tensor, asked: TracedPrompt, metric: str, *, clean_logits: Tensor, other: int = 0) -> Tensor:
    """A metric of whole logits [row pos vocab], written out."""
    end = len(asked.ids) - 1
    if metric == "prob":
        return probability(logits, asked)
    if metric == "top_prob":
        return logits[:, end].softmax(-1)[:, int(clean_logits[0, end].argmax())]
    if metric == "logprob":
        return sum(logits[:, end + i].log_softmax(-1)[:, token] for i, token in enumerate(asked.target.tolist()))  # type: ignore[return-value]
    if metric == "logit_diff":
        return logits[:, end, int(asked.target[0])] - logits[:, end, other]
    p = clean_logits[0, end].softmax(-1)
    return -(p * (p.log() - logits[:, end].softmax(-1).log())).sum(-1)


def runs(model: Any, asked: TracedPrompt, noise: Tensor, names: Sequence[str]) -> tuple[Any, Any]:
    """Caches of the clean run and of the corrupted ones."""
    start, stop = asked.subject

    def add_noise(embeddings, hook):
        embeddings = embeddings.clone()
        embeddings[:, start:stop] += noise
        return embeddings

    with torch.no_grad():
        whole = model.run_with_cache(asked.tokens[None], names_filter=list(names))[1]
        with model.hooks(fwd_hooks=[("hook_embed", add_noise)]):
            noised = model.run_with_cache(asked.tokens.repeat(len(noise), 1), names_filter=list(names))[1]
    return whole, noised


def patched(
    model: Any,
    asked: TracedPrompt,
    noise: Tensor,
    puts: Sequence[tuple[str, Tensor]],
    position: int,
    *,
    corrupt: bool = True,
    unit: int | None = None,
) -> Tensor:
    """Logits of a (corrupted) run in which some hooks' values at one position are given, [row pos d] each."""
    start, stop = asked.subject

    def add_noise(embeddings, hook):
        embeddings = embeddings.clone()
        embeddings[:, start:stop] += noise
        return embeddings

    def put(new):
        def hook_fn(value, hook):
            value = value.clone()
            if unit is None:
                value[:, position] = new[:, position]
            else:
                value[:, position, unit] = new[:, position, unit]
            return value

        return hook_fn

    hooks = [("hook_embed", add_noise)] if corrupt else []
    with torch.no_grad():
        return model.run_with_hooks(
            asked.tokens.repeat(len(noise), 1), fwd_hooks=[*hooks, *((name, put(new)) for name, new in puts)]
        )


# ------------------------------------------------------------------------------------ what Meng et al.'s script does


def embedding_std(model: Any, subjects: Sequence[str]) -> float:
    """``collect_embedding_std``: of each subject's tokens, alone, all entries of the embeddings."""
    found = []
    for subject in subjects:
        ids = model.tokenizer(subject, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model.run_with_cache(ids, names_filter=["hook_embed"])[1]["hook_embed"][0])
    return torch.cat(found).std().item()


def hidden_flow(
    model: Any, ids: Tensor, subject: tuple[int, int], noise: Tensor, component: str, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``calculate_hidden_flow``: of the token that comes first, clean, corrupted and restored probabilities.

    Returns:
        [], [] and [layer pos], the last two means over samples.
    """
    asked = TracedPrompt(ids, subject, ids[:1])
    with torch.no_grad():
        high, top = model(ids[None])[0, -1].softmax(-1).max(-1)
    asked = TracedPrompt(ids, subject, top[None].cpu())
    found = trace(model, asked, noise, component=component, window=window)
    return high, found.low.mean(), (found.effect + found.low).mean(-1)
