"""How often the old object comes first, beyond what objects that mean nothing here do.

    excess = mean over facts of ( 1[old first] − mean over control objects of 1[that control first] )

Its interval is a percentile bootstrap over facts. A share of 0 or 1 shows no spread when resampled, and near them a
bootstrap is too narrow; so each end is moved out to where Wilson's interval of the old object's share ends (less the
controls' mean), if that is further. A claim that something is *absent* rests on the upper end where nothing was seen.

Resampling facts takes the controls as they are. Where facts share them, as when the same few subjects are asked for all
facts with one old object, their own error doesn't average out over the facts, and is added in squares (`subjects`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.core.estimate import AT_ONCE, Estimate, Estimates, wilson_ends

DRAWS = 10_000

IN_TAIL = 20
"""How many draws lie beyond each end at least: with many tests the ends are far out."""


def excess(
    old: Float[Tensor, "fact *cell"],
    control: Float[Tensor, "fact *cell"],
    *,
    tests: int = 1,
    subjects: int | Float[Tensor, "*cell"] | None = None,
    at_once: float = 1.0,
    alpha: float = 0.05,
    seed: int = 0,
) -> Estimates:
    """The mean excess of each cell, with its interval.

    Args:
        old: 1 where the old object comes first, 0 where not, between them for a mean over prompts; NaN: not asked.
        control: The mean of the same over control objects.
        tests: How many cells are looked at for one claim: the intervals are at 95 % for all of them together
            (Bonferroni: each at 1 − alpha / tests).
        subjects: Of how many subjects the controls were read, where facts share them: then the interval also holds
            their error, by Wilson's interval of a share of so many, as if all facts shared all of it (the interval of a
            difference by Zou and Donner 2008, doi:10.1002/sim.3095). One number, or one a cell (infinite where facts
            don't share them); None where each fact has controls of its own throughout.
        at_once: The largest share of the facts that one such subject can count for. For each subject one object comes
            first, so that it counts for the facts with that old object alone: where they have many different ones, the
            mean null is surer than a share of so many subjects.
        alpha: One minus the level of the intervals, both ends together: 0.1 for bounds at 95 % on one side.
        seed: Seed of the bootstrap over facts (one resampling for all cells).

    Raises:
        ValueError: `subjects` is less than one, or not a number; `at_once` isn't a share.
    """
    shape, count = old.shape[1:], len(old)
    asked = None if subjects is None else torch.as_tensor(subjects, dtype=torch.float64).expand(shape).flatten()
    if asked is not None and not bool((asked >= 1).all()):
        raise ValueError(f"subjects is {subjects}, needed one at least: None where each fact has controls of its own")
    if not 0 < at_once <= 1:
        raise ValueError(f"at_once is {at_once}, needed a share above 0 and up to 1")
    if not old.numel():
        nan = torch.full(shape, math.nan, dtype=torch.float64)
        return Estimates(nan, nan, nan, torch.zeros(shape, dtype=torch.long))
    values = (old - control).double().reshape(count, -1)
    known = ~values.isnan()
    shares = torch.where(known, old.double().reshape(count, -1), math.nan)
    n = known.sum(0)
    mean, share = values.nansum(0) / n, shares.nansum(0) / n
    alpha = alpha / tests
    ends = mean.expand(2, -1).clone()
    # Where all facts say the same, so do all that are drawn of them.
    span = torch.where(known, values, -math.inf).amax(0) - torch.where(known, values, math.inf).amin(0)
    differ = (n >= 2) & (span > 0)
    if bool(differ.any()):
        ends[:, differ] = _bootstrap(torch.where(known, values, 0.0)[:, differ], known[:, differ], alpha, seed)
    low, high = wilson_ends(share, n, alpha)
    low, high = torch.fmin(ends[0], low - (share - mean)), torch.fmax(ends[1], high - (share - mean))
    if asked is not None:
        null = (share - mean).clamp(0, at_once)
        ends = [at_once * end for end in wilson_ends(null / at_once, asked, alpha)]
        low = mean - ((mean - low) ** 2 + (ends[1] - null) ** 2).sqrt()
        high = mean + ((high - mean) ** 2 + (null - ends[0]) ** 2).sqrt()
    low, high = (torch.where(n >= 2, end.clamp(-1, 1), math.nan) for end in (low, high))
    return Estimates(*(each.reshape(shape) for each in (mean, low, high, n)))


def excess_of(
    old: Float[Tensor, "fact"], control: Float[Tensor, "fact"] | None = None, *, tests: int = 1, seed: int = 0
) -> Estimate:
    """The same of one cell; without controls of the share itself."""
    found = excess(old, torch.zeros_like(old) if control is None else control, tests=tests, seed=seed)
    return Estimate(float(found.mean), float(found.low), float(found.high), int(found.n))


def _bootstrap(values: Tensor, known: Tensor, alpha: float, seed: int) -> Float[Tensor, "end cell"]:
    count = len(values)
    draws = max(DRAWS, math.ceil(2 * IN_TAIL / alpha))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for some in torch.arange(draws).split(max(1, AT_ONCE // count)):
        picked = torch.randint(count, (len(some), count), generator=generator)
        times = torch.zeros(len(some), count, dtype=torch.float64)
        times.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))
        found.append((times @ values) / (times @ known.double()))
    ends = torch.tensor([alpha / 2, 1 - alpha / 2], dtype=torch.float64)
    # One column after the other: quantile() refuses large tables.
    return torch.stack([torch.nanquantile(column, ends) for column in torch.cat(found).T], 1)
