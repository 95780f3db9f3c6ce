"""What an audit measures: evidence, and the findings that the rules read of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from tl_factedit.attacks.attack import Attack, Recovery
from tl_factedit.attacks.routes import Route, Routes, check_routes
from tl_factedit.auditing.cost import announced, reckoned
from tl_factedit.auditing.findings import NEEDED, OF_ONE_CHANGE, AttackFinding, Findings
from tl_factedit.auditing.retained import Calibration, Retention, retention
from tl_factedit.auditing.upstream import Upstream, all_upstream
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import check_length
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.objectives import Erase, Objective
from tl_factedit.evaluation.dose import Dose, dose_curve
from tl_factedit.evaluation.edit_gains import Gains, gains
from tl_factedit.evaluation.erasure import ErasureSuccess, erasure_success
from tl_factedit.evaluation.same_subject import Specificity, check_same_subject, pair_same_subject, specificity
from tl_factedit.evaluation.scores import Answer, Scores, evaluate, scores_of
from tl_factedit.evaluation.text_drift import TextDrift, drift
from tl_factedit.measure.population import Population
from tl_factedit.measure.reading import Comparison, Reading
from tl_factedit.measure.texts import encode_texts
from tl_factedit.probes.lens import LogitLens


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be measured.

    Attributes:
        attacks: In their order.
        usual: How many of these, the first, are the audit's own: one that can't be run with what was given is noted.
        routes: What follows from the facts.
        same_subject: Other facts about the same subjects.
        texts: Plain text.
        calibration: What the adaptive decoders are trained on.
        erasing: Whether the change was to erase.
        seed: Seed of the bootstraps.
        full: Whether it was asked for in full, so that what it will cost is said beforehand.
    """

    attacks: tuple[Attack, ...]
    usual: int
    routes: tuple[Route, ...]
    same_subject: tuple[Fact, ...]
    texts: tuple[str, ...]
    calibration: Calibration | None
    erasing: bool
    seed: int
    full: bool = False

    def check(self, population: Population) -> None:
        """Check that all of it can be asked, before anything is run.

        Raises:
            ValueError: Something can't; the message says what.
        """
        for attack in self.attacks:
            if isinstance(attack, type) or not callable(attack):
                what = f"the class {attack.__name__}" if isinstance(attack, type) else repr(attack)
                raise ValueError(f"attacks holds {what}, needed values such as KnockOut(): a class isn't one")
        model, bos = population.model, population.prepend_bos
        check_routes(model, self.routes, bos)
        pair_same_subject(population.facts, self.same_subject)
        check_same_subject(model, self.same_subject, bos)
        calibrated = () if self.calibration is None else self.calibration.facts
        for what, facts in (("reference", population.reference), ("calibration fact", calibrated)):
            for fact in facts:
                room = getattr(model.cfg, "n_ctx", None)
                check_length(model.tokenizer, fact.text, f"{what} {fact.name!r}", prepend_bos=bos, room=room)
        if self.texts:
            encode_texts(model, self.texts, bos)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured; None: not gathered. See `Verdict` for the fields."""

    before: Scores
    after: Scores
    lens: Comparison
    erasure_success: ErasureSuccess | None
    attacks: tuple[Recovery, ...]
    specificity: Specificity | None
    drift: TextDrift | None
    retention: Retention | None
    upstream: Upstream | None
    dose: Dose | None
    gains: tuple[Gains, ...]
    not_run: tuple[str, ...] = ()

    @property
    def routes(self) -> Routes | None:
        """The indirect routes one by one."""
        return next((found.details["routes"] for found in self.attacks if "routes" in found.details), None)


def gather(population: Population, plan: Plan) -> Evidence:
    """Measure all of a plan; whatever is kept in the population's folder is taken from there.

    Raises:
        TypeError: An attack that doesn't return a `Recovery`.
        ValueError: Two attacks whose results have one name.
    """
    stages = tqdm(
        total=4 + len(plan.attacks), desc="audit", unit="step", delay=1, disable=not population.progress, leave=False
    )
    edits = [part.changed for part in population.parts if isinstance(part.changed, Edit)]
    model, facts = population.model, population.facts
    if population.progress and plan.full:
        tqdm.write(announced(reckoned(population, plan.attacks)))
    with stages:
        stages.set_postfix_str("scores and lens")
        before, after, lens = _scores_and_lens(population)
        gone = erasure_success(population) if plan.erasing else None
        stages.update()
        recoveries, not_run = list[Recovery](), list[str]()
        controlled = [fact for fact in facts if fact.controls]
        attacked = population.asking(controlled) if controlled else None  # once, with its tokens
        for place, attack in enumerate(plan.attacks):
            stages.set_postfix_str(type(attack).__name__)
            if attacked is not None:
                try:
                    recoveries.append(_recovery_of(attack, attacked, recoveries))
                except ValueError as error:
                    if place >= plan.usual:
                        raise
                    not_run.append(f"{type(attack).__name__} couldn't be run: {error}")
            stages.update()
        recoveries = corrected_together(recoveries)
        stages.set_postfix_str("what else broke")
        beside = specificity(population, plan.same_subject) if plan.same_subject else None
        drifted = drift(population, plan.texts) if plan.texts else None
        stages.update()
        stages.set_postfix_str("decoders")
        kept = retention(population, plan.calibration, seed=plan.seed) if population.reference else None
        stages.update()
        alone = edits[0] if len(population.parts) == 1 and edits else None
        stages.set_postfix_str("what can't have changed")
        upstream = all_upstream(population) if len(edits) == len(population.parts) else None
        stages.update()
    return Evidence(
        before=before,
        after=after,
        lens=lens,
        erasure_success=gone,
        attacks=tuple(recoveries),
        specificity=beside,
        drift=drifted,
        retention=kept,
        upstream=upstream,
        dose=dose_curve(model, alone, facts, force=True) if alone is not None else None,
        gains=()
        if alone is None
        else tuple(
            gains(model, alone, text) for fact in facts for text in (fact.text, *map(fact.fill, fact.paraphrases))
        ),
        not_run=tuple(not_run),
    )


def corrected_together(recoveries: Sequence[Recovery]) -> list[Recovery]:
    """Each with intervals that hold for all cases of all of them; what doesn't say its counts stays as it is."""
    tests = sum(int(recovery.tested.sum()) for recovery in recoveries)
    return [recovery if recovery.counted is None else recovery.among(tests) for recovery in recoveries]


