"""Attacks as written: one prompt, one object, one weight at a time, through TransformerLens' public hooks.

head projection     C = ∪_l top-k tokens of D_l
probability delta   C = ∪_l top-k and bottom-k tokens of D_{l+1} − D_l        D_l = softmax(W_U LN_f(h_l))
reversal            W − Σ_{i ≤ q} s_i u_i v_iᵀ, written into the weight
relearning          torch.optim.Adam on the weights themselves
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import tl_factedit as fe
from tl_factedit.backend.weights import DownProj, down_proj

WORDS = ("Paris", "Rome", "London", "Berlin", "Madrid", "Vienna", "Tokyo", "Cairo", "France", "Italy")


def token(model: Any, word: str) -> int:
    return int(model.to_tokens(" " + word.strip(), prepend_bos=False)[0, -1])


def known_fact(model: Any, fact: fe.Fact, *, words: Sequence[str] = WORDS) -> fe.Fact:
    """The fact with the object that a random model happens to know, another new one, and the rest as controls."""
    logits = ends(model, fact.text)
    first, second, *rest = sorted(words, key=lambda word: -float(logits[token(model, word)]))
    return fact.but(target_true=f" {first}", target_new=f" {rest[0]}", controls=[f" {w}" for w in (second, *rest[1:])])


def ends(model: Any, text: str) -> Tensor:
    """Logits after a text."""
    with torch.no_grad():
        return model(model.to_tokens(text).to(model.W_E.device))[0, -1].float()


def first(model: Any, fact: fe.Fact, logits: Tensor) -> str:
    """Which of a fact's objects is the likeliest."""
    objects = [fact.target_true, fact.target_new, *fact.controls]
    return max(objects, key=lambda text: float(logits[token(model, text)]))


def firsts(model: Any, fact: fe.Fact, logits: Tensor) -> tuple[float, float, float]:
    """Whether the old object is the likeliest, whether the new one is, and the mean of the controls."""
    best = first(model, fact, logits)
    wins = [float(best == text) for text in fact.controls]
    return float(best == fact.target_true), float(best == fact.target_new), sum(wins) / len(wins)


def margin(model: Any, fact: fe.Fact, logits: Tensor) -> float:
    """log p(new) − log p(old)."""
    log_p = logits.log_softmax(-1)
    return float(log_p[token(model, fact.target_new)] - log_p[token(model, fact.target_true)])


# ------------------------------------------------------------------------------------ read-outs


def lens(model: Any, text: str) -> Tensor:
    """D_l at the last token, [layer vocab]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(model.to_tokens(text))
        streams = [cache[f"blocks.{layer}.hook_resid_post"][:, -1:] for layer in range(len(model.blocks))]
        return torch.stack([model.unembed(model.ln_final(stream))[0, 0].softmax(-1) for stream in streams])


def head_projection(distributions: Tensor, k: int) -> set[int]:
    """The union over layers of the k likeliest tokens."""
    named: set[int] = set()
    for row in distributions.tolist():
        named |= set(sorted(range(len(row)), key=lambda i: -row[i])[:k])
    return named


def probability_delta(distributions: Tensor, k: int) -> set[int]:
    """The union over steps of the k tokens that gain most and the k that lose most."""
    named: set[int] = set()
    for here, above in itertools.pairwise(distributions):
        order = (above - here).argsort().tolist()
        named |= {*order[:k], *order[-k:]}
    return named


# ------------------------------------------------------------------------------------ weights


@contextmanager
def written(sites: Sequence[DownProj], weights: Sequence[Tensor]) -> Iterator[None]:
    """Other weights for the length of a block."""
    before = [site.W.clone() for site in sites]
    try:
        for site, weight in zip(sites, weights, strict=True):
            site.write_(weight)
        yield
    finally:
        for site, weight in zip(sites, before, strict=True):
            site.write_(weight)


def without_largest(weight: Tensor, count: int) -> Tensor:
    """The weight without its largest singular directions."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    s[:count] = 0
    return (u @ torch.diag(s) @ vh).to(weight.dtype)


def updates_until_learnt(model: Any, text: str, target: str, layers: Sequence[int], lr: float, steps: int) -> float:
    """Updates of Adam on ``W_out`` until a target of one token is likelier than ½, by the line between two updates."""
    sites = [down_proj(model, layer) for layer in layers]
    wanted, before = math.log(0.5), math.nan
    with written(sites, [site.W.clone() for site in sites]):
        params = [site.param for site in sites]
        flags = [param.requires_grad for param in params]
        try:
            for param in params:
                param.requires_grad_(True)
            adam = torch.optim.Adam(params, lr=lr)
            for update in range(steps + 1):
                log_p = model(model.to_tokens(text))[0, -1].log_softmax(-1)[token(model, target)]
                now = float(log_p.detach())
                if now > wanted:
                    return 0.0 if update == 0 else update - 1 + (wanted - before) / (now - before)
                before = now
                gradients = torch.autograd.grad(-log_p, params)
                for param, gradient in zip(params, gradients, strict=True):
                    param.grad = gradient
                adam.step()
                for param in params:
                    param.grad = None
        finally:
            for param, flag in zip(params, flags, strict=True):
                param.requires_grad_(flag)
    return steps + 1.0


# ------------------------------------------------------------------------------------ states


def patched(model: Any, text: str, name: str, positions: Sequence[int], donor: Tensor) -> Tensor:
    """Logits after a text with one place's values, at some positions, from another run [pos d_model]."""

    def put(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[0, list(positions)] = donor[list(positions)]
        return value

    with torch.no_grad():
        return model.run_with_hooks(model.to_tokens(text), fwd_hooks=[(name, put)])[0, -1].float()


def state(model: Any, text: str, name: str) -> Tensor:
    """One place's values over a text, [pos d_model]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(model.to_tokens(text), names_filter=[name])
    return cache[name][0].clone()


def subject_last(model: Any, fact: fe.Fact) -> int:
    """Where the subject ends, for prompts of whole words."""
    return model.to_tokens(fact.prompt.split("{}")[0] + fact.subject).shape[1] - 1


def mean(values: Sequence[float], of: Callable[[float], float] = float) -> float:
    return sum(map(of, values)) / len(values)
