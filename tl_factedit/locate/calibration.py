"""Noise calibrated by the damage that it does, so that models can be compared.

Three standard deviations of the embeddings take nearly all of a fact from one model and little from another, whose
embeddings are small beside its positions or its norms. What compares is noise that takes the same share of
the probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tl_factedit.backend.hook_names import EMBED
from tl_factedit.backend.memory import budget
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.kinds import as_finite, short
from tl_factedit.core.tokens import encode
from tl_factedit.locate.corruption import GaussianNoise, MultivariateNoise, UniformNoise
from tl_factedit.locate.inputs import TraceInputs, align_all, ask
from tl_factedit.locate.metrics import prob

Noise = GaussianNoise | UniformNoise | MultivariateNoise
MOST_SCALE = 1000
"""Larger noise isn't tried."""


@plain_torch()
def calibrate_noise(
    model: Model,
    facts: Fact | Sequence[Fact],
    lost: float = 0.8,
    *,
    noise: Noise | None = None,
    tolerance: float = 0.01,
    prepend_bos: bool | None = None,
    memory: float | None = 2.0,
) -> Noise:
    """The noise whose scale takes a given share of the clean probability, on average over facts.

    Args:
        model: Either class.
        facts: The facts it is to be used on.
        lost: The share wanted, mean total effect / mean clean probability.
        noise: What to scale; default `GaussianNoise`.
        tolerance: How far the share may be off.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        memory: What activations may take, in GiB (None for a share of what is free).

    Returns:
        The same noise with another scale, calibrated on these facts.

    Raises:
        ValueError: The share can't be reached by any scale; the message says what can.
    """
    facts = as_facts(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    share_needed = "a share between 0 and 1"
    if not 0 < as_finite(lost, "lost", share_needed) < 1:
        raise ValueError(f"lost is {lost}, needed {share_needed}")
    if not as_finite(tolerance, "tolerance", "a finite number above 0") > 0:
        raise ValueError(f"tolerance is {tolerance}, needed a finite number above 0")
    if noise is not None and not isinstance(noise, Noise):
        raise ValueError(f"noise is {short(noise)}, a {type(noise).__name__}: needed one such as fe.GaussianNoise()")
    room = budget(model, memory)
    rows = align_all(model, facts, prepend_bos=bos_policy(model, prepend_bos))
    with frozen(model), torch.no_grad():
        noise = noise or GaussianNoise()
        start = ask(model, facts, rows, noise)
        fixed = noise.calibrated(start.subjects)

        def share(scale: float) -> float:
            return _share(_scaled(start, dataclasses.replace(fixed, scale=scale)), room)

        low, high = 0.0, 1.0
        if (least := share(low)) > lost + tolerance:
            raise ValueError(
                f"noise of scale 0 takes {least:.0%} of the probability already, needed {lost:.0%}: ask for more, or "
                "take noise that is added and has no mean of its own"
            )
        while not (found := share(high)) >= lost:
            low, high = high, 2 * high
            if high > MOST_SCALE:
                raise ValueError(
                    f"noise of {high / 2:g} standard deviations takes {found:.0%} of the probability, needed "
                    f"{lost:.0%}: ask for less, or take other facts (the model may not read these from their subjects)"
                )
        scale = high
        while abs(found - lost) > tolerance and high - low > 1e-4 * high:
            scale = (low + high) / 2
            found = share(scale)
            low, high = (scale, high) if found < lost else (low, scale)
        return dataclasses.replace(fixed, scale=scale)


@plain_torch()
def embedding_std(model: Model, subjects: Sequence[str]) -> float:
    """The standard deviation over all entries of the token embeddings of some subjects, each tokenised alone.

    The σ of Meng et al.'s code (``collect_embedding_std``), which takes it over the subjects of all known facts and
    adds noise of three of them. A subject alone may have other tokens than in its prompt: no space comes before it.

    Args:
        model: Either class.
        subjects: Texts.

    Returns:
        σ, in the units of ``hook_embed``.

    Raises:
        ValueError: No subjects, or something else than texts.

    Example:
        >>> sigma = fe.locate.embedding_std(model, [fact.subject for fact in facts])             # doctest: +SKIP
        >>> fe.causal_trace(model, facts[0], corruption=fe.GaussianNoise(3.0, sigma=sigma))      # doctest: +SKIP
    """
    if isinstance(subjects, str) or not subjects or not all(isinstance(each, str) for each in subjects):
        raise ValueError(f"subjects is {subjects!r}, needed a list of texts: [fact.subject for fact in facts]")
    bos_policy(model)  # it has a tokenizer
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        rows = [encode(model.tokenizer, subject, prepend_bos=False)[0] for subject in subjects]
        found = [runner.capture(row[None], [EMBED], stop=0)[EMBED][0].float().cpu() for row in rows]
    return float(torch.cat(found).std())


def _scaled(questions: TraceInputs, noise: Noise) -> TraceInputs:
    each = tuple(
        dataclasses.replace(question, corrupted=noise.draw(subject))
        for question, subject in zip(questions.each, questions.subjects, strict=True)
    )
    return dataclasses.replace(questions, corruption=noise, each=each)


def _share(questions: TraceInputs, memory: float) -> float:
    clean, corrupted = [], []
    for attempt in questions.chunks((), (), memory=memory):
        with attempt as chunk:
            patching = questions.patching(chunk, (), (), prob, "denoise", memory=memory * attempt.share)
            clean += [scores.mean() for scores in patching.clean]
            corrupted += [scores.mean() for scores in patching.corrupted]
    return 1 - float(torch.stack(corrupted).mean() / torch.stack(clean).mean())
