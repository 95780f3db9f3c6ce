"""Weight-side reversal: does the old object come back when the largest directions of the changed weight are dropped?

    W'  =  U S Vᵀ        W'_q  =  W' − Σ_{i ≤ q} s_i u_i v_iᵀ

Youssef et al. 2025 (arXiv:2505.20819): an edit of rank one that is large lies in the largest singular directions of
the weight it was added to, and goes with them, without any knowledge of the fact. An edit that is small, or of full
rank, doesn't. The larger it is, the more of what the layer says at the edited key lies in the first direction, the old
value included: then this is a knock-out of the layer at that key, found in the weights. The weight's own largest
directions go too, so neighbours are read as well, and the unedited model under the same loss: where that loses the
fact, that nothing comes back says nothing.

Each changed layer loses its directions alone, and all of them together. W'_q stands in the model's weights while it is
read, and is taken back bit for bit; an override that is no weight, such as a router, keeps answering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery, why_masked
from tl_factedit.backend.protocol import Model, check_layer, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.backend.weights import down_proj, rewritten
from tl_factedit.core.estimate import over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import continuation, encode
from tl_factedit.measure.change import Change
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Part, Population
from tl_factedit.measure.reading import Reading

QUANTITIES = ("old_first", "new_first", "control_first", "neighbours")
DROPPED = (16, 32, 64)


Loss: TypeAlias = tuple[tuple[int, ...] | None, int]
"""The layers that lose directions (None: all that were changed), and how many each loses."""


@dataclass(frozen=True)
class WeightReversal:
    """Drop the largest singular directions of the changed ``W_out``, in the unedited and in the changed model.

    The cases are the numbers of directions that all layers lose together and, where a change wrote several for all
    facts, pairs of a layer and a number that it loses alone. A case in which the unedited model doesn't know the facts
    either is masked. ``before`` and ``after`` also hold the case 0 (nothing dropped) and the quantity ``neighbours``,
    the share of neighbours that are answered rightly; ``extra`` has ``survives``, the share of the known facts whose
    old object is still first in the unedited model under the same loss, and ``neighbours``; ``details`` has
    ``neighbours`` with its intervals (`Estimates`, [case]) and ``layers``, those that lost directions for each fact.

    Attributes:
        dropped: How many directions to drop, each tried alone; None for 16, 32 and 64, of narrow matrices fewer.
        layers: From which layers; None for those whose ``W_out`` the change wrote.
        neighbours: How many of each fact's neighbours to ask.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    dropped: Sequence[int] | None = None
    layers: Sequence[int] | None = None
    neighbours: int = 4
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Drop the directions.

        Raises:
            ValueError: A fact without ``target_new``; another model whose ``W_out`` are the unedited one's, without
                `layers`; more directions than a weight has, or none.
        """
        facts = with_new_objects(population.facts)
        model = population.model
        of_fact = written_layers(population, self.layers)
        most = min(min(down_proj(model, layer).W.shape) for layers in set(of_fact) for layer in layers)
        some = [count for count in DROPPED if count <= most // 2] or [1] if self.dropped is None else self.dropped
        dropped = tuple(sorted(set(some)))
        if not dropped or dropped[0] < 1 or dropped[-1] > most:
            raise ValueError(f"dropped is {dropped}, needed numbers of directions from 1 to {most}")
        asked = [_WithNeighbours.of(model.tokenizer, fact, population.prepend_bos, self.neighbours) for fact in facts]

        alone = of_fact[0] if len(set(of_fact)) == 1 and len(of_fact[0]) > 1 else ()
        losses: list[Loss] = [(None, count) for count in dropped]
        losses += [((layer,), count) for layer in alone for count in dropped]

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact loss quantity"]:
            out = torch.full((len(indices), 1 + len(losses), len(QUANTITIES)), math.nan)
            for layers in dict.fromkeys(of_fact[i] for i in indices):
                rows = [row for row, i in enumerate(indices) if of_fact[i] == layers]
                here = [asked[indices[row]] for row in rows]
                out[rows] = _read(runner.model, here, layers, [(None, 0), *losses], self.batch_tokens)
            return out

        def settings(indices: tuple[int, ...]) -> object:
            return losses, [of_fact[i] for i in indices], self.neighbours, self.batch_tokens

        before, after = population.read("weight reversal", read, settings=settings)
        known = before[:, 0, 0] == 1
        counted = torch.where(known[:, None, None], after, math.nan)[:, 1:]
        near = over_facts_each(counted[..., 3], seed=self.seed)
        survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
        cases = [
            Case(_key(loss), _label(loss), "underneath", why_masked(share))
            for loss, share in zip(losses, survives.tolist(), strict=True)
        ]
        return Recovery.of(
            "weight reversal",
            population,
            cases,
            _reading(facts, losses, before),
            _reading(facts, losses, after),
            known=known,
            extra={"survives": survives, "neighbours": near.mean},
            details={"neighbours": near, "layers": tuple(of_fact)},
            asks_weights="directions",
            seed=self.seed,
        )


def written_layers(population: Population, layers: Sequence[int] | None) -> list[tuple[int, ...]]:
    """For each fact the layers whose ``W_out`` the change that serves it wrote; or those named.

    Raises:
        ValueError: There are none, or one is outside the model.
    """
    found: list[tuple[int, ...]] = [()] * len(population.facts)
    for part in population.parts:
        for i in part.indices:
            found[i] = _where(population.model, part, layers)
    return found


def _where(model: Model, part: Part, layers: Sequence[int] | None) -> tuple[int, ...]:
    chosen = tuple(sorted(set(_written(part) if layers is None else layers)))
    if not chosen:
        raise ValueError(
            "no W_out differs from the unedited model's, needed layers=[...]"
            if layers is None
            else "layers is empty, needed one at least"
        )
    return tuple(check_layer(model, layer) for layer in chosen)


def _written(part: Part) -> tuple[int, ...]:
    """The layers whose ``W_out`` a change wrote."""
    if isinstance(part.changed, Change):
        return part.changed.layers
    there = part.changed
    return tuple(
        layer
        for layer in range(n_layers(part.unedited))
        if not torch.equal(down_proj(part.unedited, layer).W, down_proj(there, layer).W)
    )


def _key(loss: Loss) -> int | tuple[int, int]:
    layers, count = loss
    return count if layers is None else (layers[0], count)


def _label(loss: Loss) -> str:
    layers, count = loss
    where = "" if layers is None else f" of layer {layers[0]} alone"
    return f"{count} direction{'s' * (count > 1)}{where} dropped"


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, eq=False)
class _WithNeighbours:
    """A fact, and the neighbours' prompts with their right answers."""

    fact: FirstTokens
    neighbours: tuple[tuple[Int[Tensor, "_"], int], ...]

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, bos: bool, count: int) -> _WithNeighbours:
        answers = fact.neighbour_targets or [fact.old] * len(fact.neighbours)
        near = [
            (
                encode(tokenizer, text, prepend_bos=bos)[0],
                int(continuation(tokenizer, text, answer, prepend_bos=bos)[0]),
            )
            for text, answer in list(zip(fact.neighbours, answers, strict=True))[:count]
        ]
        return cls(FirstTokens.of(tokenizer, fact, bos), tuple(near))


