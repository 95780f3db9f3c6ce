"""The classifier is discriminant analysis as written, as good as scikit-learn's, and follows Bayes' curve."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import probing
from planted import bayes_accuracy, bayes_percentile, gaussian_states

from tl_factedit.core.estimate import over_facts
from tl_factedit.probes.classifier import SHRINKAGES, TEMPERATURES, LinearClassifier, deal

K = 5


def rows(n: int = 120, dim: int = 8, *, seed: int = 0, k: int = K, signal: float = 1.5, dtype=torch.float64):
    """Correlated states of unequal scale with unequally many rows a class."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.cat(
        [torch.arange(k).repeat(2), torch.multinomial(torch.arange(1.0, k + 1), n - 2 * k, True, generator=draw)]
    )
    mix = torch.randn(dim, dim, generator=draw, dtype=dtype)
    means = torch.randn(k, dim, generator=draw, dtype=dtype)
    return (signal * means[y] + torch.randn(n, dim, generator=draw, dtype=dtype)) @ mix * 3.0 + 7.0, y


def fixed(alpha: float, temperature: float = 1.0) -> LinearClassifier:
    return LinearClassifier(shrinkages=(alpha,), temperatures=(temperature,))


# ---------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("alpha", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("dim", [8, 200])  # fewer rows than dimensions takes another way to the same
def test_scores_are_those_of_discriminant_analysis_as_written(alpha, dim):
    x, y = rows(dim=dim)
    queries = rows(20, dim, seed=1)[0]
    found = fixed(alpha, temperature=3.0).fit(x, y, K).log_probs(queries)
    mean, sd = probing.standardised(x.numpy(), y.numpy())
    want = probing.discriminants((x.numpy() - mean) / sd, y.numpy(), alpha, (queries.numpy() - mean) / sd)
    torch.testing.assert_close(found, (torch.tensor(want) / 3.0).log_softmax(-1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dim", [8, 200])
def test_it_is_scikit_learns_discriminant_analysis_on_standardised_inputs(dim):
    discriminant = pytest.importorskip("sklearn.discriminant_analysis")
    x, y = rows(dim=dim)
    queries = rows(20, dim, seed=1)[0]
    found = fixed(0.2).fit(x, y, K)
    mean, sd = probing.standardised(x.numpy(), y.numpy())
    other = discriminant.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2, priors=np.full(K, 1 / K))
    other.fit((x.numpy() - mean) / sd, y.numpy())
    want = other.predict_log_proba((queries.numpy() - mean) / sd)
    # In logs only where they are no rounding of 0.
    torch.testing.assert_close(found.log_probs(queries).exp(), torch.tensor(np.exp(want)), rtol=1e-6, atol=1e-9)
    assert found.n_train == 120


def test_shrinkage_and_temperature_are_those_of_the_least_loss_on_held_out_rows():
    x, y = rows(90, 30, signal=0.4)
    shrinkages, temperatures = (0.01, 0.2, 0.7), (1.0, 4.0)
    found = LinearClassifier(folds=3, shrinkages=shrinkages, temperatures=temperatures).fit(x, y, K)
    mean, sd = probing.standardised(x.numpy(), y.numpy())
    z, truth, fold = (x.numpy() - mean) / sd, y.numpy(), deal(y, 3).numpy()
    losses, right = {}, {}
    for alpha in shrinkages:
        held = np.zeros((len(z), K))
        for k in range(3):
            held[fold == k] = probing.discriminants(z[fold != k], truth[fold != k], alpha, z[fold == k])
        for t in temperatures:
            log_p = torch.tensor(held / t).log_softmax(-1).numpy()
            losses[alpha, t] = np.mean([-log_p[truth == k, k].mean() for k in range(K)])
            right[alpha, t] = np.mean([(held[truth == k].argmax(1) == k).mean() for k in range(K)])
    best = min(losses, key=losses.__getitem__)
    assert (found.shrinkage, found.temperature) == best
    assert found.held_out_loss == pytest.approx(losses[best], rel=1e-6)
    assert found.held_out_accuracy == pytest.approx(right[best])
    assert len(set(losses.values())) == 6  # they differ, so the choice is one


# ---------------------------------------------------------------------------------------- laws


@given(seed=st.integers(0, 50), k=st.integers(2, 5), folds=st.integers(2, 6))
def test_every_class_is_dealt_out_evenly(seed, k, folds):
    y = torch.randint(k, (60,), generator=torch.Generator().manual_seed(seed))
    fold = deal(y, folds, seed=seed)
    for j in range(k):
        count = torch.bincount(fold[y == j], minlength=folds)
        assert count.max() - count.min() <= 1


def test_rows_of_one_group_are_held_out_together():
    y = torch.arange(K).repeat_interleave(8)
    groups = torch.arange(20).repeat_interleave(2)
    fold = deal(y, 4, groups=groups)
    assert torch.equal(fold[::2], fold[1::2])
    assert not torch.equal(deal(y, 4)[::2], deal(y, 4)[1::2])


def test_rows_seen_twice_flatter_a_fit_that_does_not_know_of_their_groups():
    x, y = rows(100, 40, signal=0.0)
    twice, groups = torch.cat([x, x]), torch.arange(100).repeat(2)
    naive = LinearClassifier().fit(twice, torch.cat([y, y]), K)
    aware = LinearClassifier().fit(twice, torch.cat([y, y]), K, groups=groups)
    assert naive.held_out_accuracy > 0.5
    assert aware.held_out_accuracy < 0.35
    assert aware.held_out_loss > 0.9 * math.log(K) > naive.held_out_loss


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100), seed=st.integers(0, 5))
def test_scale_and_origin_of_features_do_not_matter(scale, shift, seed):
    x, y = rows(seed=seed)
    factors = scale ** torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)
    plain = fixed(0.3).fit(x, y, K).log_probs(x)
    moved = fixed(0.3).fit(x * factors + shift, y, K).log_probs(x * factors + shift)
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-5)


