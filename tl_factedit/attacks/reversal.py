"""Weight-side reversal: does the old object come back when the largest directions of the changed weight are dropped?

    W'  =  U S Vᵀ        W'_q  =  W' − Σ_{i ≤ q} s_i u_i v_iᵀ

Youssef et al. 2025 (arXiv:2505.20819): an edit of rank one that is large lies in the largest singular directions of
the weight it was added to, and goes with them, without any knowledge of the fact. An edit that is small, or of full
rank, doesn't. The larger it is, the more of what the layer says at the edited key lies in the first direction, the old
value included: then this is a knock-out of the layer at that key, found in the weights. The weight's own largest
directions go too, so neighbours are read as well, and the unedited model under the same loss: where that loses the
fact, that nothing comes back says nothing.

All changed layers lose their directions together. W'_q stands in the model's weights while it is read, and is taken
back bit for bit; an override that is no weight, such as a router, keeps answering.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.backend.protocol import Model, check_layer
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import DownProj, down_proj, write_all
from tl_factedit.core.estimate import Estimate, Estimates, over_facts_each
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import continuation, encode
from tl_factedit.measure.change import Change, Changed
from tl_factedit.measure.excess import excess
from tl_factedit.measure.first_tokens import FirstTokens, at_the_ends, one_of, with_new_objects
from tl_factedit.measure.population import Part, bos_of_change, each
from tl_factedit.measure.reading import Reading

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = ("old_first", "new_first", "control_first", "neighbours")
DROPPED = (1, 2, 4, 8, 16)


@dataclass(frozen=True, eq=False)
class Reversal:
    """What is left when the changed layers lose their largest singular directions.

    Objects count by their first tokens. Facts whose objects share one, and facts that the unedited model doesn't know
    (old object first, nothing dropped), are left out.

    Attributes:
        facts: What was asked.
        dropped: How many directions each layer lost.
        layers: Which layers lost them, for each fact.
        known: Whether a fact counts, [fact].
        before: The unedited model under the same loss in the same layers: axes fact, dropped (and 0), quantity;
            ``*_first`` are 0 or 1 (of controls: their mean), ``neighbours`` is the share of neighbours that are
            answered rightly.
        after: The changed model, the same.
        survives: Share of the known facts whose old object is still first in the unedited model, [dropped].
        excess: The old object's in the changed model, with 95 % intervals, [dropped].
        corrected: The same with intervals that hold for all numbers of directions together (Bonferroni).
        neighbours: Share of neighbours that the changed model answers rightly, [dropped].
    """

    facts: tuple[Fact, ...]
    dropped: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]
    known: Bool[Tensor, "fact"]
    before: Reading
    after: Reading
    survives: Float[Tensor, "dropped"]
    excess: Estimates
    corrected: Estimates
    neighbours: Estimates

    def at(self, dropped: int, *, corrected: bool = False) -> Estimate:
        """The excess with so many directions dropped."""
        return one_of(self.corrected if corrected else self.excess, self.dropped.index(dropped))

    @property
    def best(self) -> int:
        """The number of directions with the largest excess."""
        return self.dropped[int(self.excess.mean.nan_to_num(-math.inf).argmax())]

    @property
    def strongest(self) -> Estimate:
        """The excess of the best number of directions, with its corrected interval."""
        return self.at(self.best, corrected=True)

    def table(self) -> pd.DataFrame:
        """One row for each number of directions."""
        import pandas as pd

        def share(dropped: int, quantity: str) -> float:
            return float(self.after.at(dropped=dropped, quantity=quantity)[self.known].nanmean())

        return pd.DataFrame(
            [
                {
                    "dropped": q,
                    "survives": float(self.survives[i]),
                    "old_first": share(q, "old_first"),
                    "new_first": share(q, "new_first"),
                    "control_first": share(q, "control_first"),
                    "excess": float(self.excess.mean[i]),
                    "low": float(self.excess.low[i]),
                    "high": float(self.excess.high[i]),
                    "corrected_low": float(self.corrected.low[i]),
                    "corrected_high": float(self.corrected.high[i]),
                    "neighbours": float(self.neighbours.mean[i]),
                }
                for i, q in enumerate(self.dropped)
            ]
        )

    def __repr__(self) -> str:
        """The best number of directions in a line."""
        i = self.dropped.index(self.best)
        return (
            f"Reversal(excess {self.strongest:.2f} with {self.best} directions dropped, which the unedited model "
            f"survives in {float(self.survives[i]):.0%}; {int(self.known.sum())} of {len(self.facts)} facts known)"
        )


def reverse_by_weights(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    dropped: Sequence[int] = DROPPED,
    layers: Sequence[int] | None = None,
    neighbours: int = 4,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> Reversal:
    """Drop the largest singular directions of the changed ``W_out``, in the unedited and in the changed model.

    Args:
        model: The unedited model.
        changed: A change of it for all facts, a list with a change for each, or another model.
        facts: What to ask, each with ``target_new`` and with ``controls``.
        dropped: How many directions to drop, each tried alone.
        layers: From which layers; None for those that the change names. Another model names none.
        neighbours: How many of each fact's neighbours to ask.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        batch_tokens: Most tokens in one forward pass.
        seed: Of the bootstrap.

    Raises:
        ValueError: No facts; a fact without ``target_new``; another model without `layers`; more directions than a
            weight has, or none.
    """
    facts = with_new_objects(facts)
    parts = list(each(model, changed, facts))
    where = [_where(model, part, layers) for part in parts]
    most = min(min(down_proj(model, layer).W.shape) for some in where for layer in some)
    dropped = tuple(sorted(set(dropped)))
    if not dropped or dropped[0] < 1 or dropped[-1] > most:
        raise ValueError(f"dropped is {dropped}, needed numbers of directions from 1 to {most}")
    bos = bos_of_change(model, changed, prepend_bos)
    asked = [_WithNeighbours.of(model.tokenizer, fact, bos, neighbours) for fact in facts]
    before, after = (torch.full((len(facts), 1 + len(dropped), len(QUANTITIES)), math.nan) for _ in range(2))
    of_fact: list[tuple[int, ...]] = [()] * len(facts)
    for part, some in zip(parts, where, strict=True):
        for i in part.indices:
            of_fact[i] = some
    for some in set(of_fact):
        mine = [i for i, theirs in enumerate(of_fact) if theirs == some]
        with frozen(model), torch.no_grad():
            before[mine] = _read(model, [asked[i] for i in mine], some, dropped, batch_tokens)
    for part, some in zip(parts, where, strict=True):
        mine = list(part.indices)
        with part.applied() as tested, frozen(tested), torch.no_grad():
            after[mine] = _read(tested, [asked[i] for i in mine], some, dropped, batch_tokens)
    known = before[:, 0, 0] == 1
    counted = torch.where(known[:, None, None], after, math.nan)[:, 1:]
    return Reversal(
        facts=facts,
        dropped=dropped,
        layers=tuple(of_fact),
        known=known,
        before=_reading(facts, dropped, before),
        after=_reading(facts, dropped, after),
        survives=torch.where(known[:, None], before[:, 1:, 0], math.nan).nanmean(0),
        excess=excess(counted[..., 0], counted[..., 2], seed=seed),
        corrected=excess(counted[..., 0], counted[..., 2], tests=len(dropped), seed=seed),
        neighbours=over_facts_each(counted[..., 3], seed=seed),
    )


def _where(model: Model, part: Part, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is None and not isinstance(part.changed, Change):
        raise ValueError("another model names no layers that it was changed in, needed layers=[...]")
    chosen = tuple(sorted(set(part.changed.layers if layers is None else layers)))  # type: ignore[union-attr]
    if not chosen:
        raise ValueError("layers is empty, needed one at least")
    return tuple(check_layer(model, layer) for layer in chosen)


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True, eq=False)
class _WithNeighbours:
    """A fact, and the neighbours' prompts with their right answers."""

    fact: FirstTokens
    neighbours: tuple[tuple[Int[Tensor, "_"], int], ...]

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, bos: bool, count: int) -> _WithNeighbours:
        answers = fact.neighbour_targets or [fact.target_true] * len(fact.neighbours)
        near = [
            (
                encode(tokenizer, text, prepend_bos=bos)[0],
                int(continuation(tokenizer, text, answer, prepend_bos=bos)[0]),
            )
            for text, answer in list(zip(fact.neighbours, answers, strict=True))[:count]
        ]
        return cls(FirstTokens.of(tokenizer, fact, bos), tuple(near))


