"""Some facts, a model, and what the model was changed into: checked once, and read before and after.

`Population.of` takes a change in any of its three forms (`measure.change`) and finds out which facts each change
serves. Everything that measures takes a population, and reads both models by it::

    population = Population.of(model, edit, facts, folder="kept")
    before, after = population.read("name", read, settings=...)       # read: (Runner, indices) -> [fact …]

What is read is kept in the population's folder, if it has one, so that every measurement resumes after a kill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.fingerprint import hashed_once
from tl_factedit.backend.protocol import Model, bos_policy, kind, model_name
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import carries_hooks, frozen, plain_torch
from tl_factedit.core.cache import Cache, check_kinds
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import check_length, of_all
from tl_factedit.core.words import counted
from tl_factedit.measure.change import Change, Changed, Digested, asked_as, check_made_for, identity
from tl_factedit.measure.first_tokens import FirstTokens, are_known

T = TypeVar("T")
Read: TypeAlias = Callable[[Runner, tuple[int, ...]], T]
"""Reads a model, through a runner, of the facts at some indices: gives tensors, numbers, text, tuples of these."""

Settings: TypeAlias = Any | Callable[[tuple[int, ...]], Any]
"""What a reading depends on beside facts, models and BOS, as plain data; or a function that says it of some facts."""

BATCH_TOKENS = 4096
"""Most tokens in one forward pass, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some facts, and the changed model that answers for them.

    Attributes:
        facts: The facts it serves.
        indices: Their places among all facts.
        unedited: The model without the change.
        changed: The change, or the other model.
    """

    facts: tuple[Fact, ...]
    indices: tuple[int, ...]
    unedited: Model
    changed: Change | Model

    @property
    def touched(self) -> frozenset[str]:
        """The subjects that the change was made for, as far as is known; none of them is a reference or a control."""
        made_for = self.changed.facts if isinstance(self.changed, Change) else ()
        return frozenset(fact.subject for fact in (*self.facts, *made_for))

    @contextmanager
    def applied(self) -> Iterator[Model]:
        """The changed model for the length of a ``with`` block."""
        if isinstance(self.changed, Change):
            with self.changed.applied(self.unedited) as model:
                yield model
        else:
            yield self.changed


@dataclass(frozen=True, eq=False)
class Population:
    """What is measured before and after a change.

    Attributes:
        model: The unedited model.
        changed: The change, a list with one for each fact, or another model.
        facts: What is asked.
        reference: Facts of the same relations about other subjects, which nothing changed: what knock-outs put in
            place, and what decoders are trained on.
        prepend_bos: Whether prompts run with BOS in front.
        parts: Which change serves which facts.
        cache: Where readings are kept; None: nowhere.
        progress: Whether to show a bar on what takes longer than a second.
        force: Whether facts may be asked that a single change wasn't made for.
    """

    model: Model
    changed: Changed
    facts: tuple[Fact, ...]
    reference: tuple[Fact, ...]
    prepend_bos: bool
    parts: tuple[Part, ...]
    cache: Cache | None
    progress: bool
    force: bool = False

    @classmethod
    @plain_torch()
    def of(
        cls,
        model: Model,
        changed: Changed,
        facts: Fact | Sequence[Fact],
        *,
        reference: Sequence[Fact] = (),
        prepend_bos: bool | None = None,
        folder: str | Path | None = None,
        progress: bool = True,
        force: bool = False,
    ) -> Population:
        """Check what is given, and find out which change serves which fact; no model is run.

        Args:
            model: The unedited model (an `Edit` must not be applied to it).
            changed: An edit of it (or a router), a list with one for each fact, or the model as it was changed in any
                other way.
            facts: What to ask.
            reference: See `Population`.
            prepend_bos: BOS policy; None for the change's own, or the model's default.
            folder: Where to keep what is read; a call that was killed resumes there, and one of more facts is only
                asked what is new.
            progress: Whether to show a bar on what takes longer than a second.
            force: Whether to ask about facts that a single change wasn't made for; what is measured then says nothing
                about the change. Of a list of changes each fact needs its own all the same.

        Raises:
            ValueError: No facts or no changes; a fact that the change wasn't made for (by subject, prompt and new
                object), unless `force`, or that no change of a list was made for, or several; another model with
                another vocabulary; a BOS policy other than the change's; a folder, and a change or a model that
                can't be told from others.

        Example:
            >>> population = fe.Population.of(model, edit, [fact])      # doctest: +SKIP
            >>> fe.attacks.ReadOut()(population)                        # doctest: +SKIP
        """
        facts, reference = as_facts(facts), _each_once(as_facts(reference, "reference"))
        parts = parts_of(model, changed, facts)
        if isinstance(changed, Change) and not force:
            check_made_for(changed, facts, "what is measured")
        bos = bos_of_change(model, changed, prepend_bos)
        cache = Cache.at(folder)
        if cache is not None:
            _check_keepable(parts)
        return cls(model, changed, facts, reference, bos, parts, cache, progress, force)

    @plain_torch()
    def asking(self, facts: Fact | Sequence[Fact], reference: Sequence[Fact] | None = None) -> Population:
        """The same changes, asked about other facts (or with other references), whatever a change was made for."""
        facts = as_facts(facts)
        reference = self.reference if reference is None else _each_once(as_facts(reference, "reference"))
        parts = parts_of(self.model, self.changed, facts)
        return replace(self, facts=facts, reference=reference, parts=parts)

    @property
    def touched(self) -> frozenset[str]:
        """All subjects that some change was made for."""
        return frozenset().union(*(part.touched for part in self.parts))

    def touched_with(self, fact: int) -> frozenset[str]:
        """The subjects that the change which serves a fact was made for."""
        return next(part.touched for part in self.parts if fact in part.indices)

    @cached_property
    @plain_torch()
    def first_tokens(self) -> tuple[FirstTokens, ...]:
        """Each fact's prompt with the first tokens of its objects.

        Raises:
            ValueError: A fact without ``target_new``, or whose prompt is longer than the model's context.
        """
        self.check_room()
        return tuple(FirstTokens.of(self.model.tokenizer, fact, self.prepend_bos) for fact in self.facts)

    def check_room(self) -> None:
        """Check that each fact's prompt fits into the model's context.

        Raises:
            ValueError: Some don't; the message names them.
        """
        tokenizer, bos, room = self.model.tokenizer, self.prepend_bos, getattr(self.model.cfg, "n_ctx", None)
        of_all(
            self.facts,
            lambda fact: check_length(tokenizer, fact.text, f"fact {fact.name!r}", prepend_bos=bos, room=room),
        )

    @cached_property
    @plain_torch()
    def known(self) -> Bool[Tensor, "fact"]:
        """Whether the unedited model finds the old object likeliest of all objects: what could come back at all."""
        asked = self.first_tokens

        def read(runner: Runner, indices: tuple[int, ...]) -> Tensor:
            return are_known(runner, [asked[i] for i in indices], BATCH_TOKENS)

        return self.unedited("known", read, settings=())

    @plain_torch()
    def unedited(self, name: str, read: Read[T], *, settings: Settings, kinds: Sequence[type] = ()) -> T:
        """The reading of the unedited model, of all facts.

        Args:
            name: The measurement's, in words that can be a file's name.
            read: What to read. It is called without gradients, inside `frozen`.
            settings: Everything else the reading depends on, as plain data, such as ``repr(self)`` of a frozen
                dataclass. Readings with the same name and equal settings are taken for one another.
            kinds: The dataclasses of this package that `read` may return.

        Returns:
            What `read` returns, called once with all facts.
        """

        def compute() -> T:
            with frozen(self.model), torch.no_grad():
                return read(Runner(self.model), tuple(range(len(self.facts))))

        return self.keep(f"{name} before", None, compute, settings=settings, kinds=kinds)

    def each(
        self, name: str, read: Read[T], *, settings: Settings, kinds: Sequence[type] = ()
    ) -> Iterator[tuple[Part, T]]:
        """Each change's reading of the facts that it serves, with the part, in order.

        Args:
            name: As in `unedited`.
            read: What to read, with the change applied; it is called without gradients, inside `frozen`.
            settings: As in `unedited`.
            kinds: As in `unedited`.

        Returns:
            An iterator of pairs of a part and what `read` returns for the part's facts, in the order of its indices.
        """
        silent = not self.progress or len(self.parts) == 1
        base = self._base()
        for part in tqdm(self.parts, desc=name, unit="change", delay=1, disable=silent, leave=False):

            def compute(part: Part = part) -> T:
                with part.applied() as tested, frozen(tested), torch.no_grad():
                    return read(Runner(tested), part.indices)

            yield part, self.keep(name, part, compute, settings=settings, kinds=kinds, base=base)

    def read(
        self, name: str, read: Read[Float[Tensor, "fact *rest"]], *, settings: Settings
    ) -> tuple[Float[Tensor, "fact *rest"], Float[Tensor, "fact *rest"]]:
        """Readings before and after the change; see `unedited` and `each`.

        Args:
            name: As in `unedited`.
            read: What to read, one row for each of the facts that it is asked.
            settings: As in `unedited`.

        Returns:
            Of the unedited and of the changed model, one row a fact, in the order of `facts`.
        """
        before = self.unedited(name, read, settings=settings)
        return before, self.after(name, read, settings=settings)

    @plain_torch()
    def after(
        self, name: str, read: Read[Float[Tensor, "fact *rest"]], *, settings: Settings
    ) -> Float[Tensor, "fact *rest"]:
        """The reading after the change; see `each`.

        Args:
            name: As in `unedited`.
            read: As in `read`.
            settings: As in `unedited`.

        Returns:
            One row a fact, in the order of `facts`, each of the change that serves it.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(self.facts)
        with hashed_once(self.model):
            for part, found in self.each(name, read, settings=settings):
                for i, row in zip(part.indices, found, strict=True):
                    rows[i] = row
        return torch.stack(rows)

    def keep(
        self,
        name: str,
        part: Part | None,
        compute: Callable[[], T],
        *,
        settings: Settings,
        kinds: Sequence[type] = (),
        base: Any = None,
    ) -> T:
        """What was computed before and kept in the folder, or what is computed (and kept) now.

        Args:
            name: As in `unedited`.
            part: The change it is of; None for the unedited model.
            compute: Runs whatever is to be run.
            settings: As in `unedited`.
            kinds: As in `unedited`.
            base: What tells the unedited model from others, where it was hashed already.
        """
        check_kinds(kinds)  # also where nothing is kept
        if self.cache is None:
            return compute()
        indices = tuple(range(len(self.facts))) if part is None else part.indices
        depends_on = {
            "facts": [asdict(self.facts[i]) for i in indices],
            "change": "none" if part is None else _origin(part.changed),
            "model": self._base() if base is None else base,
            "prepend_bos": self.prepend_bos,
            "settings": settings(indices) if callable(settings) else settings,
        }
        found = self.cache.find(name, depends_on, kinds)
        if found is not None:
            return found[0]
        result = compute()
        self.cache.keep(name, depends_on, result, kinds)
        return result

    def _base(self) -> Any:
        """What tells the unedited model from others; None where nothing is kept. Hashed anew for each measurement."""
        return None if self.cache is None else _origin(self.model)

    def __repr__(self) -> str:
        """How many facts, and under how many changes."""
        changes = (
            counted(len(self.parts), "change") if isinstance(self.changed, Sequence) else type(self.changed).__name__
        )
        kept = f", kept in {self.cache.folder}" if self.cache else ""
        facts, others = counted(len(self.facts), "fact"), counted(len(self.reference), "reference")
        return f"Population({facts} under {changes}, {others}{kept})"


