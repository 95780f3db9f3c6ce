"""What later reads carry, at which tokens an edit works, where it fires: as whole passes give it, and identities."""

import math
from dataclasses import replace

import laws
import measured
import pytest
import tiny
import torch
from oracles import attacking

import tl_factedit as fe
from tl_factedit.backend.weights import down_proj
from tl_factedit.evaluation import coverage
from tl_factedit.evaluation.attribution import SETS
from tl_factedit.evaluation.coverage import GROUPS

PLACES = (("resid", "subject"), ("attn", "last"), ("mlp", "last"), ("resid", "last"), ("resid", "all"))
HOOKS = {"resid": "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}


def rome(model, fact, layer=1, strength=3.0):
    stats = fe.KeyStats.identity(model, layer)
    return fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)(model, [fact]).scaled(strength)


@pytest.fixture(scope="module")
def setting(kind):
    """A model, two facts that it knows, and an edit of each in layer 1."""
    model = tiny.model(kind, "gpt2")
    facts = [attacking.known_fact(model, fact) for fact in (laws.FACT, laws.OTHER)]
    return model, facts, [rome(model, fact) for fact in facts]


# ------------------------------------------------------------------------------------ mediation


def test_patches_are_those_of_whole_passes(setting):
    model, facts, edits = setting
    with laws.untouched(model):
        found = measured.mediate(model, edits, facts, places=PLACES)
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        end = model.to_tokens(fact.text).shape[1] - 1
        at = {"subject": [attacking.subject_last(model, fact)], "last": [end], "all": range(end + 1)}
        assert float(found.unedited[i]) == pytest.approx(
            attacking.margin(model, fact, attacking.ends(model, fact.text)), abs=1e-4
        )
        for layer in range(4):
            for place in PLACES:
                name = f"blocks.{layer}.{HOOKS[place[0]]}"
                donor = attacking.state(model, fact.text, name)
                with edit.applied(model):
                    logits = attacking.patched(model, fact.text, name, at[place[1]], donor)
                expected = [*attacking.firsts(model, fact, logits), attacking.margin(model, fact, logits)]
                values = found.patched.at(fact=i, place=place, layer=layer)
                assert values.tolist() == pytest.approx(expected, abs=1e-3)


def test_the_identities_of_patching(setting):
    model, facts, edits = setting
    found = measured.mediate(model, edits, facts, places=PLACES)
    assert (found.changed - found.unedited).abs().min() > 1e-2
    # The stream of all tokens, from the edited layer on, is the unedited run; so is that of the last token at the end.
    assert found.share.mean[4].tolist() == pytest.approx([0, 1, 1, 1], abs=1e-4)
    assert found.at(("resid", "last"), 3).mean == pytest.approx(1, abs=1e-4)
    assert found.old_first.mean[4].tolist()[1:] == [1.0, 1.0, 1.0]
    # Below the edit nothing differs, and above the last block nobody reads the subject.
    assert found.share.mean[:, 0].tolist() == pytest.approx([0] * 5, abs=1e-4)
    assert found.at(("resid", "subject"), 3).mean == pytest.approx(0, abs=1e-4)
    assert found.share.mean[1, 1] == pytest.approx(0, abs=1e-4) and abs(found.at(("attn", "last"), 3).mean) > 1e-3
    assert len(found.table()) == 5 * 4 and "resid at subject" in repr(found)


def test_the_share_is_a_ratio_of_means_over_known_facts(setting):
    model, (fact, other), edits = setting
    found = measured.mediate(model, edits, [fact, other])
    m = found.patched.at(place=("mlp", "last"), layer=2, quantity="margin")
    expected = (found.changed - m).mean() / (found.changed - found.unedited).mean()
    assert found.at(("mlp", "last"), 2).mean == pytest.approx(float(expected), abs=1e-5)
    unknown = other.but(target_true=other.controls[0], controls=[*other.controls[1:], other.target_true])
    alone = measured.mediate(model, edits, [fact, unknown])
    assert alone.known.tolist() == [True, False] and alone.at(("mlp", "last"), 2).n == 1
    assert alone.at(("mlp", "last"), 2).mean != pytest.approx(float(expected), abs=1e-4)


