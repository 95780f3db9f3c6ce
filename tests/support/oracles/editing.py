"""Editing by the letter: one text, one row, one formula at a time, through TransformerLens' public hooks.

No batch, no padding, no partial forward, no import of the package's own machinery but the Cholesky factor of
`whiten_key`, which tests of its errors go through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_factedit.core.solve import cholesky, whiten

Hooks = Sequence[tuple[str, Any]]


def whiten_key(moment: Tensor, key: Tensor, *, ridge: float = 0.0) -> Tensor:
    """``(C + ridge · tr(C)/m · I)⁻¹ k``: ROME's direction, from a second moment alone."""
    return whiten(cholesky(moment, ridge=ridge), key)


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


def _rows(model: Any, fact: Any, templates: list[str], bos: bool) -> list[tuple[list[int], tuple[int, int]]]:
    """Token ids of each template and where its subject's first and last token are (of a word-level tokenizer)."""
    rows = []
    for template in templates:
        before = template.split("{}")[0]
        first = len(_tokens(model, before, bos)) if before else int(bos)
        last = len(_tokens(model, before + fact.subject, bos)) - 1
        rows.append((_tokens(model, template.replace("{}", fact.subject), bos), (first, last)))
    return rows


def key_and_value(model: Any, layer: int, ids: list[int], position: int) -> tuple[Tensor, Tensor]:
    """What goes into W_out at a position and what comes out of it, as the hooks see them."""
    key, value = (f"blocks.{layer}.{place}" for place in ("mlp.hook_post", "hook_mlp_out"))
    return seen(model, key, ids)[position], seen(model, value, ids)[position]


def seen(model: Any, place: str, ids: list[int], hooks: Hooks = ()) -> Tensor:
    """What a hook sees at every token of one text while other hooks are at work."""
    kept = []

    def keep(value: Tensor, hook: Any) -> None:
        kept.append(value[0].detach().clone())

    with torch.no_grad():
        model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[*hooks, (place, keep)])
    return kept[0]


def embedded(embeddings: Tensor | None, subject: tuple[int, int]) -> list[tuple[str, Any]]:
    """The hook that sets a subject's token embeddings: the last of them at its last token, and so on backwards."""

    def put(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        for back in range(subject[1] - subject[0] + 1):
            value[:, subject[1] - back] = embeddings[max(len(embeddings) - 1 - back, 0)].to(value.dtype)
        return value

    return [] if embeddings is None else [("hook_embed", put)]


# ------------------------------------------------------------------------------------ values

PLACES = {"mlp": ("hook_mlp_out",), "resid": ("hook_resid_post",), "modules": ("hook_attn_out", "hook_mlp_out")}
"""Where δ is added: ROME, MEMIT, PMET."""


def _log_probs(
    model: Any, layer: int, ids: list[int], subject: tuple[int, int], delta: Tensor, where: str, embeddings: Any
) -> Tensor:
    """Log-probabilities at every position with each δ added at its place at the subject's last token."""

    def adder(own: Tensor) -> Any:
        def add(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, subject[1]] = value[:, subject[1]] + own.to(value.dtype)
            return value

        return add

    hooks = [(f"blocks.{layer}.{place}", adder(own)) for place, own in zip(PLACES[where], delta, strict=True)]
    out = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[*embedded(embeddings, subject), *hooks])
    return out[0].float().log_softmax(-1)


def before(model: Any, fact: Any, layer: int, *, bos: bool, where: str = "mlp", embeddings: Any = None) -> Tensor:
    """What stands at each place in the bare prompt without δ, [place, d_model]."""
    ((ids, subject),) = _rows(model, fact, [fact.prompt], bos)
    hooks = embedded(embeddings, subject)
    return torch.stack([seen(model, f"blocks.{layer}.{place}", ids, hooks)[subject[1]] for place in PLACES[where]])


