"""Excess over controls: the mean is that of a plain loop, and the interval holds where a bootstrap alone doesn't."""

import math
import random

import pytest
import torch

from tl_factedit.core.estimate import jointly
from tl_factedit.measure.excess import excess, excess_of

NAN = math.nan


def test_the_mean_is_that_of_a_loop_and_facts_that_were_not_asked_are_left_out():
    old = torch.tensor([[1.0, NAN], [0.0, 1.0], [1.0, 0.5], [1.0, 0.0]])
    control = torch.tensor([[0.0, 0.1], [0.25, 0.0], [0.0, 0.05], [NAN, 0.1]])
    found = excess(old, control)
    assert found.n.tolist() == [3, 3]
    assert found.mean.tolist() == pytest.approx([(1 - 0.25 + 1) / 3, (1 + 0.45 - 0.1) / 3])


def test_without_facts_or_with_one_there_is_no_interval():
    nothing, one = excess_of(torch.zeros(0)), excess_of(torch.tensor([1.0, NAN]))
    assert nothing.n == 0 and math.isnan(nothing.mean)
    assert one.n == 1 and one.mean == 1 and math.isnan(one.low) and math.isnan(one.high)
    none = excess(torch.full((3, 2), NAN), torch.zeros(3, 2))
    assert none.n.tolist() == [0, 0] and bool(none.mean.isnan().all())


def test_the_interval_holds_both_the_bootstraps_and_wilsons():
    draw = random.Random(0)
    old = torch.tensor([float(draw.random() < 0.3) for _ in range(60)])
    control = torch.tensor([draw.choice([0, 1 / 14]) for _ in range(60)])
    found = excess_of(old, control)
    boot = jointly([(old - control).tolist()], lambda means: means[0])
    assert found.low <= boot.low + 0.01 and found.high >= boot.high - 0.01
    share, z = float(old.mean()), 1.959964
    root = z * math.sqrt(share * (1 - share) / 60 + z**2 / (4 * 60**2))
    wilson = [(share + z**2 / 120 + sign * root) / (1 + z**2 / 60) - float(control.mean()) for sign in (-1, 1)]
    assert found.low <= wilson[0] + 1e-6 and found.high >= wilson[1] - 1e-6
    assert found.low == pytest.approx(min(boot.low, wilson[0]), abs=0.01)
    assert found.high == pytest.approx(max(boot.high, wilson[1]), abs=0.01)


@pytest.mark.parametrize(("share", "n"), [(0.02, 40), (0.1, 40), (0.5, 40), (0.97, 40)])
def test_the_interval_covers_the_truth_where_a_bootstrap_alone_does_not(share, n):
    generator = torch.Generator().manual_seed(1)
    old = (torch.rand(n, 2_000, generator=generator) < share).float()  # 2,000 samples of n facts
    found = excess(old, torch.zeros_like(old))
    covered = ((found.low <= share) & (share <= found.high)).double().mean()
    assert covered >= 0.94
    if share == 0.02:
        means = old.double().mean(0)
        assert float((means > 0).double().mean()) < 0.6  # a bootstrap of zeros alone has no width, and misses it


def test_with_more_tests_the_interval_is_wider_and_as_wide_as_bonferroni_wants():
    old = torch.tensor([1.0] * 30 + [0.0] * 30)
    one, six, many = (excess_of(old, torch.zeros(60), tests=tests) for tests in (1, 6, 84))
    assert many.low < six.low < one.low < 0.5 < one.high < six.high < many.high
    # The normal quantiles at 1 − .05 / (2 · tests), of a share of one half.
    for found, z in ((one, 1.960), (six, 2.638), (many, 3.436)):
        assert found.high - 0.5 == pytest.approx(z * 0.5 / math.sqrt(60), abs=0.02)


def test_the_ends_stay_between_minus_one_and_one():
    found = excess_of(torch.ones(5), torch.zeros(5))
    assert found.high == 1 and found.low < 0.7
    found = excess_of(torch.zeros(5), torch.ones(5))
    assert found.low == -1
