"""Knock-out cell by cell, as defined: whole forward passes of one prompt each, through TransformerLens' public hooks.

At the last subject token the MLP outputs of some layers are replaced by their means over other prompts' last subject
tokens (or by a part of them), and the prompt's end is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Prompt = tuple[Tensor, int]  # ids, and the position of the last subject token


def mean_output(model: Any, prompts: Sequence[Prompt], layer: int) -> Tensor:
    """The mean of a layer's MLP output at the last subject tokens, [d_model]."""
    name, total = f"blocks.{layer}.hook_mlp_out", torch.zeros(model.cfg.d_model, dtype=torch.float64)
    for ids, last in prompts:
        with torch.no_grad():
            _, cache = model.run_with_cache(ids[None], names_filter=[name])
        total += cache[name][0, last].double()
    return total / len(prompts)


def knocked_out(model: Any, prompt: Prompt, means: Mapping[int, Tensor], *, strength: float = 1.0) -> Tensor:
    """Log-probabilities at the end of a prompt, [vocab], with some layers' outputs replaced by their means."""
    ids, last = prompt

    def replace(layer):
        def hook_fn(value, hook):
            value = value.clone()
            value[0, last] = (1 - strength) * value[0, last] + strength * means[layer].to(value)
            return value

        return f"blocks.{layer}.hook_mlp_out", hook_fn

    with torch.no_grad():
        logits = model.run_with_hooks(ids[None], fwd_hooks=[replace(layer) for layer in means])
    return logits[0, -1].float().log_softmax(-1)


def first(log_p: Tensor, objects: Sequence[int]) -> tuple[float, float, float]:
    """Whether the first of some objects is the likeliest of them, whether the second is, and the mean of the others."""
    likeliest = max(objects, key=lambda token: float(log_p[token]))
    wins = [float(token == likeliest) for token in objects]
    return wins[0], wins[1], sum(wins[2:]) / len(wins[2:])
