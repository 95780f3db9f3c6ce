"""Was the fact edited, or was a new one laid over it?

`audit` gathers what bears on that, each number with its null, and `verdict.judge` makes a label of it:

- does the change work (`evaluate`), and what else does it break: neighbours, the subject's other facts, plain text;
- is the old object back when one place is knocked out, or on indirect routes (*recoverable*);
- can it be decoded, as facts are encoded here or in another code (*retained*).

What *cannot* have changed is checked bit for bit and reported as such: everything up to the key of an edit. A lens, the
gain of an edit and its dose curve are shown and never judged: they have no null, or say the same of a perfect edit.
What wasn't gathered is listed, and no label claims more than was.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import torch

from tl_factedit.measure.change import Change, Changed, Part, bos_of_change, each, identity
from tl_factedit.evaluation.specificity import Asides, Drift, ask_asides, drift, encode_texts, pair_asides
from tl_factedit.editing.edit import Edit
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.evaluation.scores import Answer, Scores, evaluate, scores_of
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.evaluation.erasure_success import Forgotten, forgotten
from tl_factedit.evaluation.gains import Dose, Gains, dose_curve, gains
from tl_factedit.measure.cache import check_keepable, read_each
from tl_factedit.attacks.knockout import LEAST_REFERENCES, KnockOut, knock_out, windows_of
from tl_factedit.backend.model import (
    Model,
    Runner,
    as_layers,
    component_hook,
    down_proj,
    fingerprint,
    n_layers,
    quiet,
    resid_pre,
)
from tl_factedit.editing.objectives import Erase, Objective
from tl_factedit.measure.reading import Comparison, Reading
from tl_factedit.probes.lens import LogitLens
from tl_factedit.backend.provenance import Provenance
from tl_factedit.attacks.readout import ReadOut, read_out
from tl_factedit.attacks.relearning import Relearning
from tl_factedit.auditing.retention import Calibration, Retention, check_apart, retention, unchanged
from tl_factedit.attacks.routes import Route, Routes, check_routes, follow_routes
from tl_factedit.core.tokens import align
from tl_factedit.auditing.rules import Findings, Label, Thresholds, judge

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Upstream:
    """What an edit cannot have changed, and the check that it didn't.

    Attributes:
        layer: The first edited layer.
        invariant: Whether all residuals and attention outputs up to that layer, and its key, are
            equal bit for bit with and without the edit, at every position of every fact's prompt.
        changed_after: Whether its MLP output is *not* equal: the check can see a change.
        positions: How many token positions were compared.
    """

    layer: int
    invariant: bool
    changed_after: bool
    positions: int


@dataclass(frozen=True)
class Axis:
    """One of the verdict's two axes.

    Attributes:
        estimate: The measurement that decides, or None if none was gathered.
        says: What that means, in words.
    """

    estimate: Estimate | None
    says: str


@dataclass(frozen=True)
class Verdict:
    """The result of `audit`.

    Attributes:
        label: FAILED, DAMAGED, INSERTED, MOVED, LATENT, SCARRED, ERASED or INCONCLUSIVE (see `tl_factedit.auditing.rules`).
        level: ``"per edit"`` (one fact: descriptive) or ``"population"``.
        retained: Is the old object still decodable, at places that the change can have touched?
        recoverable: Does it come back by a way that goes past the change?
        reasons: Why this label, with the numbers.
        missing: Evidence that stronger labels need and that was not gathered, or not precisely enough.
        power: The smallest effects that would have shown.
        findings: The numbers that the label rests on.
        thresholds: What counted as how much.
        before: Scores of the unchanged model.
        after: Scores of the changed one.
        forgotten: Of a change that was to erase, whether the old object still leads; None for any other.
        knock_out: Evidence on recoverability; None if it could not be gathered.
        routes: The same.
        retention: Evidence on what is retained; None if it could not be gathered.
        read_out: White-box attacks at the last token; None if no fact has controls.
        relearning: What was given; None if nothing was.
        asides: What else is known of the subjects; None if nothing was asked.
        drift: On plain text; None if none was given.
        upstream: What cannot have changed (None for a model changed in another way).
        lens: Logit-lens readings before and after; `Reading.at` and ``.table()`` give numbers. Descriptive.
        gains: Of the edit over each fact's prompt and paraphrases (a single `Edit` only). Descriptive.
        dose: Dose curve of each fact (a single `Edit` only). Descriptive.
        facts: What was asked.
    """

    label: Label
    level: Literal["per edit", "population"]
    retained: Axis
    recoverable: Axis
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    power: tuple[str, ...]
    findings: Findings
    thresholds: Thresholds
    before: Scores
    after: Scores
    forgotten: Forgotten | None
    knock_out: KnockOut | None
    routes: Routes | None
    retention: Retention | None
    read_out: ReadOut | None
    relearning: Relearning | None
    asides: Asides | None
    drift: Drift | None
    upstream: Upstream | None
    lens: Comparison
    gains: tuple[Gains, ...]
    dose: Dose | None
    facts: tuple[Fact, ...]

    def table(self) -> pd.DataFrame:
        """One row a fact: probabilities before and after, knock-out, lens at the end, and for one edit its dose."""
        import pandas as pd

        last = len(self.lens.after.axes["layer"]) - 1
        back = self._back()
        rows = []
        for i, fact in enumerate(self.facts):
            was, now = (
                next(a for a in s.answers if a.fact == i and a.ask == "rewrite") for s in (self.before, self.after)
            )
            at_end = [reading.values[i, last, 1] for reading in (self.lens.before, self.lens.after)]
            rank = self.lens.after.axes["quantity"].index("rank_old")
            rows.append(
                {
                    "fact": fact.name,
                    "old": fact.target_true,
                    "new": fact.target_new,
                    "p_old_before": math.exp(-was.nll_true),
                    "p_old_after": math.exp(-now.nll_true),
                    "p_new_before": math.exp(-was.nll_new),
                    "p_new_after": math.exp(-now.nll_new),
                    "old_back_by_knock_out": back.get(fact, math.nan),
                    "rank_old_before": float(at_end[0][rank]),
                    "rank_old_after": float(at_end[1][rank]),
                    "override_margin": math.nan if self.dose is None else float(self.dose.override_margin[i]),
                    "critical_dose": math.nan if self.dose is None else float(self.dose.critical[i]),
                    "success": now.success if self.forgotten is None else self.forgotten.gone(i),
                    "same_first_token": now.same_first_token,
                }
            )
        return pd.DataFrame(rows)

    def _back(self) -> dict[Fact, float]:
        """Of each fact, whether the old object is first under the strongest knock-out."""
        if self.knock_out is None or self.knock_out.best is None:
            return {}
        first = self.knock_out.after.at(window=self.knock_out.best, quantity="old_first")
        return dict(zip(self.knock_out.facts, first.tolist(), strict=True))

    def __repr__(self) -> str:
        """Label, reasons and what is missing."""
        lines = [f"Verdict: {self.label} ({self.level}, {len(self.facts)} facts)"]
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"  retained: {self.retained.says}", f"  recoverable: {self.recoverable.says}"]
        for what, found in (("what would have shown", self.power), ("not gathered", self.missing)):
            lines += [f"  {what}:", *(f"    - {line}" for line in found)] if found else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The label, its reasons and the facts; `show.verdict` has the pictures."""
        lists = (("Why", self.reasons), ("What would have shown", self.power), ("Not gathered", self.missing))
        shown = "".join(
            f"<p><b>{what}</b></p><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
            for what, lines in lists
            if lines
        )
        head = f"<h3>{self.label}</h3><p>{self.level}, {len(self.facts)} facts</p>"
        return head + shown + self.table().to_html(float_format="{:.3f}".format, index=False)


