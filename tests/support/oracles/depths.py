"""The unlearning depth score as written (Lee, Kim and Jo 2026, arXiv:2605.24614): one fact and one layer at a time.

Whole passes of the models' own calls with one hook; nothing of the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mean_log_p(model: Any, prompt: Tensor, target: Tensor, hooks: list[Any]) -> float:
    """Mean over the target's tokens of log p(token | all before it), teacher-forced."""
    with torch.no_grad():
        logits = model.run_with_hooks(torch.cat([prompt, target])[None], fwd_hooks=hooks)[0]
    total = 0.0
    for t, token in enumerate(target.tolist()):
        total += float(logits[len(prompt) - 1 + t].float().log_softmax(-1)[token])
    return total / len(target)


def drop(full: Any, source: Any, prompt: Tensor, target: Tensor, layer: int, places: list[int]) -> float:
    """What the source's states after one block cost the full model, nats a token."""
    name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        _, cache = source.run_with_cache(torch.cat([prompt, target])[None])
    theirs = cache[name][0].clone()

    def put(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        for place in places:
            value[0, place] = theirs[place]
        return value

    return mean_log_p(full, prompt, target, []) - mean_log_p(full, prompt, target, [(name, put)])


def score(stage_1: list[float], stage_2: list[float], tau: float) -> float | None:
    """Of one fact: the erasure ratios of the layers that count, weighted by what the retain model lacks."""
    above = below = 0.0
    for of_retain, of_changed in zip(stage_1, stage_2, strict=True):
        if of_retain > tau:
            above += of_retain * min(max(of_changed / of_retain, 0.0), 1.0)
            below += of_retain
    return above / below if below else None
