"""zsRE's score, as written: one whole forward pass for each token of each object (Meng et al., eval_utils_zsre.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tokens_right(model: Any, prompt: Sequence[int], target: Sequence[int]) -> list[bool]:
    """For each token of the target, whether it is the likeliest after the prompt and the tokens before it."""
    right = []
    for i, token in enumerate(target):
        ids = torch.tensor([*prompt, *target[:i]])
        with torch.no_grad():
            right.append(int(model(ids[None])[0, -1].argmax()) == token)
    return right
