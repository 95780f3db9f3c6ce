"""What every editor does before it writes: facts, statistics and contexts checked, texts aligned, before any pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from tl_factedit.backend.fingerprint import Fingerprint
from tl_factedit.backend.protocol import Model, bos_policy, check_unquantised
from tl_factedit.backend.sharing import check_own
from tl_factedit.backend.state import plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.kinds import check_one, short
from tl_factedit.core.solve import NotPositiveDefiniteError, cholesky
from tl_factedit.core.spacing import before_prompts
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import Aligned, align, align_all, brings_bos
from tl_factedit.editing.concerns import EditWarning, warn_before
from tl_factedit.editing.ledger import base_fingerprint
from tl_factedit.editing.objectives import Inject, Objective
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.stats.key_stats import TOKENS_PER_DIMENSION, KeyStats
from tl_factedit.stats.sampling import SampledContexts

SMALL_RIDGE = 1e-3
"""Of a ridge: below, it makes up for little where tokens are few (the table of docs/statistics.md)."""


@dataclass(frozen=True, eq=False)
class EditInputs:
    """What an editor starts from, checked before any forward pass.

    Attributes:
        model: Either class.
        facts: What to edit.
        prompts: Each fact's own prompt on its tokens.
        prepend_bos: BOS policy.
        base: Fingerprint of the weights below any edit that is on the model.
    """

    model: Model
    facts: tuple[Fact, ...]
    prompts: tuple[Aligned, ...]
    prepend_bos: bool
    base: Fingerprint

    @classmethod
    @plain_torch()
    def of(
        cls,
        model: Model,
        facts: Fact | Sequence[Fact],
        layers: Iterable[int],
        *,
        objective: Objective | None = None,
        stats: Iterable[KeyStats] = (),
        ridge: float | None = None,
        fit: ValueFit | None = None,
        prepend_bos: bool | None = None,
        writes: bool = True,
    ) -> EditInputs:
        """Check what was given; nothing is run.

        Args:
            model: Either class.
            facts: What to edit.
            layers: Whose ``W_out`` the edit changes.
            objective: What the facts are wanted for; None for `Inject`, which needs a ``target_new``.
            stats: Second moments of keys that the editor uses.
            ridge: What is added before one is inverted; None where none is.
            fit: How values will be fitted, if they will be: its KL prompts are aligned too.
            prepend_bos: BOS policy; None for that of the statistics, or else the model's.
            writes: Whether the weights are written at all (a router leaves them).

        Warns:
            EditWarning: Values that are fitted there can't change an answer (see `warn_before`).

        Raises:
            ValueError: The facts, the layers or the statistics don't do (see `check_facts`, `check_stats`, `bos_of`);
                or both objects of a fact are the same tokens, so that there is nothing to inject.
            UnsupportedModelError: A layer has no ``W_out`` to itself.
        """
        facts, layers, stats = check_facts(facts, objective), list(layers), list(stats)
        for layer in layers:
            down_proj(model, layer)
        check_unquantised(cast(nn.Module, model))
        if writes:
            check_own(model, layers)
        base = base_fingerprint(model)
        check_stats(stats, model, base, ridge)
        bos = bos_of(stats, prepend_bos, model)
        room = getattr(model.cfg, "n_ctx", None)
        prompts = tuple(align_all(model.tokenizer, facts, prepend_bos=bos, room=room))
        if objective is None or isinstance(objective, Inject):
            _check_changes(facts, prompts)
        for template in fit.kl_prompts if fit else ():
            align_all(model.tokenizer, facts, prepend_bos=bos, template=template, room=room)
        if fit is not None:
            warn_before(model, facts, prompts, max(layers), fit)
        return cls(model, facts, prompts, bos, base)

    def only(self, index: int) -> EditInputs:
        """The same for one of the facts."""
        return replace(self, facts=(self.facts[index],), prompts=(self.prompts[index],))


def _check_changes(facts: Sequence[Fact], prompts: Sequence[Aligned]) -> None:
    """Check that what is to be injected is something else than the old object."""
    same = [
        fact
        for fact, row in zip(facts, prompts, strict=True)
        if row.old_ids is not None and row.new_ids is not None and row.old_ids.tolist() == row.new_ids.tolist()
    ]
    if same:
        raise ValueError(
            f"target_new {same[0].target_new!r} of {[fact.name for fact in same]} is the old object, as tokens too: an "
            "edit of it would change no answer; give another target_new, or make the old object likelier with "
            "objective=fe.editing.Amplify()"
        )


def check_facts(facts: Fact | Iterable[Fact], objective: Objective | None = None) -> tuple[Fact, ...]:
    """The facts (or the only one), if each has what the objective needs.

    Args:
        facts: What to edit.
        objective: What for; None for `Inject`, which needs a ``target_new``.

    Raises:
        ValueError: Something else than facts, none, a fact that lacks what the objective needs (``target_new``), or one
            subject and prompt twice.
    """
    facts = as_facts(facts)
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
    """Check that statistics are of these weights, and of enough tokens.

    Args:
        stats: Statistics of the layers to be written.
        model: To be edited.
        base: Fingerprint of its weights before any edit.
        ridge: What is added before C is inverted; None where it isn't inverted.

    Warns:
        EditWarning: They are of fewer tokens than an inverse wants, and the ridge is too small to make up for it.
    """
    for each in stats:
        each.check(model, base)
        if each.is_identity or each.n_tokens >= each.wanted_tokens:
            continue
        if ridge:
            if ridge < SMALL_RIDGE:
                why = f"too few tokens for ridge={ridge:g}, with which an edit writes where the sample has little"
                tell(too_few(each, why), EditWarning, once="too few tokens for a ridge")
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


def factor(stats: KeyStats, ridge: float) -> Float[Tensor, "d_mlp d_mlp"]:
    """The Cholesky factor of C.

    Raises:
        ValueError: C can't be inverted; the message says of how many tokens it is, and how many are wanted.
    """
    try:
        return cholesky(stats.moment, ridge=ridge)
    except NotPositiveDefiniteError as error:
        raise ValueError(too_few(stats, str(error))) from error


def prefixes(contexts: SampledContexts | Sequence[str], inputs: EditInputs) -> tuple[str, ...]:
    """The contexts, the bare one first, with a space between each and the prompt where the script has one.

    Warns:
        UserWarning: A context of one's own ended without it.

    Raises:
        ValueError: With one of them a prompt is longer than the model's context.
    """
    own = not isinstance(contexts, SampledContexts)
    found = _spaced(contexts, inputs.model) if own else contexts.draw(inputs.model)
    _check_bos(found, inputs)
    _check_room(found, inputs)
    return found


def _check_bos(contexts: Sequence[str], inputs: EditInputs) -> None:
    """Check that BOS comes once: it stands at the beginning, of the context or of the prompt behind it."""
    tokenizer = inputs.model.tokenizer
    bos = str(tokenizer.bos_token or "")
    bringing = [fact for fact in inputs.facts if bos and bos in fact.prompt]
    for context in contexts:
        if bos and bos in context and (bringing or not brings_bos(tokenizer, context) or context.count(bos) > 1):
            where = f"and so does the prompt of {bringing[0].name!r}" if bringing else "where no text begins"
            raise ValueError(f"context {short(context)} holds the BOS token {bos!r}, {where}: take it off the context")


def _spaced(contexts: Sequence[str], model: Model) -> tuple[str, ...]:
    special = tuple(str(each) for each in getattr(model.tokenizer, "all_special_tokens", ()) if each)
    found = tuple(each if each.endswith(special) else before_prompts(each) for each in contexts)
    changed = [(given, now) for given, now in zip(contexts, found, strict=True) if given != now]
    if changed:
        (given, now), more = changed[0], f", and so did {len(changed) - 1} more" if changed[1:] else ""
        tell(f"context {given!r} became {now!r}{more}: a space stands between a context and the prompt")
    return found if found and found[0] == "" else ("", *found)


def _check_room(contexts: Sequence[str], inputs: EditInputs) -> None:
    tokenizer, room = inputs.model.tokenizer, getattr(inputs.model.cfg, "n_ctx", None)
    for i, context in enumerate(contexts):
        if room is None or not context:
            continue
        for fact, prompt in zip(inputs.facts, inputs.prompts, strict=True):
            longest = max((len(ids) for ids in (prompt.old_ids, prompt.new_ids) if ids is not None), default=1)
            if len((context + prompt.text).encode()) + longest <= room:
                continue  # a token has a byte at least
            count = len(align(tokenizer, fact, prepend_bos=inputs.prepend_bos, prefix=context).ids) + longest - 1
            if count > room:
                begin = context if len(context) < 80 else context[:77] + "…"
                raise ValueError(
                    f"context {i} of {len(contexts)} (the bare prompt is 0), {begin!r}, makes {count} tokens of the "
                    f"prompt of {fact.name!r} and its object, and the model has room for {room} (cfg.n_ctx): shorten it"
                )


def check_objective(objective: Objective) -> None:
    """Check that an objective is a value, not a class."""
    if isinstance(objective, type):
        raise ValueError(f"objective is the class {objective.__name__}, needed a value: write {objective.__name__}()")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective is {objective!r}, needed a value such as Inject() or Erase()")


def check_number(name: str, value: object) -> None:
    """Check that a field holds a number.

    Raises:
        ValueError: It doesn't; the message names the field.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}, needed a number")


def check_fit(fit: ValueFit) -> None:
    """Check that it is said how to fit values by a `ValueFit`."""
    check_one(fit, ValueFit, "fit", "fe.ValueFit(...), such as fe.ValueFit(steps=25)")


def check_ridge(ridge: float) -> None:
    """Check that a ridge is a share."""
    check_number("ridge", ridge)
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}, needed 0 or more (a share of the mean eigenvalue)")


def check_contexts(contexts: SampledContexts | Sequence[str]) -> None:
    """Check that contexts are texts to put before a prompt, without a place for a subject."""
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
