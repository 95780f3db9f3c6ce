"""What did a change do to some facts, and what did it leave?

`audit` gathers what bears on that, each number with its null, and `rules.judge` makes a label of it:

- does the change work (`evaluate`), and what else does it break: neighbours, the subject's other facts, plain text;
- without what the change wrote, is the old object still there (*elsewhere*);
- with the change in force, does it come back (*underneath*);
- can it be decoded, as facts are encoded here or in another code (*retained*).

What *cannot* have changed is checked bit for bit and reported as such: everything up to the key of an edit. A lens, the
gain of an edit and its dose curve are shown and never judged: they have no null, or say the same of a perfect edit.
What wasn't gathered is listed, and no label claims more than was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tl_factedit.attacks.attack import Attack
from tl_factedit.attacks.context import ContextAttack
from tl_factedit.attacks.disjoint_relearning import DisjointRelearning
from tl_factedit.attacks.drifting import Drift
from tl_factedit.attacks.knockout import KnockOut
from tl_factedit.attacks.neutral import NeutralContexts, neutral_prefixes
from tl_factedit.attacks.readout import ReadOut
from tl_factedit.attacks.reversal import WeightReversal
from tl_factedit.attacks.rewording import Paraphrases
from tl_factedit.attacks.rounding import Rounding
from tl_factedit.attacks.routes import FollowRoutes, Route, as_routes
from tl_factedit.auditing.calibration import Calibration, check_apart, unchanged
from tl_factedit.auditing.findings import Thresholds
from tl_factedit.auditing.gather import Plan, findings_of, gather, is_erasure, with_controls
from tl_factedit.auditing.positive import found_in_an_override
from tl_factedit.auditing.provenance import AuditProvenance
from tl_factedit.auditing.rules import judge
from tl_factedit.auditing.unedited import check_way_round, describe_beside, edits_beside, subjects_written
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.auditing.wording import (
    describe_context,
    not_compared,
    of_what_was_written,
    recoverable_axis,
    retained_axis,
    what_is_missing,
)
from tl_factedit.backend.fingerprint import hashed_once
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact, as_facts, need_old_object
from tl_factedit.core.kinds import as_several, check_flags, check_one
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import check_all
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import check_objective
from tl_factedit.editing.objectives import Objective
from tl_factedit.measure.change import Change, Changed, check_made_for
from tl_factedit.measure.population import Population, check_facts_once

ABSENCES = ("ERASED", "MOVED", "LATENT", "SCARRED")
"""Labels that say that no way back was found."""

BUDGET, PARAPHRASES = 20, 2
"""Of the read-out at a budget (Patil et al. 2023): so many tokens, over the prompt and so many paraphrases."""


@plain_torch()
def audit(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    reference: Sequence[Fact] | None = None,
    routes: Sequence[Route] = (),
    same_subject: Sequence[Fact] = (),
    texts: Sequence[str] = (),
    calibration: Calibration | None = None,
    attacks: Attack | Sequence[Attack] = (),
    full: bool = False,
    objective: Objective | None = None,
    thresholds: Thresholds | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    force: bool = False,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Verdict:
    """Ask what became of some facts' old objects.

    Only `model`, `changed` and `facts` are needed; what else is given makes more of the evidence possible, and the
    verdict says what is missing.

    Args:
        model: The unchanged model (an `Edit` must not be applied to it). Other edits on it are told of, unless the
            change was made on top of them.
        changed: An edit of it (or a router), a list with one for each fact, or the model as it was changed in any
            other way.
        facts: The changed facts, each with ``target_new``. Their paraphrases and neighbours are scored; their
            ``controls`` are the null of whatever asks for the old object (facts without any get the other objects of
            their relation among `facts` and `reference`).
        reference: Facts of the same relations about other subjects, which nothing changed: what a knock-out puts in
            place (five a relation), and what decoders are trained on (hundreds). None: with a change for each fact, the
            other facts; otherwise none. Those about subjects that the change, or an edit on one of the models, was
            made for are left out.
        routes: What follows from the facts (`Route`).
        same_subject: Other facts about the same subjects, which should stay.
        texts: Plain text that has nothing to do with them.
        calibration: The same kind of change made for other subjects (`Calibration`).
        attacks: Further attacks, beside those that every audit makes (`KnockOut`, `Paraphrases`, `ReadOut` of one
            token a layer and of 20, and `FollowRoutes` where routes are given), or a single one; one of the same type
            takes the place of the default ones.
        full: Whether to make all attacks that a claim of absence needs: to also drop the largest directions of the
            changed weights (`WeightReversal`) and round them (`Rounding`), to put the old object before the prompt
            (`ContextAttack`) or the objects of `same_subject` (`NeutralContexts`) and, of one change for all facts, to
            teach some facts and look at the others (`DisjointRelearning`) and to train on `texts` (`Drift`). Where an
            absence would be claimed, all of them but the knock-out are then made on overrides of the same facts, and
            what the claim rests on has to find one. With `progress` it is said beforehand what it will cost.
        objective: What the change was to bring about: of `Erase` that the old object no longer leads, of anything else
            that the new one does. None: what an edit was made with, and `Inject` for anything else.
        thresholds: What counts as how much; None: the declared ones, `Thresholds()`.
        prepend_bos: BOS policy of a model changed in another way; None for its default. An edit has its own.
        seed: Seed of the bootstraps.
        force: Whether to ask about facts that a single change wasn't made for; the verdict then says nothing about the
            change (mostly that it failed). Of a list of changes each fact needs its own all the same.
        folder: Where to keep what is read of each change: a call that was killed resumes there, and one of more facts
            asks only what is new. Nothing is taken from it that depends on other weights, changes, facts, settings or
            versions.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The verdict. Over one fact it is descriptive; claims want many.

    Raises:
        TypeError: An attack that can't be called, a class in place of a value, or one that returns no `Recovery`.
        ValueError: The change is the model itself, or the changed model is given first (an edit of one of the facts
            is on `model` and not on `changed`); the edit is applied to the model already, isn't of this model, or was
            made with another BOS policy; a fact that the change wasn't made for (by subject, prompt and new object),
            unless `force`; a fact given twice, or without ``target_new`` (for an erasure, any other object: it is what
            the old one is compared with), or that no change of a list was made for; some edits that erase among others
            that don't; two attacks of one name.

    Example:
        >>> verdict = fe.audit(model, edit, [fact])               # doctest: +SKIP
        >>> verdict.label, verdict.table()                        # doctest: +SKIP
    """
    facts = as_facts(facts)
    check_flags(full=full, force=force, progress=progress)
    if objective is not None:
        check_objective(objective)
    if calibration is not None:
        check_one(calibration, Calibration, "calibration", "fe.Calibration(changed, facts)")
    if thresholds is not None:
        check_one(thresholds, Thresholds, "thresholds", "fe.Thresholds(...)")
    routes, same_subject = as_routes(routes), as_facts(same_subject, "same_subject")
    texts = as_several(texts, str, "texts", "a text")
    attacks = tuple(attacks) if isinstance(attacks, Sequence) else (attacks,)
    reference = None if reference is None else as_facts(reference, "reference")
    with hashed_once(model):
        population = _population(model, changed, facts, reference, calibration, prepend_bos, folder, progress, force)
        carried = [describe_beside(beside)] if (beside := edits_beside(model, changed)) else []
        for said in carried:
            tell(said)
        erasing = is_erasure(population, objective)
        usual = _usual(population, attacks, routes, same_subject, texts, full, seed)
        plan = Plan(
            attacks=(*usual, *attacks),
            usual=len(usual),
            routes=routes,
            same_subject=same_subject,
            texts=texts,
            calibration=calibration,
            erasing=erasing,
            seed=seed,
            full=full,
        )
        plan.check(population)
        thresholds = Thresholds() if thresholds is None else thresholds
        evidence = gather(population, plan)
        one_change = not isinstance(changed, Sequence)
        findings = findings_of(evidence, erasing=erasing, facts=len(population.facts), one_change=one_change)
        found = judge(findings, thresholds)
        if found.label in ABSENCES:
            controlled = population.asking([fact for fact in population.facts if fact.controls])
            findings = replace(findings, control=found_in_an_override(controlled, plan.attacks, evidence.attacks))
            found = judge(findings, thresholds)
        return Verdict(
            label=found.label,
            level="per edit" if findings.few else "population",
            by=found.by,
            retained=retained_axis(findings, evidence.retention),
            recoverable=recoverable_axis(findings),
            reasons=(*found.reasons, *of_what_was_written(evidence), *describe_context(evidence)),
            missing=(*not_compared(evidence.after), *found.missing, *what_is_missing(evidence), *carried),
            power=found.power,
            findings=findings,
            thresholds=thresholds,
            before=evidence.before,
            after=evidence.after,
            erasure_success=evidence.erasure_success,
            attacks=evidence.attacks,
            retention=evidence.retention,
            specificity=evidence.specificity,
            drift=evidence.drift,
            upstream=evidence.upstream,
            lens=evidence.lens,
            gains=evidence.gains,
            dose=evidence.dose,
            facts=population.facts,
            provenance=AuditProvenance.of(population, plan),
        )


def _population(
    model: Model,
    changed: Changed,
    facts: tuple[Fact, ...],
    reference: Sequence[Fact] | None,
    calibration: Calibration | None,
    prepend_bos: bool | None,
    folder: str | Path | None,
    progress: bool,
    force: bool,
) -> Population:
    """What is audited: each fact once, with controls, and with the references that the change left alone."""
    need_old_object(facts, "an audit")
    check_facts_once(facts)
    others = tuple(facts if reference is None and isinstance(changed, Sequence) else reference or ())
    population = Population.of(
        model, changed, facts, reference=others, prepend_bos=prepend_bos, folder=folder, progress=progress, force=True
    )
    check_way_round(model, changed, facts)
    for part in population.parts:
        if isinstance(part.changed, Edit):
            part.changed.check(model)
    room = getattr(model.cfg, "n_ctx", None)
    check_all(model.tokenizer, facts, prepend_bos=population.prepend_bos, room=room)
    if isinstance(changed, Change) and not force:  # what can't be asked at all is refused as such, first
        check_made_for(changed, [fact for fact in facts if fact.target_new is not None], "an audit")
    if calibration is not None:
        check_apart(calibration, facts)
        others = tuple(unchanged(others, changed, calibration))
    asked = [with_controls(fact, (*facts, *others)) for fact in facts]
    return replace(population, force=force).asking(asked, _left_alone(population, others))


def _left_alone(population: Population, others: Sequence[Fact]) -> list[Fact]:
    """The references about subjects that no edit on one of the models was made for, nor the change itself.

    With a change for each fact the other facts are references, each of which knows its own change.
    """
    written = subjects_written(population.model, population.changed)
    own = frozenset[str]() if isinstance(population.changed, Sequence) else population.touched
    on = sorted({fact.subject for fact in others if fact.subject in written - own})
    if on:
        tell(
            f"edits on the models were made for {len(on)} subjects of the references, such as {on[0]!r}: these are "
            "left out"
        )
    return [fact for fact in others if fact.subject not in written | own]


def _usual(
    population: Population,
    given: Sequence[Attack],
    routes: tuple[Route, ...],
    same_subject: Sequence[Fact],
    texts: tuple[str, ...],
    full: bool,
    seed: int,
) -> tuple[Attack, ...]:
    """The attacks that every audit makes, and those of a full one; without those whose type the user gave himself."""
    usual: list[Attack] = [KnockOut(partial=True, seed=seed), ReadOut(seed=seed)]
    if any(fact.paraphrases for fact in population.facts):
        usual.append(Paraphrases(seed=seed))
    usual.append(ReadOut(budget=BUDGET, paraphrases=PARAPHRASES, seed=seed))
    if routes:
        usual.append(FollowRoutes(routes))
    if full:
        usual += [WeightReversal(neighbours=0, seed=seed), Rounding(seed=seed), ContextAttack(seed=seed)]
        prefixes = neutral_prefixes(same_subject, seed=seed)
        usual += [NeutralContexts(prefixes, seed=seed)] if prefixes else []
        if not isinstance(population.changed, Sequence):
            usual.append(DisjointRelearning(seed=seed))
            usual += [Drift(texts, seed=seed)] if texts else []
    own = {type(attack) for attack in given}
    return tuple(attack for attack in usual if type(attack) not in own)
