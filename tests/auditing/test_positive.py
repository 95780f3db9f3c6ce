"""A positive control is an override of the same facts: it holds, it is hidden from knock-outs, and attacks find it."""

import copy

import audits
import laws
import pytest
import tiny
from attacking_facts import known_facts

import tl_factedit as fe
from tl_factedit.auditing import audit as auditing
from tl_factedit.auditing import positive
from tl_factedit.auditing.positive import found_in_an_override

KIND = tiny.KINDS[-1]


@pytest.fixture(scope="module")
def population():
    facts = audits.ASKED[:30]
    return fe.Population.of(
        audits.organism(KIND), audits.organism(KIND), facts, reference=audits.REFERENCE[:40], progress=False
    )


def test_it_lies_where_no_knock_out_shows_it_and_the_weights_give_it_away(population):
    silenced = fe.attacks.KnockOut(components=("mlp",), places=("subject",), resample=False)
    knocked = silenced(population)
    seen = []

    def look(there):
        """An attack that looks at what it is given."""
        seen.append(there)
        return fe.attacks.Rounding()(there)

    with laws.untouched(audits.organism(KIND)):
        found = found_in_an_override(population, (silenced, fe.attacks.WeightReversal(neighbours=0), look), (knocked,))
    assert set(found) == {"weight reversal", "rounding"}  # a knock-out isn't asked
    (there,) = seen
    assert there.changed.layers == (0,) and len(there.facts) >= 25  # the organism can't spare its first MLP
    assert fe.evaluate(audits.organism(KIND), there.facts).efficacy.mean == 0.0
    with there.changed.applied(audits.organism(KIND)) as changed:
        assert fe.evaluate(changed, there.facts).efficacy.mean == 1.0
    assert silenced(there).details["whole"] is False
    assert found["weight reversal"].mean > 0.1 > abs(found["rounding"].mean)


def test_an_attack_that_cannot_be_run_on_the_control_finds_nothing(population):
    found = found_in_an_override(population, (fe.attacks.NeutralContexts(()), fe.attacks.Rounding()), ())
    assert set(found) == {"rounding"}  # the other raises: there are no texts


def test_what_could_not_be_overridden_gives_no_control(population, monkeypatch):
    monkeypatch.setattr(positive, "FIT", fe.ValueFit(steps=1, kl_weight=0.0, kl_prompts=()))
    assert found_in_an_override(population, (fe.attacks.Rounding(),), ()) == {}


def test_it_is_made_only_where_an_absence_would_be_claimed(kind, monkeypatch):
    model, asked = tiny.model(kind, "gpt2"), []
    facts = known_facts(model)

    def control(*given):
        asked.append(given)
        return {}

    judged = auditing.judge

    def judge(findings, thresholds):
        found = judged(findings, thresholds)
        return found if findings.control is not None else type(found)(label[0], (), (), ())

    monkeypatch.setattr(auditing, "found_in_an_override", control)
    monkeypatch.setattr(auditing, "judge", judge)
    label = ["INSERTED"]
    assert fe.audit(model, copy.deepcopy(model), facts, progress=False).label == "INSERTED" and not asked
    label[0] = "ERASED"
    # Judged again with what the control found, which is nothing.
    assert fe.audit(model, copy.deepcopy(model), facts, progress=False).label != "ERASED" and len(asked) == 1
