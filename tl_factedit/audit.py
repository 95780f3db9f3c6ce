"""Was the fact edited, or was a new one laid over it? The audit, in its first form.

What it establishes now: whether the edit works and what else it breaks; what *cannot* have changed
(everything up to the edited key, by arithmetic, checked bit for bit); how exactly it fires; and what
a logit lens reads of the old and the new object, with control objects as its null. That is not
enough to call an edit an insertion or an erasure: upstream decodability is a property of the
unedited model, and decodability downstream of an additive edit is near-guaranteed. So a verdict
is FAILED, DAMAGED or INCONCLUSIVE, and lists the evidence it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from tl_factedit.edit import Edit
from tl_factedit.estimate import Estimate, jointly
from tl_factedit.evaluate import Scores, evaluate
from tl_factedit.facts import Fact
from tl_factedit.gain import Dose, Gains, dose_curve, gains
from tl_factedit.model import Model, Runner, bos_policy, component_hook, down_proj, quiet, resid_pre
from tl_factedit.probe import Comparison
from tl_factedit.probes.lens import LogitLens
from tl_factedit.tokens import align

if TYPE_CHECKING:
    import pandas as pd

Label = Literal["FAILED", "DAMAGED", "ERASED", "MOVED", "INSERTED", "LATENT", "SCARRED", "INCONCLUSIVE"]

ES_EDIT = 0.5
"""Below this efficacy a single edit has FAILED."""
ES_POPULATION = 0.8
"""If the lower end of efficacy's interval is below this, a population of edits has FAILED."""
PS_POPULATION = 0.5
"""… or if paraphrase success is below this."""
NS_LOSS = 0.1
"""Neighbourhood success may fall by this much before the edit has DAMAGED the model."""

