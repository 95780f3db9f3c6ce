"""Is the old object still decodable after a change, and in which code?

Two rulers answer, each a linear classifier over the objects of the relation at every layer and position, trained on
other subjects (`probes.linear`):

native
    trained on how unchanged facts are encoded where the changed facts are read: in the changed model, if it is one for
    all; in the unedited one for a list of single edits, which leave other subjects as they were.
adaptive
    trained on facts that were changed in the same way, labelled with what each had before: it finds the old object in
    whatever code changed facts keep theirs.

Both are set against what the same kind of ruler reads before the change, ρ (`probes.residual`), over the cells that
the change can have touched. What lies upstream of an edit is left out: it is the same by arithmetic. Facts of several
relations have a ruler each; a percentile is ½ where nothing is known whatever the relation, so that their facts are
pooled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.core.facts import Fact
from tl_factedit.measure.change import Change, Changed
from tl_factedit.measure.first_tokens import with_new_objects
from tl_factedit.measure.population import Part, Population, bos_of_change
from tl_factedit.probes.linear import Decoded, Ruler, decode, train_ruler
from tl_factedit.probes.residual import Residual, residual_knowledge
from tl_factedit.probes.states import INPUT, HiddenStates, read_states

LEAST_FOR_AN_OBJECT = 4
"""Training subjects that an object needs to be a class; a ruler of few is blind and would find nothing anywhere."""

LEAST_OBJECTS = 8
"""With fewer, the new object says much about the old one (of two, all)."""

LEAST_SKILL = 0.5
"""What a native ruler's accuracy above chance on unchanged facts of the changed model has to be, beside the unedited
model's: one that is blind there finds nothing, whatever there is."""


@dataclass(frozen=True)
class Calibration:
    """The same kind of change, made for other subjects of the relation: what an adaptive ruler is trained on.

    Attributes:
        changed: A change for all of them, or one for each, or the model in which they are changed.
        facts: What it was made for.
    """

    changed: Changed
    facts: Sequence[Fact]


@dataclass(frozen=True, eq=False)
class Retention:
    """What the rulers read.

    Attributes:
        native: ρ by the native rulers; None if there is none.
        adaptive: ρ by the adaptive ones; None if there is none.
        transfer: Accuracy of the native ruler on unchanged facts of what it reads, each by a fit without it,
            [layer position]; of several relations their mean.
        facts: Which of the facts were read: those whose old object is a class.
        n_native: On how many facts the native rulers were trained.
        n_adaptive: The adaptive ones.
        why: Why there is no ruler, or fewer facts.
        relations: How many facts were read of each relation (or prompt, where no relation is named).
    """

    native: Residual | None
    adaptive: Residual | None
    transfer: Tensor | None
    facts: tuple[Fact, ...]
    n_native: int
    n_adaptive: int
    why: tuple[str, ...]
    relations: Mapping[str, int]

    def __repr__(self) -> str:
        """Both in a line."""
        shown = [
            f"{what} {'none' if found is None else format(found.pooled, '.2f')} ({n} training facts)"
            for what, found, n in (
                ("native", self.native, self.n_native),
                ("adaptive", self.adaptive, self.n_adaptive),
            )
        ]
        over = f" over {len(self.relations)} relations" if len(self.relations) > 1 else ""
        return f"Retention(ρ {', '.join(shown)}{over})"