def _without(weight: Float[Tensor, "d_mlp d_model"], vectors: Tensor, count: int) -> Tensor:
    """A weight without its first so many directions."""
    wide, some = weight.double(), vectors[:, :count]
    return (wide - wide @ some @ some.T).to(weight.dtype)


def _largest(weight: Float[Tensor, "d_mlp d_model"], most: int) -> Float[Tensor, "d_model direction"]:
    """The right singular vectors v_i, the largest first."""
    # WᵀW is the smaller square; what its squared condition costs is lost at the small end, which isn't dropped.
    wide = weight.double()
    return torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(-1)[:, :most]


def _read(
    model: Model, asked: Sequence[_WithNeighbours], layers: Sequence[int], losses: Sequence[Loss], batch_tokens: int
) -> Float[Tensor, "fact loss quantity"]:
    rows = [ids for one in asked for ids in (one.fact.ids, *(ids for ids, _ in one.neighbours))]
    owner = [(i, j) for i, one in enumerate(asked) for j in range(-1, len(one.neighbours))]
    out = torch.full((len(asked), len(losses), len(QUANTITIES)), math.nan)
    sites = {layer: down_proj(model, layer) for layer in layers}
    most = max(count for _, count in losses)
    directions = {layer: _largest(site.W, most) for layer, site in sites.items()}
    runner = Runner(model)
    for q, (some, count) in enumerate(losses):
        right: dict[int, list[float]] = {}
        losing = layers if some is None else some
        with ExitStack() as stack:
            if count:
                chosen = [sites[layer] for layer in losing]
                weights = [_without(site.W, directions[site.layer], count) for site in chosen]
                writing = rewritten(chosen, weights)
                stack.enter_context(writing)
            for row, logits in at_the_ends(runner, rows, batch_tokens):
                i, j = owner[row]
                fact = asked[i].fact
                if j < 0:
                    out[i, q, :3] = fact.first(logits)
                else:
                    answer = asked[i].neighbours[j][1]
                    best = max((answer, fact.old, fact.new, *fact.controls), key=lambda token: float(logits[token]))
                    right.setdefault(i, []).append(float(best == answer))
        for i, of_fact in right.items():
            out[i, q, 3] = sum(of_fact) / len(of_fact)
    return out


def _reading(facts: Sequence[Fact], losses: Sequence[Loss], values: Tensor) -> Reading:
    return Reading(
        name="weight-side reversal",
        values=values,
        axes={"fact": range(len(facts)), "case": [0, *map(_key, losses)], "quantity": QUANTITIES},
        unit="1 where first among the objects (of controls the mean), share of neighbours",
    )
