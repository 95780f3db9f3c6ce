"""Corruptions of a subject, as values: what becomes of its token embeddings.

A corruption is calibrated once on all subjects to be traced, then drawn for each fact anew from its own
seed: every (layer, position) cell sees the same corruption (common random numbers), and a fact's
draw doesn't depend on which other facts are traced with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.hook_names import EMBED
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import check_one
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import Aligned


@dataclass(frozen=True, eq=False)
class Subject:
    """What a corruption sees of a fact.

    Attributes:
        fact: The fact.
        ids: The subject's token ids, [position].
        around: The token ids before and after it in the prompt.
        answer: The first tokens of ``target_true``, until more than white space is said: one of most, [token].
        embeddings: What these tokens are at ``hook_embed``, [position d_model].
        top: Asks the clean model which token it puts first after the prompt, and after each but the last of `answer`.
    """

    fact: Fact
    ids: Int[Tensor, "position"]
    around: tuple[tuple[int, ...], tuple[int, ...]]
    answer: tuple[int, ...]
    embeddings: Float[Tensor, "position d_model"]
    top: Callable[[], tuple[int, ...]]


def subject_of(runner: Runner, fact: Fact, row: Aligned) -> Subject:
    """What a corruption sees of a fact; call inside `frozen` and without gradients."""
    embeddings = runner.capture(row.ids[None], [EMBED], stop=0)[EMBED][0].float().cpu()

    answer = row.true_ids[: row.old_word]

    @functools.cache
    def top() -> tuple[int, ...]:
        asked = torch.cat([row.ids, answer[:-1]])
        at = torch.arange(len(row.ids) - 1, len(asked))
        return tuple(runner.logits(asked[None], at=at[None])[0].argmax(-1).tolist())

    start, stop = row.subject
    ids = row.ids.tolist()
    around = (tuple(ids[:start]), tuple(ids[stop:]))
    return Subject(fact, row.ids[start:stop], around, tuple(answer.tolist()), embeddings[start:stop], top)


@runtime_checkable
class Corruption(Protocol):
    """What `causal_trace` asks of a corruption."""

    def calibrated(self, subjects: Sequence[Subject]) -> Corruption:
        """The same corruption with its scale, or its choice of others' tokens, fixed on these subjects."""
        ...

    def draw(self, subject: Subject) -> Float[Tensor, "sample position d_model"]:
        """The subject's corrupted embeddings, the same whenever they are asked for; none: it can't be corrupted."""
        ...

    def contrast(self, subject: Subject) -> Int[Tensor, "sample"] | None:
        """The answer (its first token) that each corrupted run has of its own; None if it has none."""
        ...


@dataclass(frozen=True)
class GaussianNoise:
    """Independent Gaussian noise, ``scale`` times the spread of the subjects' embeddings.

    Meng et al. 2022 (arXiv:2202.05262, app. B.1): three standard deviations, taken over all
    entries of the token embeddings of all subjects. The draw is theirs too,
    ``numpy.random.RandomState(seed).randn(samples, positions, d_model)``, with their seed if it is 1.

    Attributes:
        scale: In standard deviations of the embeddings; absolute with ``sigma=1``.
        samples: How many corrupted runs are averaged.
        seed: Seed of the draw.
        sigma: The standard deviation; None to measure it on the facts that are traced.
        replace: Whether the noise stands in place of the embeddings instead of being added.
    """

    scale: float = 3.0
    samples: int = 10
    seed: int = 0
    sigma: float | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check(self)

    @plain_torch()
    def calibrated(self, subjects: Sequence[Subject]) -> GaussianNoise:
        """With `sigma` measured, unless it is given."""
        return _with_sigma(self, subjects)

    @plain_torch()
    def noise(self, n_tokens: int, d_model: int) -> Float[Tensor, "sample position d_model"]:
        """``scale · sigma · N(0, 1)``."""
        return torch.from_numpy(_random(self.seed).randn(self.samples, n_tokens, d_model)) * _reach(self)

    @plain_torch()
    def draw(self, subject: Subject) -> Float[Tensor, "sample position d_model"]:
        """The embeddings with the noise added, or the noise alone."""
        return _noised(self, subject)

    def contrast(self, subject: Subject) -> None:
        """None: noise has no answer of its own."""


