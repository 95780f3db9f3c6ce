"""Is the old object still decodable after a change, and in which code?

Two linear probes answer, each a classifier over the objects of the relation at every layer and position, trained on
other subjects (`tl_factedit.probes.linear`):

native
    Trained on how unchanged facts are encoded where the changed facts are read: in the changed model, if one model
    serves all facts; in the unedited one for a list of single edits, which leave other subjects as they were.
adaptive
    Trained on facts that were changed in the same way, labelled with what each had before: it finds the old object in
    whatever code changed facts keep theirs in.

Both are compared with what the same kind of probe reads before the change, by ρ (`tl_factedit.probes.residual`), over
the cells that the change can have touched. What lies upstream of an edit is left out: it is the same by arithmetic.
Each relation has a probe of its own; a percentile is ½ where nothing is known, whatever the relation, so that facts of
several relations are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.auditing.calibration import Calibration, check_apart, unchanged
from tl_factedit.auditing.probe_plan import LEAST_OBJECTS, Plan, objects_with_subjects, plan_by_relation
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.measure.change import Change, Changed
from tl_factedit.measure.first_tokens import at_the_ends, with_new_objects
from tl_factedit.measure.population import BATCH_TOKENS, Part, Population, bos_of_change
from tl_factedit.probes.linear import LinearProbe, ProbeReadout, fit_linear_probe
from tl_factedit.probes.residual import Residual, residual_knowledge
from tl_factedit.probes.states import INPUT, HiddenStates, read_states

LEAST_HOLDING = 0.8
"""Of its own facts a calibration's change has to hold for this share."""

LEAST_SKILL = 0.5
"""Least ratio of a native probe's accuracy above chance, on unchanged facts of the changed model, to that of a probe of
the unedited model: one that is blind there finds nothing, whatever there is."""


