"""A positive control is an override of the same facts: it holds, it is hidden from knock-outs, and attacks find it."""

import copy

import audits
import laws
import pytest
import tiny
import torch
from attacking_facts import known_facts

import tl_factedit as fe
from tl_factedit.auditing import audit as auditing
from tl_factedit.auditing import positive
from tl_factedit.auditing.positive import found_in_an_override
from tl_factedit.backend.weights import down_proj
from tl_factedit.organism import text as told

KIND = tiny.KINDS[-1]
IN_CHANGED = "weight reversal (in the changed model)"


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
    assert set(found) == {"weight reversal", "rounding", IN_CHANGED}  # a knock-out isn't asked
    (there,) = seen
    assert there.changed.layers == (0,) and len(there.facts) >= 25  # the organism can't spare its first MLP
    assert fe.evaluate(audits.organism(KIND), there.facts).efficacy.mean == 0.0
    with there.changed.applied(audits.organism(KIND)) as changed:
        assert fe.evaluate(changed, there.facts).efficacy.mean == 1.0
    assert silenced(there).details["whole"] is False
    assert found["weight reversal"].mean > 0.1 > abs(found["rounding"].mean)
    assert found[IN_CHANGED].low > 0  # of references


@pytest.mark.parametrize("hidden", [False, True], ids=["as made", "hidden"])
def test_a_large_matrix_that_no_key_reads_hides_an_override_from_the_weights_and_shows_in_the_control(hidden):
    model, asked = audits.organism(KIND), audits.ASKED[:30]
    stats = fe.key_stats(model, [0], told.texts(1_000), n_tokens=10_000, progress=False)[0]
    editor = fe.Emmet({0: stats}, weight=1e-4, fit=audits.FIT, contexts=("",), progress=False)
    changed = copy.deepcopy(model)
    editor(changed, asked).apply_(changed)
    fe.editing.forget_edits_(changed)
    if hidden:
        rarely_read = torch.linalg.eigh(stats.moment.double()).eigenvectors[:, :32]
        with torch.no_grad():
            weight = down_proj(changed, 0).W
            written = torch.linalg.qr(torch.randn(weight.shape[1], 32, dtype=torch.float64)).Q
            weight += (3 * float(torch.linalg.matrix_norm(weight.double(), 2)) * rarely_read @ written.T).to(weight)
    assert fe.evaluate(changed, asked).efficacy.mean > 0.9
    population = fe.Population.of(model, changed, asked, reference=audits.REFERENCE[:80], progress=False)
    reversal = fe.attacks.WeightReversal(dropped=(16, 32), neighbours=0)
    found = found_in_an_override(population, (reversal,), ())
    assert found["weight reversal"].low > 0  # of the unedited model, as ever
    assert (reversal(population).strongest.low > 0) is (found[IN_CHANGED].low > 0) is not hidden


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