def test_an_unchanged_model_has_no_share(setting):
    model, facts, _ = setting
    found = measured.mediate(model, model, facts)
    assert torch.allclose(found.patched.at(quantity="margin"), found.unedited[:, None, None], atol=1e-4)
    assert found.old_first.mean.eq(1).all()
    assert found.share.mean.isnan().all() and found.share.n.eq(0).all()


def test_mediation_refuses_what_it_can_not_patch(kind, setting, monkeypatch):
    model, facts, edits = setting
    other = tiny.model(kind, "gpt2", n_layers=3)
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="places is empty"):
            measured.mediate(model, edits, facts, places=[])
        with pytest.raises(ValueError, match="a model of the same form"):
            measured.mediate(model, other, facts)
        with pytest.raises(ValueError, match="no target_new, needed one"):
            measured.mediate(model, model, [facts[0].but(target_new=None)])


# ------------------------------------------------------------------------------------ positions


def taken_away(model, edit, fact, positions):
    """m of the edited model whose values at some positions are those of the key through the unedited weight."""
    (delta,) = edit.deltas
    site = down_proj(model, delta.layer)
    old, keys = site.W.clone(), attacking.state(model, fact.text, site.key_hook)
    plain = keys @ old + (0 if site.bias is None else site.bias)
    with edit.applied(model):
        logits = attacking.patched(model, fact.text, f"blocks.{delta.layer}.hook_mlp_out", positions, plain.detach())
    return attacking.margin(model, fact, logits)


def test_what_is_left_without_the_edit_at_some_tokens_is_that_of_whole_passes(setting):
    model, facts, edits = setting
    with laws.untouched(model):
        found = measured.attribute_positions(model, edits, facts)
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        n, s = model.to_tokens(fact.text).shape[1], attacking.subject_last(model, fact)
        sets = ([s], [*range(s), *range(s + 1, n)], range(s), range(s + 1, n), [n - 1], range(n))
        for j, positions in enumerate(sets):
            assert float(found.without[i, j]) == pytest.approx(taken_away(model, edit, fact, positions), abs=1e-3)
    assert found.without.std(1).min() > 1e-3


def test_taken_away_everywhere_an_edit_leaves_the_unedited_model(setting):
    model, facts, _ = setting
    edits = [fe.compose([rome(model, fact), rome(model, fact, 2)]) for fact in facts]
    found = measured.attribute_positions(model, edits, facts)
    assert torch.allclose(found.without[:, SETS.index("all")], found.unedited, atol=1e-3)
    assert found.at("all").mean == pytest.approx(1, abs=1e-3)
    assert found.at("subject").mean != pytest.approx(1, abs=1e-3)
    assert len(found.table()) == len(SETS) and "all 1.00" in repr(found)


def test_a_wrong_contribution_would_be_noticed(setting, monkeypatch):
    model, facts, edits = setting
    on = fe.editing.Delta.on
    monkeypatch.setattr(fe.editing.Delta, "on", lambda self, weight: weight + 1.2 * (on(self, weight) - weight))
    assert abs(measured.attribute_positions(model, edits, facts).at("all").mean - 1) > 0.01


def test_a_set_without_a_token_gives_nothing(setting):
    model, _, _ = setting
    fact = attacking.known_fact(model, fe.Fact("Big Ben", "in the city of {}", " Paris", " Rome"))
    found = measured.attribute_positions(model, [rome(model, fact)], [fact])
    assert math.isnan(found.at("after").mean) and found.at("after").n == 0
    assert found.at("last").mean == found.at("subject").mean  # the prompt ends with the subject


