"""What an edit is to write: v*, the value that makes the model say the new object. The only gradient loop.

    L(δ) = mean_j −1/T Σ_i log p(o_i | x_j + prompt; v + δ)  +  a · KL(p_δ ‖ p_0)  +  b · ‖δ‖ / ‖v‖²

after Meng et al. 2022 (arXiv:2202.05262, eq. 4) and their code, where the weight decay takes the norm of δ,
not its square. δ is added to the output of ``W_out`` at the last subject token of every context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.facts import Fact
from tl_factedit.model import Model, Runner, down_proj, gather, quiet, resid_pre
from tl_factedit.tokens import Aligned, align, pad


@dataclass(frozen=True)
class ValueFit:
    """How a value is optimised; the defaults are those of Meng et al.'s code.

    Attributes:
        steps: Evaluations of the loss; one fewer updates (the last one is only read).
        lr: Of Adam.
        kl_weight: a, the weight of what the subject is said to be staying as it was.
        decay: b, the weight of ‖δ‖ / ‖v‖².
        clamp: ‖δ‖ is kept at or below this many ‖v‖.
        stop_below: Stop early once the loss is below.
        kl_prompts: Templates about the subject whose prediction is to stay as it was.
        kl_at: Where it is read: at the last ``"subject"`` token (Meng et al.), or at the ``"end"``
            of the prompt, which guards the subject's other relations better.
    """

    steps: int = 20
    lr: float = 0.5
    kl_weight: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0
    stop_below: float = 0.05
    kl_prompts: Sequence[str] = ("{} is a",)
    kl_at: Literal["subject", "end"] = "subject"

    def __post_init__(self) -> None:
        """Check the numbers and choices."""
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, needed at least 1 (which only reads the loss)")
        if self.kl_at not in ("subject", "end"):
            raise ValueError(f"kl_at {self.kl_at!r} is unknown, needed 'subject' or 'end'")
        if isinstance(self.kl_prompts, str):
            raise ValueError(
                f"kl_prompts is the string {self.kl_prompts!r}, needed a list: write [{self.kl_prompts!r}]"
            )


@dataclass(frozen=True)
class Fitted:
    """A fitted value, and what happened on the way.

    Attributes:
        delta: δ, [d_model], float64.
        keys: The key at the last subject token in each context, [context d_mlp], float64; the
            bare prompt is the first.
        outputs: What ``W_out`` answers there now, [context d_model], float64.
        losses: The loss before each step.
        target_prob: Mean probability of a token of the new object over contexts, before each step.
        stopped: Why it ended: ``"loss"`` or ``"steps"``.
        clamped: At how many steps δ had to be projected back.
    """

    delta: Float[Tensor, "d_model"]
    keys: Float[Tensor, "context d_mlp"]
    outputs: Float[Tensor, "context d_model"]
    losses: tuple[float, ...]
    target_prob: tuple[float, ...]
    stopped: Literal["loss", "steps"]
    clamped: int


def fit_value(
    model: Model,
    fact: Fact,
    layer: int,
    contexts: Sequence[str],
    *,
    fit: ValueFit | None = None,
    prepend_bos: bool,
    progress: bool = True,
) -> Fitted:
    """Find the δ that makes the model go on with ``fact.target_new``.

    Only the blocks from `layer` on are run, on the residual stream of the clean run below them.

    Args:
        model: Either class; its weights don't change.
        fact: With a ``target_new``.
        layer: Whose ``W_out`` will be edited.
        contexts: Prefixes; the first must be the bare one, ``""``.
        fit: Hyperparameters.
        prepend_bos: BOS policy.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The fitted value.

    Raises:
        ValueError: The fact has no ``target_new``.
        RuntimeError: The loss or δ is not finite.
    """
    fit = fit or ValueFit()
    if fact.target_new is None:
        raise ValueError(f"fact {fact.name!r} has no target_new, needed one to write: fact.but(target_new=...)")
    if not contexts or contexts[0]:
        raise ValueError('contexts must begin with the bare one, ""')
    site = down_proj(model, layer)
    with quiet(model):
        # Made inside `quiet`: autograd can't keep positions that were made in a caller's inference_mode.
        batch = _Batch.of(model, fact, contexts, fit, prepend_bos)
        runner = Runner(model)
        with torch.no_grad():
            below = runner.capture(batch.tokens, [site.key_hook, resid_pre(layer)], stop=layer + 1)
        keys = gather(below[site.key_hook], batch.lookup[:, None].to(below[site.key_hook].device))[:, 0].double()
        start = (layer, below[resid_pre(layer)])
        outputs = site.value(keys)
        try:
            with torch.enable_grad():
                found = _descend(runner, batch, site.value_at, start, float(outputs[0].norm()), fit, progress)
        finally:
            _drop_graphs(model)
    delta, losses, probs, stopped, clamped = found
    n = len(contexts)
    return Fitted(
        delta=delta.double().cpu(),
        keys=keys[:n].cpu(),
        outputs=outputs[:n].detach().cpu(),
        losses=tuple(losses),
        target_prob=tuple(probs),
        stopped=stopped,
        clamped=clamped,
    )


def _drop_graphs(model: Model) -> None:
    """Detach what the model's modules keep of the last forward pass.

    The attention of a TransformerBridge keeps its last pattern, with the whole graph behind it: memory
    that is never freed, and a model that ``copy.deepcopy`` refuses.
    """
    for module in model.modules():  # type: ignore[attr-defined]
        for name, kept in list(vars(module).items()):
            if isinstance(kept, Tensor) and kept.grad_fn is not None:
                vars(module)[name] = kept.detach()


@dataclass(frozen=True)
class _Batch:
    """Rows to run: the contexts, each followed by the target but its last token, then the KL prompts."""

    tokens: Int[Tensor, "row pos"]
    lookup: Int[Tensor, "row"]
    at: Int[Tensor, "row target"]
    target: Int[Tensor, "context target"]

    @classmethod
    def of(cls, model: Model, fact: Fact, contexts: Sequence[str], fit: ValueFit, prepend_bos: bool) -> _Batch:
        rewrite = [align(model.tokenizer, fact, prepend_bos=prepend_bos, prefix=x) for x in contexts]
        guard = [align(model.tokenizer, fact, prepend_bos=prepend_bos, template=t) for t in fit.kl_prompts]
        targets = [_new_ids(row) for row in rewrite]
        if len({len(t) for t in targets}) > 1:
            raise ValueError(f"target {fact.target_new!r} is spelt in different lengths after different contexts")
        length = len(targets[0])
        rows = [torch.cat([row.ids, t[:-1]]) for row, t in zip(rewrite, targets, strict=True)]
        at = [torch.arange(length) + len(row.ids) - 1 for row in rewrite]
        for row in guard:
            rows.append(row.ids)
            read = row.last if fit.kl_at == "subject" else len(row.ids) - 1
            at.append(torch.full((length,), read))
        lookup = torch.tensor([row.last for row in (*rewrite, *guard)])
        return cls(pad(rows, fill=0), lookup, torch.stack(at), torch.stack(targets))


def _new_ids(row: Aligned) -> Int[Tensor, "target"]:
    if row.new_ids is None:
        raise ValueError("the fact has no target_new")
    return row.new_ids


def _descend(
    runner: Runner,
    batch: _Batch,
    value_at: Any,
    start: tuple[int, Tensor],
    v_norm: float,
    fit: ValueFit,
    progress: bool,
) -> tuple[Tensor, list[float], list[float], Literal["loss", "steps"], int]:
    where = start[1].device
    n = len(batch.target)
    target, rows = batch.target.to(where), torch.arange(len(batch.lookup), device=where)
    lookup = batch.lookup.to(where)
    delta = torch.zeros(start[1].shape[-1], device=where, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=fit.lr)

    def add_delta(value: Tensor, hook: Any = None) -> Tensor:
        moved = value.clone()
        moved[rows, lookup] = moved[rows, lookup] + delta.to(value.dtype)
        return moved

    losses: list[float] = []
    probs: list[float] = []
    before: Tensor | None = None
    clamped = 0
    stopped: Literal["loss", "steps"] = "steps"
    for step in tqdm(range(fit.steps), desc="fitting the value", delay=1, disable=not progress, leave=False):
        logits = runner.logits(batch.tokens, at=batch.at, start=start, hooks=[(value_at, add_delta)])
        log_p = logits.float().log_softmax(-1)
        target_log_p = log_p[:n].gather(-1, target[..., None])[..., 0]
        guard = log_p[n:, 0]
        before = guard.detach() if before is None else before
        kl = (guard.exp() * (guard - before)).sum(-1)
        loss = -target_log_p.mean() + fit.decay * delta.norm() / v_norm**2
        if len(guard):
            loss = loss + fit.kl_weight * kl.mean()
        losses.append(float(loss.detach()))
        probs.append(float(target_log_p.detach().exp().mean()))
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"the loss is {losses[-1]} at step {step}: the model overflows with this value "
                "(lower ValueFit.lr or clamp, or load the model in float32)"
            )
        if losses[-1] < fit.stop_below:
            stopped = "loss"
            break
        if step == fit.steps - 1:
            break
        (gradient,) = torch.autograd.grad(loss, delta)
        delta.grad = gradient
        adam.step()
        with torch.no_grad():
            norm = float(delta.norm())
            if not norm < float("inf"):
                raise RuntimeError(f"the value is not finite after step {step}: lower ValueFit.lr")
            if norm > fit.clamp * v_norm:
                delta *= fit.clamp * v_norm / norm
                clamped += 1
    return delta.detach(), losses, probs, stopped, clamped
