"""Gradient descent on weights that stand beside the model's, held in a box around them.

A hook answers the keys with the weights that are learnt, and no weight of the model is written. Below the first of the
layers everything is run once. Above it every token moves, those before the subject too, so that none can be left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.halving import halving
from tl_factedit.backend.memory import budget, graph_bytes, logits_bytes, together
from tl_factedit.backend.protocol import Hook
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import DownProj
from tl_factedit.core.telling import tell
from tl_factedit.editing.adam import Adam
from tl_factedit.editing.concerns import EditWarning
from tl_factedit.editing.training_rows import TrainingBatch, TrainingRows


@runtime_checkable
class Schedule(Protocol):
    """What a descent asks of an editor."""

    @property
    def epsilon(self) -> float | None:
        """How far an entry may move; None for no bound."""
        ...

    @property
    def steps(self) -> int:
        """Passes over the facts."""
        ...

    @property
    def lr(self) -> float:
        """Step size of Adam."""
        ...

    @property
    def stop_below(self) -> float:
        """Mean loss below which it stops early."""
        ...

    @property
    def batch(self) -> int:
        """How many facts an update is made of."""
        ...

    @property
    def memory(self) -> float | None:
        """What activations may take, in GiB."""
        ...

    @property
    def progress(self) -> bool:
        """Whether to show a bar on what takes longer than a second."""
        ...


@dataclass(frozen=True, eq=False)
class Tuned:
    """What came out: the weights in the model's own type, and how each fact fared."""

    weights: list[Float[Tensor, "_ _"]]
    fits: tuple[dict[str, Any], ...]


class WeightDescent:
    """The optimisation of copies of some layers' weights."""

    def __init__(
        self, runner: Runner, asked: Sequence[TrainingRows], sites: Sequence[DownProj], schedule: Schedule
    ) -> None:
        self.runner, self.asked, self.sites, self.schedule = runner, asked, sites, schedule
        self.first = sites[0].layer
        # Steps of Adam are smaller than what half precision resolves.
        self.weights = [site.W.float() if site.W.dtype.itemsize < 4 else site.W.clone() for site in sites]
        self.bounds = [None if schedule.epsilon is None else bounds(site.W, schedule.epsilon) for site in sites]
        boxes = [box for box in self.bounds if box is not None]
        if boxes and all(bool((low == high).all()) for low, high in boxes):
            names = ", ".join(repr(rows.edit_target.fact.name) for rows in asked[:3])
            tell(
                f"the edit of {names} can't change the answer: epsilon is {schedule.epsilon}, less than what "
                f"{sites[0].W.dtype} resolves at any entry: take a larger one, or load the model in float32",
                EditWarning,
            )
        self.adam = Adam(self.weights, schedule.lr)
        self.memory = budget(runner.model, schedule.memory)

    def run(self) -> Tuned:
        """Step until the loss is small, or the steps are over."""
        schedule, count = self.schedule, len(self.asked)
        starts = range(0, count, schedule.batch)
        batches = [self._pieces(range(i, min(i + schedule.batch, count))) for i in starts]
        losses: list[list[float]] = [[] for _ in range(count)]
        probs: list[list[float]] = [[] for _ in range(count)]
        stopped: Literal["loss", "steps"] = "steps"
        with tqdm(total=schedule.steps, unit="step", desc="fine-tuning", delay=1, disable=not schedule.progress) as bar:
            for _ in range(schedule.steps):
                done = True
                for facts, pieces in batches:
                    gradients = self._gradients(pieces, losses, probs)
                    if not self._below(facts, losses):
                        done = False
                        self._update(gradients)
                bar.update()
                if done:
                    stopped = "loss"
                    break
        weights = [weight.to(site.W.dtype) for site, weight in zip(self.sites, self.weights, strict=True)]
        for site, weight in zip(self.sites, weights, strict=True):
            if not bool(weight.isfinite().all()):
                raise RuntimeError(f"the weights of layer {site.layer} are not finite after fine-tuning: lower lr")
        if stopped == "steps":
            with torch.no_grad():
                for _, pieces in batches:
                    self._gradients(pieces, losses, probs, only_losses=True)
        held = {} if schedule.epsilon is None else {"held": self._held(weights)}
        return Tuned(
            weights=weights,
            fits=tuple(
                {
                    "losses": losses[i],
                    "target_prob": probs[i],
                    "stopped": stopped,
                    **held,
                }
                for i in range(count)
            ),
        )

    def _pieces(self, facts: Sequence[int]) -> tuple[Sequence[int], list[_Piece]]:
        """The facts of an update: as many at a time as their graphs leave room for."""
        token, read = graph_bytes(self.runner.model, self.first), logits_bytes(self.runner.model)
        needs = [self.asked[i].need(token, read) for i in facts]
        return facts, [_Piece([facts[i] for i in some]) for some in together(needs, self.memory)]

    def _gradients(
        self, pieces: list[_Piece], losses: list[list[float]], probs: list[list[float]], *, only_losses: bool = False
    ) -> list[Tensor]:
        """Of the mean loss of a batch, by each weight; its facts' losses are noted.

        Pieces that the device has no memory for are halved, for good: their gradients are summed either way.
        """
        total = [torch.zeros_like(weight) for weight in self.weights]
        count = sum(len(piece.facts) for piece in pieces)
        kept = {tuple(piece.facts): piece for piece in pieces}
        pieces.clear()
        groups = [list(facts) for facts in kept]
        for attempt in halving(groups, len, "facts at once", "less memory"):
            with attempt as facts:
                piece = kept.pop(tuple(facts), None) or _Piece(facts)
                table = self._add(piece.batch(self), count, total, only_losses=only_losses)
                pieces.append(piece)
                for i, (of_fact, likely) in zip(facts, table, strict=True):
                    losses[i].append(of_fact)
                    probs[i].append(likely)
                    if not math.isfinite(of_fact):
                        raise RuntimeError(
                            f"the loss of {self.asked[i].edit_target.fact.name!r} is {losses[i][-1]} after "
                            f"{self.adam.updates} updates: lower lr, or load the model in float32"
                        )
        return total

    def _add(
        self, batch: TrainingBatch, count: int, total: Sequence[Tensor], *, only_losses: bool
    ) -> list[list[float]]:
        """Add what some facts say of the gradient; each one's loss and probability, fetched at once."""
        leaves = [weight.detach().requires_grad_(not only_losses) for weight in self.weights]
        with torch.set_grad_enabled(not only_losses):
            loss, prob = self._loss(batch, leaves)
            if not only_losses:
                for sum_, part in zip(total, torch.autograd.grad(loss.sum() / count, leaves), strict=True):
                    sum_ += part
        return torch.stack([loss.detach(), prob.detach()], 1).tolist()

    def _loss(
        self, piece: TrainingBatch, leaves: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "fact"], Float[Tensor, "fact"]]:
        """Each fact's loss, and the mean probability of a token of its target."""
        hooks = [hook for site, leaf in zip(self.sites, leaves, strict=True) for hook in answering_hooks(site, leaf)]
        logits = self.runner.logits(piece.tokens, at=piece.at, start=(self.first, piece.stream), hooks=hooks)[0]
        log_p = logits.float().log_softmax(-1).gather(-1, piece.target[:, None])[:, 0]
        row = torch.zeros_like(piece.share).index_add(0, piece.row, log_p)
        per_row = torch.where(piece.unlikely[piece.fact], row.exp(), -row / piece.length)
        fact = torch.zeros(len(piece.facts), device=log_p.device)
        token_prob = torch.zeros_like(piece.share).index_add(0, piece.row, log_p.detach().exp()) / piece.length
        return (
            fact.index_add(0, piece.fact, per_row * piece.share),
            fact.index_add(0, piece.fact, token_prob * piece.share),
        )

    def _below(self, facts: Sequence[int], losses: Sequence[Sequence[float]]) -> bool:
        if any(self.asked[i].edit_target.unlikely for i in facts):
            return False
        return sum(losses[i][-1] for i in facts) / len(facts) < self.schedule.stop_below

    def _update(self, gradients: Sequence[Tensor]) -> None:
        """One step of Adam, then back into the box."""
        self.adam.step(gradients)
        for weight, box in zip(self.weights, self.bounds, strict=True):
            if box is not None:
                torch.clamp(weight, *(bound.to(weight.dtype) for bound in box), out=weight)

    def _held(self, weights: Sequence[Tensor]) -> float:
        """The share of entries that stand at the end of what ε leaves them."""
        at_end = [
            ((weight == box[0]) | (weight == box[1])).double().mean().cpu()
            for weight, box in zip(weights, self.bounds, strict=True)
            if box is not None
        ]
        return float(torch.stack(at_end).mean())


