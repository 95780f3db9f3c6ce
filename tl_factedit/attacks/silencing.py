"""Running a model with cells silenced: what it says of its objects then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.attacks.cells import COMPONENTS, PLACES, Cells, Place, describe
from tl_factedit.attacks.replacements import Replacements, roles_at
from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook, resid_post, resid_pre
from tl_factedit.backend.protocol import Hook, HookFn
from tl_factedit.backend.runner import Runner
from tl_factedit.core.tokens import Aligned, pad

By: TypeAlias = Literal["mean", "resample", "half"]
"""What stands in for what is silenced: the references' mean, one of them, or half of the mean and half of its own."""

BY: tuple[By, ...] = ("mean", "resample", "half")

ENOUGH_TOKENS = 128
"""In one forward pass: with fewer, most of the time isn't spent on arithmetic."""


class Silencing(NamedTuple):
    """Some cells, and what stands in for them.

    Attributes:
        cells: They are silenced together; none: nothing is.
        by: What stands in: the references' ``"mean"``, one of them (``"resample"``), or ``"half"`` of the mean and half
            of what the cell says itself.
    """

    cells: Cells = ()
    by: By = "mean"

    def __str__(self) -> str:
        """In words."""
        words = {"mean": "", "resample": " (resampled)", "half": " (by half)"}
        return describe(self.cells) + words[self.by]


NOTHING = Silencing()
"""Nothing silenced."""


@dataclass(frozen=True, eq=False)
class SilencedPrompt:
    """A prompt, and which sources stand in for what it says.

    Attributes:
        row: The prompt.
        mean: The source that is a mean over references.
        other: The source that is one of them.
    """

    row: Aligned
    mean: int
    other: int

    def source(self, by: By) -> int:
        """Which one a silencing takes."""
        return self.other if by == "resample" else self.mean


def says_under(
    runner: Runner,
    asked: Sequence[SilencedPrompt],
    replacements: Replacements,
    silencings: Sequence[Silencing],
    reduce: Callable[[int, Float[Tensor, "vocab"]], Tensor],
    batch_tokens: int,
) -> Float[Tensor, "asked silencing *rest"]:
    """What a model says at the end of each prompt under each silencing: blocks below its first cell are run once.

    Args:
        runner: Runs the model; call inside `frozen` and ``torch.no_grad``.
        asked: The prompts.
        replacements: What stands in.
        silencings: What is silenced, one after the other.
        reduce: Makes what is wanted of a prompt's log-probabilities; is given its place among `asked`.
        batch_tokens: Most tokens in one forward pass.
    """
    enough = min(ENOUGH_TOKENS, batch_tokens)
    begins = [min((cell.layer for cell in each.cells), default=runner.n_layers) for each in silencings]
    most = max(len(here) for _, here in passes(begins, runner.n_layers, 1, 0))
    streams = [*(resid_pre(layer) for layer in range(runner.n_layers)), resid_post(runner.n_layers - 1)]
    found: dict[tuple[int, int], Tensor] = {}
    for attempt in that_fit([most * len(each.row.ids) for each in asked], batch_tokens):
        with attempt as some:
            rows = [asked[i].row for i in some]
            tokens = pad([row.ids for row in rows], 0)
            ends = torch.tensor([len(row.ids) - 1 for row in rows])
            clean = runner.capture(tokens, streams)
            spots = spots_of(rows)
            for begin, here in passes(begins, runner.n_layers, tokens.numel(), enough):
                # All prompts under the first of these silencings, then all under the next …
                hooks = hooks_of([asked[i] for i in some], spots, [silencings[s] for s in here], replacements)
                logits = runner.logits(
                    tokens.repeat(len(here), 1),
                    at=ends.repeat(len(here))[:, None],
                    start=(begin, clean[streams[begin]].repeat(len(here), 1, 1)),
                    hooks=hooks,
                )[:, 0]
                log_p = logits.float().log_softmax(-1).cpu()
                for s, part in zip(here, log_p.split(len(some)), strict=True):
                    for i, each in zip(some, part, strict=True):
                        found[i, s] = reduce(i, each)
    return torch.stack([torch.stack([found[i, s] for s in range(len(silencings))]) for i in range(len(asked))])


def passes(begins: Sequence[int], layers: int, tokens: int, enough: int) -> list[tuple[int, list[int]]]:
    """Which silencings are run together, and from which block on.

    Those that begin at one layer go together. Where they are few tokens, as with one fact, those that begin at the
    next layers go with them: running some blocks that nothing changed costs less than another pass.

    Args:
        begins: The first layer of each; the model's number of layers for one of nothing.
        layers: How many the model has.
        tokens: What one costs.
        enough: How many tokens a pass may have through those that begin higher.
    """
    by_layer: dict[int, list[int]] = {}
    for s, begin in enumerate(begins):
        by_layer.setdefault(begin, []).append(s)
    found: list[tuple[int, list[int]]] = []
    for begin, here in sorted(by_layer.items()):
        if found and begin < layers and (len(found[-1][1]) + len(here)) * tokens <= enough:
            found[-1][1].extend(here)
        else:
            found.append((begin, list(here)))
    return found


def spots_of(rows: Sequence[Aligned]) -> dict[Place, tuple[Tensor, ...]]:
    """By place: which row, which position, and which role, of all rows one after the other."""
    spots: dict[Place, tuple[Tensor, ...]] = {}
    for place in PLACES:
        found = [(i, p, role) for i, row in enumerate(rows) for p, role in roles_at(place, row)]
        spots[place] = tuple(torch.tensor(column) for column in zip(*found, strict=True))
    return spots


def hooks_of(
    asked: Sequence[SilencedPrompt],
    spots: Mapping[Place, tuple[Tensor, ...]],
    silencings: Sequence[Silencing],
    replacements: Replacements,
) -> list[Hook]:
    """One hook for each component of each layer that some silencing names."""
    sources = {by: torch.tensor([each.source(by) for each in asked]) for by in BY}
    at: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]] = {}
    for s, each in enumerate(silencings):
        for cell in each.cells:
            i, p, role = spots[cell.place]
            share = torch.full((len(i),), 0.5 if each.by == "half" else 1.0)
            entry = (i + s * len(asked), p, sources[each.by][i], role, share)
            at.setdefault((COMPONENTS.index(cell.component), cell.layer), []).append(entry)
    hooks: list[Hook] = []
    for (component, layer), entries in at.items():
        rows, position, source, role, share = (torch.cat(column) for column in zip(*entries, strict=True))
        value = replacements.at(source, role, component, layer)
        hooks.append((component_hook(COMPONENTS[component], layer), mix(rows, position, value, share)))
    return hooks


def mix(
    rows: Int[Tensor, "n"],
    positions: Int[Tensor, "n"],
    value: Float[Tensor, "n d_model"],
    share: Float[Tensor, "n"],
) -> HookFn:
    """At some positions of some rows, another value in place of a share of what stands there."""

    def hook_fn(own: Tensor, hook: Any = None) -> Tensor:
        mixed = own.clone()
        here, new, a = mixed[rows, positions], value.to(own), share.to(own)[:, None]
        mixed[rows, positions] = torch.where(a == 1, new, (1 - a) * here + a * new)
        return mixed

    return hook_fn
