"""Lenses and patches as written: one token, one layer, one cell at a time, with TransformerLens' own parts.

Tuned lens (Belrose et al. 2023, arXiv:2303.08112, eq. 6 to 9)::

    KL(p || q) = Σ_v p_v (log p_v − log q_v),   p the model's prediction, q = softmax(head(h + A h + b))

Attribute rate (Geva et al. 2023, arXiv:2304.14767, sec. 5): of the k words with the largest logits, the share that is
in the set.

Patchscope (Ghandeharioun et al. 2024, arXiv:2401.06102): a whole pass in which a vector is put in the place of a
token's state after a block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def head(model: Any, stream: Tensor) -> Tensor:
    """Logits of one vector by the model's own last norm and unembedding."""
    logits = model.unembed(model.ln_final(stream[None, None]))[0, 0]
    # gemma 2 caps its logits after the unembedding
    cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def streams(model: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """What a prompt's tokens are after each block, a list of [pos d_model]; and its logits, [pos vocab]."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids[None], names_filter=names)
    return [cache[name][0] for name in names], logits[0]


def lens(model: Any, stream: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """Log-probabilities that a translator makes of one vector."""
    return head(model, stream + matrix @ stream + bias).log_softmax(-1)


def kl(model: Any, prompts: Sequence[Tensor], layer: int, matrix: Tensor, bias: Tensor, *, skip: int) -> Tensor:
    """Mean KL of one layer's translator over all tokens of some prompts but the first `skip` of each."""
    found = []
    for ids in prompts:
        stream, logits = streams(model, ids)
        for position in range(skip, len(ids)):
            log_p = logits[position].log_softmax(-1)
            log_q = lens(model, stream[layer][position], matrix, bias)
            found.append(sum(log_p[v].exp() * (log_p[v] - log_q[v]) for v in range(len(log_p))))
    return sum(found) / len(found)


def attribute_rate(logits: Tensor, words: Collection[int], k: int) -> float:
    """Share of the k words with the largest logits that are attributes."""
    values = logits.tolist()
    order = sorted(range(len(values)), key=lambda word: -values[word])
    return sum(word in words for word in order[:k]) / k


def patched(model: Any, ids: Tensor, layer: int, position: int, vector: Tensor) -> Tensor:
    """Logits of a prompt, [pos vocab], with one token's state after a block (-1: before the first) replaced."""

    def put(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, position] = vector
        return value

    name = f"blocks.{layer}.hook_resid_post" if layer >= 0 else "blocks.0.hook_resid_pre"
    with torch.no_grad():
        return model.run_with_hooks(ids[None], fwd_hooks=[(name, put)])[0]