class _Piece:
    """Facts that are run at once; their rows are run up to the first layer that is changed when they first are."""

    def __init__(self, facts: list[int]) -> None:
        self.facts = facts
        self._batch: TrainingBatch | None = None

    def batch(self, descent: WeightDescent) -> TrainingBatch:
        if self._batch is None:
            self._batch = TrainingBatch.of(descent.runner, descent.asked, self.facts, descent.first)
        return self._batch


def bounds(
    weight: Float[Tensor, "d_mlp d_model"], epsilon: float
) -> tuple[Float[Tensor, "d_mlp d_model"], Float[Tensor, "d_mlp d_model"]]:
    """The least and the largest that each entry may become, numbers of the weight's own type within ε of it.

    An entry whose neighbours in that type are farther away than ε can't move: in bfloat16 all that are larger than
    256 ε.
    """
    exact, kind = weight.double(), torch.finfo(weight.dtype)
    ends = []
    for sign in (-1, 1):
        end = exact + sign * epsilon
        rounded = end.to(weight.dtype)
        # Where rounding goes beyond the end: a step of the type back, but not beyond the weight.
        inside = (end - sign * (end.abs() * kind.eps).clamp(min=kind.tiny * kind.eps)).to(weight.dtype)
        inside = torch.minimum(inside, weight) if sign < 0 else torch.maximum(inside, weight)
        ends.append(torch.where((rounded.double() - exact).abs() <= epsilon, rounded, inside))
    return ends[0], ends[1]


def answering_hooks(site: DownProj, weight: Tensor) -> list[Hook]:
    """Hooks that answer the keys of a layer with another weight."""

    def answer(key: Tensor, value: Tensor) -> Tensor:
        out = key @ weight.to(value.dtype)
        return out if site.bias is None else out + site.bias

    return site.hooks(answer)
