"""A corruption is a value: its scale is measured once, and its noise depends on its own seed alone."""

import dataclasses
import math

import pytest
import tiny
import torch

from tl_factedit.core.facts import Fact
from tl_factedit.locate.corruption import (
    Corruption,
    GaussianNoise,
    GivenNoise,
    MultivariateNoise,
    Subject,
    UniformNoise,
)
from tl_factedit.locate.trace import causal_trace


def rows(n: int = 50, width: int = 40, spread: float = 0.7, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def subject(embeddings: torch.Tensor) -> Subject:
    fact = Fact("Rome", "The {} is", " Paris")
    return Subject(fact, torch.arange(len(embeddings)), ((), ()), (0,), embeddings, lambda: (0,))


def calibrated(noise, embeddings: torch.Tensor):
    """On two subjects, whose tokens together are these."""
    return noise.calibrated([subject(embeddings[:20]), subject(embeddings[20:])])


# ---------------------------------------------------------------------------------------- Gaussian


def test_sigma_is_the_standard_deviation_over_all_entries_not_of_each_token():
    embeddings = rows() + 10 * torch.arange(50)[:, None]  # tokens differ far more than a token's entries
    noise = calibrated(GaussianNoise(), embeddings)
    assert noise.sigma == pytest.approx(float(embeddings.flatten().std()))
    assert noise.sigma > 10 * float(embeddings.std(-1).mean())


def test_a_sigma_that_is_given_stays_and_the_first_value_is_not_changed():
    assert calibrated(GaussianNoise(sigma=0.1), rows()).sigma == 0.1
    plain = GaussianNoise()
    assert calibrated(plain, rows()) == dataclasses.replace(plain, sigma=float(rows().std()))
    assert plain.sigma is None


def test_half_precision_embeddings_are_measured_in_float32():
    assert calibrated(GaussianNoise(), rows().half()).sigma == pytest.approx(float(rows().std()), rel=1e-3)


@pytest.mark.parametrize(("scale", "sigma"), [(3.0, 0.1), (1.0, 2.0), (0.5, 0.03)])
def test_noise_has_mean_zero_and_scale_times_sigma_spread(scale, sigma):
    noise = GaussianNoise(scale, samples=40, sigma=sigma).noise(10, 100)
    assert noise.shape == (40, 10, 100)
    # 40,000 numbers: their mean errs by sd/200 and their sd by sd/283; four times that is never met by chance.
    assert abs(noise.mean()) < 4 * scale * sigma / 200
    assert noise.std() == pytest.approx(scale * sigma, rel=4 / 283)


def test_noise_is_the_same_whenever_it_is_drawn_and_another_with_another_seed():
    noise = GaussianNoise(sigma=1.0)
    torch.manual_seed(0)
    first, state = noise.noise(3, 8), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(noise.noise(3, 8), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state), "the draw took from the global generator"
    assert not torch.allclose(dataclasses.replace(noise, seed=1).noise(3, 8), first)
    assert not torch.allclose(first[0], first[1]), "samples are to differ"
    assert not torch.allclose(first[:, 0], first[:, 1]), "tokens are to differ"


def test_noise_of_twice_the_scale_is_twice_the_noise():
    one, two = (GaussianNoise(scale, sigma=0.5).noise(2, 8) for scale in (1.5, 3.0))
    torch.testing.assert_close(2 * one, two)
    assert not GaussianNoise(0.0, sigma=0.5).noise(2, 8).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0, needed at least 1"),
        ({"samples": -1}, "samples is -1"),
        ({"scale": -1.0}, "scale is -1.0, needed 0 or more"),
        ({"scale": math.nan}, "scale is nan, needed a number"),
        ({"sigma": -0.1}, "sigma is -0.1, needed 0 or more"),
    ],
)
def test_numbers_that_make_no_noise_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianNoise(**options)


def test_a_draw_before_the_scale_is_known_says_what_to_do():
    with pytest.raises(ValueError, match=r"sigma isn't known yet: call calibrated\(subjects\) first, or give sigma="):
        GaussianNoise().noise(2, 8)


# ---------------------------------------------------------------------------------------- given


def test_given_noise_is_added_as_it_was_given_and_has_no_scale_to_measure():
    numbers, mine = rows(6).reshape(3, 2, 40).double(), subject(rows(2, seed=1))
    noise = GivenNoise(numbers)
    assert noise.calibrated([mine]) is noise
    torch.testing.assert_close(noise.draw(mine), mine.embeddings + numbers.float())


@pytest.mark.parametrize(("tokens", "width"), [(1, 40), (3, 40), (2, 41)])
def test_given_noise_for_another_subject_or_width_is_refused(tokens, width):
    noise, other = GivenNoise(rows(6).reshape(3, 2, 40)), subject(rows(tokens, width))
    for use in (noise.draw, lambda mine: noise.calibrated([mine])):
        with pytest.raises(ValueError, match=rf"the given noise is \(3, 2, 40\), needed \[sample, {tokens}, {width}\]"):
            use(other)