def audit(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    *,
    reference: Sequence[Fact] | None = None,
    routes: Sequence[Route] = (),
    asides: Sequence[Fact] = (),
    texts: Sequence[str] = (),
    calibration: Calibration | None = None,
    relearning: Relearning | None = None,
    objective: Objective | None = None,
    widths: Sequence[int] | None = None,
    thresholds: Thresholds | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Verdict:
    """Ask what became of some facts' old objects.

    Only `model`, `changed` and `facts` are needed; what else is given makes more of the evidence possible, and the
    verdict says what is missing.

    Args:
        model: The unchanged model (an `Edit` must not be applied to it).
        changed: An edit of it (or a router), a list with one for each fact, or the model as it was changed in any
            other way.
        facts: The changed facts, each with ``target_new``. Their paraphrases and neighbours are scored; their
            ``controls`` are the null of whatever asks for the old object (facts without any get the other objects of
            their relation among `facts` and `reference`).
        reference: Facts of the same relations about other subjects, which nothing changed: what a knock-out puts in
            place (five a relation), and what decoders are trained on (hundreds). None: with a change for each fact, the
            other facts; otherwise none.
        routes: What follows from the facts (`Route`).
        asides: Other facts about the same subjects, which should stay.
        texts: Plain text that has nothing to do with them.
        calibration: The same kind of change made for other subjects (`Calibration`).
        relearning: What `relearn` measured on the same facts; it trains, so it is left to you.
        objective: What the change was to bring about: of `Erase` that the old object no longer leads, of anything else
            that the new one does. None: what an edit was made with, and `Inject` for anything else.
        widths: How many layers to knock out together; None: one, and as many as reach from the first that the change
            wrote to the last.
        thresholds: What counts as how much; None: the declared ones, `Thresholds()`.
        prepend_bos: BOS policy of a model changed in another way; None for its default. An edit has its own.
        seed: Of the bootstraps.
        folder: Where to keep what is read of each change: a call that was killed goes on from there, and one of more
            facts asks only what is new. Nothing is taken from it that hangs on other weights, changes, facts, settings
            or versions.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        The verdict. Over one fact it is descriptive; claims want many.

    Raises:
        ValueError: The edit is applied to the model already, isn't of this model, or was made with another BOS
            policy; a fact given twice, or without ``target_new`` (for an erasure, any other object: it is what the old
            one is compared with), or that no change of a list was made for; some edits that erase among others that
            don't.

    Example:
        >>> verdict = fe.audit(model, edit, [fact])               # doctest: +SKIP
        >>> verdict.label, verdict.table()                        # doctest: +SKIP
    """
    facts = as_facts(facts)
    routes, asides, texts = tuple(routes), tuple(asides), tuple(texts)
    widths = None if widths is None else as_layers(widths)
    twice = [name for name, count in Counter(map(identity, facts)).items() if count > 1]
    if twice:
        subject, prompt, _ = twice[0]
        raise ValueError(
            f"{prompt.replace('{}', subject)!r} is asked twice, needed each fact once: it would count as two facts"
        )
    if relearning is not None and {*map(identity, relearning.facts)} != {*map(identity, facts)}:
        raise ValueError("relearning is of other facts than are audited, needed what relearn measured on the same")
    parts = list(each(model, changed, facts))
    edits = [part.changed for part in parts if isinstance(part.changed, Edit)]
    for edit in edits:
        edit.check(model)
    check_keepable(parts, folder)
    erasing = _erases(edits, objective)
    bos = bos_of_change(model, changed, prepend_bos)
    for fact in facts:
        align(model.tokenizer, fact, prepend_bos=bos)
    others = tuple(facts if reference is None and isinstance(changed, Sequence) else reference or ())
    if calibration is not None:
        check_apart(calibration, facts)
        others = tuple(unchanged(others, changed, calibration))
    facts = tuple(_with_controls(fact, (*facts, *others)) for fact in facts)
    thresholds = thresholds or Thresholds()
    parts = list(each(model, changed, facts))  # with their controls, as they are asked
    written = [_written(part) for part in parts]
    _check_asked(model, facts, widths, routes, asides, texts, bos)

    lens = LogitLens(prepend_bos=bos)
    before, lens_before = evaluate(model, facts, prepend_bos=bos), lens(model, facts)
    how: _How = {"prepend_bos": bos, "folder": folder, "progress": progress}
    after, lens_after = _each_after(parts, facts, lens, lens_before, how)
    gone = forgotten(model, changed, facts, **how) if erasing else None
    alone = edits[0] if len(parts) == 1 and edits else None
    able, left_out = _can_be_knocked(facts, others, parts)
    spans = widths or sorted({1, max((max(each) - min(each) + 1 for each in written if each), default=1)})
    knocked = (
        knock_out(model, changed, [facts[i] for i in able], others, widths=spans, seed=seed, **how) if able else None
    )
    controlled = [fact for fact in facts if fact.controls]
    attacked = read_out(model, changed, controlled, seed=seed, **how) if controlled else None
    routed = follow_routes(model, changed, routes, **how) if routes else None
    beside = ask_asides(model, changed, facts, asides, **how) if asides else None
    drifted = drift(model, changed, facts, texts, **how) if texts else None
    kept = retention(model, changed, facts, others, calibration, seed=seed, **how) if others else None
    findings = Findings(
        efficacy=after.efficacy if gone is None else gone.prompt,
        paraphrase=after.paraphrase if gone is None else gone.paraphrase,
        neighbour_loss=_neighbour_loss(before, after),
        aside_loss=None if beside is None else _minus_from_one(beside.kept),
        perplexity=None if drifted is None else drifted.perplexity_ratio,
        mask=None if knocked is None else knocked.strongest,
        mask_at_most=math.nan if knocked is None else _largest(knocked.excess.high[knocked.tested]),
        mask_tests=0 if knocked is None else int(knocked.tested.sum()),
        mask_holds=_holds(knocked, written),
        route_old=None if routed is None else routed.old_excess,
        route_new=None if routed is None else routed.new,
        native=None if kept is None or kept.native is None else kept.native.pooled,
        adaptive=None if kept is None or kept.adaptive is None else kept.adaptive.pooled,
        readout=None if attacked is None else attacked.strongest,
        readout_at_most=math.nan if attacked is None else _largest(attacked.excess.high),
        savings=None if relearning is None else relearning.savings,
        erasing=erasing,
        facts=len(facts),
    )
    found = judge(findings, thresholds)
    upstream = _all_upstream(model, parts) if len(edits) == len(parts) else None
    dose = dose_curve(model, alone, facts) if alone is not None else None
    comparison = Comparison(lens_before, lens_after)
    return Verdict(
        label=found.label,
        level="per edit" if len(facts) == 1 else "population",
        retained=_retained(findings, kept),
        recoverable=_recoverable(findings),
        reasons=(*found.reasons, *_own_layers(knocked, written), *_describe(upstream, dose, comparison)),
        missing=(*found.missing, *left_out, *(() if kept is None else kept.why), *_masked(knocked, written, widths)),
        power=found.power,
        findings=findings,
        thresholds=thresholds,
        before=before,
        after=after,
        forgotten=gone,
        knock_out=knocked,
        routes=routed,
        retention=kept,
        read_out=attacked,
        relearning=relearning,
        asides=beside,
        drift=drifted,
        upstream=upstream,
        lens=comparison,
        gains=() if alone is None else _gains(model, alone, facts),
        dose=dose,
        facts=facts,
    )


# ------------------------------------------------------------------------------------ gathering


def _erases(edits: Sequence[Edit], objective: Objective | None) -> bool:
    """Whether the change was to erase."""
    if objective is not None:
        return isinstance(objective, Erase)
    erase = {edit.editor.get("objective") == repr(Erase()) for edit in edits}
    if len(erase) > 1:
        raise ValueError("some of the edits erase and some don't, needed one objective: audit them apart")
    return erase == {True}


def _with_controls(fact: Fact, among: Sequence[Fact]) -> Fact:
    """With the other objects of its relation as controls, if it has none of its own."""
    if fact.controls:
        return fact
    targets = dict.fromkeys(other.target_true for other in among if other.group == fact.group)
    return fact.but(controls=[each for each in targets if each not in (fact.target_true, fact.target_new)])


class _How(TypedDict):
    """What all measurements of changes are told alike."""

    prepend_bos: bool
    folder: str | Path | None
    progress: bool


def _each_after(
    parts: Sequence[Part], facts: tuple[Fact, ...], lens: LogitLens, before: Reading, how: _How
) -> tuple[Scores, Reading]:
    """Scores and lens of each fact under the change that serves it; the provenance is that of the first."""

    def read(tested: Model, part: Part) -> tuple[tuple[Answer, ...], torch.Tensor, str]:
        scores = evaluate(tested, part.facts, prepend_bos=how["prepend_bos"])
        return scores.answers, lens(tested, part.facts).values, json.dumps(scores.provenance.to_json())

    answers: list[Answer] = []
    values: dict[int, torch.Tensor] = {}
    provenance: list[str] = []
    asked = {"settings": how["prepend_bos"]}
    kept = read_each(
        parts, read, what="scores", asked=asked, folder=how["folder"], kinds=(Answer,), progress=how["progress"]
    )
    for part, (mine, read_there, where) in kept:
        answers += [replace(answer, fact=part.indices[answer.fact]) for answer in mine]
        values |= dict(zip(part.indices, read_there, strict=True))
        provenance.append(where)
    answers.sort(key=lambda answer: answer.fact)
    reading = replace(before, values=torch.stack([values[i] for i in range(len(facts))]))
    return scores_of(facts, tuple(answers), Provenance.from_json(json.loads(provenance[0]))), reading


def _check_asked(
    model: Model,
    facts: Sequence[Fact],
    widths: Sequence[int] | None,
    routes: Sequence[Route],
    asides: Sequence[Fact],
    texts: Sequence[str],
    bos: bool,
) -> None:
    """See that all that is given can be asked, before anything is run."""
    if widths is not None:
        windows_of(n_layers(model), widths)
    check_routes(model, routes, bos)
    pair_asides(facts, asides)
    if texts:
        encode_texts(model, texts, bos)


def _written(part: Part) -> tuple[int, ...] | None:
    """The layers that a change wrote; None for another model that differs in more than ``W_out``."""
    if isinstance(part.changed, Change):
        return part.changed.layers
    here, there = fingerprint(part.unedited), fingerprint(part.changed)
    if (here.rest, here.layout, len(here.w_out)) != (there.rest, there.layout, len(there.w_out)):
        return None
    return tuple(i for i, both in enumerate(zip(here.w_out, there.w_out, strict=True)) if both[0] != both[1])


def _can_be_knocked(
    facts: Sequence[Fact], reference: Sequence[Fact], parts: Sequence[Part]
) -> tuple[list[int], list[str]]:
    """The facts that have controls, and references enough; and why the others can't be asked."""
    of_relation = {(fact.group, fact.subject) for fact in reference}
    able, without, few = list[int](), 0, Counter[str]()
    for part in parts:
        for i in part.indices:
            count = sum(relation == facts[i].group and subject not in part.touched for relation, subject in of_relation)
            if not facts[i].controls:
                without += 1
            elif count < LEAST_REFERENCES:
                few[facts[i].group] += 1
            else:
                able.append(i)
    notes = [f"{without} facts weren't knocked out: they have no controls"] if without and reference else []
    notes += [
        f"{count} facts of {relation!r} weren't knocked out: fewer than {LEAST_REFERENCES} references"
        for relation, count in few.items()
        if reference
    ]
    return sorted(able), notes


def _holds(knocked: KnockOut | None, written: Sequence[tuple[int, ...] | None]) -> bool | None:
    """Whether all that was written is knocked out by some window that could be tested."""
    if knocked is None or any(layers is None for layers in written):
        return None
    tested = [set(window) for window, yes in zip(knocked.windows, knocked.tested.tolist(), strict=True) if yes]
    return all(any(set(layers or ()) <= window for window in tested) for layers in written)


def _largest(ends: torch.Tensor) -> float:
    """The largest of some upper ends, not corrected (each has to show its absence)."""
    known = ends[~ends.isnan()]
    return float(known.max()) if len(known) else math.nan


def _masked(
    knocked: KnockOut | None, written: Sequence[tuple[int, ...] | None], widths: Sequence[int] | None
) -> Iterator[str]:
    if knocked is None:
        return
    for window, why in knocked.masked.items():
        yield f"knock-out of layers {list(window)} tells nothing: {why}"
    if widths is None and None in written:
        yield "knock-outs of several layers together (widths=): what is in two of them wouldn't show in one"


def _own_layers(knocked: KnockOut | None, written: Sequence[tuple[int, ...] | None]) -> Iterator[str]:
    """What a knock-out of the changed layers themselves says less of."""
    if knocked is None or knocked.best is None:
        return
    changed = {layer for layers in written for layer in layers or ()}
    if changed and changed <= set(knocked.best):
        share = float(knocked.of_unedited[knocked.windows.index(knocked.best)])
        yield (
            f"the strongest knock-out takes out all that the change wrote: what comes back ({share:.2f} of what the "
            "unedited model says under it) is what that model knows by other ways; it shows that such ways exist, and "
            "that the change left them"
        )


def _gains(model: Model, edit: Edit, facts: Sequence[Fact]) -> tuple[Gains, ...]:
    return tuple(gains(model, edit, text) for fact in facts for text in (fact.text, *map(fact.fill, fact.paraphrases)))


def check_upstream(model: Model, edit: Edit, facts: Sequence[Fact]) -> Upstream:
    """Compare everything up to the first edited key with and without the edit, bit for bit."""
    first = edit.layers[0]
    site = down_proj(model, first)
    places = [
        *(resid_pre(layer) for layer in range(first + 1)),
        *(component_hook("attn", layer) for layer in range(first + 1)),
        site.key_hook,
    ]
    mlp_out = component_hook("mlp", first)
    rows = [align(model.tokenizer, fact, prepend_bos=edit.provenance.prepend_bos) for fact in facts]

    def all_rows(runner: Runner) -> list[dict[str, torch.Tensor]]:
        # Each alone, as bits are compared: what a row is computed beside may change them.
        return [runner.capture(row.ids[None], [*places, mlp_out], stop=first + 1) for row in rows]

    with quiet(model), torch.no_grad():
        before = all_rows(Runner(model))
        with edit.applied(model):
            after = all_rows(Runner(model))
    both = list(zip(before, after, strict=True))
    return Upstream(
        first,
        invariant=all(torch.equal(was[place], now[place]) for was, now in both for place in places),
        changed_after=not any(torch.equal(was[mlp_out], now[mlp_out]) for was, now in both),
        positions=sum(len(row.ids) for row in rows),
    )


def _all_upstream(model: Model, parts: Sequence[Part]) -> Upstream:
    found = [check_upstream(model, part.changed, part.facts) for part in parts if isinstance(part.changed, Edit)]
    return Upstream(
        min(each.layer for each in found),
        all(each.invariant for each in found),
        all(each.changed_after for each in found),
        sum(each.positions for each in found),
    )


# ------------------------------------------------------------------------------------ what it comes to


def _neighbour_loss(before: Scores, after: Scores) -> Estimate | None:
    """By how much each fact's neighbourhood success fell."""
    if not after.neighbourhood.n:
        return None
    loss = []
    for i in range(len(after.facts)):
        shares = [
            [a.success for a in scores.answers if a.fact == i and a.ask == "neighbour"] for scores in (before, after)
        ]
        loss.append(math.nan if not shares[0] else (sum(shares[0]) - sum(shares[1])) / len(shares[0]))
    return over_facts(loss)  # where all facts lose alike, others may lose nothing, or all


def _minus_from_one(kept: Estimate) -> Estimate:
    return Estimate(1 - kept.mean, 1 - kept.high, 1 - kept.low, kept.n)


def _retained(findings: Findings, kept: Retention | None) -> Axis:
    if kept is None:
        return Axis(None, "not gathered: decoders want facts of the same relation about other subjects (reference=)")
    rho = findings.native or findings.adaptive
    if rho is None:
        return Axis(None, f"not gathered: {'; '.join(kept.why)}")
    return Axis(rho, f"ρ = {rho:.2f} (1: as before the change, 0: nothing; retained is not used)")


def _recoverable(findings: Findings) -> Axis:
    measured = [each for each in (findings.mask, findings.route_old) if each is not None and each.n]
    if not measured:
        return Axis(None, "not gathered: no way back to the old object was tried (reference=, routes=)")
    strongest = max(measured, key=lambda each: each.mean)
    return Axis(strongest, f"the old object is back in excess of controls by {strongest:.2f}, by the best way tried")


def _describe(upstream: Upstream | None, dose: Dose | None, lens: Comparison) -> list[str]:
    lines = []
    if upstream is not None:
        state = "equal bit for bit" if upstream.invariant else "NOT EQUAL, which should be impossible: report this"
        lines.append(
            f"everything up to the key of layer {upstream.layer} is {state} ({upstream.positions} positions): "
            "what is decodable there is a property of the unedited model and no finding about the edit"
        )
    if dose is not None:
        a = dose.critical[~dose.critical.isnan()]
        tie = "never ties" if not len(a) else f"ties at dose {float(a.mean()):.2f} on average"
        lines.append(
            f"the new object leads by {float(dose.override_margin.mean()):.1f} nats and {tie} (descriptive: no null)"
        )
    for reading, when in ((lens.before, "before"), (lens.after, "after")):
        at_end = reading.at(position="last", quantity="percentile_old")[:, -1]
        known = at_end[~at_end.isnan()]
        if len(known):
            lines.append(
                f"lens after the last block, {when}: old object above {float(known.mean()):.0%} of its controls "
                "(null 50%)"
            )
    return lines