@dataclass(frozen=True)
class UniformNoise:
    """Independent noise from U(−1, 1), ``scale`` times the spread of the subjects' embeddings.

    Meng et al.'s ``u3`` is ``UniformNoise(3.0, sigma=1.0)``: there uniform noise isn't scaled to the embeddings.

    Attributes:
        scale: Half the width, in standard deviations of the embeddings; absolute with ``sigma=1``.
        samples: How many corrupted runs are averaged.
        seed: Seed of the draw.
        sigma: The standard deviation; None to measure it on the facts that are traced.
        replace: Whether the noise stands in place of the embeddings instead of being added.
    """

    scale: float = 3.0
    samples: int = 10
    seed: int = 0
    sigma: float | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check(self)

    @plain_torch()
    def calibrated(self, subjects: Sequence[Subject]) -> UniformNoise:
        """With `sigma` measured, unless it is given."""
        return _with_sigma(self, subjects)

    @plain_torch()
    def noise(self, n_tokens: int, d_model: int) -> Float[Tensor, "sample position d_model"]:
        """``scale · sigma · U(−1, 1)``."""
        return torch.from_numpy(_random(self.seed).uniform(-1, 1, (self.samples, n_tokens, d_model))) * _reach(self)

    @plain_torch()
    def draw(self, subject: Subject) -> Float[Tensor, "sample position d_model"]:
        """The embeddings with the noise added, or the noise alone."""
        return _noised(self, subject)

    def contrast(self, subject: Subject) -> None:
        """None: noise has no answer of its own."""


@dataclass(frozen=True, eq=False)
class MultivariateNoise:
    """Noise with the mean and covariance of embeddings: normal, or Student's t with heavier tails.

    Attributes:
        scale: Factor of the deviations from the mean; 1 for the embeddings' own spread.
        samples: How many corrupted runs are averaged.
        seed: Seed of the draw.
        df: Degrees of freedom of the multivariate t distribution; None for the normal one.
        embeddings: What mean and covariance are taken of, [token d_model], such as ``model.W_E``; None for the
            tokens of the subjects that are traced, of which there are often fewer than dimensions: the noise then
            lies in the space that they span.
        replace: Whether the noise stands in place of the embeddings instead of being added.
    """

    scale: float = 1.0
    samples: int = 10
    seed: int = 0
    df: float | None = None
    embeddings: Float[Tensor, "token d_model"] | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check(self)
        check_settings(self, above={"df": 0})
        if self.embeddings is not None:
            _check_embeddings(self.embeddings)

    @plain_torch()
    def calibrated(self, subjects: Sequence[Subject]) -> MultivariateNoise:
        """With the subjects' `embeddings`, unless others are given."""
        if self.embeddings is not None:
            return self
        found = torch.cat([subject.embeddings for subject in subjects]).float().cpu()
        _check_embeddings(found)
        return replace(self, embeddings=found)

    @plain_torch()
    def noise(self, n_tokens: int, d_model: int) -> Float[Tensor, "sample position d_model"]:  # noqa: ARG002
        """``μ + scale · N(0, Σ)``, divided by ``√(χ²(df) / df)`` for each token if `df` is given."""
        if self.embeddings is None:
            raise ValueError("the embeddings aren't known yet: call calibrated(subjects) first, or give embeddings=")
        table, random = self.embeddings.double().cpu(), _random(self.seed)
        mean = table.mean(0)
        # gᵀ(E − μ)/√(n−1) with g ~ N(0, I) has the sample covariance of E, without ever making that matrix.
        g = torch.from_numpy(random.randn(self.samples, n_tokens, len(table)))
        deviation = g @ (table - mean) / (len(table) - 1) ** 0.5
        if self.df is not None:
            deviation = (
                deviation / torch.from_numpy(random.chisquare(self.df, (self.samples, n_tokens, 1)) / self.df).sqrt()
            )
        return (mean + self.scale * deviation).float()

    @plain_torch()
    def draw(self, subject: Subject) -> Float[Tensor, "sample position d_model"]:
        """The embeddings with the noise added, or the noise alone."""
        return _noised(self, subject)

    def contrast(self, subject: Subject) -> None:
        """None: noise has no answer of its own."""

    def __eq__(self, other: Any) -> bool:
        """Equal when all numbers are."""
        return isinstance(other, MultivariateNoise) and _same(self, other)

    def __hash__(self) -> int:
        """A hash of what isn't a tensor."""
        return hash((self.scale, self.samples, self.seed, self.df, self.replace))


