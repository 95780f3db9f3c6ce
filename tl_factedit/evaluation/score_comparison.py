"""Several models' scores on the same facts, set against one another fact by fact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, jointly, over_facts
from tl_factedit.core.kinds import as_whole, short
from tl_factedit.evaluation.published_scores import check_alike
from tl_factedit.evaluation.scores import KINDS, Scores, by_fact, harmonic

if TYPE_CHECKING:
    import pandas as pd

FLIPS = 10_000
Cluster = Literal["fact", "relation"]


@plain_torch()
def compare_scores(
    scores: Mapping[str, Scores], *, against: str | None = None, cluster: Cluster = "fact", seed: int = 0
) -> pd.DataFrame:
    """Several models' scores on the same facts, paired: by how much each differs from one of them.

    The unit is the fact. Intervals are of the paired difference, by the bootstrap over facts, or over whole relations
    where claims are to reach beyond those at hand. p is of a permutation test (each fact's two answers, or those of all
    facts of a relation, swapped at random), corrected by Holm's method for the models that are compared.

    Args:
        scores: Results of `evaluate` by name, such as ``{"ROME": a, "MEMIT": b}``.
        against: Whom the others are compared with; None for the first.
        cluster: ``"fact"``, or ``"relation"`` (`Fact.group`).
        seed: Seed of resampling.

    Returns:
        One row a model and score (``"efficacy"``, ``"paraphrase"``, ``"neighbourhood"``, ``"score"``, ``"p_new"``):
        its value, that of the model it is compared with, ``difference`` with ``low`` and ``high``, ``p``, ``p_holm``,
        ``n``.

    Raises:
        ValueError: Fewer than two models, of other prompts, an unknown name, or another `cluster`.

    Example:
        >>> fe.evaluation.compare_scores({"unedited": before, "ROME": after})             # doctest: +SKIP
    """
    import pandas as pd

    if not isinstance(scores, Mapping):
        raise ValueError(f"scores is {short(scores)}, needed scores by name: {{'ROME': a, 'MEMIT': b}}")
    as_whole(seed, "seed", least=None)
    if len(scores) < 2:
        raise ValueError(f"there are {len(scores)} scores, needed two at least")
    check_alike(scores)
    against = next(iter(scores)) if against is None else against
    if against not in scores:
        raise ValueError(f"against is {against!r}, needed one of {', '.join(map(repr, scores))}")
    if cluster not in ("fact", "relation"):
        raise ValueError(f"cluster is {cluster!r}, needed 'fact' or 'relation'")
    facts = scores[against].facts
    clusters = list(range(len(facts))) if cluster == "fact" else [fact.group for fact in facts]
    base, rows = _columns(scores[against]), []
    for name, each in scores.items():
        if name == against:
            continue
        mine = _columns(each)
        for metric, columns in mine.items():
            found = _paired(columns, base[metric], clusters if cluster == "relation" else None, seed)
            p = _permuted(columns, base[metric], clusters, seed)
            value, other = (_combined(torch.tensor(x, dtype=torch.float64)) for x in (columns, base[metric]))
            rows.append(
                {
                    "model": name,
                    "score": metric,
                    "value": float(value),
                    against: float(other),
                    "difference": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "p": p,
                    "n": found.n,
                }
            )
    table = pd.DataFrame(rows)
    table.insert(8, "p_holm", table.groupby("score")["p"].transform(lambda p: holm(p.tolist())))
    return table


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of several p-values (1979): NaN stays, and isn't counted.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    out, worst = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * value))
        out[i] = worst
    return out


def _columns(scores: Scores) -> dict[str, list[list[float]]]:
    """What each score is made of: one column of facts, or for S three."""
    shares = [by_fact(len(scores.facts), scores.answers, ask, lambda answer: float(answer.success)) for ask in KINDS]
    p_new = by_fact(len(scores.facts), scores.answers, "rewrite", lambda answer: math.exp(-answer.nll_new))
    names = ("efficacy", "paraphrase", "neighbourhood")
    return {**{name: [column] for name, column in zip(names, shares, strict=True)}, "score": shares, "p_new": [p_new]}


def _combined(columns: Tensor) -> Tensor:
    """The score that columns [kind fact] or [flip kind fact] come to: their mean, of several the harmonic one."""
    return harmonic(list(columns.nanmean(-1).movedim(-1, 0)))


def _paired(
    mine: Sequence[Sequence[float]], other: Sequence[Sequence[float]], clusters: Sequence[object] | None, seed: int
) -> Estimate:
    if len(mine) == 1:  # a share, or a probability
        apart = [one - two for one, two in zip(mine[0], other[0], strict=True)]
        return over_facts(apart, span=(-1.0, 1.0), clusters=clusters, seed=seed)
    return jointly(
        [*mine, *other],
        lambda means: harmonic(means[: len(mine)]) - harmonic(means[len(mine) :]),
        clusters=clusters,
        seed=seed,
    )


def _permuted(
    mine: Sequence[Sequence[float]], other: Sequence[Sequence[float]], clusters: Sequence[object], seed: int
) -> float:
    """How often a difference as large comes when each cluster's answers are swapped at random."""
    both = torch.tensor([list(mine), list(other)], dtype=torch.float64)  # [model kind fact]
    if bool(both.isnan().all(-1).any()):
        return math.nan
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    of_fact = torch.tensor([place[cluster] for cluster in clusters])
    seen = float((_combined(both[0]) - _combined(both[1])).abs())
    generator, least = torch.Generator().manual_seed(seed), 1
    for piece in torch.arange(FLIPS).split(max(1, 2_000_000 // both.numel())):
        swap = (torch.rand(len(piece), len(place), generator=generator) < 0.5)[:, None, of_fact]
        one, two = torch.where(swap, both[1], both[0]), torch.where(swap, both[0], both[1])
        least += int(((_combined(one) - _combined(two)).abs() >= seen - 1e-12).sum())
    return least / (FLIPS + 1)
