"""What is measured of a run in causal tracing: how strongly it holds the clean answer.

A metric sees the logits that follow a fact's prompt and says one number for each run; larger means nearer to the
clean run. Zhang and Nanda 2023 (arXiv:2309.16042) compare the first three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.core.facts import Fact
from tl_factedit.locate.metric_identity import identity_of


@dataclass(frozen=True, eq=False)
class MetricInput:
    """What a metric may look at besides a run's logits.

    Attributes:
        fact: The fact.
        target: Token ids of ``target_true``, [target].
        clean: Logits of the clean run, [target vocab].
        contrast: First token of the answer to set against the clean one, [sample], or one for all: that of
            the corrupted run if it has one, or else of ``target_new``; None without either.
    """

    fact: Fact
    target: Int[Tensor, "target"]
    clean: Float[Tensor, "target vocab"]
    contrast: Int[Tensor, "_"] | None


Metric: TypeAlias = Callable[[Float[Tensor, "row sample target vocab"], MetricInput], Float[Tensor, "row sample"]]
"""From logits at the end of the prompt and at all but the last token of the target."""


def logprob(logits: Float[Tensor, "row sample target vocab"], asked: MetricInput) -> Float[Tensor, "row sample"]:
    """Log-probability of the whole target, teacher-forced, in nats."""
    logits = logits.float()
    index = asked.target.to(logits.device).expand(*logits.shape[:2], -1)[..., None]
    return (logits.gather(-1, index)[..., 0] - logits.logsumexp(-1)).sum(-1)


def prob(logits: Float[Tensor, "row sample target vocab"], asked: MetricInput) -> Float[Tensor, "row sample"]:
    """Probability of the whole target, teacher-forced."""
    return logprob(logits, asked).exp()


def top_prob(logits: Float[Tensor, "row sample target vocab"], asked: MetricInput) -> Float[Tensor, "row sample"]:
    """Probability of the token that the clean run puts first, whatever ``target_true`` is (Meng et al.'s code)."""
    top = int(asked.clean[0].argmax())
    return logits[:, :, 0].float().softmax(-1)[..., top]


def logit_diff(logits: Float[Tensor, "row sample target vocab"], asked: MetricInput) -> Float[Tensor, "row sample"]:
    """Logit of the target's first token minus that of the contrasting answer's (Zhang and Nanda 2023, eq. 2)."""
    if asked.contrast is None:
        raise ValueError(
            f"metric 'logit_diff' has nothing to set against {asked.fact.target_true!r}, needed target_new, or a "
            "corruption with an answer of its own (TokenReplacement)"
        )
    first = logits[:, :, 0].float()
    other = asked.contrast.to(first.device).expand(first.shape[:2])[..., None]
    return first[..., int(asked.target[0])] - first.gather(-1, other)[..., 0]


def kl(logits: Float[Tensor, "row sample target vocab"], asked: MetricInput) -> Float[Tensor, "row sample"]:
    """Minus KL(clean || run) at the end of the prompt, in nats: 0 for the clean run, less for others."""
    clean = asked.clean[0].float().log_softmax(-1).to(logits.device)
    run = logits[:, :, 0].float().log_softmax(-1)
    return -(clean.exp() * (clean - run)).sum(-1)


NAMED: dict[str, Metric] = {"prob": prob, "top_prob": top_prob, "logprob": logprob, "logit_diff": logit_diff, "kl": kl}
"""The metrics that `causal_trace` takes by name."""


def metric_of(metric: str | Metric) -> tuple[str, Metric]:
    """A metric and its name.

    Raises:
        ValueError: No metric has this name.
    """
    if callable(metric):
        name = str(getattr(metric, "__name__", repr(metric)))
        return name, metric if metric in NAMED.values() else _checked(name, metric)
    if metric not in NAMED:
        raise ValueError(f"metric {metric!r} is unknown, needed one of {sorted(NAMED)}, or a function")
    return metric, NAMED[metric]


def identity(metric: str | Metric) -> str:
    """What a file can tell a metric by: its name, and of a function of one's own its code and what that refers to.

    Raises:
        ValueError: It is callable and no plain function, or refers to something, so that two can't be told apart.
    """
    if not callable(metric) or metric in NAMED.values():
        return metric_of(metric)[0]
    if not isinstance(metric, FunctionType):
        raise ValueError(
            f"metric {metric!r} is a {type(metric).__name__}, of which a file can't tell one from another: needed a "
            "plain function (def), or no folder"
        )
    return identity_of(metric, "the metric")


def _checked(name: str, metric: Metric) -> Metric:
    def checked(logits: Float[Tensor, "row sample target vocab"], asked: MetricInput) -> Float[Tensor, "row sample"]:
        found: object = metric(logits, asked)
        if not isinstance(found, Tensor) or found.is_complex():
            what = f"a {type(found).__name__}" if not isinstance(found, Tensor) else f"{found.dtype} numbers"
            raise ValueError(f"metric {name!r} returned {what}, needed a tensor of one real number for each run")
        found = found.contiguous() if found.is_floating_point() else found.float()
        if found.shape != logits.shape[:2]:
            raise ValueError(
                f"metric {name!r} returned {tuple(found.shape)} of logits {tuple(logits.shape)}, needed "
                f"{tuple(logits.shape[:2])}: one number for each run"
            )
        return found

    return checked


def stacked(logits: Float[Tensor, "row vocab"], samples: int, target: int) -> Float[Tensor, "cell sample target vocab"]:
    """Rows in the order (cell, sample, target) as what a metric takes."""
    return torch.unflatten(logits, 0, (-1, samples, target))
