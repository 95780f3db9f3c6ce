"""Noise calibrated by the damage that it does, so that models can be compared.

Three standard deviations of the embeddings take nearly all of a fact from one model and little from another, whose
embeddings are small beside its positions or its norms. What compares is noise that takes the same share of
the probability.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tl_factedit.backend.memory import check_memory
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import bos_policy
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
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
    memory: float = 2.0,
) -> Noise:
    """The noise whose scale takes a given share of the clean probability, on average over facts.

    Args:
        model: Either class.
        facts: The facts it is to be used on.
        lost: The share wanted, mean total effect / mean clean probability.
        noise: What to scale; default `GaussianNoise`.
        tolerance: How far the share may be off.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        memory: What activations may take, in GiB.

    Returns:
        The same noise with another scale, calibrated on these facts.

    Raises:
        ValueError: The share can't be reached by any scale; the message says what can.
    """
    facts = as_facts(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    if not 0 < lost < 1:
        raise ValueError(f"lost is {lost}, needed a share between 0 and 1")
    check_memory(memory)
    rows = align_all(model, facts, prepend_bos=bos_policy(model, prepend_bos))
    with frozen(model), torch.no_grad():
        noise = noise or GaussianNoise()
        start = ask(model, facts, rows, noise)
        fixed = noise.calibrated(start.subjects)

        def share(scale: float) -> float:
            return _share(_scaled(start, dataclasses.replace(fixed, scale=scale)), memory)

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


def _scaled(questions: TraceInputs, noise: Noise) -> TraceInputs:
    each = tuple(
        dataclasses.replace(question, corrupted=noise.draw(subject))
        for question, subject in zip(questions.each, questions.subjects, strict=True)
    )
    return dataclasses.replace(questions, corruption=noise, each=each)


def _share(questions: TraceInputs, memory: float) -> float:
    clean, corrupted = [], []
    for _, patching in questions.chunks((), (), prob, "denoise", memory=memory):
        clean += [scores.mean() for scores in patching.clean]
        corrupted += [scores.mean() for scores in patching.corrupted]
    return 1 - float(torch.stack(corrupted).mean() / torch.stack(clean).mean())
