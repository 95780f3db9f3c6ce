"""How a value is optimised, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tl_factedit.core.kinds import check_one
from tl_factedit.core.settings import check_settings
from tl_factedit.editing.value_methods import AdamSteps, ValueMethod

Where = Literal["mlp", "resid", "modules"]
"""Where δ is added: to what ``W_out`` answers, to the stream after the block, or (PMET) one δ to what the attention and
one to what ``W_out`` hands on."""


@dataclass(frozen=True)
class ValueFit:
    """How a value is optimised; the defaults are those of Meng et al.'s code.

    Attributes:
        steps: Evaluations of the loss; one fewer updates (the last one is only read).
        lr: Adam's step size; says nothing to `LineSearch`.
        kl_weight: a, the weight of what the subject is said to be staying as it was.
        decay: b, the weight of ‖δ‖ / ‖v‖².
        clamp: ‖δ‖ is kept at or below this many ‖v‖.
        stop_below: Stop early once the loss is below.
        kl_prompts: Templates about the subject whose prediction is to stay as it was.
        kl_at: Where it is read: at the last ``"subject"`` token (Meng et al.), or at the ``"end"``
            of the prompt, which guards the subject's other relations better.
        ease: What the first term counts at the step after one at which the new object came first everywhere (each of
            its tokens, in every context): 1 for the same as always, 0.1 in PMET's code.
        stop_kl: Stop early at such a step if a · KL is at most this (0.01 in PMET's code); None: don't.
        method: How δ is moved: `AdamSteps`, or `LineSearch`, which needs half as many steps for most facts.
    """

    steps: int = 20
    lr: float = 0.5
    kl_weight: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0
    stop_below: float = 0.05
    kl_prompts: Sequence[str] = ("{} is a",)
    kl_at: Literal["subject", "end"] = "subject"
    ease: float = 1.0
    stop_kl: float | None = None
    method: ValueMethod = field(default_factory=AdamSteps)

    def __post_init__(self) -> None:
        """Check the numbers and choices."""
        check_settings(
            self,
            least={"steps": 1, "kl_weight": 0, "decay": 0, "ease": 0},  # one step only reads the loss
            above={"lr": 0, "clamp": 0},
        )
        check_one(self.method, ValueMethod, "method", "fe.editing.AdamSteps() or fe.editing.LineSearch()")
        if not isinstance(self.method, AdamSteps) and (self.ease != 1 or self.stop_kl is not None):
            raise ValueError(
                f"ease is {self.ease} and stop_kl {self.stop_kl}, which change what is descended on from step to step: "
                "needed 1 and None with any method but AdamSteps()"
            )


@dataclass(frozen=True)
class Fitted:
    """A fitted value, and what happened on the way.

    Attributes:
        delta: δ, [d_model], float64; of two, that of ``W_out``.
        keys: The key at the last subject token in each context, [context d_mlp], float64; the
            bare prompt is the first.
        outputs: What stands there now where δ is added, [context d_model], float64: the answer of ``W_out``, or the
            residual stream after the block.
        losses: The loss at each evaluation. Of `LineSearch` some are of steps that were taken back; δ has the least.
        target_prob: Mean probability of a token of the object over contexts, before each step.
        stopped: Why it ended: ``"loss"``, ``"kl"`` or ``"steps"``.
        clamped: At how many steps δ had to be projected back.
        attn_delta: The δ of the attention's output, where there are two.
    """

    delta: Float[Tensor, "d_model"]
    keys: Float[Tensor, "context d_mlp"]
    outputs: Float[Tensor, "context d_model"]
    losses: tuple[float, ...]
    target_prob: tuple[float, ...]
    stopped: Literal["loss", "kl", "steps"]
    clamped: int
    attn_delta: Float[Tensor, "d_model"] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """How it was found, as plain data."""
        return {
            "losses": list(self.losses),
            "target_prob": list(self.target_prob),
            "stopped": self.stopped,
            "clamped": self.clamped,
        }
