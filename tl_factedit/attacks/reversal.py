"""Weight-side reversal: does the old object come back when the largest directions of the changed weight are dropped?

    W'  =  U S Vᵀ        W'_q  =  W' − Σ_{i ≤ q} s_i u_i v_iᵀ

Youssef et al. 2025 (arXiv:2505.20819): an edit of rank one that is large lies in the largest singular directions of
the weight it was added to, and goes with them, without any knowledge of the fact. An edit that is small, or of full
rank, doesn't. The larger it is, the more of what the layer says at the edited key lies in the first direction, the old
value included: then this is a knock-out of the layer at that key, found in the weights. The weight's own largest
directions go too, so neighbours are read as well, and the unedited model under the same loss: where that loses the
fact, that nothing comes back says nothing.

Each changed matrix loses its directions alone, and all of them together. How much of what was written goes with them
(`cover`) tells whether the change is still in force; and where that is less than half, whether the old object leads if
nothing is dropped but what was *written* into these directions is undone (`undone`): one of several layers may hold
what an edit consists of, though not most of its size. W'_q stands in the model's weights while it is read, and is
taken back bit for bit; an override that is no weight, such as a router or a hook, keeps answering, and that nothing
comes back says nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.attacks.attack import OFF, Case, Recovery, Shows, why_masked
from tl_factedit.attacks.written import Written, question
from tl_factedit.backend.matrices import Matrix, matrices
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.backend.weights import rewritten
from tl_factedit.core.estimate import over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import continuation, encode
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Population
from tl_factedit.measure.reading import Reading
from tl_factedit.measure.strangers import Strangers

QUANTITIES = ("old_first", "new_first", "control_first", "neighbours", "cover", "common_first", "undone")
DROPPED = (16, 32, 64)

MOST_ALONE = 32
"""So many matrices lose directions alone at most: those that were changed most, for their size."""


Loss: TypeAlias = tuple[str | None, int]
"""The matrix that loses directions (None: all that were changed), and how many each loses."""


@dataclass(frozen=True)
class WeightReversal:
    """Drop the largest singular directions of the changed matrices, in the unedited and in the changed model.

    The cases are the numbers of directions that all matrices lose together and, where a change wrote several for all
    facts, pairs of a matrix (of a ``W_out`` its layer, of others the name) and a number that it loses alone. A case in
    which the unedited model doesn't know the facts either is masked. Cases that take away half or more of what was
    written, or what it does, ask what lies elsewhere, the others what lies underneath; facts for which a case does the
    other don't count in it.

    ``before`` and ``after`` also hold the case 0 (nothing dropped), and the quantities ``neighbours``, the share of
    neighbours that are answered rightly, ``cover``, the share of the squared change that lies in what is dropped (of
    the unedited model NaN), ``undone``, whether the old object leads if only what was written into the dropped
    directions is taken back (NaN where they hold half of it or more), and ``common_first``, how often the old object
    comes first for references who don't have it (the larger of this and of the controls' mean is the null);
    ``extra`` has ``survives``, the share of the known facts whose old object is still
    first in the unedited model under the same loss, ``neighbours`` and ``cover``; ``details`` has ``neighbours`` with
    its intervals (`Estimates`, [case]), ``matrices``, those that lost directions for each fact, and ``layers``, those
    of them that are a ``W_out``.

    Attributes:
        dropped: How many directions to drop, each tried alone; None for 16, 32 and 64, of narrow matrices at most half.
        layers: From the ``W_out`` of which layers; None for all matrices that the change wrote, whatever they are. Of
            two models of different classes only ``W_out`` can be compared; it then asks the weights in part.
        neighbours: How many of each fact's neighbours to ask.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    dropped: Sequence[int] | None = None
    layers: Sequence[int] | None = None
    neighbours: int = 4
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Drop the directions.

        Raises:
            ValueError: A fact without ``target_new``; another model whose matrices are the unedited one's, without
                `layers`; more directions than a matrix has, or none.
        """
        facts = with_new_objects(population.facts)
        written = Written.of(population, self.layers)
        rank = {name: min(weight.shape) for name, weight in written.unedited.items()}
        if self.dropped is None:
            dropped = tuple(count for count in DROPPED if count <= max(rank.values()) // 2) or (1,)
        else:
            dropped = tuple(sorted(set(self.dropped)))
            if not dropped or dropped[0] < 1 or dropped[-1] > min(rank.values()):
                raise ValueError(f"dropped is {dropped}, needed numbers of directions from 1 to {min(rank.values())}")
        asked = [
            _WithNeighbours.of(population.model.tokenizer, fact, population.prepend_bos, self.neighbours)
            for fact in facts
        ]
        names, strangers = written.names, Strangers.of(population, seed=self.seed)
        alone = _alone(population, written) if len(set(names)) == 1 and len(names[0]) > 1 else ()
        losses: list[Loss] = [(None, count) for count in dropped]
        limit = {name: size if self.dropped is not None else max(1, size // 2) for name, size in rank.items()}
        losses += [(name, count) for name in alone for count in dropped if count <= limit[name]]

        def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact loss quantity"]:
            out = torch.full((len(indices), 1 + len(losses), len(QUANTITIES)), math.nan)
            there = matrices(runner.model)
            for mine in dict.fromkeys(names[i] for i in indices):
                rows = [row for row, i in enumerate(indices) if names[i] == mine]
                here = [indices[row] for row in rows]
                sites = [there[name] for name in mine]
                some = [(None, 0), *losses]
                out[rows] = _read(runner, asked, here, strangers, sites, some, written, limit, self.batch_tokens)
            return out

        def settings(indices: tuple[int, ...]) -> object:
            others = [strangers.rows[place].tolist() for place in strangers.among(indices)]
            return losses, [names[i] for i in indices], self.neighbours, others, self.batch_tokens

        before, after = population.read("weight reversal", read, settings=settings)
        known = before[:, 0, 0] == 1
        counted = torch.where(known[:, None, None], after, math.nan)[:, 1:]
        near = over_facts_each(counted[..., 3], seed=self.seed)
        survives = torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0)
        keys = [_key(loss, written) for loss in losses]
        asks: list[Shows] = [question(counted[:, c, 4]) for c in range(len(losses))]
        asked_of = torch.ones(len(facts), len(losses), dtype=torch.bool)
        for c in (c for c, shows in enumerate(asks) if shows == "underneath"):
            # Where the old object leads with nothing dropped, the change does nothing in any case.
            off_for = (after[:, 1 + c, QUANTITIES.index("undone")] >= OFF) & (after[:, 0, 0] != 1)
            is_off = float(off_for[known].double().mean()) >= OFF
            asks[c], asked_of[:, c] = "elsewhere" if is_off else "underneath", off_for == is_off
        cases = [
            Case(key, _label(loss), asks[c], why_masked(float(survives[c])))
            for c, (key, loss) in enumerate(zip(keys, losses, strict=True))
        ]
        return Recovery.of(
            "weight reversal",
            population,
            cases,
            _reading(facts, keys, before),
            _reading(facts, keys, after),
            known=known,
            asked=asked_of,
            common=after[:, 1:, QUANTITIES.index("common_first")],
            subjects=strangers.fewest,
            extra={"survives": survives, "neighbours": near.mean, "cover": counted[..., 4].nanmean(0)},
            details={"neighbours": near, "matrices": names, "layers": written.layers},
            asks_weights="directions" if written.compared and not written.hooked else None,
            seed=self.seed,
        )


def _alone(population: Population, written: Written) -> tuple[str, ...]:
    """The matrices that lose directions alone: all, or those that were changed most."""
    names = written.names[0]
    if len(names) <= MOST_ALONE:
        return names
    with population.parts[0].applied() as tested:
        there = matrices(tested)
        size = {name: float(written.change(there[name]).norm() / written.unedited[name].norm()) for name in names}
    chosen = sorted(names, key=lambda name: -size[name])[:MOST_ALONE]
    return tuple(name for name in names if name in chosen)


def _key(loss: Loss, written: Written) -> int | tuple[int | str, int]:
    name, count = loss
    return count if name is None else (written.layer.get(name, name), count)


def _label(loss: Loss) -> str:
    name, count = loss
    where = "" if name is None else f" of {name} alone"
    return f"{count} direction{'s' * (count > 1)}{where} dropped"


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, eq=False)
class _WithNeighbours:
    """A fact, and the neighbours' prompts with their right answers."""

    fact: FirstTokens
    neighbours: tuple[tuple[Int[Tensor, "_"], int], ...]

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, bos: bool, count: int) -> _WithNeighbours:
        answers = fact.neighbour_targets or [fact.after(text, fact.old) for text in fact.neighbours]
        near = [
            (
                encode(tokenizer, text, prepend_bos=bos)[0],
                int(continuation(tokenizer, text, answer, prepend_bos=bos)[0]),
            )
            for text, answer in list(zip(fact.neighbours, answers, strict=True))[:count]
        ]
        return cls(FirstTokens.of(tokenizer, fact, bos), tuple(near))


