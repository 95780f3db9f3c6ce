"""Learning on top of a changed model: what is taught, and Adam on changes that stand beside ``W_out``."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.halving import Attempt, halving, that_fit
from tl_factedit.backend.hook_names import resid_pre
from tl_factedit.backend.memory import GIB, NUMBER, budget, graph_bytes, logits_bytes
from tl_factedit.backend.protocol import Hook, Model, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, batches, continuation, pad
from tl_factedit.editing.adam import Adam
from tl_factedit.measure.first_tokens import FirstTokens
from tl_factedit.measure.population import Population

LEARNT = 0.5
"""An object is learnt when it is likelier than this."""


@dataclass(frozen=True, eq=False)
class Lessons:
    """What a fact's prompt is taught, one object at a time.

    Attributes:
        asked: The prompt.
        targets: The old object's ids, then those of the controls.
        named: The controls.
    """

    asked: FirstTokens
    targets: tuple[Int[Tensor, "_"], ...]
    named: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, bos: bool, controls: int, seed: str) -> Lessons:
        """The lessons of a fact, with some of its controls drawn."""
        if controls < 1:
            raise ValueError(f"controls is {controls}, needed 1 at least for each fact")
        asked = FirstTokens.of(tokenizer, fact, bos)
        row = align(tokenizer, fact, prepend_bos=bos)
        spelt = {text: continuation(tokenizer, row.text, text, prepend_bos=bos) for text in asked.named}
        alike = [text for text, ids in spelt.items() if len(ids) == len(row.true_ids)]
        some = random.Random(seed).sample(alike, min(controls, len(alike)))
        return cls(asked, (row.true_ids, *(spelt[text] for text in some)), tuple(some))

    @property
    def ids(self) -> Int[Tensor, "pos"]:
        """The prompt's token ids."""
        return self.asked.ids

    @property
    def controls(self) -> bool:
        """Whether there is anything to compare with."""
        return self.asked.apart and len(self.targets) > 1


Pupil = tuple[Int[Tensor, "_"], Int[Tensor, "_"]]
"""Ids of a prompt, and of what it is to be followed by."""


class Group:
    """Pupils that are run at once, from the first layer that learns on."""

    def __init__(self, runner: Runner, pupils: Sequence[Pupil], first: int) -> None:
        self.tokens = pad([torch.cat([ids, target[:-1]]) for ids, target in pupils], 0)
        at = [(r, len(ids) - 1 + i) for r, (ids, target) in enumerate(pupils) for i in range(len(target))]
        self.at = torch.tensor([r for r, _ in at]), torch.tensor([place for _, place in at])
        self.target = torch.cat([target for _, target in pupils])
        self.length = torch.tensor([float(len(target)) for _, target in pupils])
        place = resid_pre(first)
        with torch.no_grad():
            self.start = first, runner.capture(self.tokens, [place], stop=first)[place]

    def log_p(self, runner: Runner, hooks: Sequence[Hook]) -> Float[Tensor, "pupil"]:
        """Of each pupil's whole target."""
        logits = runner.logits(self.tokens, at=self.at, start=self.start, hooks=hooks)[0]
        log_p = logits.float().log_softmax(-1).gather(-1, self.target.to(logits.device)[:, None])[:, 0]
        return torch.zeros(len(self.length), device=log_p.device).index_add(0, self.at[0].to(log_p.device), log_p)


class Lesson:
    """The pupils of an update, in groups that are run at once; those that the device has no memory for are halved.

    Args:
        runner: Runs the model.
        pupils: Who is taught.
        widths: What each costs, in tokens.
        first: The first layer that learns.
        batch_tokens: Most tokens in one pass.
    """

    def __init__(
        self, runner: Runner, pupils: Sequence[Pupil], widths: Sequence[int], first: int, batch_tokens: int
    ) -> None:
        self.pupils = tuple(pupils)
        self._runner, self._widths, self._first, self._most = runner, widths, first, batch_tokens
        self._groups: dict[tuple[int, ...], Group] = {}

    def attempts(self) -> Iterator[Attempt[int]]:
        """The pupils, some at a time: as many as had room when they were last run."""
        if not self._groups:
            yield from that_fit(self._widths, self._most)
            return
        known = [list(some) for some in self._groups]
        yield from halving(known, len, "texts in one pass", "a smaller batch_tokens")

    def group(self, some: list[int]) -> Group:
        """Run these up to the first layer that learns, if that isn't done yet; none of them is kept twice."""
        if tuple(some) not in self._groups:
            for other in [each for each in self._groups if set(each) & set(some)]:
                del self._groups[other]
            self._groups[tuple(some)] = Group(self._runner, [self.pupils[i] for i in some], self._first)
        return self._groups[tuple(some)]


