"""Editing by the letter: one text, one row, one formula at a time, through TransformerLens' public hooks.

No batch, no padding, no partial forward, no import of the package's own machinery.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def second_moments(
    model: Any, layers: list[int], texts: list[str], *, n_tokens: int, context: int, bos: bool
) -> tuple[dict[int, Tensor], int]:
    """E[k kᵀ] by layer, and its number of tokens: a sum of outer products, token by token."""
    names = {layer: f"blocks.{layer}.mlp.hook_post" for layer in layers}
    total, count = dict.fromkeys(layers, 0.0), 0
    for text in texts:
        ids = model.to_tokens(text, prepend_bos=False)[0].tolist()
        size = context - bos
        for start in range(0, len(ids), size):
            piece = ([model.tokenizer.bos_token_id] if bos else []) + ids[start : start + size]
            piece = piece[: n_tokens - count]
            if not piece:
                break
            with torch.no_grad():
                _, cache = model.run_with_cache(torch.tensor([piece]), names_filter=list(names.values()))
            for layer, name in names.items():
                for key in cache[name][0].double():
                    total[layer] = total[layer] + torch.outer(key, key)
            count += len(piece)
    return {layer: moment / count for layer, moment in total.items()}, count


def _tokens(model: Any, text: str, bos: bool) -> list[int]:
    return model.to_tokens(text, prepend_bos=bos)[0].tolist()


def _rows(model: Any, fact: Any, templates: list[str], bos: bool) -> list[tuple[list[int], int]]:
    """Token ids of each template and the position of its last subject token (of a word-level tokenizer)."""
    rows = []
    for template in templates:
        until = template.split("{}")[0] + fact.subject
        rows.append((_tokens(model, template.replace("{}", fact.subject), bos), len(_tokens(model, until, bos)) - 1))
    return rows


def key_and_value(model: Any, layer: int, ids: list[int], position: int) -> tuple[Tensor, Tensor]:
    """What goes into W_out at a position and what comes out of it, as the hooks see them."""
    names = [f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_mlp_out"]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=names)
    return cache[names[0]][0, position], cache[names[1]][0, position]


def _log_probs(model: Any, layer: int, ids: list[int], position: int, delta: Tensor) -> Tensor:
    """Log-probabilities at every position with δ added to the MLP's output at one."""

    def add(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, position] = value[:, position] + delta.to(value.dtype)
        return value

    out = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", add)])
    return out[0].float().log_softmax(-1)


def loss(
    model: Any,
    fact: Any,
    layer: int,
    contexts: tuple[str, ...],
    delta: Tensor,
    *,
    bos: bool,
    kl_weight: float,
    decay: float,
    kl_prompts: tuple[str, ...] = ("{} is a",),
    kl_at: str = "subject",
    kl: str = "new‖old",
    squared: bool = False,
) -> Tensor:
    """L(δ) = mean_j −1/T Σ_i log p(o_i) + a KL + b ‖δ‖ / ‖v‖², term by term.

    Args:
        kl: ``"new‖old"`` is Meng et al.'s; ``"old‖new"`` is what it is not.
        squared: The decay with ‖δ‖², which it is not either.
    """
    target = _tokens(model, fact.target_new, False)
    rewrite = _rows(model, fact, [context + fact.prompt for context in contexts], bos)
    nll = 0.0
    for ids, position in rewrite:
        log_p = _log_probs(model, layer, ids + target[:-1], position, delta)
        for i, token in enumerate(target):
            nll = nll - log_p[len(ids) - 1 + i, token] / len(target) / len(rewrite)
    drift = 0.0
    guard = _rows(model, fact, list(kl_prompts), bos)
    for ids, position in guard:
        at = position if kl_at == "subject" else len(ids) - 1
        new = _log_probs(model, layer, ids, position, delta)[at]
        with torch.no_grad():
            old = _log_probs(model, layer, ids, position, torch.zeros_like(delta))[at]
        a, b = (new, old) if kl == "new‖old" else (old, new)
        drift = drift + (a.exp() * (a - b)).sum() / len(guard)
    _, v = key_and_value(model, layer, *rewrite[0])
    size = delta.norm() ** 2 if squared else delta.norm()
    return nll + kl_weight * drift + decay * size / v.norm() ** 2


def fit_value(
    model: Any,
    fact: Any,
    layer: int,
    contexts: tuple[str, ...],
    *,
    bos: bool,
    steps: int,
    lr: float,
    clamp: float,
    stop_below: float,
    **terms: Any,
) -> tuple[Tensor, list[float]]:
    """δ and the loss before each step: Adam by hand (Kingma & Ba 2014), then the projection."""
    (ids, position), *_ = _rows(model, fact, [fact.prompt], bos)
    v_norm = float(key_and_value(model, layer, ids, position)[1].norm())
    delta = torch.zeros(model.cfg.d_model)
    mean, square, losses = torch.zeros_like(delta), torch.zeros_like(delta), []
    for step in range(1, steps + 1):
        delta.requires_grad_(True)
        now = loss(model, fact, layer, contexts, delta, bos=bos, **terms)
        losses.append(float(now.detach()))
        if losses[-1] < stop_below or step == steps:
            break
        (gradient,) = torch.autograd.grad(now, delta)
        delta = delta.detach()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        delta = delta - lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        delta = delta * min(1.0, clamp * v_norm / float(delta.norm()))
    return delta.detach(), losses


def rank_one(moment: Tensor, mean_key: Tensor, key: Tensor, residual: Tensor) -> Tensor:
    """ΔW [d_mlp, d_model] of Meng et al.: Λ = r / (C⁻¹k̄)ᵀk, ΔW = C⁻¹k̄ ⊗ Λ, with an explicit inverse."""
    u = torch.linalg.inv(moment) @ mean_key
    return torch.outer(u, residual / (u @ key))