@dataclass(frozen=True, eq=False)
class _Directions:
    """The largest singular directions of a matrix, the largest first, on its narrower side."""

    vectors: Float[Tensor, "side direction"]
    of_rows: bool

    @classmethod
    def of(cls, weight: Float[Tensor, "rows columns"], most: int) -> _Directions:
        # The square of the narrower side: what its squared condition costs is lost at the small end, which isn't
        # dropped.
        wide, of_rows = weight.double(), weight.shape[0] < weight.shape[1]
        square = wide @ wide.T if of_rows else wide.T @ wide
        return cls(torch.linalg.eigh(square).eigenvectors.flip(-1)[:, :most], of_rows)

    def part(self, weight: Float[Tensor, "rows columns"], count: int) -> Float[Tensor, "rows columns"]:
        """What of a matrix lies in the first so many directions, in float64."""
        wide, some = weight.double(), self.vectors[:, :count]
        return some @ (some.T @ wide) if self.of_rows else (wide @ some) @ some.T


def _without(weight: Float[Tensor, "rows columns"], directions: _Directions, count: int) -> Tensor:
    """A matrix without its first so many directions."""
    return (weight.double() - directions.part(weight, count)).to(weight.dtype)


def _cover(sites: Sequence[Matrix], directions: dict[str, _Directions], loss: Loss, written: Written) -> float:
    """The share of the squared change of some matrices that lies in what is dropped; NaN where nothing was changed."""
    name, count = loss
    gone = total = 0.0
    for site in sites:
        change = written.change(site)
        total += float(change.square().sum())
        if count and name in (None, site.name):
            gone += float(directions[site.name].part(change, count).square().sum())
    return gone / total if total else math.nan


