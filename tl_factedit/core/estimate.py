"""A number with its uncertainty: bootstrap over facts, widened where it is known to be too narrow.

How often the intervals that a rule of the audit reads hold the truth is simulated in
``tests/auditing/test_coverage_of_intervals.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over facts with its 95 % interval.

    Attributes:
        mean: The estimate; NaN if no fact could be scored.
        low: Lower end. NaN below two facts (of a correlation: five), which say nothing about the spread between facts,
            and where all facts have one value on a scale without ends.
        high: Upper end; NaN where `low` is.
        n: How many facts it is over.
    """

    mean: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        """Check that they are numbers: a file may say anything."""
        for name in ("mean", "low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name} of an estimate is {value!r}, needed a number")
        if isinstance(self.n, bool) or not isinstance(self.n, Integral) or self.n < 0:
            raise ValueError(f"n of an estimate is {self.n!r}, needed a whole number, 0 or more")
        if math.isnan(self.low) != math.isnan(self.high):
            raise ValueError(f"low and high of an estimate are {self.low} and {self.high}, needed both or neither")

    def __format__(self, spec: str) -> str:
        """``f"{estimate:.2f}"`` gives the mean with its interval and n."""
        spec = spec or ".3f"
        if self.n == 0:
            return "not measured"
        if self.n < 2 or math.isnan(self.low):
            return f"{self.mean:{spec}} (n = {self.n}: no interval)"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}] (n = {self.n})"

    def __str__(self) -> str:
        """The mean with its interval and n."""
        return format(self, ".3f")


DRAWS = 10_000

ALPHA = 0.05
"""Share of intervals that may miss."""

Z = 1.959964
"""Standard deviations of a 95 % interval."""

ROUNDING = 1e-12
"""How much means of equal numbers may differ."""

FEWEST = 5
"""Facts that the interval of a correlation needs."""

AT_ONCE = 5_000_000
"""Most numbers resampled at a time: with all 21,919 facts of CounterFact a whole table of draws is 1.8 GB."""


