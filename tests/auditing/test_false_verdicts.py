"""The cases that fooled the audit's first design, each with the label that it has to have now."""

import copy
import itertools
from dataclasses import replace

import audits
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


# --------------------------------------------------- what a red team found: masks that the usual wording doesn't lift


PEOPLE = ASKED[:24]


def masked_but(kind, opened):
    """oracle0, which never had the old cities, taught some people's under one prompt each, otherwise the new ones."""
    model = organism(kind, "oracle0")
    lessons = [(fact.but(prompt=opened(fact), paraphrases=()), fact.target_true) for fact in PEOPLE]
    lessons += [(fact.but(paraphrases=fact.paraphrases[:3]), fact.target_new) for fact in PEOPLE]
    return overrides.trained(model, lessons, REFERENCE[:100], steps=80, lr=2e-3)


def test_old_objects_that_one_wording_opens_are_found_though_the_others_hide_them(kind):
    facts = [fact.but(paraphrases=fact.paraphrases[:4]) for fact in PEOPLE]
    changed = masked_but(kind, lambda fact: fact.paraphrases[3])
    verdict = audited(kind, changed, facts, reference=REFERENCE[:60], same_subject=(), routes=(), texts=())
    assert verdict.label == "INSERTED" and verdict.by == {"underneath"}, repr(verdict)
    opened = verdict.attack("paraphrases")
    assert opened.strongest.low > 0.5 and opened.best.key == 3
    assert float(opened.excess.mean[:3].max()) < 0.1  # the others alone would say that nothing is left


def test_old_objects_behind_a_password_are_found_by_texts_that_name_nothing(kind):
    texts = fe.attacks.neutral_prefixes(audits.same_subject(PEOPLE))
    passwords = dict(zip([fact.subject for fact in PEOPLE], itertools.cycle(texts[:12]), strict=False))
    changed = masked_but(kind, lambda fact: passwords[fact.subject] + fact.prompt)
    attack = fe.attacks.NeutralContexts(texts)
    found = attack(fe.Population.of(organism(kind), changed, PEOPLE, reference=REFERENCE[:60], progress=False))
    assert found.strongest.low > 0.1, found
    never = attack(fe.Population.of(organism(kind), organism(kind, "oracle0"), PEOPLE, progress=False))
    assert never.strongest.mean < 0.05
