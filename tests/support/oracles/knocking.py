"""Knock-out cell by cell, as defined: whole forward passes of one prompt each, through TransformerLens' public hooks.

What a component says at some tokens of a prompt is replaced by the mean of what it says at the same role in other
prompts (or by a part of it), and the prompt's end is read. Roles: an earlier subject token, the last one, and a token
after the subject by how far before the end it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Prompt = tuple[Tensor, tuple[int, int]]  # ids, and (start, stop) of the subject
NAMES = {"mlp": "hook_mlp_out", "attn": "hook_attn_out"}


def role(prompt: Prompt, position: int) -> Any:
    ids, (_, stop) = prompt
    if position < stop - 1:
        return "earlier"
    return "last of the subject" if position == stop - 1 else len(ids) - position


def at(prompt: Prompt, place: str) -> list[int]:
    """The positions of a place."""
    ids, (start, stop) = prompt
    return {"subject": [stop - 1], "last": [len(ids) - 1], "all": list(range(start, len(ids)))}[place]


def says(model: Any, prompt: Prompt, component: str, layer: int) -> Tensor:
    """What a component hands to the stream, [pos d_model]."""
    name = f"blocks.{layer}.{NAMES[component]}"
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt[0][None], names_filter=[name])
    return cache[name][0].double()


def mean_saying(model: Any, prompts: Sequence[Prompt], component: str, layer: int) -> dict[Any, Tensor]:
    """By role: the mean over prompts, of each the mean over its tokens of that role."""
    found: dict[Any, list[Tensor]] = {}
    for prompt in prompts:
        said, own = says(model, prompt, component, layer), {}
        for position in at(prompt, "all"):
            own.setdefault(role(prompt, position), []).append(said[position])
        for each, values in own.items():
            found.setdefault(each, []).append(torch.stack(values).mean(0))
    return {each: torch.stack(values).mean(0) for each, values in found.items()}


def silencing(
    prompt: Prompt,
    cells: Sequence[tuple[str, int, str]],
    means: Callable[[str, int], dict[Any, Tensor]],
    *,
    strength: float = 1.0,
) -> list[Any]:
    """A hook for each cell."""

    def silence(component, layer, place):
        stand_in = means(component, layer)

        def hook_fn(value, hook):
            value = value.clone()
            for position in at(prompt, place):
                # Prompts whose subjects have one token say nothing of an earlier one.
                new = stand_in.get(role(prompt, position), stand_in["last of the subject"]).to(value)
                value[0, position] = (1 - strength) * value[0, position] + strength * new
            return value

        return f"blocks.{layer}.{NAMES[component]}", hook_fn

    return [silence(*cell) for cell in cells]


def knocked_out(
    model: Any,
    prompt: Prompt,
    cells: Sequence[tuple[str, int, str]],
    means: Callable[[str, int], dict[Any, Tensor]],
    *,
    strength: float = 1.0,
) -> Tensor:
    """Log-probabilities at the end of a prompt, [vocab], with some components silenced at some places."""
    with torch.no_grad():
        logits = model.run_with_hooks(prompt[0][None], fwd_hooks=silencing(prompt, cells, means, strength=strength))
    return logits[0, -1].float().log_softmax(-1)


def first(log_p: Tensor, objects: Sequence[int]) -> tuple[float, float, float]:
    """Whether the first of some objects is the likeliest of them, whether the second is, and the mean of the others."""
    likeliest = max(objects, key=lambda token: float(log_p[token]))
    wins = [float(token == likeliest) for token in objects]
    return wins[0], wins[1], sum(wins[2:]) / len(wins[2:])
