"""More of what the answers behind `Scores` come to, and two models' scores side by side.

`magnitudes` are Meng et al.'s EM, PM and NM; `rewrite_scores` those of Hase et al.; `compare_scores` sets several
models' scores on the same facts against one another, fact by fact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, jointly, over_facts
from tl_factedit.core.kinds import as_whole, check_one, short
from tl_factedit.evaluation.scores import Answer, Ask, Scores

if TYPE_CHECKING:
    import pandas as pd

KINDS: tuple[Ask, ...] = ("rewrite", "paraphrase", "neighbour")
FLIPS = 10_000
Cluster = Literal["fact", "relation"]


@dataclass(frozen=True)
class ThreeScores:
    """A score of the edits' prompts, their paraphrases and their neighbours, each over facts.

    Attributes:
        rewrite: After the edits' own prompts.
        paraphrase: After their paraphrases.
        neighbourhood: After their neighbours.
    """

    rewrite: Estimate
    paraphrase: Estimate
    neighbourhood: Estimate

    def __repr__(self) -> str:
        """The three in a line."""
        return f"rewrite {self.rewrite:.3f}, paraphrase {self.paraphrase:.3f}, neighbourhood {self.neighbourhood:.3f}"


@plain_torch()
def magnitudes(scores: Scores) -> ThreeScores:
    """EM, PM and NM (Meng et al. 2022): by how much the wanted object is likelier than the other.

    ``p(new) − p(true)`` after prompts and paraphrases, ``p(true) − p(new)`` after neighbours, p the geometric mean of
    the probabilities of an object's tokens. Averaged within a fact first.

    Example:
        >>> fe.evaluation.magnitudes(fe.evaluate(model, facts)).rewrite           # doctest: +SKIP
    """
    check_one(scores, Scores, "scores", "what fe.evaluate returns")
    signs = {"rewrite": 1.0, "paraphrase": 1.0, "neighbour": -1.0}

    def of(answer: Answer) -> float:
        return signs[answer.ask] * (math.exp(-answer.nll_new) - math.exp(-answer.nll_true))

    return ThreeScores(*(over_facts(_by_fact(scores, ask, of), span=(-1.0, 1.0)) for ask in KINDS))


@plain_torch()
def rewrite_scores(before: Scores, after: Scores) -> ThreeScores:
    """The scores of Hase et al. 2023 (section 4): how far the new object's probability moved, of how far it could.

    ``(p* − p) / (1 − p)`` after prompts and paraphrases, ``1 − |p* − p| / (½ + |p − ½|)`` after neighbours, p and p*
    the probability of the *whole* new object before and after. All paraphrases and neighbours count, averaged within a
    fact; their code takes the first of each, and cuts at 0.

    Args:
        before: Of the unedited model.
        after: Of the edited one, on the same facts.

    Raises:
        ValueError: They are of different prompts.
    """
    _check_alike({"before": before, "after": after})

    def p(answer: Answer) -> float:
        return math.exp(-answer.nll_new * answer.tokens_new)

    def score(was: Answer, now: Answer) -> float:
        one, other = p(was), p(now)
        if was.ask == "neighbour":
            return 1 - abs(other - one) / (0.5 + abs(one - 0.5))
        return (other - one) / (1 - one) if one < 1 else math.nan

    then = iter(before.answers)
    found = {id(now): score(next(then), now) for now in after.answers}
    return ThreeScores(
        *(
            over_facts(
                _by_fact(after, ask, lambda answer: found[id(answer)]), span=(0.0, 1.0) if ask == "neighbour" else None
            )
            for ask in KINDS
        )
    )


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
    _check_alike(scores)
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


def _by_fact(scores: Scores, ask: Ask, of: Callable[[Answer], float]) -> list[float]:
    """The mean of a number of each fact's answers of a kind that compare two objects; NaN where there are none."""
    found: list[list[float]] = [[] for _ in scores.facts]
    for answer in scores.answers:
        if answer.ask == ask and answer.compared and not math.isnan(value := of(answer)):
            found[answer.fact].append(value)
    return [sum(mine) / len(mine) if mine else math.nan for mine in found]


def _columns(scores: Scores) -> dict[str, list[list[float]]]:
    """What each score is made of: one column of facts, or for S three."""
    shares = [_by_fact(scores, ask, lambda answer: float(answer.success)) for ask in KINDS]
    p_new = _by_fact(scores, "rewrite", lambda answer: math.exp(-answer.nll_new))
    names = ("efficacy", "paraphrase", "neighbourhood")
    return {**{name: [column] for name, column in zip(names, shares, strict=True)}, "score": shares, "p_new": [p_new]}


def _harmonic(means: Sequence[Tensor]) -> Tensor:
    return len(means) / torch.stack([1 / mean for mean in means]).sum(0)


def _combined(columns: Tensor) -> Tensor:
    """The score that columns [kind fact] or [flip kind fact] come to: their mean, of several the harmonic one."""
    return _harmonic(list(columns.nanmean(-1).movedim(-1, 0)))


def _paired(
    mine: Sequence[Sequence[float]], other: Sequence[Sequence[float]], clusters: Sequence[object] | None, seed: int
) -> Estimate:
    if len(mine) == 1:  # a share, or a probability
        apart = [one - two for one, two in zip(mine[0], other[0], strict=True)]
        return over_facts(apart, span=(-1.0, 1.0), clusters=clusters, seed=seed)
    return jointly(
        [*mine, *other],
        lambda means: _harmonic(means[: len(mine)]) - _harmonic(means[len(mine) :]),
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


def _check_alike(scores: Mapping[str, Scores]) -> None:
    """Check that all scores are of the same prompts and objects."""
    for name, each in scores.items():
        check_one(each, Scores, repr(name), "what fe.evaluate returns")
    asked = {name: [(a.fact, a.ask, a.prompt, a.true, a.new) for a in each.answers] for name, each in scores.items()}
    first = next(iter(asked))
    for name, mine in asked.items():
        if mine != asked[first]:
            raise ValueError(f"{name!r} and {first!r} are scores of different prompts, needed the same facts for both")