def parts_of(model: Model, changed: Changed, facts: Sequence[Fact]) -> tuple[Part, ...]:
    """The parts of a population: one, or one for each change that serves a fact.

    Of several changes a fact belongs to the one that was made for its subject, prompt and new object; its paraphrases,
    neighbours and controls don't matter.

    Args:
        model: The unedited model.
        changed: The change, a list of them, or another model.
        facts: What is asked.

    Raises:
        ValueError: No facts or no changes; a fact that no change of the list was made for, or several; another model
            with another vocabulary. Nothing is applied before all is checked.
    """
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    if isinstance(changed, (str, Path)):
        raise ValueError(f"changed is {changed!r}, needed the change itself: fe.Edit.load({str(changed)!r})")
    if not isinstance(changed, (Sequence, Change)):
        kind(changed)
    if isinstance(changed, Sequence):
        return _one_by_one(model, changed, facts)
    if not isinstance(changed, Change) and changed.cfg.d_vocab != model.cfg.d_vocab:
        raise ValueError(
            f"{model_name(changed)} has {changed.cfg.d_vocab} tokens and {model_name(model)} {model.cfg.d_vocab}, "
            "needed two models with one tokenizer"
        )
    return (Part(tuple(facts), tuple(range(len(facts))), model, changed),)


