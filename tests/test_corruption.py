"""A corruption is a value: its scale is measured once, and its noise hangs on its own seed alone."""

import dataclasses
import math

import pytest
import tiny
import torch

from tl_factedit.corruption import Corruption, GaussianNoise, GivenNoise
from tl_factedit.facts import Fact
from tl_factedit.trace import causal_trace


def rows(n: int = 50, width: int = 40, spread: float = 0.7, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- Gaussian


def test_sigma_is_the_standard_deviation_over_all_entries_not_of_each_token():
    embeddings = rows() + 10 * torch.arange(50)[:, None]  # tokens differ far more than a token's entries
    noise = GaussianNoise().calibrated(embeddings)
    assert noise.sigma == pytest.approx(float(embeddings.flatten().std()))
    assert noise.sigma > 10 * float(embeddings.std(-1).mean())


def test_a_sigma_that_is_given_stays_and_the_first_value_is_not_changed():
    assert GaussianNoise(sigma=0.1).calibrated(rows()).sigma == 0.1
    plain = GaussianNoise()
    assert plain.calibrated(rows()) == dataclasses.replace(plain, sigma=float(rows().std()))
    assert plain.sigma is None


def test_half_precision_embeddings_are_measured_in_float32():
    assert GaussianNoise().calibrated(rows().half()).sigma == pytest.approx(float(rows().std()), rel=1e-3)


@pytest.mark.parametrize(("scale", "sigma"), [(3.0, 0.1), (1.0, 2.0), (0.5, 0.03)])
def test_noise_has_mean_zero_and_scale_times_sigma_spread(scale, sigma):
    noise = GaussianNoise(scale, samples=40, sigma=sigma).draw(10, 100)
    assert noise.shape == (40, 10, 100)
    # 40,000 numbers: their mean errs by sd/200 and their sd by sd/283; four times that is never met by chance.
    assert abs(noise.mean()) < 4 * scale * sigma / 200
    assert noise.std() == pytest.approx(scale * sigma, rel=4 / 283)


def test_noise_is_the_same_whenever_it_is_drawn_and_another_with_another_seed():
    noise = GaussianNoise(sigma=1.0)
    torch.manual_seed(0)
    first, state = noise.draw(3, 8), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(noise.draw(3, 8), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state), "the draw took from the global generator"
    assert not torch.allclose(dataclasses.replace(noise, seed=1).draw(3, 8), first)
    assert not torch.allclose(first[0], first[1]), "samples are to differ"
    assert not torch.allclose(first[:, 0], first[:, 1]), "tokens are to differ"


def test_noise_of_twice_the_scale_is_twice_the_noise():
    one, two = (GaussianNoise(scale, sigma=0.5).draw(2, 8) for scale in (1.5, 3.0))
    torch.testing.assert_close(2 * one, two)
    assert not GaussianNoise(0.0, sigma=0.5).draw(2, 8).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0, needed at least 1"),
        ({"samples": -1}, "samples is -1"),
        ({"scale": -1.0}, "scale is -1.0, needed 0 or more"),
        ({"scale": math.nan}, "scale is nan, needed 0 or more"),
        ({"sigma": -0.1}, "sigma is -0.1, needed 0 or more"),
    ],
)
def test_numbers_that_make_no_noise_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianNoise(**options)


def test_a_draw_before_the_scale_is_known_says_what_to_do():
    with pytest.raises(ValueError, match=r"sigma isn't known yet: call calibrated\(embeddings\) first, or give sigma="):
        GaussianNoise().draw(2, 8)


# ---------------------------------------------------------------------------------------- given


def test_given_noise_is_what_was_given_and_has_no_scale_to_measure():
    numbers = rows(6).reshape(3, 2, 40).double()
    noise = GivenNoise(numbers)
    assert noise.calibrated(rows()) is noise
    assert torch.equal(noise.draw(2, 40), numbers.float())


@pytest.mark.parametrize(("tokens", "width"), [(1, 40), (3, 40), (2, 41)])
def test_given_noise_for_another_subject_or_width_is_refused(tokens, width):
    with pytest.raises(ValueError, match=rf"the given noise is \(3, 2, 40\), needed \[sample, {tokens}, {width}\]"):
        GivenNoise(rows(6).reshape(3, 2, 40)).draw(tokens, width)


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

    def calibrated(self, embeddings):
        return self

    def draw(self, n_tokens, d_model):
        return torch.full((1, n_tokens, d_model), self.value)


@pytest.mark.parametrize("corruption", [GaussianNoise(), GivenNoise(torch.zeros(1, 1, 1)), Constant(1.0)])
def test_every_corruption_follows_the_protocol(corruption):
    assert isinstance(corruption, Corruption)
    assert not isinstance(object(), Corruption)


def test_a_corruption_of_ones_own_is_traced_with(kind):
    model, fact = tiny.model(kind, "gpt2"), Fact("Rome", "The {} is", " Paris")
    mine = causal_trace(model, fact, corruption=Constant(0.5))
    given = causal_trace(model, fact, corruption=GivenNoise(torch.full((1, 1, 32), 0.5)))
    assert torch.equal(mine.effect, given.effect)
    assert not torch.equal(mine.effect, causal_trace(model, fact, corruption=Constant(0.7)).effect)
    assert mine.corruption == Constant(0.5)
