"""What an audit gives: a label, its reasons, what is missing, and all that was measured."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tl_factedit.attacks.attack import Recovery
from tl_factedit.auditing.explanation import explain
from tl_factedit.auditing.findings import Findings, Label, Thresholds
from tl_factedit.auditing.provenance import AuditProvenance
from tl_factedit.auditing.retained import Retention
from tl_factedit.auditing.upstream import Upstream
from tl_factedit.backend.state import plain_torch
from tl_factedit.core import saved
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import as_finite
from tl_factedit.core.words import counted
from tl_factedit.evaluation.dose import Dose
from tl_factedit.evaluation.edit_gains import Gains
from tl_factedit.evaluation.erasure import ErasureSuccess
from tl_factedit.evaluation.same_subject import Specificity
from tl_factedit.evaluation.scores import Scores
from tl_factedit.evaluation.text_drift import TextDrift
from tl_factedit.measure.reading import Comparison

if TYPE_CHECKING:
    import pandas as pd


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
        label: FAILED, DAMAGED, INSERTED, MOVED, LATENT, SCARRED, ERASED or INCONCLUSIVE; see
            `tl_factedit.auditing.rules`.
        level: ``"per edit"`` (fewer than ten facts: descriptive) or ``"population"``.
        by: If INSERTED, which questions brought the old object back: ``"elsewhere"`` (with what the change wrote
            switched off), ``"underneath"`` (with the change in force), or both.
        retained: Is the old object still decodable, at places that the change can have touched?
        recoverable: Does it come back by a way that goes past the change?
        reasons: Why this label, with the numbers.
        missing: Evidence that stronger labels need and that was not gathered, or not precisely enough.
        power: The smallest effects that would have shown.
        findings: The numbers that the label rests on.
        thresholds: What counted as how much.
        before: Scores of the unchanged model.
        after: Scores of the changed one.
        erasure_success: Whether the old object still leads, after a change that was to erase; None for any other.
        attacks: What each attack brought back.
        retention: Evidence on what is retained; None if it could not be gathered.
        specificity: What else is known of the subjects; None if nothing was asked.
        drift: On plain text; None if none was given.
        upstream: What cannot have changed (None for a model changed in another way).
        lens: Logit-lens readings before and after; `Reading.at` and ``.table()`` give numbers. Descriptive.
        gains: The edit's gains over each fact's prompt and paraphrases (a single `Edit` only). Descriptive.
        dose: Dose curve of each fact (a single `Edit` only). Descriptive.
        facts: What was asked.
        provenance: The unedited model, the changes, and the settings: seed, attacks, BOS policy, versions.
    """

    label: Label
    level: Literal["per edit", "population"]
    by: frozenset[str]
    retained: Axis
    recoverable: Axis
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    power: tuple[str, ...]
    findings: Findings
    thresholds: Thresholds
    before: Scores
    after: Scores
    erasure_success: ErasureSuccess | None
    attacks: tuple[Recovery, ...]
    retention: Retention | None
    specificity: Specificity | None
    drift: TextDrift | None
    upstream: Upstream | None
    lens: Comparison
    gains: tuple[Gains, ...]
    dose: Dose | None
    facts: tuple[Fact, ...]
    provenance: AuditProvenance

    def __post_init__(self) -> None:
        """Check that thresholds are numbers: a file may say anything."""
        for name, value in vars(self.thresholds).items():
            as_finite(value, f"thresholds.{name}")

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file: all that was measured, with its provenance.

        Raises:
            ValueError: An attack of one's own put something into its ``details`` that a file can't hold; the message
                names it, and nothing is written.
            OSError: The file can't be written; what was there is as it was.

        Example:
            >>> verdict.save("verdict.safetensors")               # doctest: +SKIP
            >>> fe.Verdict.load("verdict.safetensors").label      # doctest: +SKIP
        """
        saved.save(self, path, "verdict")

    @classmethod
    def load(cls, path: str | Path) -> Verdict:
        """Read a file of `save`; no model is needed.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is cut short or changed, holds another kind of thing, or what it holds doesn't fit
                together; the message names it.
        """
        return saved.load(path, "verdict", cls)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON: dataclasses as dicts, tensors as nested lists, NaN as NaN.

        Raises:
            ValueError: As in `save`.

        Example:
            >>> json.dumps(verdict.to_dict())                     # doctest: +SKIP
        """
        return saved.as_plain(self, "verdict")

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a fact: probabilities before and after, the best way back, the lens at the end, an edit's dose."""
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
                    "old_back": back.get(fact, math.nan),
                    "rank_old_before": float(at_end[0][rank]),
                    "rank_old_after": float(at_end[1][rank]),
                    "override_margin": math.nan if self.dose is None else float(self.dose.override_margin[i]),
                    "critical_dose": math.nan if self.dose is None else float(self.dose.critical[i]),
                    "success": now.success if self.erasure_success is None else self.erasure_success.gone(i),
                    "same_first_token": now.same_first_token,
                }
            )
        return pd.DataFrame(rows)

    def attack(self, name: str) -> Recovery | None:
        """What an attack brought back, by its name (``"knock-out"``); None if none of that name was run."""
        return next((recovery for recovery in self.attacks if recovery.attack == name), None)

    def _back(self) -> dict[Fact, float]:
        """Of each fact, whether the old object is first under the attack (and the case) that brings it back most."""
        ways = [
            found
            for recovery in self.attacks
            for shows in ("elsewhere", "underneath")
            if (found := recovery.showing(shows)) is not None and found.strongest.n
        ]
        if not ways:
            return {}
        best = max(ways, key=lambda found: found.strongest.mean)
        return dict(zip(best.facts, best.old_back.tolist(), strict=True))

    def explain(self) -> str:
        """The label in a sentence or two: what was found, by which question, and what was foreseeable.

        Where no label is supported: all that is missing, each in a few words (`missing` has them whole).
        """
        return explain(self)

    def __repr__(self) -> str:
        """Label, reasons and what is missing."""
        by = f" by what is {' and '.join(sorted(self.by))}" if self.by else ""
        lines = [f"Verdict: {self.label}{by} ({self.level}, {counted(len(self.facts), 'fact')})"]
        lines += [f"  {explain(self, first=1)}"]
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
        by = f" ({' and '.join(sorted(self.by))})" if self.by else ""
        head = f"<h3>{self.label}{by}</h3><p>{html.escape(explain(self, first=1))}</p>"
        head += f"<p>{self.level}, {counted(len(self.facts), 'fact')}</p>"
        return head + shown + self.table().to_html(float_format="{:.3f}".format, index=False)
