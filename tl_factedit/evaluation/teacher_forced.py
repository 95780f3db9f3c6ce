"""Token accuracy: zsRE's score, as the code of Meng et al. has it (``eval_utils_zsre.py``).

Each token of the wanted object is asked for after the prompt and the object's tokens before it (teacher-forced), and
counts if it is the likeliest of all. Teacher forcing gives away the length and the beginning of what is asked for, so
that an object counts in part which the model would never say (Yang et al. 2025, arXiv:2502.11177).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact, as_facts, check_distinct
from tl_factedit.core.tokens import check_room, check_subject, continuation, encode, of_all, pad


@dataclass(frozen=True)
class TokenAccuracy:
    """The result of `token_accuracy`.

    Attributes:
        rewrite: Share of the new object's tokens that come first after the prompt, over facts.
        paraphrase: The same after the paraphrases, over the facts that have any.
        neighbourhood: Share of the neighbours' own objects' tokens, over the facts that have neighbours.
        facts: What was asked.
        provenance: Model, weights as they were, BOS policy, versions.
    """

    rewrite: Estimate
    paraphrase: Estimate
    neighbourhood: Estimate
    facts: tuple[Fact, ...]
    provenance: Provenance

    def __repr__(self) -> str:
        """The three in a line."""
        return (
            f"TokenAccuracy(rewrite {self.rewrite:.3f}, paraphrase {self.paraphrase:.3f}, "
            f"neighbourhood {self.neighbourhood:.3f})"
        )


@plain_torch()
def token_accuracy(
    model: Model, facts: Fact | Sequence[Fact], *, prepend_bos: bool | None = None, batch_tokens: int = 4096
) -> TokenAccuracy:
    """Which share of the wanted objects' tokens a model puts first, teacher-forced: zsRE's score.

    Args:
        model: Either class, edited or not.
        facts: One or several, each with a ``target_new``; neighbours are asked for ``neighbour_targets``.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: No facts, a fact given twice, without ``target_new``, or with neighbours whose object isn't known.

    Example:
        >>> facts = fe.data.zsre(path, written="answer")                         # doctest: +SKIP
        >>> with edit.applied(model):                                            # doctest: +SKIP
        ...     fe.evaluation.token_accuracy(model, facts)
    """
    facts = as_facts(facts)
    check_distinct(facts)
    asked = [(i, kind, text, target) for i, fact in enumerate(facts) for kind, text, target in _asked(fact)]
    provenance = Provenance.of(model, prepend_bos, prompts=(text for _, _, text, _ in asked))
    bos = provenance.prepend_bos
    of_facts = of_all(facts, lambda fact: _requests(model, fact, bos))
    requests = [request for of_fact in of_facts for request in of_fact]
    with frozen(model), torch.no_grad():
        right = comes_first(Runner(model), requests, batch_tokens)

    def mean(kind: str) -> Estimate:
        shares = []
        for i in range(len(facts)):
            # Tokens count alike, as in the published code, however they are spread over a fact's prompts.
            mine = [r for (of, what, _, _), r in zip(asked, right, strict=True) if (of, what) == (i, kind)]
            shares.append(float(torch.cat(mine).float().mean()) if mine else float("nan"))
        return over_facts(shares)

    return TokenAccuracy(mean("rewrite"), mean("paraphrase"), mean("neighbour"), facts, provenance)


def _asked(fact: Fact) -> list[tuple[str, str, str]]:
    """(kind, prompt, wanted object) of everything a fact is asked."""
    if fact.target_new is None:
        raise ValueError(f"fact {fact.name!r} has no target_new, needed one to look for: fact.but(target_new=...)")
    theirs = fact.neighbour_targets or [fact.after(text, fact.old) for text in fact.neighbours]
    return [
        ("rewrite", fact.text, fact.target_new),
        *(("paraphrase", text, fact.after(text, fact.target_new)) for text in map(fact.fill, fact.paraphrases)),
        *(("neighbour", text, target) for text, target in zip(fact.neighbours, theirs, strict=True)),
    ]


def _requests(model: Model, fact: Fact, bos: bool) -> list[tuple[Int[Tensor, "_"], Int[Tensor, "_"]]]:
    check_subject(model.tokenizer, fact)
    return [_request(model, text, target, bos) for _, text, target in _asked(fact)]


def _request(model: Model, text: str, target: str, bos: bool) -> tuple[Int[Tensor, "_"], Int[Tensor, "_"]]:
    ids, wanted = (
        encode(model.tokenizer, text, prepend_bos=bos)[0],
        continuation(model.tokenizer, text, target, prepend_bos=bos),
    )
    check_room(ids, [wanted], getattr(model.cfg, "n_ctx", None), text)
    return ids, wanted


def comes_first(
    runner: Runner, requests: Sequence[tuple[Int[Tensor, "_"], Int[Tensor, "_"]]], batch_tokens: int
) -> list[Bool[Tensor, "_"]]:
    """For each token of each target, whether it is the likeliest there."""
    rows = [torch.cat([prompt, target[:-1]]) for prompt, target in requests]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for attempt in that_fit([len(row) for row in rows], batch_tokens):
        with attempt as batch:
            reach = max(len(requests[i][1]) for i in batch)
            # A shorter target's last places are read again and not used.
            at = torch.stack(
                [(len(requests[i][0]) - 1 + torch.arange(reach)).clamp(max=len(rows[i]) - 1) for i in batch]
            )
            top = runner.logits(pad([rows[i] for i in batch], 0), at=at).argmax(-1).cpu()
            for i, mine in zip(batch, top, strict=True):
                found[i] = mine[: len(requests[i][1])] == requests[i][1]
    return found