def test_given_noise_is_equal_when_its_numbers_are():
    numbers = rows(6).reshape(3, 2, 40)
    assert GivenNoise(numbers) == GivenNoise(numbers.clone())
    assert hash(GivenNoise(numbers)) == hash(GivenNoise(numbers.clone()))
    assert GivenNoise(numbers) != GivenNoise(numbers + 1)
    assert GivenNoise(numbers) != GivenNoise(numbers[:2])
    assert GivenNoise(numbers) != GaussianNoise()


# ---------------------------------------------------------------------------------------- one's own


@dataclasses.dataclass(frozen=True)
class Constant:
    """The simplest corruption one could write."""

    value: float

    def calibrated(self, subjects):
        return self

    def draw(self, subject):
        return subject.embeddings[None] + self.value

    def contrast(self, subject):
        return None


@pytest.mark.parametrize(
    "corruption",
    [GaussianNoise(), UniformNoise(), MultivariateNoise(), GivenNoise(torch.zeros(1, 1, 1)), Constant(1.0)],
    ids=lambda each: type(each).__name__,
)
def test_every_corruption_follows_the_protocol(corruption):
    assert isinstance(corruption, Corruption)
    assert not isinstance(object(), Corruption)
    assert corruption.contrast(subject(rows(1))) is None


def test_a_corruption_of_ones_own_is_traced_with(kind):
    model, fact = tiny.model(kind, "gpt2"), Fact("Rome", "The {} is", " Paris")
    mine = causal_trace(model, fact, corruption=Constant(0.5))
    given = causal_trace(model, fact, corruption=GivenNoise(torch.full((1, 1, 32), 0.5)))
    assert torch.equal(mine.effect, given.effect)
    assert not torch.equal(mine.effect, causal_trace(model, fact, corruption=Constant(0.7)).effect)
    assert mine.corruption == Constant(0.5)


# ---------------------------------------------------------------------------------------- the published draw, others


def test_the_draw_is_that_of_the_published_code():
    numpy = pytest.importorskip("numpy")
    want = numpy.random.RandomState(1).randn(10, 3, 40) * (3 * 0.2)
    torch.testing.assert_close(GaussianNoise(sigma=0.2, seed=1).noise(3, 40), torch.from_numpy(want))
    assert not torch.allclose(GaussianNoise(sigma=0.2, seed=0).noise(3, 40), torch.from_numpy(want))


def test_noise_is_added_or_stands_in_place():
    noise, mine = GaussianNoise(sigma=0.2), subject(rows(3))
    drawn = noise.noise(3, 40).float()
    torch.testing.assert_close(noise.draw(mine), mine.embeddings + drawn)
    torch.testing.assert_close(dataclasses.replace(noise, replace=True).draw(mine), drawn)


def test_uniform_noise_fills_its_range_evenly():
    noise = calibrated(UniformNoise(2.0, samples=40), rows()).noise(10, 40)
    reach = 2 * float(rows().std())
    assert noise.abs().max() <= reach
    assert noise.abs().max() > 0.99 * reach
    assert noise.std() == pytest.approx(reach / math.sqrt(3), rel=0.03)


def test_multivariate_noise_has_the_mean_and_covariance_of_its_embeddings():
    table = rows(30, 6) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) + torch.arange(6)
    drawn = MultivariateNoise(samples=4000, embeddings=table).noise(5, 6).flatten(0, 1)
    scale = float(table.T.cov().abs().max())
    # 20,000 draws: means err by sd/141, entries of the covariance by about 1 % of the largest.
    torch.testing.assert_close(drawn.mean(0), table.mean(0), rtol=0, atol=4 * math.sqrt(scale) / 141)
    torch.testing.assert_close(drawn.T.cov(), table.T.cov(), rtol=0, atol=0.05 * scale)
    heavy = MultivariateNoise(samples=4000, embeddings=table, df=3.0).noise(5, 6).flatten(0, 1)
    kurtosis = [((x - x.mean()) ** 4).mean() / x.var() ** 2 for x in (drawn[:, 0], heavy[:, 0])]
    assert kurtosis[0] == pytest.approx(3.0, abs=0.3)
    assert kurtosis[1] > 4.5


def test_multivariate_noise_takes_the_subjects_own_embeddings_and_needs_two():
    noise = calibrated(MultivariateNoise(), rows())
    assert torch.equal(noise.embeddings, rows())
    assert calibrated(noise, rows(seed=1)) is noise
    with pytest.raises(ValueError, match="embeddings holds 1 token, needed two or more"):
        MultivariateNoise().calibrated([subject(rows(1))])
    with pytest.raises(ValueError, match="the embeddings aren't known yet"):
        MultivariateNoise().noise(1, 40)
    with pytest.raises(ValueError, match="df is 0"):
        MultivariateNoise(df=0.0)
    assert noise == calibrated(MultivariateNoise(), rows())
    assert noise != calibrated(MultivariateNoise(), rows(seed=1))
    assert hash(noise) == hash(MultivariateNoise())
