"""The smallest effects that some measurements would have shown."""

from __future__ import annotations

import math

from tl_factedit.auditing.findings import Findings, Thresholds
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


def power_of(findings: Findings, thresholds: Thresholds) -> tuple[str, ...]:
    """What the attacks that switch cells off, and the decoders, would have shown with a power of 80 %."""
    lines = []
    for finding in findings.showing("elsewhere"):
        if finding.strongest.n > 1:
            share = smallest_share(finding.strongest.n, thresholds.present, tests=max(1, finding.tests))
            lines.append(
                f"a case of {finding.attack}, one of {finding.tests} of all attacks, would have shown if it brought "
                f"the old object back in {share:.0%} of facts"
            )
    if findings.control:
        each = "; ".join(f"{name} {value:.2f}" for name, value in findings.control.items())
        lines.append(
            f"of an override of the same facts, made as a control, attacks bring the old object back in: {each}"
        )
    for what, rho in (("native", findings.native), ("adaptive", findings.adaptive)):
        if rho is not None and rho.n > 1:
            least = thresholds.retained + (Z + Z_POWER) * standard_error(rho)
            lines.append(f"ρ of {least:.2f} by the {what} decoder would have shown")
    return tuple(lines)


def has_interval(value: Estimate) -> bool:
    """Whether a number has an interval: it is over two facts at least."""
    return value.n > 1 and not math.isnan(value.low)


def standard_error(value: Estimate) -> float:
    """The standard error that a 95 % interval's width stands for."""
    return (value.high - value.low) / (2 * Z)


def _at_least(k: int, n: int, p: float) -> float:
    """P(at least k of n)."""
    if p >= 1:
        return 1.0
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
