"""Where a verdict came from: what is needed to audit again."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tl_factedit.attacks.attack import Attack
from tl_factedit.attacks.routes import Route
from tl_factedit.auditing.gather import Plan
from tl_factedit.backend.provenance import Provenance
from tl_factedit.core.facts import Fact
from tl_factedit.measure.change import Change, Digested
from tl_factedit.measure.population import Part, Population


@dataclass(frozen=True)
class ChangeProvenance:
    """Where one of the audited changes came from.

    Attributes:
        kind: ``"Edit"``, ``"RoutedEdit"`` …; ``"model"`` for another model.
        digest: What tells the change from others; None where it has nothing that does.
        editor: Name and hyperparameters of the editor, as far as they are known.
        provenance: The weights that the change was made on; for another model, its own.
    """

    kind: str
    digest: str | None
    editor: Mapping[str, Any]
    provenance: Provenance

    @classmethod
    def of(cls, part: Part) -> ChangeProvenance:
        """Of the change that serves some facts."""
        changed = part.changed
        if not isinstance(changed, Change):
            return cls("model", None, {}, Provenance.of(changed))
        digest = changed.digest if isinstance(changed, Digested) else None
        editor = dict(getattr(changed, "editor", {}))
        return cls(type(changed).__name__, digest, editor, changed.provenance)


@dataclass(frozen=True)
class AuditProvenance:
    """What a verdict depends on, beside its facts and thresholds.

    Attributes:
        model: The unedited model: weights, BOS policy, versions.
        changes: Each change, in the order of the first fact that it serves.
        prepend_bos: Whether prompts ran with BOS in front.
        seed: Seed of the bootstraps.
        attacks: Each attack with its settings, as it says them of itself (its ``repr``).
        erasing: Whether the change was audited as one that was to erase.
        given: How many references, routes, other facts about the subjects, texts and calibrating facts there were.
        digest: A hash of all of these, text by text, and of the facts: equal for audits that asked the same.
    """

    model: Provenance
    changes: tuple[ChangeProvenance, ...]
    prepend_bos: bool
    seed: int
    attacks: tuple[str, ...]
    erasing: bool
    given: Mapping[str, int]
    digest: str

    @classmethod
    def of(cls, population: Population, plan: Plan) -> AuditProvenance:
        """Of an audit that measures a plan."""
        given: dict[str, Sequence[Any]] = {
            "reference": population.reference,
            "routes": plan.routes,
            "same_subject": plan.same_subject,
            "texts": plan.texts,
            "calibration": () if plan.calibration is None else tuple(plan.calibration.facts),
        }
        asked = {
            name: [each if isinstance(each, str) else asdict(each) for each in items] for name, items in given.items()
        }
        asked["facts"] = [asdict(fact) for fact in population.facts]
        prompts = (
            text
            for each in itertools.chain(population.facts, *given.values())
            for text in ([each] if isinstance(each, str) else _asked(each))
        )
        return cls(
            model=Provenance.of(population.model, population.prepend_bos, prompts=prompts),
            changes=tuple(ChangeProvenance.of(part) for part in population.parts),
            prepend_bos=population.prepend_bos,
            seed=plan.seed,
            attacks=tuple(map(settings_of, plan.attacks)),
            erasing=plan.erasing,
            given={name: len(items) for name, items in given.items()},
            digest=hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16],
        )


def _asked(each: Fact | Route) -> tuple[str, ...]:
    """What is asked of a fact or a route."""
    return (
        (each.prompt,) if isinstance(each, Route) else (each.text, *map(each.fill, each.paraphrases), *each.neighbours)
    )


def settings_of(attack: Attack) -> str:
    """An attack's name and settings; without its place in memory, where it has no ``repr`` of its own."""
    said = repr(attack)
    return type(attack).__name__ if " at 0x" in said else said
