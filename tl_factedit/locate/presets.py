"""Causal tracing as published, with its settings in one place each.

Under a paper's name stands what its code does; each argument chooses something else. What differs all the same is
listed in the documentation, "As published, and where not".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tl_factedit.backend.protocol import Component, Model, bos_policy
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact, as_facts, need_old_object
from tl_factedit.locate.calibration import embedding_std
from tl_factedit.locate.corruption import Corruption, GaussianNoise
from tl_factedit.locate.filters import answered, holds_the_object, is_the_object
from tl_factedit.locate.inputs import align_all
from tl_factedit.locate.replacement import TokenReplacement
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import Trace

SEED = 1
"""Of the noise, in the code of both papers that draw it."""
GREEDY = 36
"""Tokens in which Hase et al. look for the object."""


@plain_torch()
def meng2022(
    model: Model,
    facts: Fact | Sequence[Fact],
    component: Component = "resid",
    *,
    answer: Literal["top token", "object"] = "top token",
    unknown: Literal["skip", "trace"] = "skip",
    corruption: Corruption | None = None,
    prepend_bos: bool | None = False,
    memory: float | None = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Meng et al. 2022 (arXiv:2202.05262), as in their ``experiments/causal_trace.py``.

    Noise of three standard deviations, taken over the embeddings of all given facts' subjects, each tokenised alone
    (``s3``); ten samples of their seed; windows of ten MLPs or attentions; the probability of the one token that the
    model puts first; facts whose object isn't that token are left out; no BOS, as with GPT-2's tokenizer.

    Args:
        model: Either class.
        facts: The known facts. Where only some of them are to be traced, give `corruption` the σ of all.
        component: What is restored.
        answer: What is measured: ``"top token"`` as published, or the whole ``"object"``, teacher-forced.
        unknown: What becomes of facts that the model doesn't answer: ``"skip"`` as published, or ``"trace"``.
        corruption: None as published. ``GaussianNoise(3.0, seed=1)`` takes σ over the subjects as they stand in their
            prompts; ``GaussianNoise(3.0, seed=1, sigma=fe.locate.embedding_std(model, subjects))`` over any subjects.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        memory: As in `causal_trace`.
        folder: As in `causal_trace`.
        progress: As in `causal_trace`.

    Returns:
        The trace of the facts that are left.

    Warns:
        UserWarning: Some facts are left out.

    Raises:
        ValueError: The model answers none of the facts; or as in `causal_trace`.

    Example:
        >>> fe.locate.meng2022(model, fe.data.known_facts(path), "mlp").average()     # doctest: +SKIP
    """
    facts = _checked(facts, answer, unknown)
    corruption = corruption or _three_sigma(model, facts, prepend_bos)
    if unknown == "skip":
        facts = answered(model, facts, 1, is_the_object, prepend_bos=prepend_bos)
    return causal_trace(
        model,
        facts,
        component=component,
        window=10 if component in ("mlp", "attn") else 1,
        corruption=corruption,
        metric="top_prob" if answer == "top token" else "prob",
        prepend_bos=prepend_bos,
        memory=memory,
        folder=folder,
        progress=progress,
    )


@plain_torch()
def hase2023(
    model: Model,
    facts: Fact | Sequence[Fact],
    component: Component = "mlp",
    *,
    answer: Literal["top token", "object"] = "object",
    unknown: Literal["skip", "trace"] = "skip",
    corruption: Corruption | None = None,
    prepend_bos: bool | None = False,
    memory: float | None = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Hase et al. 2023 (arXiv:2301.04213), as in their ``experiments/tracing.py``.

    As Meng et al., but windows of five MLPs; the probability of the whole object, teacher-forced; and facts are left
    out whose object doesn't occur in the 36 tokens that the model says by greedy decoding. What they relate to editing
    is the largest share of the effect over tokens, `Trace.best_fraction`.

    Arguments, warnings and errors are those of `meng2022`. Their noise is a number for each model: 0.094 for GPT-J,
    which is three standard deviations as Meng et al. take them, 0.1 for GPT-2 XL, 0.03 for GPT-NeoX:
    ``corruption=fe.GaussianNoise(0.094, seed=1, sigma=1.0)``. None takes Meng et al.'s rule.

    Example:
        >>> fe.locate.hase2023(model, facts).best_fraction().nanmean(0)               # doctest: +SKIP
    """
    facts = _checked(facts, answer, unknown)
    corruption = corruption or _three_sigma(model, facts, prepend_bos)
    if unknown == "skip":
        facts = answered(model, facts, GREEDY, holds_the_object, prepend_bos=prepend_bos)
    return causal_trace(
        model,
        facts,
        component=component,
        window=5 if component in ("mlp", "attn") else 1,
        corruption=corruption,
        metric="top_prob" if answer == "top token" else "prob",
        prepend_bos=prepend_bos,
        memory=memory,
        folder=folder,
        progress=progress,
    )


@plain_torch()
def zhang2023(
    model: Model,
    facts: Fact | Sequence[Fact],
    component: Component = "mlp",
    *,
    window: int = 1,
    samples: int = 1,
    prepend_bos: bool | None = None,
    memory: float | None = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Zhang and Nanda 2023 (arXiv:2309.16042): symmetric token replacement, logit difference, what they recommend.

    No code of theirs is published; this is the paper's text. Effects are in logits: `Trace.fraction` divides them by
    the total effect, as their normalised ones are.

    Args:
        model: Either class.
        facts: Facts that share prompts: each one's donor is found among the others.
        component: What is restored.
        window: How many layers are restored together; they also show 3, 5 and 10.
        samples: How many donors a fact has at most; theirs have one.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        memory: As in `causal_trace`.
        folder: As in `causal_trace`.
        progress: As in `causal_trace`.

    Raises:
        ValueError: No fact has a donor; or as in `causal_trace`.

    Example:
        >>> fe.locate.zhang2023(model, facts).fraction(min_effect=0.5)                # doctest: +SKIP
    """
    return causal_trace(
        model,
        facts,
        component=component,
        window=window,
        corruption=TokenReplacement(samples=samples),
        metric="logit_diff",
        prepend_bos=prepend_bos,
        memory=memory,
        folder=folder,
        progress=progress,
    )


def _checked(facts: Fact | Sequence[Fact], answer: str, unknown: str) -> tuple[Fact, ...]:
    if answer not in ("top token", "object"):
        raise ValueError(f"answer is {answer!r}, needed 'top token' or 'object'")
    if unknown not in ("skip", "trace"):
        raise ValueError(f"unknown is {unknown!r}, needed 'skip' or 'trace'")
    facts = as_facts(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    need_old_object(facts, "a trace")
    return facts


def _three_sigma(model: Model, facts: Sequence[Fact], prepend_bos: bool | None) -> GaussianNoise:
    align_all(model, facts, prepend_bos=bos_policy(model, prepend_bos))  # before the first pass: a text may be too long
    sigma = embedding_std(model, [fact.subject for fact in facts])
    return GaussianNoise(3.0, samples=10, seed=SEED, sigma=sigma)