def retention(population: Population, calibration: Calibration | None = None, *, seed: int = 0) -> Retention:
    """Read the old objects of some facts, each by rulers of its relation.

    Args:
        population: What to read, each fact with ``target_new``. Of its references, those about changed subjects are
            left out by themselves.
        calibration: For the adaptive rulers; about other subjects.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: A fact without ``target_new``; or a subject that is asked and in the calibration.
    """
    facts, changed, bos = with_new_objects(population.facts), population.changed, population.prepend_bos
    model, parts, touched = population.model, population.parts, population.touched
    if calibration is not None:
        check_apart(calibration, facts)
    others = [fact for fact in unchanged(population.reference, changed, calibration) if fact.subject not in touched]
    plans, notes = _plans(facts, others)
    if not plans:
        return Retention(None, None, None, (), 0, 0, tuple(notes), {})
    asked = tuple(fact for plan in plans for fact in plan.facts)
    clean = read_states(model, asked, prepend_bos=bos)
    after = states_of_changed(population.asking(asked))
    cells = _touched_cells(clean, parts)
    before, native, adaptive = list[Decoded](), list[Decoded](), list[_Adaptive]()
    transfer, there, here = list[Tensor](), list[Tensor](), list[Tensor]()
    begin = 0
    for plan in tqdm(plans, desc="rulers", unit="relation", delay=1, disable=not population.progress, leave=False):
        mine = list(range(begin, begin + len(plan.facts)))
        begin += len(plan.facts)
        unedited = train_ruler(read_states(model, plan.others, prepend_bos=bos), objects=plan.objects)
        own = _native(model, changed, plan, unedited, bos)
        before.append(decode(unedited, clean.take(mine)))
        native.append(decode(own, after.take(mine)))
        transfer.append(own.held_out_accuracy)
        there.append(own.held_out_accuracy - 1 / len(plan.objects))
        here.append(unedited.held_out_accuracy - 1 / len(plan.objects))
        if calibration is not None:
            found = _adaptive(population, calibration, plan, clean.take(mine), after.take(mine))
            if found is None:
                notes.append(f"the calibration has too few facts for each old object{plan.of}: no adaptive ruler")
            else:
                adaptive.append(found)
    if calibration is None:
        notes.append("no calibration (the same change made for other subjects) was given: no adaptive ruler")
    read = _residual(
        before, native, cells, seed, notes, "the native ruler reads the old objects nowhere even before the change"
    )
    if read is not None:
        skill = float(torch.stack(there).sum(0)[read.cells].mean() / torch.stack(here).sum(0)[read.cells].mean())
        if not skill >= LEAST_SKILL:
            notes.append(
                f"the native ruler reads unchanged facts of the changed model {skill:.0%} as well as one of the "
                f"unedited model does there, needed {LEAST_SKILL:.0%}: what it doesn't find needn't be absent, no ρ"
            )
            read = None
    return Retention(
        native=read,
        adaptive=_residual(
            [found.before for found in adaptive],
            [found.after for found in adaptive],
            cells,
            seed,
            notes,
            "with so few calibration facts nothing is read before the change either",
        ),
        transfer=torch.stack(transfer).mean(0),
        facts=asked,
        n_native=sum(found.ruler.n_train for found in native),
        n_adaptive=sum(found.after.ruler.n_train for found in adaptive),
        why=tuple(notes),
        relations={plan.relation: len(plan.facts) for plan in plans},
    )


def states_of_changed(population: Population) -> HiddenStates:
    """Each fact's states under the change that serves it, in the order of the facts."""
    bos = population.prepend_bos
    sample = read_states(population.model, population.facts[:1], prepend_bos=bos)  # for its labels

    def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact layer position d_model"]:
        return read_states(runner.model, [population.facts[i] for i in indices], prepend_bos=bos).values

    values = population.after("states", read)
    return HiddenStates(values, sample.layers, sample.positions, population.facts, "changed")


@dataclass(frozen=True, eq=False)
class _Plan:
    """The rulers of one relation.

    Attributes:
        relation: Its name.
        objects: The classes.
        facts: What is read: those whose old object is a class.
        others: What the native ruler is trained on.
        several: Whether there are other relations.
    """

    relation: str
    objects: tuple[str, ...]
    facts: tuple[Fact, ...]
    others: tuple[Fact, ...]
    several: bool

    @property
    def of(self) -> str:
        """Of which relation, in words, where there are several."""
        return f" of {self.relation!r}" if self.several else ""


def _plans(facts: Sequence[Fact], others: Sequence[Fact]) -> tuple[list[_Plan], list[str]]:
    """A plan for each relation that there can be rulers of, and why not for the others."""
    relations = list(dict.fromkeys(fact.group for fact in facts))
    plans, notes = list[_Plan](), list[str]()
    for relation in relations:
        mine = [fact for fact in facts if fact.group == relation]
        known = [fact for fact in others if fact.group == relation]
        objects = _objects(known)
        if len(objects) < LEAST_OBJECTS:
            notes.append(
                f"the references give {len(objects)} objects of {relation!r} with {LEAST_FOR_AN_OBJECT} or more other "
                f"subjects each, needed {LEAST_OBJECTS}: no decoder was trained"
                + (f" for its {len(mine)} facts" if len(relations) > 1 else "")
            )
            continue
        kept = [fact for fact in mine if fact.target_true in objects]
        plan = _Plan(
            relation,
            tuple(objects),
            tuple(kept),
            tuple(fact for fact in known if fact.target_true in objects),
            len(relations) > 1,
        )
        if len(kept) < len(mine):
            notes.append(
                f"{len(mine) - len(kept)} facts{plan.of} were left out: too few other subjects have their old objects"
            )
        if kept:
            plans.append(plan)
    return plans, notes


