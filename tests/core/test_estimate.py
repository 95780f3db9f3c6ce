"""A mean over facts has the interval that statistics promise, and none where there is nothing to say."""

import math

import pytest
import torch

import tl_factedit.core.estimate as estimate_module
from tl_factedit.core.estimate import DRAWS, Estimate, jointly, over_facts, rank_correlation

NAN = math.nan


def draw(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


# ---------------------------------------------------------------------------------------- the interval


@pytest.mark.parametrize("n", [200, 1000])
def test_a_large_sample_has_the_interval_of_normal_theory(n):
    values = 3 + 2 * draw(n)
    found, half = over_facts(values.tolist()), 1.96 * float(values.std()) / math.sqrt(n)
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.n == n
    # A quantile of 10,000 draws errs by some 3 % of the half-width; 10 % is never met by chance.
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


@pytest.mark.parametrize(("successes", "n"), [(100, 400), (200, 400), (360, 400)])
def test_a_proportion_of_many_facts_has_wilsons_interval(successes, n):
    found = over_facts([1.0] * successes + [0.0] * (n - successes))
    low, high = wilson(successes, n)
    assert found.mean == successes / n
    # Wilson's is shifted to the middle by about z²/2n = 0.5 %, and a bootstrap quantile falls on multiples of 1/n.
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert high - low > 0.05


def test_four_times_the_facts_halve_the_interval():
    few, many = (over_facts((draw(n)).tolist()) for n in (250, 1000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.15)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(estimate_module, "DRAWS", 1000)
    runs, hits = 400, 0
    for seed in range(runs):
        found = over_facts((1 + draw(40, seed)).tolist(), seed=seed)
        hits += found.low <= 1 <= found.high
    # With 40 facts a percentile bootstrap covers about 94 %; 400 runs of that err by 1.2 %, taken three times.
    assert 0.90 < hits / runs < 0.98


def test_where_all_facts_agree_a_share_of_others_may_be_at_the_ends_of_the_scale():
    other = 1.959964**2 / (5 + 1.959964**2)
    found = over_facts([0.25] * 5)
    assert (found.low, found.high) == pytest.approx((0.25 * (1 - other), 0.25 + 0.75 * other))
    for value in (0.1, -0.3):  # of many a mean is rounded
        found = over_facts([value] * 37, span=(-1.0, 1.0))
        assert found.low < value - 0.05 and value + 0.05 < found.high
    for found in (over_facts([2.5] * 5, span=None), over_facts([2.5] * 5)):
        assert found.mean == 2.5 and math.isnan(found.low) and math.isnan(found.high) and found.n == 5
    assert over_facts([0.25, 0.75] * 5).low < 0.5


# ---------------------------------------------------------------------------------------- few facts


@pytest.mark.parametrize("values", [[], [NAN], [NAN, NAN]])
def test_nothing_scored_is_not_measured_rather_than_zero(values):
    found = over_facts(values)
    assert found.n == 0
    assert all(math.isnan(x) for x in (found.mean, found.low, found.high))
    assert str(found) == "not measured"


@pytest.mark.parametrize("values", [[0.7], [NAN, 0.7, NAN]])
def test_one_fact_has_a_mean_and_no_interval(values):
    found = over_facts(values)
    assert (found.mean, found.n) == (pytest.approx(0.7), 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert f"{found:.1f}" == "0.7 (n = 1: no interval)"


def test_facts_without_a_value_do_not_count():
    values = draw(50).tolist()
    gaps = over_facts([v for value in values for v in (value, NAN)])
    assert gaps.n == 50
    assert gaps.mean == pytest.approx(over_facts(values).mean)
    # A resample then has some 50 values and not just 50: the interval is about as wide.
    width, whole = gaps.high - gaps.low, over_facts(values)
    assert width == pytest.approx(whole.high - whole.low, rel=0.1)
    assert not math.isnan(width)


def test_two_facts_with_values_among_many_without_still_have_an_interval():
    found = over_facts([0.0, 1.0, *[NAN] * 20])
    assert (found.low, found.mean, found.high, found.n) == (0.0, 0.5, 1.0, 2)


# ---------------------------------------------------------------------------------------- jointly


def test_facts_are_resampled_together():
    first = draw(60).tolist()
    second = [-x for x in first]
    total = jointly([first, second], lambda means: means[0] + means[1])
    assert total.low == pytest.approx(0, abs=1e-12)
    assert total.high == pytest.approx(0, abs=1e-12)
    independent = jointly([first, draw(60, 1).tolist()], lambda means: means[0] + means[1])
    assert independent.high - independent.low > 0.3


def test_the_estimate_is_the_function_of_the_means_and_not_the_mean_of_the_function():
    a, b = [0.0, 1.0], [1.0, 0.5]
    found = jointly([a, b], lambda means: means[0] * means[1])
    assert found.mean == pytest.approx(0.5 * 0.75)
    assert found.mean != pytest.approx((0 * 1 + 1 * 0.5) / 2)


def test_n_counts_the_facts_that_have_every_score():
    found = jointly([[1.0, 2.0, 3.0, NAN], [1.0, NAN, 1.0, 1.0]], lambda means: means[0] + means[1])
    assert found.n == 2
    assert found.mean == pytest.approx(2 + 1)
    assert jointly([[1.0, NAN], [NAN, 1.0]], lambda means: means[0]).n == 0


# ---------------------------------------------------------------------------------------- randomness, size


def test_the_interval_hangs_on_its_seed_alone():
    values = draw(30).tolist()
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), over_facts(values)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert over_facts(values) == first
    assert over_facts(values, seed=1) != first


def test_many_facts_are_resampled_in_pieces_to_the_same_interval(monkeypatch):
    values, pieces, make = draw(300).tolist(), [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: pieces.append(a[1]) or make(*a, **k))
    whole = over_facts(values)
    monkeypatch.setattr(estimate_module, "AT_ONCE", 30_000)
    assert over_facts(values) == whole
    assert max(rows * columns for rows, columns in pieces[1:]) <= 30_000
    assert sum(rows for rows, _ in pieces[1:]) == DRAWS


def test_an_estimate_shows_its_interval_and_n():
    found = Estimate(0.5, 0.25, 0.75, 8)
    assert str(found) == "0.500 [0.250, 0.750] (n = 8)"
    assert f"{found:.1f}" == "0.5 [0.2, 0.8] (n = 8)"
    assert f"{found}" == str(found)


@pytest.mark.parametrize(("outcome", "ends"), [(1.0, (10 / (10 + 1.959964**2), 1.0)), (0.0, (0.0, 0.277533))])
def test_ten_facts_of_one_outcome_get_wilsons_interval_and_not_one_of_no_width(outcome, ends):
    found = over_facts([outcome] * 10)
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-5)
    assert jointly([[outcome] * 10], lambda means: means[0]).low == outcome  # the bootstrap alone sees no spread


def test_a_correlation_of_few_facts_or_without_spread_has_no_interval():
    few, more = torch.arange(4.0), torch.arange(8.0)
    for x, y in ((few, few), (few, few.roll(1)), (more, more)):
        found = rank_correlation(x, y)
        assert not math.isnan(found.mean) and math.isnan(found.low) and math.isnan(found.high)
        assert str(found).endswith(f"(n = {len(x)}: no interval)")
    some = rank_correlation(more, torch.tensor([0.0, 2.0, 1.0, 3.0, 5.0, 4.0, 7.0, 6.0]))
    assert some.low < some.mean < some.high


def test_a_ratio_whose_lower_part_may_be_nothing_has_no_bound_there():
    """Of ten facts, all but one of which had nothing to lose: a resample may hold none that had."""
    had, has = [0.0] * 11 + [1e-12, 2.0], [0.5] * 12 + [1.0]
    found = jointly([has, had], lambda means: means[0] / means[1])
    assert math.isinf(found.high) and not math.isnan(found.low)
    for seed in range(20):  # wherever a quantile falls between a number and infinity
        found = jointly([has, had], lambda means: means[0] / means[1], seed=seed)
        assert math.isnan(found.low) == math.isnan(found.high)
