"""What every editor does before it writes: facts, statistics and contexts checked, texts aligned, before any pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.fingerprint import Fingerprint
from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.weights import check_own
from tl_factedit.core.facts import Fact
from tl_factedit.core.solve import NotPositiveDefiniteError, cholesky
from tl_factedit.core.tokens import Aligned, align
from tl_factedit.editing.objectives import EditTarget, Inject, Objective
from tl_factedit.editing.value_fit import Fitted, ValueFit
from tl_factedit.stats.key_stats import TOKENS_PER_DIMENSION, KeyStats
from tl_factedit.stats.sampling import SampledContexts


def check_facts(facts: Sequence[Fact], objective: Objective | None = None) -> tuple[Fact, ...]:
    """The facts, if there is one at least and each has what the objective needs.

    Args:
        facts: What to edit.
        objective: What for; None for `Inject`, which needs a ``target_new``.

    Raises:
        ValueError: One fact instead of a list, none, a fact that lacks what the objective needs (``target_new``), or
            one subject and prompt twice.
    """
    if isinstance(facts, Fact):
        raise ValueError("facts is one Fact, needed a list of them: write [fact]")
    facts = tuple(facts)
    for fact in facts:
        if not isinstance(fact, Fact):
            raise ValueError(f"facts has a {type(fact).__name__}, {fact!r}: needed Facts")
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    (objective or Inject()).check(facts)
    texts = [fact.text for fact in facts]
    twice = {text for text in texts if texts.count(text) > 1} if len(set(texts)) < len(texts) else set()
    if twice:
        raise ValueError(
            f"{sorted(twice)[0]!r} is asked for by two facts, needed one each: a prompt has one answer (objects of one "
            "prompt can be erased one after the other)"
        )
    return facts


def check_stats(stats: Sequence[KeyStats], model: Model, base: Fingerprint, ridge: float | None) -> None:
    """See that statistics are of these weights, and of enough tokens.

    Args:
        stats: Of the layers to be written.
        model: To be edited.
        base: Fingerprint of its weights before any edit.
        ridge: What is added before C is inverted; None where it isn't inverted.
    """
    check_own(model, [each.layer for each in stats])
    for each in stats:
        each.check(model, base)
        if each.is_identity or ridge or each.n_tokens >= each.wanted_tokens:
            continue
        if ridge is None:
            raise ValueError(
                f"the second moment of layer {each.layer} is over {each.n_tokens:,} tokens: directions that were "
                f"never seen would count as free; wanted {each.wanted_tokens:,} or more: collect more text"
            )
        raise ValueError(too_few(each, "too few tokens to invert"))


def bos_of(stats: Iterable[KeyStats], asked: bool | None, model: Model) -> bool:
    """The BOS policy: as asked, or that of the statistics, or else the model's.

    Raises:
        ValueError: The statistics were collected with another one, or with different ones.
    """
    theirs = {each.provenance.prepend_bos for each in stats if each.provenance is not None}
    if len(theirs) > 1:
        raise ValueError("the key statistics of some layers were collected with BOS and of some without: collect again")
    policy = next(iter(theirs), None)
    if asked is not None and policy is not None and asked != policy:
        raise ValueError(
            f"prepend_bos={asked}, but the key statistics were collected with {policy}: "
            "collect them with the same policy"
        )
    return bos_policy(model, asked if asked is not None else policy)


def align_facts(model: Model, facts: Sequence[Fact], fit: ValueFit, prepend_bos: bool) -> tuple[Aligned, ...]:
    """The facts' prompts on their tokens, after seeing that KL prompts can be aligned too."""
    for fact in facts:
        for template in fit.kl_prompts:
            align(model.tokenizer, fact, prepend_bos=prepend_bos, template=template)
    return tuple(align(model.tokenizer, fact, prepend_bos=prepend_bos) for fact in facts)


def factor(stats: KeyStats, ridge: float) -> Float[Tensor, "d_mlp d_mlp"]:
    """The Cholesky factor of C.

    Raises:
        ValueError: C can't be inverted; the message says of how many tokens it is, and how many are wanted.
    """
    try:
        return cholesky(stats.moment, ridge=ridge)
    except NotPositiveDefiniteError as error:
        raise ValueError(too_few(stats, str(error))) from error


def prefixes(contexts: SampledContexts | Sequence[str], model: Model) -> tuple[str, ...]:
    """The contexts, the bare one first."""
    if isinstance(contexts, SampledContexts):
        return contexts.draw(model)
    return tuple(contexts) if contexts and contexts[0] == "" else ("", *contexts)


def check_objective(objective: Objective) -> None:
    """A class is no value of it."""
    if isinstance(objective, type):
        raise ValueError(f"objective is the class {objective.__name__}, needed a value: write {objective.__name__}()")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective is {objective!r}, needed a value such as Inject() or Erase()")


def check_contexts(contexts: SampledContexts | Sequence[str]) -> None:
    """A string is no list of strings, and a prefix has no place for a subject."""
    if isinstance(contexts, SampledContexts):
        return
    if isinstance(contexts, str):
        raise ValueError(f"contexts is the string {contexts!r}, needed a list: write [{contexts!r}]")
    if not isinstance(contexts, Sequence):
        raise ValueError(
            f"contexts is {contexts!r}, needed a list of prefixes, or SampledContexts: write () for the bare prompt "
            "alone"
        )
    for i, context in enumerate(contexts):
        if not isinstance(context, str) or "{}" in context:
            raise ValueError(f'context {context!r} is no prefix, needed text to put before a prompt, without "{{}}"')
        if i and not context:
            raise ValueError(f"contexts[{i}] is empty: the bare prompt is always the first context, and counts once")


def too_few(stats: KeyStats, why: str) -> str:
    """What to say of a second moment that can't be inverted."""
    return (
        f"the second moment of layer {stats.layer} is over {stats.n_tokens:,} tokens: {why}; wanted "
        f"{TOKENS_PER_DIMENSION} tokens for each of {len(stats.moment)} dimensions = {stats.wanted_tokens:,} or more: "
        "collect more text, or pass ridge=1e-2"
    )


def plain(value: Any) -> Any:
    """The same data with lists for tuples, as a JSON header gives it back."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def described_stats(stats: Iterable[KeyStats]) -> dict[str, Any]:
    """Where second moments came from, as plain data, with a hash of each."""
    stats = list(stats)
    return {
        "n_tokens": [each.n_tokens for each in stats],
        "corpus": [each.corpus for each in stats],
        "moment": [each.digest for each in stats],
    }


def described(contexts: SampledContexts | Sequence[str]) -> Any:
    """Contexts as plain data (given ones are kept in the `Edit` itself)."""
    return plain(asdict(contexts)) if isinstance(contexts, SampledContexts) else "given"


def record(fitted: Fitted, wish: EditTarget, *, same_first_token: bool) -> dict[str, Any]:
    """How a value was found, what for, and whether both objects of the fact begin alike, as plain data."""
    return {
        "target": wish.fact.target_new,
        "unlikely": wish.unlikely,
        "same_first_token": same_first_token,
        "losses": list(fitted.losses),
        "target_prob": list(fitted.target_prob),
        "stopped": fitted.stopped,
        "clamped": fitted.clamped,
    }
