"""How often the intervals that a rule of the audit reads hold the truth: 93 % of the time at least, where 95 is meant.

The rules read: efficacy (`over_facts` of yes and no), neighbours' loss (`over_facts` of losses), specificity's loss and
what every attack brings back (`excess`), the decoders' ρ (a ratio of `jointly`) and perplexity (`mean_over_facts`, of
ratios or of their logarithms). Of an upper bound, or a lower one, half of what may be missed: 3.5 %.

What is yes or no is counted, not drawn: there are n + 1 samples, each with its probability. All else is simulated.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tl_factedit.core.estimate as estimate_module
import tl_factedit.measure.excess as excess_module
from tl_factedit.core.estimate import Estimate, jointly, mean_over_facts, over_facts
from tl_factedit.measure.excess import excess

LEAST, ONE_SIDED = 0.93, 0.965
FACTS = (10, 30, 75)
SHARES = (0.03, 0.1, 0.5, 0.9, 0.97)
MORE_FACTS, MORE_SHARES = (10, 20, 30, 40, 75), (0.03, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.97)
RUNS = 1_500
DRAWS = 1_000
ROUNDING = 1e-9
CATASTROPHE = 0.03
Interval = Callable[[list[float]], Estimate]


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    """A tenth of the draws: their own error, 7 % of a tail, is small beside that of the samples."""
    monkeypatch.setattr(estimate_module, "DRAWS", DRAWS)
    monkeypatch.setattr(excess_module, "DRAWS", 2 * DRAWS)


def naive(values: list[float]) -> Estimate:
    """The percentile bootstrap alone: what isn't enough."""
    table = torch.tensor(values, dtype=torch.float64)
    picked = torch.randint(len(table), (DRAWS, len(table)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(table[picked].mean(-1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(table.mean()), low, high, len(table))


def losses(values: list[float]) -> Estimate:
    return over_facts(values)


# ---------------------------------------------------------------------------------------- yes and no, counted


def binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def of_shares(interval: Interval, n: int, p: float) -> tuple[float, float, float]:
    """How often a share's interval holds p, its upper end bounds it, and its lower end does: exactly."""
    found = [interval([1.0] * k + [0.0] * (n - k)) for k in range(n + 1)]
    weights = [binomial(k, n, p) for k in range(n + 1)]
    above = [each.high >= p - ROUNDING for each in found]
    below = [each.low <= p + ROUNDING for each in found]
    both = [a and b for a, b in zip(above, below, strict=True)]
    return tuple(sum(w for w, held in zip(weights, each, strict=True) if held) for each in (both, above, below))


@pytest.mark.parametrize("n", MORE_FACTS)
def test_shares_are_held(n):
    for p in MORE_SHARES:
        both, above, below = of_shares(over_facts, n, p)
        assert both >= LEAST and min(above, below) >= ONE_SIDED, (n, p, both, above, below)


def test_of_shares_the_resampled_ends_alone_do_not_bound_what_efficacy_has_to_reach():
    """With 75 facts of which 95 % succeed, a resampled lower end is too high twice as often as it may be."""
    both, _, below = of_shares(lambda values: jointly([values], lambda means: means[0]), 75, 0.95)
    assert both < LEAST and below < ONE_SIDED - 0.03


def test_a_percentile_bootstrap_alone_does_not_hold_shares():
    alone = {(n, p): of_shares(naive, n, p)[0] for n in FACTS for p in SHARES}
    assert alone[10, 0.03] < 0.3 and alone[30, 0.97] < 0.65 and alone[75, 0.03] < 0.91
    assert sum(held < LEAST for held in alone.values()) >= 8


# ---------------------------------------------------------------------------------------- means, drawn


def sampled(draw: Callable[[int, torch.Generator], Tensor], n: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(n)
    return [draw(n, generator).double().tolist() for _ in range(RUNS)]


def rate(found: list[Estimate], truth: float) -> tuple[float, float, float]:
    """How often the interval, its upper and its lower end hold the truth."""
    above = torch.tensor([each.high >= truth - ROUNDING for each in found]).double()
    below = torch.tensor([each.low <= truth + ROUNDING for each in found]).double()
    return float((above * below).mean()), float(above.mean()), float(below.mean())


def mostly_nothing(n: int, generator: torch.Generator) -> Tensor:
    """Losses over ten neighbours: seldom a tenth; and three facts of a hundred lose everything."""
    some = 0.1 * (torch.rand(n, generator=generator) < 0.15)
    return torch.where(torch.rand(n, generator=generator) < CATASTROPHE, 1.0, some)


def around_nothing(n: int, generator: torch.Generator) -> Tensor:
    """Losses and gains of a fiftieth, with the same catastrophes: a mean may be below 0."""
    some = 0.02 * torch.randn(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < CATASTROPHE, 1.0, some)


def everywhere(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator)


def of_several_prompts(n: int, generator: torch.Generator) -> Tensor:
    """Shares over five prompts of a fact, which differ between facts."""
    p = torch.rand(n, generator=generator).sqrt()
    return (torch.rand(n, 5, generator=generator) < p[:, None]).double().mean(-1)


BOUNDED = {
    mostly_nothing: CATASTROPHE + (1 - CATASTROPHE) * 0.015,
    around_nothing: CATASTROPHE,
    everywhere: 0.5,
    of_several_prompts: 2 / 3,
}


@pytest.mark.parametrize("draw", BOUNDED, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("n", FACTS)
def test_means_on_a_scale_with_ends_are_held_rare_catastrophes_among_them(n, draw):
    both, above, below = rate([losses(values) for values in sampled(draw, n)], BOUNDED[draw])
    assert both >= LEAST, both
    assert min(above, below) >= 0.955, (above, below)  # 1,500 samples err by .5 %


def test_a_percentile_bootstrap_alone_misses_catastrophes_that_it_has_not_seen():
    found = {
        (n, draw): rate([naive(values) for values in sampled(draw, n)], BOUNDED[draw])[0]
        for n in FACTS
        for draw in (mostly_nothing, around_nothing)
    }
    assert found[10, around_nothing] < 0.35 and found[30, around_nothing] < 0.65
    assert found[75, around_nothing] < 0.92 and found[10, mostly_nothing] < 0.75
    assert rate([naive(values) for values in sampled(everywhere, 10)], 0.5)[0] < LEAST  # too narrow, of so few


# ---------------------------------------------------------------------------------------- ρ, and perplexity


def rho(n: int, seed: int, *, left: float) -> tuple[list[float], list[float]]:
    """Mean percentile less ½, over correlated cells, after and before: `left` of what was readable is left."""
    generator = torch.Generator().manual_seed(seed)
    own, own_after = torch.rand(2, n, generator=generator)
    before = 0.9 + 0.1 * own - 0.5
    after = left * before + (1 - left) * (0.7 * own_after + 0.3 * torch.rand(n, generator=generator) - 0.5)
    return after.tolist(), before.tolist()


@pytest.mark.parametrize("left", [0.0, 0.5])
@pytest.mark.parametrize("n", FACTS)
def test_a_ratio_of_means_is_held_as_rho_is(n, left):
    found = [jointly(rho(n, seed, left=left), lambda means: means[0] / means[1]) for seed in range(RUNS)]
    both, above, below = rate(found, left)
    assert both >= LEAST and min(above, below) >= 0.955, (both, above, below)


@pytest.mark.parametrize("n", FACTS)
def test_equivalence_of_rho_by_its_90_percent_interval_is_as_rare_as_it_says(n):
    """Two one-sided tests at 5 %: where ρ is at the bound, it is called smaller in 7 % at most."""
    from tl_factedit.auditing.findings import Thresholds
    from tl_factedit.auditing.rules import _is_zero

    at = Thresholds().equal
    found = [jointly(rho(n, seed, left=at), lambda means: means[0] / means[1]) for seed in range(RUNS)]
    assert sum(_is_zero(each, Thresholds()) for each in found) / RUNS <= 0.07


def ratios(n: int, generator: torch.Generator) -> Tensor:
    """Perplexity over that before, a change each: lognormal."""
    return torch.exp(0.3 * torch.randn(n, generator=generator))


@pytest.mark.parametrize("n", FACTS)
def test_mean_ratios_of_perplexity_are_held(n):
    both, _, below = rate([mean_over_facts(torch.tensor(v)) for v in sampled(ratios, n)], math.exp(0.3**2 / 2))
    assert both >= LEAST and below >= 0.955, (both, below)


def test_without_ends_of_the_scale_nothing_can_hold_what_was_not_seen():
    """A limit, not a promise: of a ratio there is no largest, so that no sample bounds what others may be."""

    def rare(n: int, generator: torch.Generator) -> Tensor:
        return torch.where(torch.rand(n, generator=generator) < CATASTROPHE, 10.0, ratios(n, generator))

    truth = CATASTROPHE * 10 + (1 - CATASTROPHE) * math.exp(0.3**2 / 2)
    assert rate([mean_over_facts(torch.tensor(values)) for values in sampled(rare, 10)], truth)[0] < 0.6


# ---------------------------------------------------------------------------------------- what attacks bring back


def draws(p: float, *shape: int, seed: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < p).float()


def of_excess(found, truth: float) -> tuple[float, float, float]:
    above, below = found.high >= truth - 1e-6, found.low <= truth + 1e-6
    return tuple(float(each.double().mean()) for each in (above & below, above, below))


@pytest.mark.parametrize("n", FACTS)
@pytest.mark.parametrize("p", SHARES)
def test_an_excess_over_controls_of_its_own_is_held(n, p):
    old = draws(p, n, 1_000, seed=1)
    for null in (0.0, 0.05, 0.3):
        control = draws(null, 14, n, 1_000, seed=2).mean(0)
        both, above, below = of_excess(excess(old, control), p - null)
        assert both >= LEAST and min(above, below) >= ONE_SIDED - 0.01, (null, both, above, below)


@pytest.mark.parametrize("n", FACTS)
@pytest.mark.parametrize("objects", [1, 4, 16])
def test_an_excess_over_nulls_that_facts_share_is_held_once_that_is_said(n, objects):
    """16 subjects are asked for all facts with one old object: their error doesn't average out over facts."""
    runs, subjects = 1_000, 16
    generator = torch.Generator().manual_seed(3)
    of_fact = torch.randint(objects, (n, runs), generator=generator)
    missed = []
    for p, null in ((0.1, 0.1), (0.5, 0.1), (0.5, 0.3)):
        read = draws(null, subjects, objects, runs, seed=4).mean(0)
        old, control = draws(p, n, runs, seed=5), read.gather(0, of_fact)
        both, above, below = of_excess(excess(old, control, subjects=subjects), p - null)
        assert both >= LEAST and min(above, below) >= ONE_SIDED - 0.01, (p, null, both, above, below)
        missed.append(of_excess(excess(old, control), p - null)[0])
    if (n, objects) in ((75, 1), (75, 4), (30, 1)):
        assert min(missed) < 0.89  # where it isn't said


@pytest.mark.parametrize("n", FACTS)
@pytest.mark.parametrize("tests", [1, 5, 20, 84])
def test_intervals_for_many_cases_together_are_held_by_all_of_them(n, tests):
    """Counted: each number of facts whose old object is back is a cell."""
    old = torch.tensor([[float(fact < k) for k in range(n + 1)] for fact in range(n)])
    together, alone = (excess(old, torch.zeros_like(old), tests=count) for count in (tests, 1))
    for p in MORE_SHARES:
        weights = torch.tensor([binomial(k, n, p) for k in range(n + 1)], dtype=torch.float64)
        held = float((weights * ((together.low <= p + 1e-6) & (together.high >= p - 1e-6))).sum())
        assert held**tests >= LEAST, (p, held**tests)
        if (n, p, tests) == (75, 0.5, 20):
            one = float((weights * ((alone.low <= p + 1e-6) & (alone.high >= p - 1e-6))).sum())
            assert one**tests < 0.5  # where it isn't corrected


def test_nulls_may_be_shared_in_some_cells_and_not_in_others():
    old, control = draws(0.4, 30, 3, seed=7), torch.full((30, 3), 0.2)
    some = excess(old, control, subjects=torch.tensor([16.0, math.inf, 4.0]))
    for cell, subjects in enumerate((16, None, 4)):
        alone = excess(old[:, cell], control[:, cell], subjects=subjects)
        assert (float(some.low[cell]), float(some.high[cell])) == pytest.approx((float(alone.low), float(alone.high)))
    assert some.high[2] - some.low[2] > some.high[0] - some.low[0] > some.high[1] - some.low[1]


@pytest.mark.parametrize("subjects", [0, math.nan])
def test_the_number_of_subjects_is_one_at_least(subjects):
    with pytest.raises(ValueError, match="needed one at least"):
        excess(torch.ones(3), torch.zeros(3), subjects=torch.tensor(float(subjects)))