class Learner:
    """Changes of some ``W_out`` that are learnt by Adam: one for each row, or one for all.

    Attributes:
        learnt: For each site, [change d_mlp d_model].
    """

    def __init__(self, runner: Runner, sites: Sequence[DownProj], changes: int, lr: float) -> None:
        self.runner, self.sites = runner, sites
        # Steps of Adam are smaller than what half precision resolves.
        kinds = [torch.promote_types(site.W.dtype, torch.float32) for site in sites]
        self.learnt = [
            torch.zeros(changes, *site.W.shape, dtype=kind, device=site.W.device)
            for site, kind in zip(sites, kinds, strict=True)
        ]
        self.adam = Adam(self.learnt, lr)

    def update(self, lesson: Lesson) -> Float[Tensor, "pupil"]:
        """One update towards all targets; log p of each from before it."""
        total = [torch.zeros_like(each) for each in self.learnt]
        count = 1 if len(self.learnt[0]) > 1 else len(lesson.pupils)
        log_p = torch.empty(len(lesson.pupils))
        for attempt in lesson.attempts():
            with attempt as some:
                found, gradients = self._gradients(lesson.group(some), count)
                log_p[some] = found
                for sum_, part in zip(total, gradients, strict=True):
                    sum_ += part
        return self._step(log_p, total)

    def update_group(self, group: Group) -> Float[Tensor, "pupil"]:
        """The same towards the targets of one group, whole or not at all."""
        log_p, gradients = self._gradients(group, 1 if len(self.learnt[0]) > 1 else len(group.length))
        return self._step(log_p, gradients)

    def _step(self, log_p: Float[Tensor, "pupil"], gradients: Sequence[Tensor]) -> Float[Tensor, "pupil"]:
        if not bool(log_p.isfinite().all()):
            raise RuntimeError(f"a log-probability is not finite after {self.adam.updates} updates: lower lr")
        self.adam.step(gradients)
        return log_p

    def _gradients(self, group: Group, count: int) -> tuple[Float[Tensor, "pupil"], tuple[Tensor, ...]]:
        """Log p of each pupil's target, and the gradients of their losses' sum over `count`."""
        leaves = [each.detach().requires_grad_() for each in self.learnt]
        with torch.enable_grad():
            log_p = group.log_p(self.runner, adding_hooks(self.sites, leaves))
            loss = (-log_p / group.length.to(log_p.device)).sum() / count
            return log_p.detach().cpu(), torch.autograd.grad(loss, leaves)


def adding_hooks(sites: Sequence[DownProj], learnt: Sequence[Tensor]) -> list[Hook]:
    """Hooks that add what was learnt to what ``W_out`` (and whatever else is laid over it) answers."""

    def of(site: DownProj, change: Tensor) -> list[Hook]:
        whole = change if len(change) > 1 else change[0]
        return site.hooks(lambda key, value: value + (key.to(change.dtype) @ whole).to(value.dtype))

    return [hook for site, change in zip(sites, learnt, strict=True) for hook in of(site, change)]


def updates_until_learnt(
    model: Model, pupils: Sequence[Pupil], layers: Sequence[int], lr: float, steps: int, memory: float | None
) -> Float[Tensor, "pupil"]:
    """For each pupil, learning alone, the updates until its target is likelier than ½; ``steps + 1`` if it isn't."""
    room = budget(model, memory)
    sites = [down_proj(model, layer) for layer in layers]
    runner = Runner(model)
    numbers = sum(site.W.numel() for site in sites)
    token, read = graph_bytes(model, layers[0]), logits_bytes(model)
    # Of each change there are the sum, the gradient, two moments and a step.
    cost = [NUMBER * 6 * numbers + token * (len(ids) + len(target)) + read * len(target) for ids, target in pupils]
    taken = torch.full((len(pupils),), steps + 1.0)
    try:
        for attempt in halving(batches(cost, int(room * GIB)), len, "facts that learn at once", "less memory"):
            with attempt as some:
                taken[some] = _learn(runner, sites, [pupils[i] for i in some], lr, steps)
    finally:
        detach_caches(model)
    return taken


def _learn(
    runner: Runner, sites: Sequence[DownProj], pupils: Sequence[Pupil], lr: float, steps: int
) -> Float[Tensor, "pupil"]:
    group = Group(runner, pupils, sites[0].layer)
    learner = Learner(runner, sites, len(pupils), lr)
    taken = torch.full((len(pupils),), math.nan)
    wanted, before = math.log(LEARNT), torch.full((len(pupils),), math.nan)
    for update in range(steps + 1):
        if update < steps:
            now = learner.update_group(group)
        else:
            with torch.no_grad():
                now = group.log_p(runner, adding_hooks(sites, learner.learnt)).cpu()
        there = taken.isnan() & (now > wanted)
        between = update - 1 + (wanted - before) / (now - before) if update else torch.zeros_like(now)
        taken = torch.where(there, between, taken)
        before = now
        if not bool(taken.isnan().any()):
            break
    return taken.nan_to_num(nan=steps + 1.0)


def check_one_change(population: Population, why: str) -> None:
    """Check that one change answers for all facts.

    Raises:
        ValueError: Several do.
    """
    if len(population.parts) != 1:
        raise ValueError(
            f"{len(population.parts)} changes answer for {len(population.facts)} facts, needed one for all: {why}"
        )


def learning_layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers whose ``W_out`` may learn: those named, or all."""
    chosen = tuple(range(n_layers(model)) if layers is None else sorted(set(layers)))
    if not chosen:
        raise ValueError("layers is empty, needed one at least")
    for layer in chosen:
        down_proj(model, layer)
    return chosen