@dataclass(frozen=True, eq=False)
class Retention:
    """What the native and the adaptive probes read.

    Attributes:
        native: ρ by the native probes; None if there is none.
        adaptive: ρ by the adaptive probes; None if there is none.
        transfer: Accuracy of the native probe on unchanged facts of what it reads, each by a fit without it,
            [layer position]; the mean over relations if there are several.
        facts: The facts that were read: those whose old object is a class.
        n_native: Number of facts that the native probes were trained on.
        n_adaptive: Number of facts that the adaptive probes were trained on.
        why: Why there is no probe, or why facts were left out.
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
        """Both ρ in one line."""
        shown = [
            f"{what} {'none' if found is None else format(found.pooled, '.2f')} ({n} training facts)"
            for what, found, n in (
                ("native", self.native, self.n_native),
                ("adaptive", self.adaptive, self.n_adaptive),
            )
        ]
        over = f" over {len(self.relations)} relations" if len(self.relations) > 1 else ""
        return f"Retention(ρ {', '.join(shown)}{over})"


@plain_torch()
def retention(population: Population, calibration: Calibration | None = None, *, seed: int = 0) -> Retention:
    """Read the old objects of some facts, by linear probes of each relation.

    Args:
        population: What to read, each fact with ``target_new``. References about changed subjects are left out.
        calibration: The same kind of change for other subjects, to train the adaptive probes on.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: A fact without ``target_new``, or a subject both among the facts and in the calibration.
    """
    facts, changed, bos = with_new_objects(population.facts), population.changed, population.prepend_bos
    model, parts, touched = population.model, population.parts, population.touched
    if calibration is not None:
        check_apart(calibration, facts)
    given = calibration
    others = [fact for fact in unchanged(population.reference, changed, calibration) if fact.subject not in touched]
    plans, notes = plan_by_relation(facts, others)
    if not plans:
        return Retention(None, None, None, (), 0, 0, tuple(notes), {})
    if calibration is not None:
        holds = _holds(population, calibration)
        if holds < LEAST_HOLDING:
            notes.append(
                f"the calibration's change holds for {holds:.0%} of its own facts, needed {LEAST_HOLDING:.0%}: states "
                "that weren't changed alike teach no adaptive probe"
            )
            calibration = None
    asked = tuple(fact for plan in plans for fact in plan.facts)
    clean = read_states(model, asked, prepend_bos=bos)
    after = states_of_changed(population.asking(asked))
    cells = _touched_cells(clean, parts)
    before, native, adaptive = list[ProbeReadout](), list[ProbeReadout](), list[_Adaptive]()
    transfer, there, here = list[Tensor](), list[Tensor](), list[Tensor]()
    begin = 0
    for plan in tqdm(plans, desc="probes", unit="relation", delay=1, disable=not population.progress, leave=False):
        rows = list(range(begin, begin + len(plan.facts)))
        begin += len(plan.facts)
        unedited = fit_linear_probe(read_states(model, plan.others, prepend_bos=bos), objects=plan.objects)
        own = _native(model, changed, plan, unedited, bos)
        before.append(unedited.read(clean.take(rows)))
        native.append(own.read(after.take(rows)))
        transfer.append(own.held_out_accuracy)
        there.append(own.held_out_accuracy - 1 / len(plan.objects))
        here.append(unedited.held_out_accuracy - 1 / len(plan.objects))
        if calibration is not None:
            found = _adaptive(population, calibration, plan, clean.take(rows), after.take(rows))
            if found is None:
                notes.append(f"the calibration has too few facts for each old object{plan.of}: no adaptive probe")
            else:
                adaptive.append(found)
    if given is None:
        notes.append("no calibration (the same change made for other subjects) was given: no adaptive probe")
    read = _residual(
        before, native, cells, seed, notes, "the native probe reads the old objects nowhere even before the change"
    )
    if read is not None:
        skill = float(torch.stack(there).sum(0)[read.cells].mean() / torch.stack(here).sum(0)[read.cells].mean())
        if not skill >= LEAST_SKILL:
            notes.append(
                f"the native probe reads unchanged facts of the changed model {skill:.0%} as well as one of the "
                f"unedited model does there, needed {LEAST_SKILL:.0%}: what it doesn't find needn't be absent, no ρ"
            )
            read = None
    return Retention(
        native=read,
        adaptive=_residual(
            [pair.before for pair in adaptive],
            [pair.after for pair in adaptive],
            cells,
            seed,
            notes,
            "with so few calibration facts nothing is read before the change either",
        ),
        transfer=torch.stack(transfer).mean(0),
        facts=asked,
        n_native=sum(readout.probe.n_train for readout in native),
        n_adaptive=sum(pair.after.probe.n_train for pair in adaptive),
        why=tuple(notes),
        relations={plan.relation: len(plan.facts) for plan in plans},
    )


def _holds(population: Population, calibration: Calibration) -> float:
    """Of the calibration's facts that have a new object, the share in which it is likelier than the old one.

    1 where no fact has one: of an erasure nothing new need lead.
    """
    facts = [fact for fact in calibration.facts if fact.target_new is not None and fact.target_true is not None]
    if not facts:
        return 1.0
    bos_of_change(population.model, calibration.changed, population.prepend_bos)
    asking = replace(population, changed=calibration.changed).asking(facts)
    asked = asking.first_tokens

    def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact"]:
        found = torch.zeros(len(indices))
        for row, logits in at_the_ends(runner, [asked[i].ids for i in indices], BATCH_TOKENS):
            one = asked[indices[row]]
            found[row] = float(logits[one.new] > logits[one.old]) if one.apart else math.nan
        return found

    return float(asking.after("calibration holds", read, settings=()).nanmean())


def states_of_changed(population: Population) -> HiddenStates:
    """The states of each fact under the change that serves it, in the order of the facts."""
    bos = population.prepend_bos
    sample = read_states(population.model, population.facts[:1], prepend_bos=bos)  # for its labels

    def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "fact layer position d_model"]:
        return read_states(runner.model, [population.facts[i] for i in indices], prepend_bos=bos).values

    values = population.after("states", read, settings=())
    return HiddenStates(values, sample.layers, sample.positions, population.facts, "changed")


def _native(model: Model, changed: Changed, plan: Plan, unedited: LinearProbe, bos: bool) -> LinearProbe:
    """The probe that is native to where the changed facts are read."""
    if isinstance(changed, Sequence):
        return unedited
    if isinstance(changed, Change):
        with changed.applied(model) as tested:
            there = read_states(tested, plan.others, prepend_bos=bos)
    else:
        there = read_states(changed, plan.others, prepend_bos=bos)
    return fit_linear_probe(there, objects=plan.objects)


@dataclass(frozen=True, eq=False)
class _Adaptive:
    """What an adaptive probe reads, and what one trained on the same subjects' states before the change reads."""

    before: ProbeReadout
    after: ProbeReadout


def _adaptive(
    population: Population, calibration: Calibration, plan: Plan, clean: HiddenStates, after: HiddenStates
) -> _Adaptive | None:
    known = [fact for fact in calibration.facts if fact.group == plan.relation]
    objects = objects_with_subjects(known, least=2)
    if len(objects) < LEAST_OBJECTS or not {fact.target_true for fact in plan.facts} <= set(objects):
        return None
    others = [fact for fact in known if fact.target_true in objects]
    bos_of_change(population.model, calibration.changed, population.prepend_bos)
    changed = states_of_changed(replace(population, changed=calibration.changed).asking(others))
    # Before the change by as many training facts, of the same subjects: a probe of few reads less.
    unedited = read_states(population.model, others, prepend_bos=population.prepend_bos)
    before = fit_linear_probe(unedited, objects=objects)
    return _Adaptive(before.read(clean), fit_linear_probe(changed, objects=objects).read(after))


def _residual(
    before: Sequence[ProbeReadout],
    after: Sequence[ProbeReadout],
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
    """The cells that a change can have touched for every fact: from its first layer on; all, if it is another model.

    Of changes with different first layers the last counts: below it some facts are as they were, and would be found
    retained.
    """
    first = max(min(part.changed.layers) if isinstance(part.changed, Change) else INPUT + 1 for part in parts)
    after = torch.tensor([isinstance(layer, int) and layer >= first for layer in states.layers])
    return after[:, None].expand(len(states.layers), len(states.positions))
