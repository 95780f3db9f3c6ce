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
the change can have touched. What lies upstream of an edit is left out: it is the same by arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_factedit.change import Change, Changed, bos_of_change, each
from tl_factedit.facts import Fact
from tl_factedit.model import Model
from tl_factedit.probes.linear import Ruler, decode, train_ruler
from tl_factedit.probes.residual import Residual, residual_knowledge
from tl_factedit.states import INPUT, States, read_states

LEAST_FOR_AN_OBJECT = 4
"""Training subjects that an object needs to be a class; a ruler of few is blind and would find nothing anywhere."""
LEAST_OBJECTS = 8
"""With fewer, the new object says much about the old one (of two, all)."""


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
        native: ρ by the native ruler; None if there is none.
        adaptive: ρ by the adaptive one; None if there is none.
        transfer: Accuracy of the native ruler on unchanged facts of what it reads, each by a fit without it,
            [layer position].
        facts: Which of the facts were read: those whose old object is a class.
        n_native: On how many facts the native ruler was trained.
        n_adaptive: The adaptive one.
        why: Why there is no ruler, or fewer facts.
    """

    native: Residual | None
    adaptive: Residual | None
    transfer: Tensor | None
    facts: tuple[Fact, ...]
    n_native: int
    n_adaptive: int
    why: tuple[str, ...]

    def __repr__(self) -> str:
        """Both in a line."""
        shown = [
            f"{what} {'none' if found is None else format(found.pooled, '.2f')} ({n} training facts)"
            for what, found, n in (
                ("native", self.native, self.n_native),
                ("adaptive", self.adaptive, self.n_adaptive),
            )
        ]
        return f"Retention(ρ {', '.join(shown)})"


def retention(
    model: Model,
    changed: Changed,
    facts: Sequence[Fact],
    reference: Sequence[Fact],
    calibration: Calibration | None = None,
    *,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Retention:
    """Read the old objects of some facts of one relation.

    Args:
        model: The unedited model.
        changed: A change of it, a list with a change for each fact, or another model.
        facts: Each with ``target_new``.
        reference: Facts of the same relation about other subjects, which nothing changed; those about changed
            subjects are left out by themselves.
        calibration: For the adaptive ruler; about other subjects.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        seed: Of the bootstrap.

    Raises:
        ValueError: No facts, or one without ``target_new``.
    """
    facts = tuple(facts)
    for fact in facts:
        if fact.target_new is None:
            raise ValueError(f"fact {fact.name!r} has no target_new, needed one: fact.but(target_new=...)")
    parts = list(each(model, changed, facts))
    touched = frozenset().union(*(part.touched for part in parts))
    others = [fact for fact in reference if fact.subject not in touched]
    why = _why_not(facts, others)
    if why:
        return Retention(None, None, None, (), 0, 0, (why,))
    objects = _objects(others)
    kept = [i for i, fact in enumerate(facts) if fact.target_true in objects]
    left_out = len(facts) - len(kept)
    notes = [f"{left_out} facts were left out: too few other subjects have their old objects"] if left_out else []
    asked = [facts[i] for i in kept]
    others = [fact for fact in others if fact.target_true in objects and fact.relation == facts[0].relation]
    if not asked:
        return Retention(None, None, None, (), 0, 0, ("no other subjects have any of the old objects",))
    bos = bos_of_change(model, changed, prepend_bos)
    clean = read_states(model, asked, prepend_bos=bos)
    unedited = train_ruler(read_states(model, others, prepend_bos=bos), objects=objects)
    after, native = _read_all(model, changed, asked, others, objects, unedited, bos)
    cells = _touched_cells(clean, changed)
    before = decode(unedited, clean)
    found = residual_knowledge(before, decode(native, after), cells=cells, seed=seed)
    if not bool(found.cells.any()):
        notes.append("the native ruler reads the old objects nowhere even before the change: no ρ")
    adaptive, n_adaptive = None, 0
    if calibration is None:
        notes.append("no calibration (the same change made for other subjects) was given: no adaptive ruler")
    else:
        adaptive, n_adaptive, note = _adaptive(model, calibration, asked, clean, after, cells, bos, seed)
        notes += [note] if note else []
    return Retention(
        native=found if bool(found.cells.any()) else None,
        adaptive=adaptive,
        transfer=native.held_out_accuracy,
        facts=tuple(asked),
        n_native=native.n_train,
        n_adaptive=n_adaptive,
        why=tuple(notes),
    )


def states_of_changed(
    model: Model, changed: Changed, facts: Sequence[Fact], *, prepend_bos: bool | None = None
) -> States:
    """Each fact's states under the change that serves it, in the order of the facts."""
    bos = bos_of_change(model, changed, prepend_bos)
    found: dict[int, Tensor] = {}
    read: States | None = None
    for part in each(model, changed, facts):
        with part.applied() as tested:
            read = read_states(tested, part.facts, prepend_bos=bos)
        found |= dict(zip(part.indices, read.values, strict=True))
    assert read is not None
    return States(
        torch.stack([found[i] for i in range(len(facts))]), read.layers, read.positions, tuple(facts), "changed"
    )