def _recovery_of(attack: Attack, population: Population, others: Sequence[Recovery]) -> Recovery:
    """What an attack brings back, under a name that none of the others has."""
    found: object = attack(population)
    if not isinstance(found, Recovery):
        raise TypeError(
            f"{type(attack).__name__} returned a {type(found).__name__}, needed a Recovery: Recovery.of(...)"
        )
    if any(other.attack == found.attack for other in others):
        raise ValueError(
            f"two attacks are called {found.attack!r}, needed a name for each: it says which one a verdict speaks of"
        )
    return found


def findings_of(evidence: Evidence, *, erasing: bool, facts: int, one_change: bool) -> Findings:
    """The numbers that the rules read."""
    gone, kept, routes = evidence.erasure_success, evidence.retention, evidence.routes
    tests = sum(int(recovery.tested.sum()) for recovery in evidence.attacks)
    tried = {recovery.attack for recovery in evidence.attacks if bool(recovery.tested.any())}
    needed = [name for name in NEEDED if one_change or name not in OF_ONE_CHANGE]
    return Findings(
        efficacy=evidence.after.efficacy if gone is None else gone.prompt,
        paraphrase=evidence.after.paraphrase if gone is None else gone.paraphrase,
        neighbour_loss=_loss_of_neighbours(evidence.before, evidence.after),
        specificity_loss=None if evidence.specificity is None else _complement(evidence.specificity.kept),
        perplexity=None if evidence.drift is None else evidence.drift.perplexity_ratio,
        attacks=tuple(
            finding
            for recovery in evidence.attacks
            for shows in ("elsewhere", "underneath", "residue")
            if (finding := AttackFinding.of(recovery, shows, tests)) is not None
        ),
        route_new=None if routes is None else routes.new,
        native=None if kept is None or kept.native is None else kept.native.pooled,
        adaptive=None if kept is None or kept.adaptive is None else kept.adaptive.pooled,
        erasing=erasing,
        facts=facts,
        untried=tuple(name for name in needed if name not in tried),
    )


def is_erasure(population: Population, objective: Objective | None) -> bool:
    """Whether the change was to erase."""
    if objective is not None:
        return isinstance(objective, Erase)
    edits = [part.changed for part in population.parts if isinstance(part.changed, Edit)]
    erase = {edit.editor.get("objective") == repr(Erase()) for edit in edits}
    if len(erase) > 1:
        raise ValueError("some of the edits erase and some don't, needed one objective: audit them apart")
    return erase == {True}


def with_controls(fact: Fact, among: Sequence[Fact]) -> Fact:
    """With the other objects of its relation as controls, if it has none of its own."""
    if fact.controls:
        return fact
    targets = dict.fromkeys(other.target_true for other in among if other.group == fact.group)
    return fact.but(controls=[each for each in targets if each not in (fact.target_true, fact.target_new)])


def _scores_and_lens(population: Population) -> tuple[Scores, Scores, Comparison]:
    """Scores and lens of each fact, before and under the change that serves it; the provenance is that of the first."""
    facts, bos = population.facts, population.prepend_bos
    lens = LogitLens(prepend_bos=bos)
    before, lens_before = evaluate(population.model, facts, prepend_bos=bos), lens(population.model, facts)

    def read(runner: Runner, indices: tuple[int, ...]) -> tuple[tuple[Answer, ...], torch.Tensor, str]:
        chosen = [facts[i] for i in indices]
        scores = evaluate(runner.model, chosen, prepend_bos=bos)
        return scores.answers, lens(runner.model, chosen).values, json.dumps(scores.provenance.to_json())

    answers: list[Answer] = []
    values: dict[int, torch.Tensor] = {}
    provenance: list[str] = []
    for part, (mine, read_there, where) in population.each("scores", read, settings=(), kinds=(Answer,)):
        answers += [replace(answer, fact=part.indices[answer.fact]) for answer in mine]
        values |= dict(zip(part.indices, read_there, strict=True))
        provenance.append(where)
    answers.sort(key=lambda answer: answer.fact)
    reading: Reading = replace(lens_before, values=torch.stack([values[i] for i in range(len(facts))]))
    after = scores_of(facts, tuple(answers), Provenance.from_json(json.loads(provenance[0])))
    return before, after, Comparison(lens_before, reading)


def _loss_of_neighbours(before: Scores, after: Scores) -> Estimate | None:
    """By how much each fact's neighbourhood success fell."""
    if not after.neighbourhood.n:
        return None
    loss = []
    for i in range(len(after.facts)):
        shares = [
            [a.success for a in scores.answers if a.fact == i and a.ask == "neighbour"] for scores in (before, after)
        ]
        loss.append(float("nan") if not shares[0] else (sum(shares[0]) - sum(shares[1])) / len(shares[0]))
    most_gained = min(0.0, before.neighbourhood.mean - 1)  # of facts that weren't seen: what was missing of success
    return over_facts(loss, span=(most_gained, 1.0))


def _complement(kept: Estimate) -> Estimate:
    return Estimate(1 - kept.mean, 1 - kept.high, 1 - kept.low, kept.n)
