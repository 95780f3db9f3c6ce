"""What an audit measures, and with which arguments."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch

from tl_factedit.attacks.knockout import LEAST_REFERENCES, KnockOut, windows_of
from tl_factedit.attacks.routes import Route, check_routes
from tl_factedit.backend.fingerprint import fingerprint
from tl_factedit.backend.protocol import Model, n_layers
from tl_factedit.backend.provenance import Provenance
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.facts import Fact
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.objectives import Erase, Objective
from tl_factedit.evaluation.edit_gains import Gains, gains
from tl_factedit.evaluation.same_subject import pair_same_subject
from tl_factedit.evaluation.scores import Answer, Scores, evaluate, scores_of
from tl_factedit.evaluation.text_drift import encode_texts
from tl_factedit.measure.cache import read_each
from tl_factedit.measure.change import Change
from tl_factedit.measure.population import Part
from tl_factedit.measure.reading import Reading
from tl_factedit.probes.lens import LogitLens


def is_erasure(edits: Sequence[Edit], objective: Objective | None) -> bool:
    """Whether the change was to erase."""
    if objective is not None:
        return isinstance(objective, Erase)
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


class How(TypedDict):
    """What all measurements of changes are told alike."""

    prepend_bos: bool
    folder: str | Path | None
    progress: bool


def read_scores_and_lens(
    parts: Sequence[Part], facts: tuple[Fact, ...], lens: LogitLens, before: Reading, how: How
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


def check_asked(
    model: Model,
    facts: Sequence[Fact],
    widths: Sequence[int] | None,
    routes: Sequence[Route],
    same_subject: Sequence[Fact],
    texts: Sequence[str],
    bos: bool,
) -> None:
    """See that all that is given can be asked, before anything is run."""
    if widths is not None:
        windows_of(n_layers(model), widths)
    check_routes(model, routes, bos)
    pair_same_subject(facts, same_subject)
    if texts:
        encode_texts(model, texts, bos)


def layers_written(part: Part) -> tuple[int, ...] | None:
    """The layers that a change wrote; None for another model that differs in more than ``W_out``."""
    if isinstance(part.changed, Change):
        return part.changed.layers
    here, there = fingerprint(part.unedited), fingerprint(part.changed)
    if (here.rest, here.layout, len(here.w_out)) != (there.rest, there.layout, len(there.w_out)):
        return None
    return tuple(i for i, both in enumerate(zip(here.w_out, there.w_out, strict=True)) if both[0] != both[1])


def able_to_knock_out(
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


def takes_out_all(knocked: KnockOut | None, written: Sequence[tuple[int, ...] | None]) -> bool | None:
    """Whether all that was written is knocked out by some window that could be tested."""
    if knocked is None or any(layers is None for layers in written):
        return None
    tested = [set(window) for window, yes in zip(knocked.windows, knocked.tested.tolist(), strict=True) if yes]
    return all(any(set(layers or ()) <= window for window in tested) for layers in written)


def largest_end(ends: torch.Tensor) -> float:
    """The largest of some upper ends, not corrected (each has to show its absence)."""
    known = ends[~ends.isnan()]
    return float(known.max()) if len(known) else math.nan


def gains_of_facts(model: Model, edit: Edit, facts: Sequence[Fact]) -> tuple[Gains, ...]:
    return tuple(gains(model, edit, text) for fact in facts for text in (fact.text, *map(fact.fill, fact.paraphrases)))


def loss_of_neighbours(before: Scores, after: Scores) -> Estimate | None:
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


def complement(kept: Estimate) -> Estimate:
    return Estimate(1 - kept.mean, 1 - kept.high, 1 - kept.low, kept.n)
