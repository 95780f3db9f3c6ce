"""The same facts traced under two corruptions, and where the two agree.

Noise and token replacement may point to different layers (Zhang and Nanda 2023, arXiv:2309.16042: peaks under noise
are two to five times as high, and some are not there under replacement). A place that only one of the two finds is a
finding about the corruption as much as about the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.protocol import Component, Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, over_facts_each, rank_correlation
from tl_factedit.core.facts import Fact
from tl_factedit.locate.corruption import Corruption, GaussianNoise
from tl_factedit.locate.metrics import Metric
from tl_factedit.locate.replacement import TokenReplacement
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import Trace

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Peak:
    """The layer of the largest mean effect at the last subject token.

    Attributes:
        layer: The layer.
        low: Lower end of the 95 % bootstrap interval over facts.
        high: Upper end.
        effect: The mean effect there.
    """

    layer: int
    low: int
    high: int
    effect: float


@dataclass(frozen=True, eq=False)
class CorruptionComparison:
    """Two traces of the same facts.

    Attributes:
        first: Under the first corruption.
        second: Under the second.
        usable: Whether a fact counts: both could corrupt it, with a total effect of at least `min_effect`.
        min_effect: That bound.
    """

    first: Trace
    second: Trace
    usable: tuple[bool, ...]
    min_effect: float

    @plain_torch()
    def effects(self) -> tuple[Float[Tensor, "fact layer"], Float[Tensor, "fact layer"]]:
        """Shares of the total effect at the last subject token, of the usable facts."""
        last = torch.tensor([stop - 1 for _, stop in self.first.subject])
        use = torch.tensor(self.usable)
        found = [
            trace.fraction(self.min_effect)[torch.arange(len(last)), :, last][use]
            for trace in (self.first, self.second)
        ]
        return found[0], found[1]

    @plain_torch()
    def agreement(self, *, seed: int = 0) -> list[Estimate]:
        """For each layer, the rank correlation over facts of the two effects at the last subject token."""
        first, second = self.effects()
        return [rank_correlation(first[:, layer], second[:, layer], seed=seed) for layer in range(first.shape[1])]

    @plain_torch()
    def profile(self, *, seed: int = 0) -> Estimate:
        """Rank correlation over *layers* of the two mean effects, with its interval over facts."""
        first, second = self.effects()
        if len(first) < 2:
            return Estimate(float("nan"), float("nan"), float("nan"), len(first))
        picked = torch.randint(len(first), (1_000, len(first)), generator=torch.Generator().manual_seed(seed))
        found = torch.tensor(
            [rank_correlation(first[draw].mean(0), second[draw].mean(0), draws=1).mean for draw in picked]
        )
        low, high = torch.nanquantile(found, torch.tensor([0.025, 0.975])).tolist()
        return Estimate(rank_correlation(first.mean(0), second.mean(0), draws=1).mean, low, high, len(first))

    @plain_torch()
    def peaks(self, *, seed: int = 0) -> tuple[Peak, Peak]:
        """Where each is largest, with the layers between which 95 % of resamples of the facts have their largest.

        Raises:
            ValueError: No fact is usable.
        """
        if not any(self.usable):
            raise ValueError(
                f"none of {len(self.usable)} facts can be compared, needed one that both corruptions take at least "
                f"{self.min_effect} from: trace more facts, or lower min_effect"
            )
        found = []
        for effects in self.effects():
            generator = torch.Generator().manual_seed(seed)
            picked = torch.randint(len(effects), (2_000, len(effects)), generator=generator)
            layers = torch.stack([effects[draw].mean(0).argmax() for draw in picked]).double()
            low, high = torch.quantile(layers, torch.tensor([0.025, 0.975], dtype=torch.float64)).round().int().tolist()
            mean = effects.mean(0)
            found.append(Peak(int(mean.argmax()), low, high, float(mean.max())))
        return found[0], found[1]

    @plain_torch()
    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row a layer: both mean effects at the last subject token with intervals, and their rank correlation."""
        import pandas as pd

        names = [_name(trace) for trace in (self.first, self.second)]
        if names[0] == names[1]:
            names = [f"{names[0]} 1", f"{names[1]} 2"]
        means = [over_facts_each(effects, seed=seed) for effects in self.effects()]
        rows = []
        for layer, rho in enumerate(self.agreement(seed=seed)):
            row: dict[str, float] = {"layer": layer}
            for name, mean in zip(names, means, strict=True):
                row |= {name: float(mean.mean[layer]), f"{name} low": float(mean.low[layer])}
                row |= {f"{name} high": float(mean.high[layer])}
            rows.append(row | {"rank correlation": rho.mean, "low": rho.low, "high": rho.high, "n": rho.n})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """Facts, peaks and the agreement of the two profiles."""
        count = sum(self.usable)
        if count < 2:
            return f"CorruptionComparison({count} of {len(self.usable)} facts usable: too few to compare)"
        peaks = ", ".join(
            f"{_name(trace)} peaks at layer {peak.layer} [{peak.low}, {peak.high}] with {peak.effect:.2f}"
            for trace, peak in zip((self.first, self.second), self.peaks(), strict=True)
        )
        return (
            f"CorruptionComparison({count} of {len(self.usable)} facts usable; {peaks} of the total effect at the "
            f"last subject token; profiles over layers correlate {self.profile():.2f})"
        )


@plain_torch()
def compare_corruptions(
    model: Model,
    facts: Sequence[Fact],
    *,
    corruptions: tuple[Corruption, Corruption] | None = None,
    component: Component = "resid",
    window: int = 1,
    metric: str | Metric = "prob",
    min_effect: float = 0.05,
    prepend_bos: bool | None = None,
    memory: float | None = 2.0,
    progress: bool = True,
) -> CorruptionComparison:
    """Trace the same facts under noise and under token replacement.

    Args:
        model: Either class.
        facts: Several facts of a relation, or of several: replacement needs others of the same prompt.
        corruptions: Two others to compare; None for `GaussianNoise` and `TokenReplacement`.
        component: As in `causal_trace`.
        window: As in `causal_trace`.
        metric: As in `causal_trace`.
        min_effect: Facts with a smaller total effect under either are left out.
        prepend_bos: As in `causal_trace`.
        memory: As in `causal_trace`.
        progress: As in `causal_trace`.

    Returns:
        Both traces, with what compares them: `CorruptionComparison.table`, `CorruptionComparison.agreement`,
        `CorruptionComparison.profile` and `CorruptionComparison.peaks`.

    Raises:
        ValueError: As `causal_trace`, and where no fact has a donor.
    """
    facts = tuple(facts)
    # The one that may find nothing to do first.
    corruptions = corruptions or (GaussianNoise(), TokenReplacement())
    second, first = (
        causal_trace(
            model,
            facts,
            component=component,
            window=window,
            corruption=corruption,
            metric=metric,
            prepend_bos=prepend_bos,
            memory=memory,
            progress=progress,
        )
        for corruption in reversed(corruptions)
    )
    large = [trace.total_effect >= min_effect for trace in (first, second)]  # not where it is NaN
    return CorruptionComparison(first, second, tuple((large[0] & large[1]).tolist()), min_effect)


def _name(trace: Trace) -> str:
    return type(trace.corruption).__name__