@contextmanager
def _dropped(sites: Sequence[DownProj], directions: Sequence[Tensor], count: int) -> Iterator[None]:
    """The model without its weights' first so many directions for the length of a block."""
    before = [site.W.clone() for site in sites]
    try:
        for site, weight, vectors in zip(sites, before, directions, strict=True):
            wide, some = weight.double(), vectors[:, :count]
            site.write_((wide - wide @ some @ some.T).to(weight.dtype))
        yield
    finally:
        write_all(sites, before)


def _largest(weight: Float[Tensor, "d_mlp d_model"], most: int) -> Float[Tensor, "d_model direction"]:
    """The right singular vectors v_i, the largest first."""
    # WᵀW is the smaller square; what its squared condition costs is lost at the small end, which isn't dropped.
    wide = weight.double()
    return torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(-1)[:, :most]


def _read(
    model: Model, asked: Sequence[_WithNeighbours], layers: Sequence[int], dropped: Sequence[int], batch_tokens: int
) -> Float[Tensor, "fact dropped quantity"]:
    rows = [ids for one in asked for ids in (one.fact.ids, *(ids for ids, _ in one.neighbours))]
    owner = [(i, j) for i, one in enumerate(asked) for j in range(-1, len(one.neighbours))]
    out = torch.full((len(asked), 1 + len(dropped), len(QUANTITIES)), math.nan)
    sites = [down_proj(model, layer) for layer in layers]
    directions = [_largest(site.W, dropped[-1]) for site in sites]
    runner = Runner(model)
    for q, count in enumerate((0, *dropped)):
        right: dict[int, list[float]] = {}
        with ExitStack() as stack:
            if count:
                stack.enter_context(_dropped(sites, directions, count))
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


def _reading(facts: Sequence[Fact], dropped: Sequence[int], values: Tensor) -> Reading:
    return Reading(
        name="weight-side reversal",
        values=values,
        axes={"fact": range(len(facts)), "dropped": [0, *dropped], "quantity": QUANTITIES},
        unit="1 where first among the objects (of controls the mean), share of neighbours",
    )
