"""A permutation test of what a linear probe reads, against the best of all its cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.state import plain_torch
from tl_factedit.probes.linear import ProbeReadout
from tl_factedit.probes.percentile import candidate_percentiles

AT_ONCE = 2_000
"""Permutations held at a time."""


@dataclass(frozen=True, eq=False)
class Permutation:
    """How a readout compares with those of permuted labels.

    Attributes:
        statistic: The observed mean over facts, [layer position].
        p: Share of permutations whose *best cell* is as good as this cell, (1 + #≥)/(1 + n), [layer position]: the
            p-value to use when looking at all cells.
        p_each: Share of permutations whose same cell is as good: for a cell that was chosen beforehand.
        critical: What the best cell stays below in 95 % of permutations (above, if low values are looked for).
        n: Number of permutations.
    """

    statistic: Float[Tensor, "layer position"]
    p: Float[Tensor, "layer position"]
    p_each: Float[Tensor, "layer position"]
    critical: float
    n: int

    @property
    @plain_torch()
    def p_any(self) -> float:
        """The p-value of the best cell of all."""
        return float(self.p.min())


@plain_torch()
def permutation_test(
    readout: ProbeReadout,
    *,
    statistic: Literal["percentile", "accuracy"] = "percentile",
    side: Literal["above", "below"] = "above",
    n: int = 10_000,
    seed: int = 0,
) -> Permutation:
    """Permute the old objects among the facts, leave all scores as they are, and compare with the best of all cells.

    Permutations that would call a fact's new object its old one are excluded: labels are drawn uniformly from the
    others. Where there are new objects this is done by pairwise swaps, back from the labels as they are to a common
    start and from there n times independently, which is exact however few the swaps (Besag and Clifford 1989,
    10.1093/biomet/76.4.633).

    Args:
        readout: What a linear probe read.
        statistic: The mean percentile of the old object, or the share of facts where it comes first.
        side: Whether to test for values above chance, or below it (the old object is avoided).
        n: Number of permutations.
        seed: Seed of the permutations.

    Raises:
        ValueError: There are fewer than two facts, or no permutations.
    """
    if len(readout.facts) < 2:
        raise ValueError(f"{len(readout.facts)} facts can't be permuted, needed at least 2")
    if statistic == "percentile":
        table = candidate_percentiles(readout.scores, readout.new)
    elif statistic == "accuracy":
        best = readout.scores.argmax(-1)
        table = torch.nn.functional.one_hot(best, readout.scores.shape[-1]).double()
    else:
        raise ValueError(f"statistic {statistic!r} is unknown, needed 'percentile' or 'accuracy'")
    if side not in ("above", "below"):
        raise ValueError(f"side {side!r} is unknown, needed 'above' or 'below'")
    if n < 1:
        raise ValueError(f"n is {n}, needed 1 permutation at least")
    sign = 1 if side == "above" else -1
    facts, cells, objects = len(table), table.shape[1] * table.shape[2], table.shape[3]
    flat = sign * table.reshape(facts, cells, objects).nan_to_num(0.0).float()
    here = _class_means(flat, readout.old[None])[0]
    draw = torch.Generator().manual_seed(seed)
    as_good, best_as_good, maxima = torch.zeros(cells), torch.zeros(cells), []
    for labels in _permuted(readout.old, readout.new, n, draw):
        there = _class_means(flat, labels)
        # Equal means differ in the last bits by the order of summation.
        as_good += (there >= here - 1e-6).sum(0)
        best_as_good += (there.max(1, keepdim=True).values >= here - 1e-6).sum(0)
        maxima.append(there.max(1).values)
    shape = table.shape[1:3]
    return Permutation(
        statistic=sign * here.double().reshape(shape),
        p=((1 + best_as_good) / (1 + n)).double().reshape(shape),
        p_each=((1 + as_good) / (1 + n)).double().reshape(shape),
        critical=sign * float(torch.cat(maxima).quantile(0.95)),
        n=n,
    )


def _permuted(
    old: Int[Tensor, "fact"], new: Int[Tensor, "fact"], n: int, draw: torch.Generator
) -> Iterator[Int[Tensor, "draw fact"]]:
    sizes = [min(AT_ONCE, n - done) for done in range(0, n, AT_ONCE)]
    if not bool((new >= 0).any()):
        for size in sizes:
            yield old[torch.rand(size, len(old), generator=draw).argsort(1)]
        return
    # The test's size is right after any number of rounds; after so many, little is left of where they began, also among
    # few facts, where most swaps may be forbidden.
    rounds = 4 * math.ceil(math.log2(len(old))) + math.ceil(500 / len(old))
    pairings = [torch.randperm(len(old), generator=draw) for _ in range(rounds)]
    start = old[None].clone()
    _walk_(start, new, pairings[::-1], draw)
    for size in sizes:
        labels = start.repeat(size, 1)
        _walk_(labels, new, pairings, draw)
        yield labels


def _walk_(
    labels: Int[Tensor, "draw fact"], new: Int[Tensor, "fact"], pairings: Sequence[Tensor], draw: torch.Generator
) -> None:
    """For each pairing in turn, swap a pair's labels with probability ½, unless one would get its own new object."""
    half = len(new) // 2
    for pairing in pairings:
        one, two = pairing[:half], pairing[half : 2 * half]
        a, b = labels[:, one], labels[:, two]
        go = (torch.rand(a.shape, generator=draw) < 0.5) & (a != new[two]) & (b != new[one])
        labels[:, one], labels[:, two] = torch.where(go, b, a), torch.where(go, a, b)


def _class_means(
    table: Float[Tensor, "fact cell object"], labels: Int[Tensor, "draw fact"]
) -> Float[Tensor, "draw cell"]:
    facts = torch.arange(len(table))
    return torch.stack([table[facts, cell][facts, labels].mean(-1) for cell in range(table.shape[1])], -1)