def terms(
    model: Any,
    fact: Any,
    layer: int,
    contexts: tuple[str, ...],
    delta: Tensor,
    *,
    bos: bool,
    kl_prompts: tuple[str, ...] = ("{} is a",),
    kl_at: str = "subject",
    kl: str = "new‖old",
    squared: bool = False,
    where: str = "mlp",
    unlikely: bool = False,
    embeddings: Any = None,
) -> tuple[Any, Any, Any, bool]:
    """What the loss is made of: that of the target, KL, ‖δ‖ / ‖v‖², and whether the target comes first everywhere."""
    delta = delta[None] if delta.ndim == 1 else delta
    target = _tokens(model, fact.target_new, False)
    rewrite = _rows(model, fact, [context + fact.prompt for context in contexts], bos)
    wanted, first = 0.0, True
    for ids, subject in rewrite:
        log_p = _log_probs(model, layer, ids + target[:-1], subject, delta, where, embeddings)
        said = [log_p[len(ids) - 1 + i] for i in range(len(target))]
        own = sum(each[token] for each, token in zip(said, target, strict=True))
        wanted = wanted + (own.exp() if unlikely else -own / len(target)) / len(rewrite)
        first = first and all(int(each.argmax()) == token for each, token in zip(said, target, strict=True))
    drift = 0.0
    guard = _rows(model, fact, list(kl_prompts), bos)
    for ids, subject in guard:
        at = subject[1] if kl_at == "subject" else len(ids) - 1
        new = _log_probs(model, layer, ids, subject, delta, where, embeddings)[at]
        with torch.no_grad():
            old = _log_probs(model, layer, ids, subject, torch.zeros_like(delta), where, embeddings)[at]
        a, b = (new, old) if kl == "new‖old" else (old, new)
        drift = drift + (a.exp() * (a - b)).sum() / len(guard)
    size = 0.0
    for own, v in zip(delta, before(model, fact, layer, bos=bos, where=where, embeddings=embeddings), strict=True):
        size = size + (own.norm() ** 2 if squared else own.norm()) / v.norm() ** 2
    return wanted, drift, size, first


def loss(
    model: Any,
    fact: Any,
    layer: int,
    contexts: tuple[str, ...],
    delta: Tensor,
    *,
    kl_weight: float,
    decay: float,
    **how: Any,
) -> Tensor:
    """L(δ) = mean_j −1/T Σ_i log p(o_i) + a KL + b ‖δ‖ / ‖v‖², term by term.

    Args:
        delta: [d_model], or one for each of the places, [place, d_model].
        bos: BOS policy.
        kl_prompts: What KL is read after.
        kl_at: ``"subject"`` or ``"end"``.
        kl: ``"new‖old"`` is Meng et al.'s; ``"old‖new"`` is what it is not.
        squared: The decay with ‖δ‖², which it is not either.
        where: One of `PLACES`.
        unlikely: The first term is mean_j Π_i p(o_i) instead.
        embeddings: Of the subject's tokens, in every row.
    """
    wanted, drift, size, _ = terms(model, fact, layer, contexts, delta, **how)
    return wanted + kl_weight * drift + decay * size


def fit_value(
    model: Any,
    fact: Any,
    layer: int,
    contexts: tuple[str, ...],
    *,
    steps: int,
    lr: float,
    clamp: float,
    stop_below: float,
    kl_weight: float,
    decay: float,
    ease: float = 1.0,
    stop_kl: float | None = None,
    **how: Any,
) -> tuple[Tensor, list[float]]:
    """δ (a row for each of several places) and the loss before each step: Adam by hand (Kingma & Ba 2014), projected.

    Args:
        ease: What the first term counts after a step at which the target came first everywhere (PMET).
        stop_kl: Stop at such a step if a KL is at most this.
    """
    about = {name: how[name] for name in ("bos", "where", "embeddings") if name in how}
    norms = before(model, fact, layer, **about).float().norm(dim=-1)
    delta = torch.zeros(len(norms), model.cfg.d_model)
    mean, square, losses, count = torch.zeros_like(delta), torch.zeros_like(delta), [], 1.0
    for step in range(1, steps + 1):
        delta.requires_grad_(True)
        wanted, drift, size, first = terms(model, fact, layer, contexts, delta, **how)
        now = count * wanted + kl_weight * drift + decay * size
        losses.append(float(now.detach()))
        if not how.get("unlikely"):
            if losses[-1] < stop_below:
                break
            if stop_kl is not None and first and float(kl_weight * torch.as_tensor(drift).detach()) <= stop_kl:
                break
            count = ease if first else 1.0
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(now, delta)
        delta = delta.detach()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        delta = delta - lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        delta = torch.stack(
            [own * min(1.0, float(clamp * n / own.norm())) for own, n in zip(delta, norms, strict=True)]
        )
    delta = delta.detach()
    return delta[0] if len(delta) == 1 else delta, losses


# ------------------------------------------------------------------------------------ closed forms


def rank_one(moment: Tensor, mean_key: Tensor, key: Tensor, residual: Tensor) -> Tensor:
    """ΔW [d_mlp, d_model] of Meng et al.: Λ = r / (C⁻¹k̄)ᵀk, ΔW = C⁻¹k̄ ⊗ Λ, with an explicit inverse."""
    u = torch.linalg.inv(moment) @ mean_key
    return torch.outer(u, residual / (u @ key))


