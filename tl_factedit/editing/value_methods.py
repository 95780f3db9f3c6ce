"""How δ is moved to make its loss small: by Adam, as published, or by a search that asks the model less often.

A method is a value; `begin` makes of it a search for some facts at once. A search says where the loss is asked next
(`Search.at`), is told what it is there, and knows which δ it found. All of it stays where δ is: nothing is fetched.

    AdamSteps     x ← P(x − Adam's step)                                  as Meng et al. do
    LineSearch    x ← P(x + α d),  d = −H g,  α made less until f(x⁺) ≤ f(x) + c α g·d

P brings δ back into the ball ‖δ‖ ≤ clamp · ‖v‖. H is the inverse Hessian as the last few steps show it (L-BFGS: Nocedal
and Wright 2006, algorithm 7.4). On the sphere, where the gradient pushes outwards, H is that of the Lagrangian
f(x) + μ (‖x‖² − R²) / 2 with μ = −g·x / R², and g and d are along the sphere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.core.settings import check_settings
from tl_factedit.editing.adam import Adam

ENOUGH = 1e-4
"""c: how much of the decrease that the gradient promises a step has to bring (Nocedal and Wright's c₁)."""

LONGEST = 2.0
"""How many times as long as the last step that was good a step may be."""


@runtime_checkable
class Search(Protocol):
    """A descent of some facts at once."""

    @property
    def at(self) -> Float[Tensor, "fact place d_model"]:
        """Where the loss is asked next."""
        ...

    def of(self, rows: Tensor) -> Search:
        """The same for some of the facts."""
        ...

    def found(self, loss: Float[Tensor, "fact"]) -> Float[Tensor, "fact place d_model"]:
        """The δ that was found, if this is the loss at `at`."""
        ...

    def step(
        self, loss: Float[Tensor, "fact"], gradient: Float[Tensor, "fact place d_model"]
    ) -> Float[Tensor, "fact 2"]:
        """Move `at`; of each fact, whether that is finite and whether it had to be brought back."""
        ...


@runtime_checkable
class ValueMethod(Protocol):
    """How the loss of a value is made small: a frozen value with its settings."""

    def begin(self, start: Float[Tensor, "fact place d_model"], most: Float[Tensor, "fact place"], lr: float) -> Search:
        """Begin at some δ.

        Args:
            start: δ of each fact, and of each place that it is added at.
            most: The longest that it may be.
            lr: `ValueFit.lr`.
        """
        ...


def back(
    moved: Float[Tensor, "fact place d_model"], most: Float[Tensor, "fact place"]
) -> tuple[Float[Tensor, "fact place d_model"], Float[Tensor, "fact 2"]]:
    """δ brought back into its ball; whether it was finite, and whether it had to be brought back."""
    norm = moved.norm(dim=-1)
    beyond = norm > most
    said = torch.stack([(norm < math.inf).all(-1), beyond.any(-1)], 1).float()
    return moved * torch.where(beyond, most / norm, 1.0)[..., None], said


# ------------------------------------------------------------------------------------ as published


@dataclass(frozen=True)
class AdamSteps:
    """Adam with a bound: the published descent. `ValueFit.lr` is its step size."""

    def begin(self, start: Tensor, most: Tensor, lr: float) -> Search:
        """See `ValueMethod`."""
        return _AdamSearch(Adam([start], lr), most)


class _AdamSearch:
    def __init__(self, adam: Adam, most: Float[Tensor, "fact place"]) -> None:
        self.adam, self.most = adam, most

    @property
    def at(self) -> Tensor:
        return self.adam.tensors[0]

    def of(self, rows: Tensor) -> _AdamSearch:
        return _AdamSearch(self.adam.of(rows), self.most[rows])

    def found(self, loss: Tensor) -> Tensor:  # noqa: ARG002
        return self.at

    def step(self, loss: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG002
        self.adam.step([gradient])
        moved, said = back(self.at, self.most)
        self.at.copy_(moved)
        return said


# ------------------------------------------------------------------------------------ along lines


@dataclass(frozen=True)
class LineSearch:
    """A quasi-Newton search in the ball: of most facts a loss as small in half of `AdamSteps`' evaluations.

    Each fact has its own history and step, and is moved only to where its loss is lower. `ValueFit.lr` is Adam's, and
    says nothing here.

    Attributes:
        history: How many steps H is made of.
        first: How far it goes at first, as a share of the longest that δ may be.

    Example:
        >>> fit = fe.ValueFit(steps=12, method=fe.editing.LineSearch())
        >>> edit = fe.Memit(stats, fit=fit)(model, facts)         # doctest: +SKIP
    """

    history: int = 8
    first: float = 0.35

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_settings(self, least={"history": 1}, above={"first": 0})

    def begin(self, start: Tensor, most: Tensor, lr: float) -> Search:  # noqa: ARG002
        """See `ValueMethod`."""
        return _LineSearch(start, most, self.first * most.norm(dim=-1), self.history)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


class _LineSearch:
    """Of each fact: the best δ so far with its loss and gradient, and the direction and step that led to `at`.

    `steps` and `turns` are the last changes of δ and of the gradient, newest last, [history fact place·d_model];
    those that don't count are 0.
    """

    names = ("at", "most", "x", "loss", "gradient", "direction", "alpha", "reach", "begun")

    def __init__(self, start: Tensor, most: Tensor, reach: Float[Tensor, "fact"], history: int) -> None:
        facts = start[:, 0, 0]
        self.at, self.most, self.x = start.clone(), most, start.clone()
        self.loss = torch.full_like(facts, math.inf)
        self.gradient, self.direction = torch.zeros_like(start), torch.zeros_like(start)
        self.alpha, self.reach = torch.ones_like(facts), reach
        self.begun = torch.zeros_like(facts).bool()
        self.steps = start.new_zeros(history, *start.shape)
        self.turns = start.new_zeros(history, *start.shape)

    def of(self, rows: Tensor) -> _LineSearch:
        left = _LineSearch(self.at[rows], self.most[rows], self.reach[rows], len(self.steps))
        for name in self.names:
            setattr(left, name, getattr(self, name)[rows])
        left.steps, left.turns = self.steps[:, rows], self.turns[:, rows]
        return left

    def found(self, loss: Tensor) -> Tensor:
        return torch.where((loss <= self.loss)[:, None, None], self.at, self.x)

    def step(self, loss: Tensor, gradient: Tensor) -> Tensor:
        change = self.at - self.x
        promised = self.alpha * (self.gradient * self.direction).sum((-1, -2))
        good = ~self.begun | (loss <= self.loss + ENOUGH * promised)
        self._remember(good & self.begun, change, gradient - self.gradient)
        # A parabola through what is known of the line says how far to go back.
        over = 2 * (loss - self.loss - promised)
        shorter = self.alpha * (-promised / over).nan_to_num(0.5, 0.5, 0.5).clamp(0.1, 0.5)
        every = good[:, None, None]
        length = change.flatten(1).norm(dim=-1)
        grows = torch.where(self.alpha == 1, LONGEST, 1.0)  # not where a step was too long just now
        longest = torch.minimum(grows * length, self.most.norm(dim=-1))
        self.reach = torch.where(good & self.begun, longest, self.reach)
        self.x = torch.where(every, self.at, self.x)
        self.gradient = torch.where(every, gradient, self.gradient)
        self.loss = torch.where(good, loss, self.loss)
        self.direction = torch.where(every, self._direction(), self.direction)
        self.alpha = torch.where(good, 1.0, shorter)
        self.begun = self.begun | True
        self.at, said = back(self.x + self.alpha[:, None, None] * self.direction, self.most)
        return said

    def _remember(self, which: Bool[Tensor, "fact"], step: Tensor, turn: Tensor) -> None:
        every = which[:, None, None]
        self.steps = torch.where(every, torch.cat([self.steps[1:], step[None]]), self.steps)
        self.turns = torch.where(every, torch.cat([self.turns[1:], turn[None]]), self.turns)

    def _direction(self) -> Tensor:
        """−H g, along the sphere where δ is on it and would leave it."""
        size = self.x.norm(dim=-1)
        outwards = -_dot(self.gradient, self.x)
        on_it = (size > 0.999 * self.most) & (outwards > 0)
        unit = self.x / size.clamp(min=1e-30)[..., None] * on_it[..., None]
        pull = torch.where(on_it, outwards / size.clamp(min=1e-30) ** 2, 0.0)

        def along(vector: Tensor) -> Tensor:
            return vector - _dot(vector, unit)[..., None] * unit

        gradient = along(self.gradient)
        steps = along(self.steps).flatten(2)
        turns = along(self.turns + pull[..., None] * self.steps).flatten(2)
        q = gradient.flatten(1)
        curved, whole = _dot(steps, turns), self.steps.flatten(2).norm(dim=-1)
        # A step straight outwards says nothing of the sphere.
        counts = (curved > 1e-6 * whole * turns.norm(dim=-1)) & (steps.norm(dim=-1) > 0.01 * whole)
        rho = torch.where(counts, 1 / curved.where(counts, 1.0), 0.0)
        shares = []
        for s, y, r in zip(steps.flip(0), turns.flip(0), rho.flip(0), strict=True):
            share = r * _dot(s, q)
            shares.append(share)
            q = q - share[:, None] * y
        # The scale of H: the newest curvature that counts; without one the step is as long as may be.
        scale = torch.zeros_like(self.loss)
        for s, y, yes in zip(steps, turns, counts, strict=True):
            scale = torch.where(yes, _dot(s, y) / _dot(y, y).clamp(min=1e-30), scale)
        known = scale > 0
        scale = torch.where(known, scale, self.reach / q.norm(dim=-1).clamp(min=1e-30))
        q = q * scale[:, None]
        for s, y, r, share in zip(steps, turns, rho, reversed(shares), strict=True):
            q = q + (share - r * _dot(y, q))[:, None] * s
        downhill = -q.view_as(self.x)
        # From the sphere inwards, where H would leave it: straight down, which doesn't.
        leaves = ((size > 0.999 * self.most) & ~on_it & (_dot(downhill, self.x) > 0)).any(-1)
        straight = -gradient * (q.norm(dim=-1) / gradient.flatten(1).norm(dim=-1).clamp(min=1e-30))[:, None, None]
        found = torch.where(leaves[:, None, None], straight, downhill)
        length = found.flatten(1).norm(dim=-1).clamp(min=1e-30)
        return found * (self.reach / length).clamp(max=1.0)[:, None, None]