def _read(
    runner: Runner,
    everything: Sequence[_WithNeighbours],
    indices: Sequence[int],
    strangers: Strangers,
    sites: Sequence[Matrix],
    losses: Sequence[Loss],
    written: Written,
    limit: Mapping[str, int],
    batch_tokens: int,
) -> Float[Tensor, "fact loss quantity"]:
    asked, others = [everything[i] for i in indices], strangers.among(indices)
    rows = [ids for one in asked for ids in (one.fact.ids, *(ids for ids, _ in one.neighbours))]
    owner = [(i, j) for i, one in enumerate(asked) for j in range(-1, len(one.neighbours))]
    mine = len(rows)
    rows += [strangers.rows[place] for place in others]
    out = torch.full((len(asked), len(losses), len(QUANTITIES)), math.nan)
    most = max(count for _, count in losses)
    directions = {site.name: _Directions.of(site.W, min(most, limit[site.name])) for site in sites}
    for q, (name, count) in enumerate(losses):
        right: dict[int, list[float]] = {}
        out[:, q, 4] = _cover(sites, directions, (name, count), written)
        with ExitStack() as stack:
            if count:
                chosen = [site for site in sites if name in (None, site.name)]
                weights = [_without(site.W, directions[site.name], count) for site in chosen]
                stack.enter_context(rewritten(chosen, weights))
            said = dict[int, Tensor]()
            for row, logits in at_the_ends(Runner(runner.model), rows, batch_tokens):
                if row >= mine:
                    said[others[row - mine]] = logits
                    continue
                i, j = owner[row]
                fact = asked[i].fact
                if j < 0:
                    out[i, q, :3] = fact.first(logits)
                else:
                    answer = asked[i].neighbours[j][1]
                    best = max((answer, fact.old, fact.new, *fact.controls), key=lambda token: float(logits[token]))
                    right.setdefault(i, []).append(float(best == answer))
        out[:, q, QUANTITIES.index("common_first")] = strangers.common(indices, said)
        if count and 0 < float(out[0, q, 4]) < OFF:
            chosen = [site for site in sites if name in (None, site.name)]
            weights = [
                (site.W.double() - directions[site.name].part(written.change(site), count)).to(site.W.dtype)
                for site in chosen
            ]
            with rewritten(chosen, weights):
                for row, logits in at_the_ends(Runner(runner.model), [one.fact.ids for one in asked], batch_tokens):
                    out[row, q, QUANTITIES.index("undone")] = asked[row].fact.first(logits)[0]
        for i, of_fact in right.items():
            out[i, q, 3] = sum(of_fact) / len(of_fact)
    return out


def _reading(facts: Sequence[Fact], keys: Sequence[object], values: Tensor) -> Reading:
    return Reading(
        name="weight-side reversal",
        values=values,
        axes={"fact": range(len(facts)), "case": [0, *keys], "quantity": QUANTITIES},
        unit="1 where first among the objects (of controls the mean), share of neighbours, share of the change",
    )
