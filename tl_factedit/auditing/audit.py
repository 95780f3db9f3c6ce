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

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tl_factedit.attacks.knockout import knock_out
from tl_factedit.attacks.readout import read_out
from tl_factedit.attacks.relearning import Relearning
from tl_factedit.attacks.routes import Route, follow_routes
from tl_factedit.auditing.findings import Findings, Thresholds
from tl_factedit.auditing.gather import (
    How,
    able_to_knock_out,
    check_asked,
    complement,
    gains_of_facts,
    is_erasure,
    largest_end,
    layers_written,
    loss_of_neighbours,
    read_scores_and_lens,
    takes_out_all,
    with_controls,
)
from tl_factedit.auditing.retained import Calibration, check_apart, retention, unchanged
from tl_factedit.auditing.rules import judge
from tl_factedit.auditing.upstream import all_upstream
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.auditing.wording import (
    describe_context,
    masked_windows,
    own_layers_caveat,
    recoverable_axis,
    retained_axis,
)
from tl_factedit.backend.protocol import Model, as_layers
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import align
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.objectives import Objective
from tl_factedit.evaluation.dose import dose_curve
from tl_factedit.evaluation.erasure import erasure_success
from tl_factedit.evaluation.same_subject import specificity
from tl_factedit.evaluation.scores import evaluate
from tl_factedit.evaluation.text_drift import drift
from tl_factedit.measure.cache import check_keepable
from tl_factedit.measure.change import Changed
from tl_factedit.measure.population import bos_of_change, each, identity
from tl_factedit.measure.reading import Comparison
from tl_factedit.probes.lens import LogitLens


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
        same_subject: Other facts about the same subjects, which should stay.
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
    routes, same_subject, texts = tuple(routes), tuple(same_subject), tuple(texts)
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
    erasing = is_erasure(edits, objective)
    bos = bos_of_change(model, changed, prepend_bos)
    for fact in facts:
        align(model.tokenizer, fact, prepend_bos=bos)
    others = tuple(facts if reference is None and isinstance(changed, Sequence) else reference or ())
    if calibration is not None:
        check_apart(calibration, facts)
        others = tuple(unchanged(others, changed, calibration))
    facts = tuple(with_controls(fact, (*facts, *others)) for fact in facts)
    thresholds = thresholds or Thresholds()
    parts = list(each(model, changed, facts))  # with their controls, as they are asked
    written = [layers_written(part) for part in parts]
    check_asked(model, facts, widths, routes, same_subject, texts, bos)

    lens = LogitLens(prepend_bos=bos)
    before, lens_before = evaluate(model, facts, prepend_bos=bos), lens(model, facts)
    how: How = {"prepend_bos": bos, "folder": folder, "progress": progress}
    after, lens_after = read_scores_and_lens(parts, facts, lens, lens_before, how)
    gone = erasure_success(model, changed, facts, **how) if erasing else None
    alone = edits[0] if len(parts) == 1 and edits else None
    able, left_out = able_to_knock_out(facts, others, parts)
    spans = widths or sorted({1, max((max(each) - min(each) + 1 for each in written if each), default=1)})
    knocked = (
        knock_out(model, changed, [facts[i] for i in able], others, widths=spans, seed=seed, **how) if able else None
    )
    controlled = [fact for fact in facts if fact.controls]
    attacked = read_out(model, changed, controlled, seed=seed, **how) if controlled else None
    routed = follow_routes(model, changed, routes, **how) if routes else None
    beside = specificity(model, changed, facts, same_subject, **how) if same_subject else None
    drifted = drift(model, changed, facts, texts, **how) if texts else None
    kept = retention(model, changed, facts, others, calibration, seed=seed, **how) if others else None
    findings = Findings(
        efficacy=after.efficacy if gone is None else gone.prompt,
        paraphrase=after.paraphrase if gone is None else gone.paraphrase,
        neighbour_loss=loss_of_neighbours(before, after),
        specificity_loss=None if beside is None else complement(beside.kept),
        perplexity=None if drifted is None else drifted.perplexity_ratio,
        knock_out=None if knocked is None else knocked.strongest,
        knock_out_at_most=math.nan if knocked is None else largest_end(knocked.excess.high[knocked.tested]),
        knock_out_tests=0 if knocked is None else int(knocked.tested.sum()),
        knock_out_holds=takes_out_all(knocked, written),
        route_old=None if routed is None else routed.old_excess,
        route_new=None if routed is None else routed.new,
        native=None if kept is None or kept.native is None else kept.native.pooled,
        adaptive=None if kept is None or kept.adaptive is None else kept.adaptive.pooled,
        readout=None if attacked is None else attacked.strongest,
        readout_at_most=math.nan if attacked is None else largest_end(attacked.excess.high),
        savings=None if relearning is None else relearning.savings,
        erasing=erasing,
        facts=len(facts),
    )
    found = judge(findings, thresholds)
    upstream = all_upstream(model, parts) if len(edits) == len(parts) else None
    dose = dose_curve(model, alone, facts) if alone is not None else None
    comparison = Comparison(lens_before, lens_after)
    return Verdict(
        label=found.label,
        level="per edit" if len(facts) == 1 else "population",
        retained=retained_axis(findings, kept),
        recoverable=recoverable_axis(findings),
        reasons=(*found.reasons, *own_layers_caveat(knocked, written), *describe_context(upstream, dose, comparison)),
        missing=(
            *found.missing,
            *left_out,
            *(() if kept is None else kept.why),
            *masked_windows(knocked, written, widths),
        ),
        power=found.power,
        findings=findings,
        thresholds=thresholds,
        before=before,
        after=after,
        erasure_success=gone,
        knock_out=knocked,
        routes=routed,
        retention=kept,
        read_out=attacked,
        relearning=relearning,
        same_subject=beside,
        drift=drifted,
        upstream=upstream,
        lens=comparison,
        gains=() if alone is None else gains_of_facts(model, alone, facts),
        dose=dose,
        facts=facts,
    )
