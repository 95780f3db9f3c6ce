"""Which facts a model knows: to be asked before a fact is traced, edited or audited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import (
    check_room,
    check_subject,
    continuation,
    decided_at,
    encode,
    of_all,
    pad,
    up_to_a_word,
)

if TYPE_CHECKING:
    import pandas as pd


@plain_torch()
def known(
    model: Model, facts: Fact | Sequence[Fact], *, prepend_bos: bool | None = None, batch_tokens: int = 4096
) -> pd.DataFrame:
    """Whether a model says each fact's old object after its prompt, and how far it is from saying it.

    A fact is known if the token that the model puts first after the prompt is the first token of ``target_true``: what
    greedy decoding would begin with. Where that is white space alone, as some tokenizers begin " Łódź", or half a
    character, as others begin "กรุงเทพ", the tokens after it count too, until a whole character
    is said. Tracing a fact that isn't known shows noise, and editing or auditing it says nothing about an old object,
    as there is none.

    Args:
        model: A model of either class, as it is now.
        facts: The facts to ask, each by its own prompt. ``target_new`` isn't needed.
        prepend_bos: BOS policy; None for the model's default.
        batch_tokens: Most tokens in one forward pass.

    Returns:
        One row per fact, in the order of the facts:

        - ``fact``: the fact's name.
        - ``top``: the token that the model puts first after the prompt; with white space in front of it, where the
          object begins with a token of that and the model says it too.
        - ``rank``: rank of the first token of ``target_true`` there, 1 + the number of likelier tokens; the worst rank
          where several tokens count.
        - ``p``: probability of the whole ``target_true``, the product over its tokens.
        - ``known``: whether the first token of ``target_true`` is the top token, and so is each other that counts.

        Where the model's logits aren't finite nothing comes first: ``top`` is ``""``, ``rank`` and ``p`` are NaN.

    Raises:
        ValueError: No facts, a fact without ``target_true``, a target that doesn't continue its prompt, or a text
            longer than the model's context; the message names the facts.

    Example:
        >>> table = fe.known(model, facts)                                              # doctest: +SKIP
        >>> facts = [fact for fact, yes in zip(facts, table.known) if yes]              # doctest: +SKIP
    """
    import pandas as pd

    facts = as_facts(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    bos = bos_policy(model, prepend_bos)
    requests = of_all(facts, lambda fact: _request(model, fact, bos))
    rows: list[tuple[str, float, float, bool]] = [("", 0.0, 0.0, False)] * len(facts)
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for attempt in that_fit([len(prompt) + len(target) - 1 for prompt, target in requests], batch_tokens):
            with attempt as batch:
                here = [requests[i] for i in batch]
                for i, (_, target), log_p in zip(batch, here, _log_probs(runner, here), strict=True):
                    rows[i] = _row(model, target, log_p)
    table = pd.DataFrame(rows, columns=["top", "rank", "p", "known"])
    table.insert(0, "fact", [fact.name for fact in facts])
    return table if table["rank"].isna().any() else table.astype({"rank": int})


def _request(model: Model, fact: Fact, bos: bool) -> tuple[Int[Tensor, "prompt"], Int[Tensor, "target"]]:
    """Token ids of a fact's prompt and of its old object."""
    if fact.target_true is None:
        raise ValueError("it has no target_true, needed one: it is what the model is asked for")
    check_subject(model.tokenizer, fact)
    prompt, _ = encode(model.tokenizer, fact.text, prepend_bos=bos)
    target = continuation(model.tokenizer, fact.text, fact.target_true, prepend_bos=bos)
    check_room(prompt, [target], getattr(model.cfg, "n_ctx", None), fact.text)
    return prompt, target


def _log_probs(
    runner: Runner, requests: Sequence[tuple[Int[Tensor, "_"], Int[Tensor, "_"]]]
) -> Float[Tensor, "fact target vocab"]:
    """Log-probabilities at the prompts' ends and after each further token of the targets but their last."""
    reach = max(len(target) for _, target in requests)
    rows = [torch.cat([prompt, target[:-1]]) for prompt, target in requests]
    # A shorter target's last places are read again and not used.
    at = [
        (len(prompt) - 1 + torch.arange(reach)).clamp(max=len(row) - 1)
        for (prompt, _), row in zip(requests, rows, strict=True)
    ]
    return runner.logits(pad(rows, 0), at=torch.stack(at)).float().log_softmax(-1).cpu()


def _row(model: Model, target: Int[Tensor, "_"], log_p: Float[Tensor, "_ vocab"]) -> tuple[str, float, float, bool]:
    """Top token, rank, probability, and whether the fact is known."""
    if not bool(log_p[0].max().isfinite()):
        return "", float("nan"), float("nan"), False
    count = up_to_a_word(model.tokenizer, target)
    said, wanted = log_p[:count].argmax(-1).tolist(), target[:count].tolist()
    own = log_p[: len(target)].gather(-1, target[:, None])
    rank = 1 + int((log_p[:count] > own[:count]).sum(-1).max())
    top = model.tokenizer.decode(said[: decided_at(said, wanted) + 1])
    return top, float(rank), float(own.sum().exp()), said == wanted
