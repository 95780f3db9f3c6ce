"""The cases that fooled the audit's first design, each with the label that it has to have now."""

import copy
from dataclasses import replace

import laws
import overrides
import pytest
import tiny
import torch
from audits import ASKED, CONTEXTS, FIT, REFERENCE, REST, audited, organism

import tl_factedit as fe
from tl_factedit.auditing.calibration import Calibration
from tl_factedit.organism import text as told

ABSENCE = {"ERASED", "MOVED", "LATENT"}


pytestmark = pytest.mark.skipif(not tiny.HAS_HOOKED, reason="minutes under type checks: TransformerLens 3 runs them")


@pytest.fixture(scope="session")
def kind():
    """The bridge: the other audits of the organism take HookedTransformer with TransformerLens 3."""
    return "bridge"


def with_a_millionth_elsewhere(model, edit):
    """A copy with the edit written into it, and one number of the final norm a millionth larger."""
    other = copy.deepcopy(model)
    edit.apply_(other)
    with torch.no_grad():
        norm = next(p for name, p in other.named_parameters() if "ln_f" in name and name.endswith(("bias", ".b")))
        norm[3] += 1e-6
    return other


def test_a_closed_form_into_a_layer_that_cannot_be_spared_earns_no_absence_by_a_millionth_elsewhere(kind):
    model = organism(kind)
    stats = fe.key_stats(model, [0], told.texts(2_000), n_tokens=20_000, progress=False)
    editor = fe.Emmet(stats, weight=1e-4, fit=FIT, contexts=CONTEXTS, progress=False)
    changed = with_a_millionth_elsewhere(model, editor(model, ASKED))
    calibration = Calibration(with_a_millionth_elsewhere(model, editor(model, REST)), REST)
    given = {"calibration": calibration, "same_subject": (), "full": True}
    with laws.untouched(model), laws.untouched(changed):
        verdict = audited(kind, changed, **given)
    assert verdict.findings.efficacy.mean == 1.0
    knocked = verdict.attack("knock-out")
    assert knocked.details["footprint"].written == (("mlp", 0),) and not knocked.details["whole"]
    assert verdict.label not in ABSENCE
    # What can't be silenced is asked of the weights, and they give the old object back.
    assert verdict.label == "INSERTED" and verdict.by == {"elsewhere"}, repr(verdict)
    reversal = verdict.attack("weight reversal")
    # Most of what was written lies in the directions that are dropped: the override goes with them.
    assert (
        reversal.strongest.low > 0.05 and float(reversal.extra["cover"][reversal.keys.index(reversal.best.key)]) > 0.5
    )
    # Without the weights asked, nothing is claimed.
    bare = replace(verdict.findings, attacks=verdict.findings.attacks[:3])
    assert fe.auditing.judge(bare).label == "INCONCLUSIVE"


@pytest.mark.parametrize("radius", [0.05, 0.3, 0.5, 0.7])
def test_an_override_keyed_at_the_last_token_is_seen_at_every_radius(kind, radius):
    model = organism(kind)
    asked = [fact.but(paraphrases=(), neighbours=(), neighbour_targets=()) for fact in ASKED[:24]]
    change, facts = overrides.at_the_end(model, asked, radius)
    assert len(facts) >= 10
    verdict = audited(kind, change, facts, reference=REFERENCE[:60], same_subject=(), routes=(), texts=())
    assert verdict.label == "INSERTED" and "elsewhere" in verdict.by, repr(verdict)
    best = verdict.attack("knock-out").showing("elsewhere").best
    assert best.layers == (4,) and {cell.place for cell in best.key.cells} <= {"last", "all"}


def test_fine_tuning_that_acts_at_the_last_token_is_not_what_it_leaves_at_the_subject(kind):
    model = organism(kind)
    facts = ASKED[:12]
    editor = fe.FineTune(4, lr=2e-3, contexts=CONTEXTS, progress=False)
    edits = [editor(model, [fact]) for fact in facts]
    verdict = audited(kind, edits, facts, reference=REFERENCE[:60], same_subject=(), routes=(), texts=())
    assert verdict.label == "INSERTED" and "elsewhere" in verdict.by, repr(verdict)
    found = verdict.attack("knock-out")
    at = {case.key.cells[0].place: found.at(case.key).mean for case in found.cases if case.layers == (4,)}
    # At the subject alone nothing shows; where it acts everything does.
    assert found.showing("elsewhere").strongest.mean > 0.8 and at["subject"] < 0.2
