"""Which facts a model's tokenizer can align: before hundreds of records stop at one of them."""

from __future__ import annotations

from collections.abc import Iterable

from tl_factedit.backend.causal import check_causal
from tl_factedit.backend.protocol import Model, blocks, bos_policy, check_embedded
from tl_factedit.backend.state import frozen, plain_torch, unhooked
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import check_texts


@plain_torch()
def alignable(
    model: Model, facts: Fact | Iterable[Fact], *, prepend_bos: bool | None = None
) -> tuple[list[Fact], list[tuple[Fact, str]]]:
    """Sort facts into those that the model can be asked, and those that it can't, with the reason.

    A fact is alignable if its subject begins and ends on token boundaries, its objects are continuations of every text
    that they are asked after (prompt, paraphrases, neighbours), the tokens spell these texts, and all fits into the
    model's context. No fact is run.

    Args:
        model: Its tokenizer and context decide.
        facts: The facts.
        prepend_bos: BOS policy; None for the model's default.

    Returns:
        The good facts, and the others as pairs (fact, reason), both in their order.

    Raises:
        ValueError: Something else than facts.
        UnsupportedModelError: No fact can be asked of this model: it isn't causal, an encoder-decoder, or has no
            tokenizer.

    Example:
        >>> good, bad = fe.alignable(model, fe.data.counterfact("counterfact.json"))     # doctest: +SKIP
    """
    bos = bos_policy(model, prepend_bos)
    blocks(model)
    with frozen(model), unhooked(model.modules()):  # a user's hooks may want other tokens
        check_causal(model)
    good: list[Fact] = []
    bad: list[tuple[Fact, str]] = []
    for fact in as_facts(facts):
        try:
            texts = [fact.text, *map(fact.fill, fact.paraphrases), *fact.neighbours]
            check_embedded(model, texts)
            check_texts(model.tokenizer, fact, prepend_bos=bos, room=getattr(model.cfg, "n_ctx", None))
            good.append(fact)
        except ValueError as error:
            bad.append((fact, str(error)))
    return good, bad