def over_facts(
    values: Sequence[float],
    *,
    span: tuple[float, float] | None = (0.0, 1.0),
    clusters: Sequence[object] | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean and bootstrap interval over facts; facts without a value (NaN) don't count.

    A bootstrap is that of `jointly`, and knows of no fact but those that it draws from: of 30 facts, three of a hundred
    of which lose everything, 40 % of samples hold none of these, and resampling such a sample never finds one. So on a
    scale with ends the interval reaches at least to where it would be if others, unseen, lay at an end of the scale: by
    Wilson's interval of a share of none, up to ``z² / (n + z²)`` of all facts may. Where all values lie at the ends
    (shares of yes and no) it holds Wilson's interval as well.

    Args:
        values: One a fact.
        span: The ends of the scale; None where there are none: facts of one value have no interval then, and rare
            facts far from the others, none of which was seen, aren't covered by any.
        clusters: As in `jointly`.
        seed: Seed of the bootstrap.
    """
    found = jointly([values], lambda means: means[0], clusters=clusters, seed=seed)
    if found.n < 2 or math.isnan(found.low):
        return found
    known = [not math.isnan(value) for value in values]
    units = found.n if clusters is None else len({c for c, yes in zip(clusters, known, strict=True) if yes})
    agree = found.high - found.low <= ROUNDING * max(1.0, abs(found.mean))
    if span is None or (agree and not span[0] <= found.mean <= span[1]):
        return Estimate(found.mean, math.nan, math.nan, found.n) if agree else found
    other = Z**2 / (units + Z**2)
    low, high = (found.mean + other * (end - found.mean) for end in span)
    if all(value in span for value in values if not math.isnan(value)):
        width = span[1] - span[0]
        share, n = (torch.tensor(x, dtype=torch.float64) for x in ((found.mean - span[0]) / width, float(units)))
        wilson = [span[0] + width * float(end) for end in wilson_ends(share, n, ALPHA)]
        low, high = min(low, wilson[0]), max(high, wilson[1])
    return Estimate(found.mean, min(found.low, low), max(found.high, high), found.n)


def jointly(
    columns: Sequence[Sequence[float]],
    combine: Callable[[Sequence[Tensor]], Tensor],
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
) -> Estimate:
    """A function of the means of several per-fact scores, with facts resampled together.

    The ends are those quantiles of the resampled values that are as wide for n facts as Student's t is: plain ones,
    at 2.5 and 97.5 %, are too narrow by a fifth for 10 facts, and by a fiftieth for 75 (`tail`).

    Args:
        columns: Scores by kind, each with one value a fact (NaN: this fact has none).
        combine: From the means (one tensor a column, of any shape) to the estimate.
        clusters: What each fact belongs to, such as its relation: whole clusters are resampled, so that the interval
            speaks of others of their kind. None resamples facts.
        seed: Seed of the bootstrap.

    Returns:
        The estimate; n counts the facts that have every score (the interval is as wide as their number of clusters has
        it, where there are clusters).
    """
    table = torch.tensor([list(column) for column in columns], dtype=torch.float64)
    n = int((~table.isnan()).all(0).sum()) if table.numel() else 0
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(combine([row.nanmean() for row in table]))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    drawn, units = torch.Generator().manual_seed(seed), n
    if clusters is None:
        means = combine(list(_resampled_means(table, drawn)))
    else:
        known = (~table.isnan()).all(0)
        units = len({each for each, yes in zip(clusters, known.tolist(), strict=True) if yes})
        if units < 2:
            return Estimate(mean, math.nan, math.nan, n)
        means = combine(list(_resampled_by_cluster(table, clusters, drawn)))
    at = tail(units)
    low, high = torch.nanquantile(means, torch.tensor([at, 1 - at], dtype=means.dtype)).tolist()
    # Of a ratio whose lower part may be 0 some resamples are infinite, and so may an end be.
    return Estimate(mean, -math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high, n)


def tail(n: int) -> float:
    """The share of resampled means beyond each end of a 95 % interval over n facts (two at least).

    A resample of n facts varies by (n − 1)/n of the variance that it stands for, and n facts show their own variance
    with an error; Student's t has both: ``Φ(−√(n / (n − 1)) · t)``, t its quantile at n − 1 degrees (by its expansion
    in 1/(n − 1): 2.2621 for 10 facts, where it is 2.2622). Hesterberg 2015 (arXiv:1411.5279), the expanded percentile
    interval.
    """
    v, z = n - 1, Z
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return 0.5 * math.erfc(math.sqrt(n / v) * t / math.sqrt(2))


@dataclass(frozen=True, eq=False)
class Estimates:
    """Many means over the same facts, resampled together.

    Attributes:
        mean: [cell …]; NaN where no fact has a value.
        low: Lower ends of the 95 % bootstrap intervals; NaN below two facts.
        high: Upper ends.
        n: Facts that have a value.
    """

    mean: Float[Tensor, "*cell"]
    low: Float[Tensor, "*cell"]
    high: Float[Tensor, "*cell"]
    n: Int[Tensor, "*cell"]


def over_facts_each(values: Float[Tensor, "fact *cell"], *, draws: int = 2_000, seed: int = 0) -> Estimates:
    """For each cell of a table, mean and percentile-bootstrap interval over facts (NaN: this fact has no value)."""
    shape, count = values.shape[1:], len(values)
    if not values.numel():
        nan = torch.full(shape, math.nan, dtype=torch.float64)
        return Estimates(nan, nan, nan, torch.zeros(shape, dtype=torch.long))
    times = _times_drawn(count, draws, seed)
    ends = torch.tensor([0.025, 0.975], dtype=times.dtype)
    found = []
    # As many cells at a time as keep a table of draws small: a model has some 100,000 neurons.
    for table in values.double().reshape(count, -1).split(max(1, AT_ONCE // draws), 1):
        known = ~table.isnan()
        n = known.sum(0)
        filled = torch.where(known, table, 0.0)
        means = (times @ filled) / (times @ known.to(table))
        low, high = torch.nanquantile(means, ends, dim=0)
        found.append((filled.sum(0) / n, *(torch.where(n >= 2, end, math.nan) for end in (low, high)), n))
    return Estimates(*(torch.cat(each).reshape(shape) for each in zip(*found, strict=True)))


def _times_drawn(count: int, draws: int, seed: int) -> Float[Tensor, "draw fact"]:
    """How often each fact is drawn, drawing as many as there are with replacement."""
    picked = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, picked, torch.ones_like(picked).double())


def rank_correlation(
    x: Float[Tensor, "fact"], y: Float[Tensor, "fact"], *, draws: int = 2_000, seed: int = 0
) -> Estimate:
    """Spearman's rank correlation over the facts that have both, with its percentile-bootstrap interval.

    NaN where one of the two doesn't vary. There is no interval below five facts, nor where all resamples agree (ranks
    that are the same throughout), which shows no spread. A resampled fact counts as often as it is drawn, in ranks too.
    """
    both = ~(x.isnan() | y.isnan())
    pairs = [values[both].double() for values in (x, y)]
    n = int(both.sum())
    if n < 2:
        return Estimate(math.nan, math.nan, math.nan, n)
    once = torch.ones(1, n, dtype=torch.float64)
    found, resampled = (_weighted_spearman(pairs, weights) for weights in (once, _times_drawn(n, draws, seed)))
    low, high = torch.nanquantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if n < FEWEST or low == high:
        low = high = math.nan
    return Estimate(float(found[0]), low, high, n)


def _weighted_spearman(pairs: Sequence[Tensor], weights: Float[Tensor, "draw fact"]) -> Float[Tensor, "draw"]:
    centred = []
    for values in pairs:
        below = (values[:, None] > values).double() + (values[:, None] == values).double() / 2
        ranks = weights @ below.T
        centred.append(ranks - (weights * ranks).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True))
    a, b = centred
    spread = ((weights * a * a).sum(-1) * (weights * b * b).sum(-1)).sqrt()
    return torch.where(spread > 0, (weights * a * b).sum(-1) / spread, math.nan)


def _resampled_means(table: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of each row over columns drawn with replacement, [row draw]."""
    n = table.shape[1]
    pieces = torch.arange(DRAWS).split(max(1, AT_ONCE // n))
    draws = (torch.randint(n, (len(piece), n), generator=generator) for piece in pieces)
    return torch.cat([torch.stack([row[draw].nanmean(-1) for row in table]) for draw in draws], dim=1)


def _resampled_by_cluster(table: Tensor, clusters: Sequence[object], generator: torch.Generator) -> Tensor:
    """The mean of each row over the facts of clusters drawn with replacement, [row draw]."""
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    of_fact = torch.tensor([place[cluster] for cluster in clusters])
    picked = torch.randint(len(place), (DRAWS, len(place)), generator=generator)
    times = torch.zeros(DRAWS, len(place), dtype=table.dtype)
    times = times.scatter_add_(1, picked, torch.ones_like(picked).to(table))[:, of_fact]
    known = ~table.isnan()
    return ((times @ torch.where(known, table, 0.0).T) / (times @ known.to(table).T)).T


def wilson_low(share: float, n: int, z: float) -> float:
    """The lower end of Wilson's interval of a share, z standard deviations down."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    return centre - z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))


def erfinv(x: float) -> float:
    """The inverse of the error function."""
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64)))


def wilson_ends(share: Tensor, n: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Wilson's interval of a share; for means of several prompts it is too wide rather than too narrow."""
    z = float(torch.special.ndtri(torch.tensor(1 - alpha / 2, dtype=torch.float64)))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)).clamp(min=0).sqrt()
    return (centre - reach).clamp(min=0), (centre + reach).clamp(max=1)  # rounding may be beyond the ends


def mean_over_facts(values: Float[Tensor, "fact"]) -> Estimate:
    """The mean of numbers that aren't shares, with its bootstrap interval."""
    return jointly([values.tolist()], lambda means: means[0])