def least_squares(moment: Tensor, keys: Tensor, residuals: Tensor, weight: float) -> Tensor:
    """ΔW [d_mlp, d_model] of Meng et al. 2023, transposed: Δ = R Kᵀ (λC + K Kᵀ)⁻¹ with keys as columns."""
    columns, wanted = keys.T, residuals.T
    return (wanted @ columns.T @ torch.linalg.inv(weight * moment + columns @ columns.T)).T


def equality(moment: Tensor, keys: Tensor, residuals: Tensor, epsilon: float) -> Tensor:
    """ΔW of Gupta et al. 2024, transposed: Δ = R (Kᵀ C⁻¹ K + ε I)⁻¹ Kᵀ C⁻¹ with keys as columns."""
    columns, wanted, inverse = keys.T, residuals.T, torch.linalg.inv(moment)
    gram = columns.T @ inverse @ columns + epsilon * torch.eye(len(keys), dtype=keys.dtype)
    return (wanted @ torch.linalg.inv(gram) @ columns.T @ inverse).T


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """P of Fang et al. 2024: the singular vectors of C with a value below the threshold, times their transpose."""
    vectors, values, _ = torch.linalg.svd(moment)
    small = vectors[:, values < threshold]
    return small @ small.T


def in_null_space(projection: Tensor, keys: Tensor, residuals: Tensor, before: Tensor, weight: float) -> Tensor:
    """ΔW of Fang et al. 2024: Δᵀ = (P (K Kᵀ + K_p K_pᵀ) + λ I)⁻¹ P K Rᵀ with keys as columns."""
    columns, earlier = keys.T, before.T
    matrix = projection @ (columns @ columns.T + earlier @ earlier.T)
    matrix = matrix + weight * torch.eye(len(matrix), dtype=keys.dtype)
    return torch.linalg.inv(matrix) @ projection @ columns @ residuals


# ------------------------------------------------------------------------------------ many facts, many layers


def spread(
    model: Any,
    facts: list[Any],
    layers: list[int],
    contexts: tuple[str, ...],
    wanted: Tensor,
    solve: Any,
    *,
    bos: bool,
    reached: str = "hook_resid_post",
    root: bool = False,
    embeddings: Any = None,
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """MEMIT's loop over layers, from below: keys, what is missing, and the update, with the layers before changed.

    No weight is written: the updates so far are added by hooks to what W_out answers.

    Args:
        wanted: Z, what is to stand at `reached` of the last layer in each bare prompt.
        solve: (layer, keys, residuals) -> ΔW.
        reached: Where it is read.
        root: Whether what is missing is divided by the root of the layers left (PMET), not by their number.
        embeddings: For each fact, of its subject's tokens; None for the model's own.

    Returns:
        By layer, keys [fact, d_mlp], residuals [fact, d_model] and ΔW.
    """
    embeddings = embeddings or [None] * len(facts)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def changed() -> list[tuple[str, Any]]:
        hooks = []
        for layer, (*_, delta) in found.items():
            kept = []

            def read(key: Tensor, hook: Any, kept: list[Tensor] = kept) -> None:
                kept[:] = [key]

            def add(value: Tensor, hook: Any, kept: list[Tensor] = kept, delta: Tensor = delta) -> Tensor:
                return value + (kept[0].double() @ delta).to(value.dtype)

            hooks += [(f"blocks.{layer}.mlp.hook_post", read), (f"blocks.{layer}.hook_mlp_out", add)]
        return hooks

    def at_subject(place: str, fact: Any, own: Any, context: str) -> Tensor:
        ((ids, subject),) = _rows(model, fact, [context + fact.prompt], bos)
        return seen(model, place, ids, [*embedded(own, subject), *changed()])[subject[1]].double()

    for i, layer in enumerate(layers):
        keys, missing = [], []
        for fact, own, z in zip(facts, embeddings, wanted, strict=True):
            bare, *others = (at_subject(f"blocks.{layer}.mlp.hook_post", fact, own, context) for context in contexts)
            keys.append(bare / 2 + sum(others) / len(others) / 2 if others else bare)
            missing.append(z - at_subject(f"blocks.{layers[-1]}.{reached}", fact, own, ""))
        left = len(layers) - i
        key, residual = torch.stack(keys), torch.stack(missing) / (left**0.5 if root else left)
        found[layer] = (key, residual, solve(layer, key, residual))
    return found
