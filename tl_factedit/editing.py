"""What every editor does before it writes: facts, statistics and contexts checked, texts aligned, before any pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_factedit.contexts import SampledContexts
from tl_factedit.facts import Fact
from tl_factedit.model import Fingerprint, Model, bos_policy
from tl_factedit.objectives import Inject, Objective, Wish
from tl_factedit.solve import NotPositiveDefiniteError, cholesky
from tl_factedit.stats import TOKENS_PER_DIMENSION, KeyStats
from tl_factedit.tokens import align
from tl_factedit.values import Fitted, ValueFit


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
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    (objective or Inject()).check(facts)
    texts = [fact.text for fact in facts]
    twice = {text for text in texts if texts.count(text) > 1} if len(set(texts)) < len(texts) else set()
    if twice:
        raise ValueError(f"{sorted(twice)[0]!r} is asked for by two facts, needed one each: write one object")
    return tuple(facts)


def check_stats(stats: Iterable[KeyStats], model: Model, base: Fingerprint, ridge: float) -> None:
    """See that statistics are of these weights, and of enough tokens."""
    for each in stats:
        each.check(model, base)
        if each.provenance is not None and ridge == 0 and each.n_tokens < each.wanted_tokens:
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


def align_facts(model: Model, facts: Sequence[Fact], fit: ValueFit, prepend_bos: bool) -> None:
    """See that prompts and KL prompts can be aligned with their tokens."""
    for fact in facts:
        for template in (fact.prompt, *fit.kl_prompts):
            align(model.tokenizer, fact, prepend_bos=prepend_bos, template=template)


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


def check_contexts(contexts: SampledContexts | Sequence[str]) -> None:
    """A string is no list of strings."""
    if isinstance(contexts, str):
        raise ValueError(f"contexts is the string {contexts!r}, needed a list: write [{contexts!r}]")


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


def described(contexts: SampledContexts | Sequence[str]) -> Any:
    """Contexts as plain data (given ones are kept in the `Edit` itself)."""
    return plain(asdict(contexts)) if isinstance(contexts, SampledContexts) else "given"


def record(fitted: Fitted, wish: Wish | None = None) -> dict[str, Any]:
    """How a value was found, and (of a wish) what for, as plain data."""
    asked = {} if wish is None else {"target": wish.fact.target_new, "unlikely": wish.unlikely}
    return {
        **asked,
        "losses": list(fitted.losses),
        "target_prob": list(fitted.target_prob),
        "stopped": fitted.stopped,
        "clamped": fitted.clamped,
    }