def unchanged(reference: Sequence[Fact], changed: Changed, calibration: Calibration | None) -> list[Fact]:
    """The references, without the calibration's subjects where one model is changed: it has changed those too."""
    if calibration is None or isinstance(changed, (Change, Sequence)):
        return list(reference)
    subjects = {fact.subject for fact in calibration.facts}
    return [fact for fact in reference if fact.subject not in subjects]


def check_apart(calibration: Calibration, facts: Sequence[Fact]) -> None:
    """See that no subject is both asked and in the calibration."""
    overlap = sorted({fact.subject for fact in facts} & {fact.subject for fact in calibration.facts})
    if overlap:
        raise ValueError(
            f"{len(overlap)} subjects, such as {overlap[0]!r}, are in the calibration and among the facts, needed "
            "others: a ruler recognises those it was trained on"
        )


def _objects(facts: Sequence[Fact], *, least: int = LEAST_FOR_AN_OBJECT) -> list[str]:
    """The objects that enough different subjects have, in order of their names."""
    counts = Counter(target for target in {fact.subject: fact.old for fact in facts}.values())
    return sorted(target for target, count in counts.items() if count >= least)


def _native(model: Model, changed: Changed, plan: _Plan, unedited: Ruler, bos: bool) -> Ruler:
    """The ruler that is native to where the changed facts are read."""
    if isinstance(changed, Sequence):
        return unedited
    if isinstance(changed, Change):
        with changed.applied(model) as tested:
            there = read_states(tested, plan.others, prepend_bos=bos)
    else:
        there = read_states(changed, plan.others, prepend_bos=bos)
    return train_ruler(there, objects=plan.objects)


@dataclass(frozen=True, eq=False)
class _Adaptive:
    """What an adaptive ruler reads, and what one of the same people and as many facts read before the change."""

    before: Decoded
    after: Decoded


def _adaptive(
    population: Population, calibration: Calibration, plan: _Plan, clean: HiddenStates, after: HiddenStates
) -> _Adaptive | None:
    known = [fact for fact in calibration.facts if fact.group == plan.relation]
    objects = _objects(known, least=2)
    if len(objects) < LEAST_OBJECTS or not {fact.target_true for fact in plan.facts} <= set(objects):
        return None
    others = [fact for fact in known if fact.target_true in objects]
    bos_of_change(population.model, calibration.changed, population.prepend_bos)
    changed = states_of_changed(replace(population, changed=calibration.changed).asking(others))
    # Before the change by as many training facts, and of the same people: a ruler of few reads less.
    unedited = read_states(population.model, others, prepend_bos=population.prepend_bos)
    before = train_ruler(unedited, objects=objects)
    return _Adaptive(decode(before, clean), decode(train_ruler(changed, objects=objects), after))


def _residual(
    before: Sequence[Decoded],
    after: Sequence[Decoded],
    cells: Bool[Tensor, "layer position"],
    seed: int,
    notes: list[str],
    nowhere: str,
) -> Residual | None:
    """ρ, or None (and a note) if no cell counts."""
    if not before:
        return None
    found = residual_knowledge(before, after, cells=cells, seed=seed)
    if bool(found.cells.any()):
        return found
    notes.append(f"{nowhere}: no ρ")
    return None


def _touched_cells(states: HiddenStates, parts: Sequence[Part]) -> Bool[Tensor, "layer position"]:
    """The cells that a change can have touched, of every fact: from its first layer on; of another model, all.

    Of changes in several layers the last counts: below it some facts are as they were, and would be found retained.
    """
    first = max(min(part.changed.layers) if isinstance(part.changed, Change) else INPUT + 1 for part in parts)
    after = torch.tensor([isinstance(layer, int) and layer >= first for layer in states.layers])
    return after[:, None].expand(len(states.layers), len(states.positions))
