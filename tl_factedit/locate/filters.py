"""Which facts a published experiment keeps: those that the model answers, by that experiment's own rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.facts import Fact
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import pad
from tl_factedit.locate.inputs import align_all

BATCH_TOKENS = 4096

Answers = Callable[[Fact, str], bool]
"""Whether some text that the model said answers a fact."""


def is_the_object(fact: Fact, said: str) -> bool:
    """Whether what is said is the object and nothing else, but for white space (Meng et al.)."""
    return said.strip() == fact.old.strip()


def holds_the_object(fact: Fact, said: str) -> bool:
    """Whether the object occurs in what is said (Hase et al.)."""
    return fact.old.strip() in said


def answered(
    model: Model,
    facts: Sequence[Fact],
    n_tokens: int,
    answers: Answers,
    *,
    prepend_bos: bool | None,
) -> tuple[Fact, ...]:
    """The facts that a model answers in its next tokens, by greedy decoding; how many are left out is said.

    Args:
        model: Either class.
        facts: The facts.
        n_tokens: How many tokens the model may say.
        answers: What counts as an answer.
        prepend_bos: BOS policy; None for the model's.

    Raises:
        ValueError: None is left.
    """
    rows = [row.ids for row in align_all(model, facts, prepend_bos=bos_policy(model, prepend_bos))]
    with frozen(model), torch.no_grad():
        said = greedy(Runner(model), rows, n_tokens)
    texts = [model.tokenizer.decode(ids) for ids in said]
    kept = tuple(fact for fact, text in zip(facts, texts, strict=True) if answers(fact, text))
    if not kept:
        raise ValueError(
            f"the model answers none of {len(facts)} facts: after {facts[0].text!r} it says {texts[0]!r} and not "
            f"{facts[0].target_true!r}. The published experiment leaves such facts out: give facts that it knows "
            "(fe.known), or unknown='trace'"
        )
    if len(kept) < len(facts):
        tell(
            f"{len(facts) - len(kept)} of {len(facts)} facts are left out, as in the published experiment, since the "
            "model doesn't answer them: unknown='trace' keeps them",
        )
    return kept


def greedy(runner: Runner, rows: Sequence[Int[Tensor, "_"]], n_tokens: int) -> list[list[int]]:
    """The next tokens of each row, the likeliest at each step; fewer where the model's context ends."""
    room = getattr(runner.model.cfg, "n_ctx", None)
    said: list[list[int]] = [[] for _ in rows]
    for attempt in that_fit([len(row) + n_tokens for row in rows], BATCH_TOKENS):
        with attempt as batch:
            now = {i: rows[i] for i in batch}
            for _ in range(n_tokens):
                going = [i for i in now if room is None or len(now[i]) <= room]
                if not going:
                    break
                at = torch.tensor([[len(now[i]) - 1] for i in going])
                top = runner.logits(pad([now[i] for i in going], 0), at=at)[:, 0].argmax(-1).tolist()
                for i, token in zip(going, top, strict=True):
                    said[i].append(token)
                    now[i] = torch.cat([now[i], torch.tensor([token])])
    return said