def _one_by_one(model: Model, changes: Sequence[Change], facts: Sequence[Fact]) -> tuple[Part, ...]:
    if not changes:
        raise ValueError("the list of changes is empty, needed at least one")
    serving: dict[Any, list[int]] = {}
    for i, change in enumerate(changes):
        for key in {identity(fact) for fact in change.facts}:
            serving.setdefault(key, []).append(i)
    served: dict[int, list[int]] = {}
    for i, fact in enumerate(facts):
        found = next((serving[key] for key in asked_as(fact) if key in serving), [])
        if len(found) != 1:
            raise ValueError(
                f"fact {fact.name!r} is in {len(found)} of the {len(changes)} changes, needed exactly one that was "
                "made for its subject, prompt and new object"
            )
        served.setdefault(found[0], []).append(i)
    return tuple(Part(tuple(facts[i] for i in mine), tuple(mine), model, changes[c]) for c, mine in served.items())


def bos_of_change(model: Model, changed: Changed, asked: bool | None = None) -> bool:
    """Whether prompts run with BOS: as the change was made, or for another model as asked.

    Raises:
        ValueError: It was made with another policy than asked, or some of a list with one and some with the other.
    """
    changes = changed if isinstance(changed, Sequence) else [changed] if isinstance(changed, Change) else []
    policies = {change.provenance.prepend_bos for change in changes}
    if len(policies) > 1:
        raise ValueError("some of the changes were made with BOS and some without, needed one policy: make them again")
    theirs = next(iter(policies), None)
    if asked is not None and theirs is not None and asked != theirs:
        raise ValueError(
            f"prepend_bos={asked}, but the change was made with {theirs}: audit it with its own policy, or make it "
            "with the other"
        )
    return bos_policy(model, asked if theirs is None else theirs)


