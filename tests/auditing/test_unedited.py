"""What an audit takes for the unchanged model: another one than the changed, with nothing on it that isn't told."""

import copy
import warnings

import laws
import pytest
import tiny

import tl_factedit as fe
from tl_factedit.auditing.unedited import edits_beside, subjects_written

FIT = fe.ValueFit(steps=2, kl_weight=0.0)


def rome(model, fact: fe.Fact) -> fe.Edit:
    return fe.Rome(fe.KeyStats.identity(model, 1), fit=FIT, contexts=(), progress=False)(model, [fact])


def audit(model, changed, **given) -> fe.Verdict:
    return fe.audit(model, changed, [laws.FACT], progress=False, **given)


@pytest.fixture
def model(kind):
    return tiny.model(kind, "gpt2")


def test_the_model_itself_is_no_change_of_it(model, monkeypatch):
    with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="the change is the model itself"):
        audit(model, model)


def test_a_second_bridge_over_the_same_weights_is_no_change():
    inside = tiny.hf_model("gpt2")
    one, two = tiny.around(inside), tiny.around(inside)
    with pytest.raises(ValueError, match="the change is the model itself"):
        audit(one, two)


def test_the_changed_model_given_first_is_seen_by_the_edit_on_it(model, monkeypatch):
    changed = copy.deepcopy(model)
    rome(model, laws.FACT).apply_(changed)
    with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="needed the unchanged one first"):
        audit(changed, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert audit(model, changed).provenance.model.model


def test_an_edit_that_is_on_the_unchanged_model_is_told_and_its_references_are_left_out(model):
    first, second = rome(model, laws.FACT), rome(model, laws.OTHER)
    reference = [laws.OTHER, laws.FACT, laws.FACT.but(subject="Anna")]
    assert audit(model, first, reference=reference).provenance.given["reference"] == 2  # all but the fact itself
    second.apply_(model)
    with pytest.warns(UserWarning) as told:
        verdict = audit(model, first, reference=reference)
    said = [str(each.message) for each in told]
    assert any(
        "carries edits that the change wasn't made on top of" in each and laws.OTHER.name in each for each in said
    )
    assert any("left out" in each and laws.OTHER.subject in each for each in said)
    assert any("carries edits" in each for each in verdict.missing)
    assert verdict.provenance.given["reference"] == 1


def test_an_edit_made_on_top_of_those_that_are_on_has_nothing_beside_it(model):
    first = rome(model, laws.OTHER)
    first.apply_(model)
    second = rome(model, laws.FACT)
    changed = copy.deepcopy(model)
    second.apply_(changed)
    for change in (second, [second], changed):
        assert edits_beside(model, change) == ()
        assert laws.OTHER.subject in subjects_written(model, change)
    assert edits_beside(model, tiny.model("bridge", "gpt2", seed=1)) == (first,)


def test_a_reference_that_is_given_again_counts_once(model):
    edit = rome(model, laws.FACT)
    anna = laws.FACT.but(subject="Anna")
    with pytest.warns(UserWarning, match="8 references of 10 ask what another one asks"):
        population = fe.Population.of(model, edit, [laws.FACT], reference=[anna] * 9 + [laws.OTHER], progress=False)
    assert population.reference == (anna, laws.OTHER)