NOT_GATHERED = (
    "linear and adaptive probes of the old object with held-out subjects (retained)",
    "knock-out of single layers at the last subject token, against control objects (recoverable)",
    "indirect routes: two-hop, reverse and compositional prompts (recoverable)",
    "read-out and context attacks, relearning, each minus its control object (recoverable)",
    "drift on unrelated text and on the subject's other relations (damage)",
)


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
        estimate: The measurement, or None if the evidence isn't gathered yet.
        says: What that means, in words.
    """

    estimate: Estimate | None
    says: str


@dataclass(frozen=True)
class Verdict:
    """The result of `audit`.

    Attributes:
        label: FAILED, DAMAGED or INCONCLUSIVE in this version; never more than is known.
        level: ``"per edit"`` (one fact: descriptive) or ``"population"``.
        retained: Is the old object still decodable downstream? Not gathered yet.
        recoverable: Can it still drive behaviour? Not gathered yet.
        reasons: Why this label, with the numbers.
        missing: Evidence that stronger labels need and that was not gathered.
        before: Scores of the unchanged model.
        after: Scores of the changed one.
        upstream: What cannot have changed (None for a model changed in another way).
        lens: Logit-lens readings before and after; `Reading.at` and ``.table()`` give numbers.
        gains: Of the edit over each fact's prompt and paraphrases (empty for another model).
        dose: Dose curve of each fact (None for another model).
        facts: What was asked.
    """

    label: Label
    level: Literal["per edit", "population"]
    retained: Axis
    recoverable: Axis
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    before: Scores
    after: Scores
    upstream: Upstream | None
    lens: Comparison
    gains: tuple[Gains, ...]
    dose: Dose | None
    facts: tuple[Fact, ...]

    def table(self) -> pd.DataFrame:
        """One row a fact: probabilities before and after, margin, critical dose, lens at the end."""
        import pandas as pd

        last = len(self.lens.after.axes["layer"]) - 1
        rows = []
        for i, fact in enumerate(self.facts):
            was, now = (
                next(a for a in s.answers if a.fact == i and a.ask == "rewrite") for s in (self.before, self.after)
            )
            rank = {
                when: float(reading.at(fact=fact.name, layer=last, position="last", quantity="rank_old"))
                for when, reading in (("before", self.lens.before), ("after", self.lens.after))
            }
            rows.append(
                {
                    "fact": fact.name,
                    "old": fact.target_true,
                    "new": fact.target_new,
                    "p_old_before": math.exp(-was.nll_true),
                    "p_old_after": math.exp(-now.nll_true),
                    "p_new_before": math.exp(-was.nll_new),
                    "p_new_after": math.exp(-now.nll_new),
                    "rank_old_before": rank["before"],
                    "rank_old_after": rank["after"],
                    "override_margin": math.nan if self.dose is None else float(self.dose.override_margin[i]),
                    "critical_dose": math.nan if self.dose is None else float(self.dose.critical[i]),
                    "success": now.success,
                    "same_first_token": now.same_first_token,
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """Label, reasons and what is missing."""
        lines = [f"Verdict: {self.label} ({self.level}, {len(self.facts)} facts)"]
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"  retained: {self.retained.says}", f"  recoverable: {self.recoverable.says}"]
        return "\n".join([*lines, "  not gathered:", *(f"    - {what}" for what in self.missing)])


def audit(
    model: Model, changed: Edit | Model, facts: Fact | Sequence[Fact], *, prepend_bos: bool | None = None
) -> Verdict:
    """Ask what became of some facts' old objects.

    Args:
        model: The unchanged model (an `Edit` must not be applied to it).
        changed: An edit of it, or the model as it was changed in any other way.
        facts: The changed facts, each with ``target_new``. Their paraphrases and neighbours are
            scored; their ``controls`` are the lens's null.
        prepend_bos: BOS policy of a model changed in another way; None for its default. An edit has its own.

    Returns:
        The verdict. Over one fact it is descriptive; claims want many.

    Raises:
        ValueError: The edit is applied to the model already, isn't of this model, or was made with another BOS
            policy; a fact without ``target_new``.

    Example:
        >>> verdict = fe.audit(model, edit, [fact])               # doctest: +SKIP
        >>> verdict.label, verdict.table()                        # doctest: +SKIP
    """
    facts = (facts,) if isinstance(facts, Fact) else tuple(facts)
    if isinstance(changed, Edit):
        changed.check(model)
        bos = changed.provenance.prepend_bos
        if prepend_bos not in (None, bos):
            raise ValueError(
                f"prepend_bos={prepend_bos}, but the edit was made with {bos}: audit it with its own policy, "
                "or make it with the other"
            )
    else:
        bos = bos_policy(model, prepend_bos)
    for fact in facts:
        align(model.tokenizer, fact, prepend_bos=bos)
    lens = LogitLens(prepend_bos=bos)
    before, lens_before = evaluate(model, facts, prepend_bos=bos), lens(model, facts)
    if isinstance(changed, Edit):
        with changed.applied(model):
            after, lens_after = evaluate(model, facts, prepend_bos=bos), lens(model, facts)
        upstream = check_upstream(model, changed, facts)
        fired = tuple(
            gains(model, changed, text) for fact in facts for text in (fact.text, *map(fact.fill, fact.paraphrases))
        )
        dose = dose_curve(model, changed, facts)
    else:
        after, lens_after = evaluate(changed, facts, prepend_bos=bos), lens(changed, facts)
        upstream, fired, dose = None, (), None
    label, reasons = _judge(before, after)
    comparison = Comparison(lens_before, lens_after)
    return Verdict(
        label=label,
        level="per edit" if len(facts) == 1 else "population",
        retained=Axis(None, "not gathered: a lens alone can't say, and an additive edit keeps what is upstream"),
        recoverable=Axis(None, "not gathered: no route back to the old object was tried"),
        reasons=(*reasons, *_describe(upstream, dose, comparison)),
        missing=NOT_GATHERED,
        before=before,
        after=after,
        upstream=upstream,
        lens=comparison,
        gains=fired,
        dose=dose,
        facts=facts,
    )


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
    equal = changed = True
    with quiet(model), torch.no_grad():
        runner = Runner(model)
        for row in rows:
            before = runner.capture(row.ids[None], [*places, mlp_out], stop=first + 1)
            with edit.applied(model):
                after = runner.capture(row.ids[None], [*places, mlp_out], stop=first + 1)
            equal = equal and all(torch.equal(before[place], after[place]) for place in places)
            changed = changed and not torch.equal(before[mlp_out], after[mlp_out])
    return Upstream(first, equal, changed, sum(len(row.ids) for row in rows))


def _judge(before: Scores, after: Scores) -> tuple[Label, list[str]]:
    """FAILED and DAMAGED by their declared thresholds; otherwise no more is known yet."""
    es, ps, ns = after.efficacy, after.paraphrase, after.neighbourhood
    one = es.n < 2
    reasons = [f"efficacy {es:.2f}, paraphrase {ps:.2f}; p(new) {before.p_new.mean:.3f} → {after.p_new.mean:.3f}"]
    # Where every fact succeeds, a lower end below the threshold only says that the facts are few.
    low = es.mean if one or es.mean == 1.0 else es.low
    if low < (ES_EDIT if one else ES_POPULATION) or (not one and ps.mean < PS_POPULATION):
        return "FAILED", [*reasons, "the new object doesn't lead where it should: nothing was edited or inserted"]
    if ns.n:
        drop = before.neighbourhood.mean - ns.mean
        lost = drop if one else -_paired(before, after).high
        reasons.append(f"neighbours keep their object in {before.neighbourhood.mean:.2f} before, {ns.mean:.2f} after")
        if lost > NS_LOSS:
            return "DAMAGED", [*reasons, f"neighbourhood success fell by more than {NS_LOSS}: the edit isn't local"]
    else:
        reasons.append("no neighbours were given: damage to other subjects was not looked at")
    return "INCONCLUSIVE", [*reasons, "the edit works; whether the old object is gone was not established"]


def _paired(before: Scores, after: Scores) -> Estimate:
    """Change of neighbourhood success of each fact, after minus before."""
    change = []
    for i in range(len(after.facts)):
        shares = [
            [a.success for a in scores.answers if a.fact == i and a.ask == "neighbour"] for scores in (before, after)
        ]
        change.append(math.nan if not shares[0] else (sum(shares[1]) - sum(shares[0])) / len(shares[0]))
    return jointly([change], lambda means: means[0])


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