def _each_once(reference: Sequence[Fact]) -> tuple[Fact, ...]:
    """References without those that ask what another asks; that there are such is told."""
    once: dict[tuple[str, str], Fact] = {}
    for fact in reference:
        once.setdefault((fact.text, fact.group), fact)
    if twice := len(reference) - len(once):
        tell(f"{counted(twice, 'reference')} of {len(reference)} ask what another one asks: each counts once")
    return tuple(once.values())


def check_facts_once(facts: Sequence[Fact]) -> None:
    """Check that no fact is asked twice: it would count as two.

    Raises:
        ValueError: One is.
    """
    twice = [name for name, count in Counter(map(identity, facts)).items() if count > 1]
    if twice:
        subject, prompt, _ = twice[0]
        raise ValueError(
            f"{prompt.replace('{}', subject)!r} is asked twice, needed each fact once: it would count as two facts"
        )


def _check_keepable(parts: Sequence[Part]) -> None:
    """Check that what is read of each change can be kept; nothing is run.

    Raises:
        ValueError: A change that can't be told from others, or a model that carries hooks of its own.
    """
    for part in parts:
        if isinstance(part.changed, Change) and not isinstance(part.changed, Digested):
            raise ValueError(
                f"a {type(part.changed).__name__} has no digest, so that nothing can be kept of it: needed a change "
                "with one (an Edit, a RoutedEdit), or no folder"
            )
    # Each once: a population has one unedited model.
    models = {id(each): each for part in parts for each in (part.unedited, part.changed)}
    for model in models.values():
        if isinstance(model, Model) and carries_hooks(model):
            raise ValueError(
                f"{model_name(model)} carries hooks of its own, which no fingerprint of its weights tells: nothing "
                "can be kept of it, needed no folder (or reset_hooks)"
            )


def _origin(changed: Change | Model) -> Any:
    """What tells a change or a model from others, in plain data."""
    if isinstance(changed, Digested):
        return changed.digest
    assert isinstance(changed, Model)
    return Provenance.of(changed).origin()