@dataclass(frozen=True, eq=False)
class GivenNoise:
    """Noise given as numbers, for exact replication of another run.

    Attributes:
        noise: [sample position d_model], added to the subject's tokens in order.
    """

    noise: Float[Tensor, "sample position d_model"]

    def __post_init__(self) -> None:
        """Check its shape."""
        if not isinstance(self.noise, Tensor) or self.noise.ndim != 3 or not len(self.noise):
            raise ValueError(
                f"noise is {tuple(getattr(self.noise, 'shape', ())) or self.noise!r}, needed a tensor "
                "[sample position d_model] with a sample at least"
            )

    @plain_torch()
    def calibrated(self, subjects: Sequence[Subject]) -> GivenNoise:
        """Itself: it has its scale already.

        Raises:
            ValueError: It is for another number of tokens or another width.
        """
        for subject in subjects:
            self._fit(subject)
        return self

    @plain_torch()
    def draw(self, subject: Subject) -> Float[Tensor, "sample position d_model"]:
        """The embeddings with the given noise added."""
        self._fit(subject)
        return subject.embeddings.float().cpu() + self.noise.float().cpu()

    def contrast(self, subject: Subject) -> None:
        """None: noise has no answer of its own."""

    def _fit(self, subject: Subject) -> None:
        n_tokens, d_model = subject.embeddings.shape
        if tuple(self.noise.shape[1:]) != (n_tokens, d_model):
            raise ValueError(
                f"the given noise is {tuple(self.noise.shape)}, needed [sample, {n_tokens}, {d_model}]: "
                f"the subject {subject.fact.subject!r} has {n_tokens} tokens"
            )

    def __eq__(self, other: Any) -> bool:
        """Equal when the numbers are."""
        return isinstance(other, GivenNoise) and _same(self, other)

    def __hash__(self) -> int:
        """A hash of the shape."""
        return hash(tuple(self.noise.shape))


# ------------------------------------------------------------------------------------ what they share


def corruption_of(given: Corruption | None) -> Corruption:
    """The corruption that is asked for, or the default one.

    Raises:
        ValueError: It is none.
    """
    if given is None:
        return GaussianNoise()
    check_one(given, Corruption, "corruption", "one such as fe.GaussianNoise()")
    return given


def _check(noise: Any) -> None:
    check_settings(noise, least={"samples": 1, "seed": 0, "sigma": 0})
    if not 0 <= noise.scale < math.inf:  # also refuses NaN
        raise ValueError(f"scale is {noise.scale}, needed 0 or more (in standard deviations of the embeddings)")


def _check_embeddings(embeddings: Tensor) -> None:
    if len(embeddings) < 2:
        raise ValueError(
            f"embeddings holds {len(embeddings)} token, needed two or more to measure a covariance: trace more facts, "
            "or give embeddings=model.W_E"
        )


def _random(seed: int) -> np.random.RandomState:
    # The legacy generator, whose numbers never change, and which the published code draws from.
    return np.random.RandomState(seed)


def _reach(noise: GaussianNoise | UniformNoise) -> float:
    if noise.sigma is None:
        raise ValueError("sigma isn't known yet: call calibrated(subjects) first, or give sigma=")
    return noise.scale * noise.sigma


def _with_sigma(noise: Any, subjects: Sequence[Subject]) -> Any:
    if noise.sigma is not None:
        return noise
    return replace(noise, sigma=float(torch.cat([subject.embeddings for subject in subjects]).float().std()))


def _noised(noise: Any, subject: Subject) -> Tensor:
    drawn = noise.noise(*subject.embeddings.shape).float()
    return drawn if noise.replace else subject.embeddings.float().cpu() + drawn


def _same(one: Any, other: Any) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__]
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs
    )