def _read_all(
    model: Model,
    changed: Changed,
    asked: Sequence[Fact],
    others: Sequence[Fact],
    objects: Sequence[str],
    unedited: Ruler,
    bos: bool,
) -> tuple[States, Ruler]:
    """The facts' states after the change, and the ruler that is native to where they were read."""
    after = states_of_changed(model, changed, asked, prepend_bos=bos)
    if isinstance(changed, Sequence):
        return after, unedited
    if isinstance(changed, Change):
        with changed.applied(model) as tested:
            there = read_states(tested, others, prepend_bos=bos)
    else:
        there = read_states(changed, others, prepend_bos=bos)
    return after, train_ruler(there, objects=objects)


def _adaptive(
    model: Model,
    calibration: Calibration,
    asked: Sequence[Fact],
    clean: States,
    after: States,
    cells: Bool[Tensor, "layer position"],
    bos: bool,
    seed: int,
) -> tuple[Residual | None, int, str]:
    mine = {fact.subject for fact in asked}
    overlap = sorted(mine & {fact.subject for fact in calibration.facts})
    if overlap:
        raise ValueError(
            f"{len(overlap)} subjects, such as {overlap[0]!r}, are in the calibration and among the facts, needed "
            "others: a ruler recognises those it was trained on"
        )
    objects = _objects(calibration.facts, least=2)
    able = [i for i, fact in enumerate(asked) if fact.target_true in objects]
    others = [fact for fact in calibration.facts if fact.target_true in objects]
    if len(objects) < LEAST_OBJECTS or len(able) < len(asked):
        return None, 0, "the calibration has too few facts for each old object: no adaptive ruler"
    ruler = train_ruler(states_of_changed(model, calibration.changed, others, prepend_bos=bos), objects=objects)
    # Before the change by as many training facts, and of the same people: a ruler of few reads less.
    before = decode(train_ruler(read_states(model, others, prepend_bos=bos), objects=objects), clean)
    read = decode(ruler, after)
    found = residual_knowledge(before, read, cells=cells, seed=seed)
    if not bool(found.cells.any()):
        return (
            None,
            ruler.n_train,
            "with so few calibration facts nothing is read before the change either: no adaptive ρ",
        )
    return found, ruler.n_train, ""


def _objects(facts: Sequence[Fact], *, least: int = LEAST_FOR_AN_OBJECT) -> list[str]:
    """The objects that enough different subjects have, in order of their names."""
    counts = Counter(target for target in {fact.subject: fact.target_true for fact in facts}.values())
    return sorted(target for target, count in counts.items() if count >= least)


def _why_not(facts: Sequence[Fact], others: Sequence[Fact]) -> str:
    relations = sorted({str(fact.relation) for fact in facts})
    if len(relations) > 1:
        return (
            f"the facts are of {len(relations)} relations: a ruler is of one, so audit each relation apart to have "
            "its decoders"
        )
    count = len(_objects([fact for fact in others if fact.relation == facts[0].relation]))
    if count < LEAST_OBJECTS:
        return (
            f"the references give {count} objects of {relations[0]!r} with {LEAST_FOR_AN_OBJECT} or more other "
            f"subjects each, needed {LEAST_OBJECTS}: no decoder was trained"
        )
    return ""


def _touched_cells(states: States, changed: Changed) -> Bool[Tensor, "layer position"]:
    """The cells that a change can have touched: from its first layer on; of another model, all after a block."""
    changes = changed if isinstance(changed, Sequence) else [changed] if isinstance(changed, Change) else []
    first = min((layer for change in changes for layer in change.layers), default=INPUT + 1)
    after = torch.tensor([isinstance(layer, int) and layer >= first for layer in states.layers])
    return after[:, None].expand(len(states.layers), len(states.positions))