def test_frequent_classes_are_not_favoured():
    x, y = rows()
    more = torch.cat([torch.arange(len(y)), *[(y == 3).nonzero()[:, 0]] * 9])
    plain, skewed = fixed(0.3).fit(x, y, K), fixed(0.3).fit(x[more], y[more], K)
    torch.testing.assert_close(skewed.log_probs(x), plain.log_probs(x), rtol=1e-8, atol=1e-8)


def test_a_feature_that_is_constant_but_for_rounding_counts_for_nothing():
    x, y = rows(dtype=torch.float64)
    noise = 1e-7 * torch.randn(len(x), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Noise that even knows the answer: standardised without care it would be a feature like any.
    constant = 5.0 + noise + 1e-7 * y[:, None]
    alone = LinearClassifier().fit(constant, y, K)
    assert torch.equal(alone.log_probs(constant), torch.full((len(x), K), 1 / K, dtype=torch.float64).log())
    louder = LinearClassifier().fit(5.0 + 1e4 * (constant - 5.0), y, K)
    assert louder.held_out_accuracy > 0.5


def test_features_that_tell_all_and_never_vary_within_a_class_are_read():
    y = torch.arange(K).repeat(4)
    found = LinearClassifier().fit(torch.nn.functional.one_hot(y).double(), y, K)
    assert found.held_out_accuracy == 1.0
    assert found.held_out_loss < 0.01


def test_what_cannot_be_fitted_is_refused():
    x, y = rows()
    with pytest.raises(ValueError, match="class 5 has 0 training rows, needed at least 2"):
        LinearClassifier().fit(x, y, K + 1)
    with pytest.raises(ValueError, match="class 0 has 1 training groups"):
        LinearClassifier().fit(x, y, K, groups=torch.where(y == 0, 0, torch.arange(len(y))))
    with pytest.raises(ValueError, match="NaN or infinity"):
        LinearClassifier().fit(x * torch.inf, y, K)
    for wrong in ({"folds": 1}, {"shrinkages": (0.0,)}, {"shrinkages": ()}, {"temperatures": (0.0,)}):
        with pytest.raises(ValueError, match="needed"):
            LinearClassifier(**wrong)


# ---------------------------------------------------------------------------------------- calibration


def balanced(n: int, k: int) -> torch.Tensor:
    return torch.arange(k).repeat(n // k)


@pytest.mark.parametrize("signal", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
def test_accuracy_and_percentile_follow_bayes_curve(signal):
    k, dim = 8, 12
    learnt, asked = balanced(16_000, k), balanced(4_000, k)
    chooser = LinearClassifier(temperatures=(1.0, 2.0))  # which changes neither of the two readings
    probe = chooser.fit(gaussian_states(learnt, k, dim, signal, seed=1), learnt, k)
    scores = probe.log_probs(gaussian_states(asked, k, dim, signal, seed=2))
    right = over_facts((scores.argmax(-1) == asked).double().tolist())
    mine = scores.gather(-1, asked[:, None])
    percentile = over_facts(((scores < mine).double().sum(-1) / (k - 1)).tolist())
    # 95 % intervals of 14 readings: widened by half so that all hold together.
    for found, best in ((right, bayes_accuracy(signal, k)), (percentile, bayes_percentile(signal))):
        reach = 0.75 * (found.high - found.low) + 1e-3
        assert abs(found.mean - best) <= reach, (signal, found, best)


def test_bayes_curve_is_what_sampling_gives_and_no_probe_is_beyond_it():
    k, asked = 8, balanced(40_000, 8)
    for signal, seed in ((0.0, 0), (1.0, 1), (2.5, 2)):
        x = gaussian_states(asked, k, k, signal, seed=seed)
        best = (x.argmax(-1) == asked).double().mean()  # the true means are the unit vectors
        assert abs(float(best) - bayes_accuracy(signal, k)) < 4 * 0.5 / math.sqrt(len(asked))
    assert bayes_accuracy(0.0, k) == pytest.approx(1 / k, abs=1e-6)
    assert bayes_percentile(0.0) == 0.5
    # Few rows for many dimensions fall short of it.
    few = balanced(80, k)
    short = LinearClassifier().fit(gaussian_states(few, k, 60, 2.0, seed=1), few, k)
    x = gaussian_states(asked, k, 60, 2.0, seed=2)
    assert (short.log_probs(x).argmax(-1) == asked).double().mean() < bayes_accuracy(2.0, k) - 0.05


@pytest.mark.parametrize("signal", [0.0, 2.0])
def test_probabilities_are_honest_where_rows_are_few(signal):
    k, learnt, asked = 8, balanced(80, 8), balanced(4_000, 8)
    x, new = (gaussian_states(y, k, 60, signal, seed=seed) for y, seed in ((learnt, 1), (asked, 2)))

    def loss(classifier: LinearClassifier) -> float:
        log_p = classifier.fit(x, learnt, k).log_probs(new)
        return float(-log_p.gather(-1, asked[:, None]).mean())

    chosen, unshrunken = loss(LinearClassifier()), loss(fixed(SHRINKAGES[0]))
    assert chosen < math.log(k) + 0.05
    assert unshrunken > 2 * math.log(k)
    assert max(TEMPERATURES) >= 256
