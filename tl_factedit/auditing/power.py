"""The smallest effects that some measurements would have shown."""

from __future__ import annotations

import math

from tl_factedit.core.estimate import Estimate, Z, erfinv, wilson_low

Z_ONE_SIDED = 1.644854
"""Of a one-sided 95 % bound, and of a two-sided 90 % interval: two one-sided tests."""

Z_POWER = 0.841621
"""Of a power of 80 %."""


def smallest_share(n: int, threshold: float, *, tests: int = 1, power: float = 0.8) -> float:
    """The smallest share whose interval's lower end lies above `threshold` with this power.

    Wilson's interval at 1 − .05 / `tests`; NaN where `n` facts can't show any.
    """
    z = math.sqrt(2) * erfinv(1 - 0.05 / tests)
    needed = next((k for k in range(n + 1) if wilson_low(k / n, n, z) > threshold), None)
    if needed is None:
        return math.nan
    return next(
        (p / 1000 for p in range(1, 1001) if _at_least(needed, n, p / 1000) >= power),
        math.nan,
    )


def has_interval(value: Estimate | None) -> bool:
    return value is not None and value.n > 1 and not math.isnan(value.low)


def standard_error(value: Estimate) -> float:
    return (value.high - value.low) / (2 * Z)


def _at_least(k: int, n: int, p: float) -> float:
    """P(at least k of n)."""
    if p >= 1:
        return 1.0
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
