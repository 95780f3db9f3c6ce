"""What a causal trace measured, in words and colours, for its pictures."""

from __future__ import annotations

from tl_factedit.locate.corruption import GaussianNoise, GivenNoise
from tl_factedit.locate.trace_result import LEAST_SHARE, Trace
from tl_factedit.show.markup import number

HOW = "trace = fe.causal_trace(model, facts), and then fe.show.trace(trace)"
"""How to get what pictures of traces show."""

HUES = {"resid": "purple", "resid_pre": "purple", "resid_mid": "purple", "mlp": "green", "attn": "red"}
"""The hue of each component, as in Meng et al. 2022."""

COMPONENTS = {
    "resid": "residual stream",
    "resid_pre": "residual stream before the block",
    "resid_mid": "residual stream between attention and MLP",
    "mlp": "MLP output",
    "attn": "attention output",
}
"""Each component in words."""

UNITS = {"prob": "probability", "top_prob": "probability", "logprob": "nats", "logit_diff": "logits", "kl": "nats"}
"""The unit of each metric."""

VERBS = {"denoise": ("restored", "restored − corrupted"), "noise": ("corrupted", "clean − corrupted there")}
"""What is done to a cell in each direction, and which difference is shown."""


def at_last_subject_token(effect: float, layer: int, total: float, *, best: bool) -> str:
    """What the last subject token carries, as the end of a sentence.

    Args:
        effect: Its largest effect.
        layer: The layer of that.
        total: The total effect, with which it is compared.
        best: Whether it is the largest effect that the picture marks.
    """
    if best:
        return "that is the last subject token. "
    found = f"{number(effect)}, in layer {layer}"
    if not (effect > 0 and effect >= LEAST_SHARE * abs(total)):
        return f"the last subject token carries next to nothing (at most {found}) and can't say where to edit. "
    return f"the last subject token's largest is {found}. "


def quantity_of(trace: Trace, fact: int) -> str:
    """What is measured, of one fact."""
    names = {
        "prob": "probability of {}",
        "top_prob": "probability of the token that comes first in the clean run, where {} is asked for",
        "logprob": "log-probability (nats) of {}",
        "logit_diff": "logit of {} minus that of the other answer",
        "kl": "minus KL divergence from the clean run (nats), in which {} is asked for",
    }
    return names.get(trace.metric, trace.metric + " of {}").format(repr(trace.facts[fact].target_true))


def window_of(trace: Trace) -> str:
    """The window in words; nothing for single layers."""
    return "" if trace.window == 1 else f" in a window of {trace.window} layers"


def severed_of(trace: Trace) -> str:
    """What was severed, as a sentence; nothing if nothing was."""
    return f" The {COMPONENTS[trace.severed]}s above stay as in the corrupted run." if trace.severed else ""


def corruption_of(trace: Trace, fact: int, samples: int) -> str:
    """How a fact's subject was corrupted, as a sentence."""
    noise = trace.corruption
    if trace.donors[fact]:
        return f"The subject's tokens are replaced by those of {', '.join(trace.donors[fact])}."
    mean = f"Mean over {samples} noise samples" if samples > 1 else "One noise sample"
    if isinstance(noise, GaussianNoise):
        sigma = "" if noise.sigma is None else f", σ = {noise.sigma:.4g}"
        return f"{mean}: Gaussian, {noise.scale:g} × the embeddings' spread{sigma} (seed {noise.seed})."
    return f"{mean}, {'given as numbers' if isinstance(noise, GivenNoise) else type(noise).__name__}."