def test_attribution_and_coverage_want_edits(setting, monkeypatch):
    model, facts, edits = setting
    routed = [fe.editors.RoutedEdit.of(edit) for edit in edits]
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="RoutedEdit isn't an Edit"):
            measured.attribute_positions(model, routed, facts)
        with pytest.raises(ValueError, match="RoutedEdit isn't an Edit"):
            measured.gain_coverage(model, routed, facts)


# ------------------------------------------------------------------------------------ coverage


def test_gains_over_contexts_are_those_of_the_edit(setting):
    model, (fact, _), (edit, _) = setting
    fact = fact.but(paraphrases=["Where is {} ? in", "The Eiffel Tower is not a template"])
    edit = replace(edit, facts=(fact,))
    beside = fe.Fact(fact.subject, "{} is owned by the", " company")
    with laws.untouched(model):
        found = measured.gain_coverage(
            model, [edit], [fact], prefixes=["He was here . "], same_subject=[beside, laws.OTHER]
        )
    gains = {group: of_facts[0].tolist() for group, of_facts in found.gains.items()}
    end = attacking.subject_last(model, fact)

    def at(text, place):
        return float(fe.evaluation.gains(model, edit.scaled(1 / 3), text).gain[0, place, 0])

    assert gains["prompt"] == pytest.approx([1.0], abs=1e-5)
    assert gains["paraphrases"] == pytest.approx([at("Where is The Eiffel Tower ? in", end + 2)], abs=1e-5)
    assert gains["prefixed"] == pytest.approx(
        [at("He was here . " + fact.text, end + 4), at("He was here . Where is The Eiffel Tower ? in", end + 6)],
        abs=1e-5,
    )
    assert gains["same_subject"] == pytest.approx([at(beside.text, end)], abs=1e-5)
    for text, gain in zip(fact.neighbours, gains["neighbours"], strict=True):
        strength = fe.evaluation.gains(model, edit.scaled(1 / 3), text).gain[0, :, 0]
        assert gain == pytest.approx(float(strength[strength.abs().argmax()]), abs=1e-5)
    assert list(found.table().contexts) == list(GROUPS)


def test_coverage_is_the_share_of_contexts_with_the_critical_dose(setting, monkeypatch):
    model, (fact, _), (edit, _) = setting
    fact = fact.but(paraphrases=["Where is {} ? in", "John lives near {} , in"])
    edit = replace(edit, facts=(fact,)).scaled(2 / 3)
    found = measured.gain_coverage(model, [edit], [fact])
    assert float(found.critical) == float(fe.evaluation.dose_curve(model, edit, [fact]).critical) > 0
    assert found.covered["prompt"].mean == 1.0 and found.covered["prefixed"].n == 0
    assert "prompt 1.00" in repr(found)
    # An edit that never wins, at whatever dose, covers nothing.
    weak = measured.gain_coverage(model, [edit.scaled(1e-3)], [fact])
    assert math.isnan(float(weak.critical)) and weak.covered["prompt"].mean == 0.0
    # A critical dose between the gains of the two paraphrases is reached in one of them.
    low, high = sorted(found.gains["paraphrases"][0].tolist())
    between = fe.evaluation.Dose(torch.tensor([low, high]), torch.tensor([[-1.0, 1.0]]))
    monkeypatch.setattr(coverage, "dose_curve", lambda *_, **__: between)
    assert low < high and measured.gain_coverage(model, [edit], [fact]).covered["paraphrases"].mean == 0.5


def test_coverage_is_of_one_layer_and_of_the_edits_own_facts(setting):
    model, (fact, other), (edit, _) = setting
    both = fe.compose([edit, rome(model, other, 2)])
    with pytest.raises(ValueError, match=r"writes layers \[1, 2\], needed one"):
        measured.gain_coverage(model, both, [fact, other])
    with pytest.raises(ValueError, match="isn't one that the change was made for"):
        measured.gain_coverage(model, edit, [other])
