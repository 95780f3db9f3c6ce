"""How likely a model finds some continuations: ragged, batched, each prompt run once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Hook
from tl_factedit.backend.runner import Runner
from tl_factedit.core.tokens import pad

# The lengths go without a name: they differ from request to request.
Request = tuple[Int[Tensor, "_"], Int[Tensor, "_"]]


def log_probs(
    runner: Runner, requests: Sequence[Request], *, hooks: Sequence[Hook] = (), batch_tokens: int = 4096
) -> list[Float[Tensor, "_"]]:
    """Log-probability of each token of each target after its prompt, teacher-forced.

    Args:
        runner: Runs the model; call inside `frozen` and ``torch.no_grad``.
        requests: (prompt ids, target ids) pairs; equal prompts with one-token targets share a row.
        hooks: Active during the passes; they must not depend on which rows are batched together.
        batch_tokens: Most tokens in one forward pass.

    Returns:
        One tensor a request.
    """
    rows: dict[tuple[int, ...], int] = {}
    places = []
    for prompt, target in requests:
        ids = torch.cat([prompt, target[:-1]])
        places.append(rows.setdefault(tuple(ids.tolist()), len(rows)))
    distinct = [torch.tensor(ids) for ids in rows]
    asked: list[list[int]] = [[] for _ in distinct]
    for i, row in enumerate(places):
        asked[row].append(i)

    out: list[Tensor] = [torch.empty(0)] * len(requests)
    for attempt in that_fit([len(ids) for ids in distinct], batch_tokens):
        with attempt as batch:
            reach = max(len(requests[i][1]) for row in batch for i in asked[row])
            ends = torch.tensor([len(distinct[row]) for row in batch])
            at = (ends[:, None] - reach + torch.arange(reach)).clamp(min=0)
            logits = runner.logits(pad([distinct[row] for row in batch], fill=0), at=at, hooks=hooks)
            log_p = logits.float().log_softmax(-1).cpu()
            for j, row in enumerate(batch):
                for i in asked[row]:
                    target = requests[i][1]
                    out[i] = log_p[j, -len(target) :].gather(-1, target[:, None])[:, 0]
    return out


def log_softmax_of(runner: Runner, rows: Sequence[Tensor], at: Sequence[Tensor]) -> Float[Tensor, "row k vocab"]:
    """Log-probabilities at some positions of each of some token rows."""
    return runner.logits(pad(rows, 0), at=torch.stack(list(at))).float().log_softmax(-1).cpu()


def kl_divergence(was: Float[Tensor, "*row vocab"], now: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL(was ‖ now), of log-probabilities."""
    return (was.exp() * (was - now)).sum(-1)
