"""Fine-tuning and knowledge neurons by the letter: one text at a time, whole passes, TransformerLens' own hooks.

The weights are trained where they are (torch.optim.Adam on the parameter itself) and put back by the caller.
No batch, no padding, no partial forward, no import of the package's own machinery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def parameter(model: Any, layer: int) -> nn.Parameter:
    """W_out itself, in the orientation it is stored in."""
    mlp = model.blocks[layer].mlp
    if hasattr(mlp, "W_out") and "W_out" in mlp._parameters:
        return mlp._parameters["W_out"]
    return mlp.out.original_component.weight


def tokens(model: Any, text: str, bos: bool) -> list[int]:
    return model.to_tokens(text, prepend_bos=bos)[0].tolist()


def target_log_prob(model: Any, text: str, target: str, bos: bool, hooks: Sequence[Any] = ()) -> Tensor:
    """log p of each token of the target after those before it (of a word-level tokenizer)."""
    ids, aim = tokens(model, text, bos), tokens(model, target, False)
    out = model.run_with_hooks(torch.tensor([ids + aim[:-1]]), fwd_hooks=list(hooks))
    log_p = out[0].float().log_softmax(-1)
    return torch.stack([log_p[len(ids) - 1 + i, token] for i, token in enumerate(aim)])


def fine_tune_(
    model: Any,
    facts: Sequence[Any],
    layers: Sequence[int],
    *,
    bos: bool,
    steps: int,
    lr: float,
    stop_below: float = 0.0,
    epsilon: float | None = None,
    batch: int = 64,
    contexts: Sequence[str] = ("",),
    unlikely: bool = False,
    hooks: Callable[[Any], Sequence[Any]] = lambda fact: (),
    all_at_the_prompt: bool = False,
) -> list[list[float]]:
    """Train W_out of some layers in place; each fact's loss before each step.

    Args:
        unlikely: Take the probability of the object as the loss.
        hooks: What is active while a fact is asked.
        all_at_the_prompt: Score every token of an object from the prompt's last position, as Meng et al.'s code does.
    """
    params = [parameter(model, layer) for layer in layers]
    before = [param.detach().clone() for param in params]
    for param in model.parameters():
        param.requires_grad_(any(param is each for each in params))
    adam = torch.optim.Adam(params, lr=lr)
    losses: list[list[float]] = [[] for _ in facts]
    for _ in range(steps):
        stop = True
        for start in range(0, len(facts), batch):
            some = range(start, min(start + batch, len(facts)))
            total = torch.zeros(())
            for i in some:
                per_context = []
                for context in contexts:
                    text = context + facts[i].prompt.replace("{}", facts[i].subject)
                    if all_at_the_prompt:
                        aim = tokens(model, facts[i].target_new, False)
                        out = model(torch.tensor([tokens(model, text, bos)]))
                        log_p = out[0, -1].float().log_softmax(-1)[aim]
                    else:
                        log_p = target_log_prob(model, text, facts[i].target_new, bos, hooks(facts[i]))
                    per_context.append(log_p.sum().exp() if unlikely else -log_p.mean())
                loss = torch.stack(per_context).mean()
                losses[i].append(float(loss.detach()))
                total = total + loss / len(some)
            if float(total.detach()) >= stop_below:
                stop = False
                adam.zero_grad()
                total.backward()
                adam.step()
                if epsilon is not None:
                    with torch.no_grad():
                        for param, old in zip(params, before, strict=True):
                            param.copy_(torch.clamp(param, old - epsilon, old + epsilon))
        if stop:
            break
    for param in model.parameters():
        param.grad = None
    return losses


def probability(model: Any, text: str, target: str, bos: bool, layer: int, key: Tensor | None) -> Tensor:
    """P(target | text), with the key at the text's last token set to another."""
    position = len(tokens(model, text, bos)) - 1

    def put(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, position] = key
        return value

    hooks = [] if key is None else [(f"blocks.{layer}.mlp.hook_post", put)]
    return target_log_prob(model, text, target, bos, hooks).sum().exp()


def last_key(model: Any, text: str, bos: bool, layer: int) -> Tensor:
    """The key at the text's last token."""
    name = f"blocks.{layer}.mlp.hook_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([tokens(model, text, bos)]), names_filter=[name])
    return cache[name][0, -1].detach().clone()


def attribution(model: Any, text: str, target: str, bos: bool, layer: int, shares: Sequence[float]) -> Tensor:
    """k ∘ mean over a of ∂P/∂k at a k, for the shares a one by one."""
    key = last_key(model, text, bos, layer)
    total = torch.zeros_like(key, dtype=torch.float64)
    for share in shares:
        scaled = (share * key).requires_grad_()
        (gradient,) = torch.autograd.grad(probability(model, text, target, bos, layer, scaled), scaled)
        total += gradient.double() / len(shares)
    return key.double() * total
