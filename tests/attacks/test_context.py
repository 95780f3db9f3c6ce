"""Context attacks: rates as whole passes give them, and copying taken out of them."""

import math

import laws
import measured
import pytest
import tiny
import torch
from oracles import attacking

import tl_factedit as fe
from tl_factedit.attacks import context as context_attack
from tl_factedit.attacks.context import Prefix

PREFIXES = (
    fe.attacks.RepeatPrefix(2, " . "),
    fe.attacks.QuestionPrefix("Who can visit {} ? "),
    fe.attacks.TextPrefix({word: f"{word} is a famous city ." for word in attacking.WORDS}),
)


def rome(model, fact):
    stats = fe.KeyStats.identity(model, 1)
    return fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)(model, [fact])


@pytest.fixture(scope="module")
def setting(kind):
    """A model, two facts that it knows, and an edit of each."""
    model = tiny.model(kind, "gpt2")
    facts = [attacking.known_fact(model, fact) for fact in (laws.FACT, laws.OTHER)]
    return model, facts, [rome(model, fact) for fact in facts]


def test_prefixes_are_texts_with_the_object_in_them():
    assert fe.attacks.RepeatPrefix()(laws.FACT, " Paris") == "Paris. Paris. Paris. "
    question = "Is it true that The Eiffel Tower is located in the city of Paris? "
    assert fe.attacks.QuestionPrefix()(laws.FACT, " Paris") == question
    about = fe.attacks.TextPrefix({"Paris": "Paris is old."})
    assert about(laws.FACT, " Paris") == "Paris is old. " and about(laws.FACT, " Rome") is None
    assert repr(about) == "TextPrefix(1 texts)"
    assert all(isinstance(prefix, Prefix) for prefix in PREFIXES)
    with pytest.raises(ValueError, match="times is 0"):
        fe.attacks.RepeatPrefix(0)
    with pytest.raises(ValueError, match=r'exactly one "\{\}"'):
        fe.attacks.QuestionPrefix("Is it true?")


def rates(model, fact, prefix, controls):
    """Whether the object that the prefix names is first, and whether it beats the new one: the old, then controls."""

    def asked(obj):
        logits = attacking.ends(model, prefix(fact, obj) + fact.text)
        mine, new = (attacking.token(model, text) for text in (obj, fact.target_new))
        return float(attacking.first(model, fact, logits) == obj), float(logits[mine] > logits[new])

    old, others = asked(fact.target_true), [asked(text) for text in controls]
    return torch.tensor(
        [old[0], sum(o[0] for o in others) / len(others), old[1], sum(o[1] for o in others) / len(others)]
    )


def test_the_rates_are_those_of_whole_passes(setting):
    model, facts, edits = setting
    with laws.untouched(model):
        found = measured.attack_by_context(model, edits, facts, prefixes=PREFIXES, controls=3)
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        assert len(set(found.details["controls"][i])) == 3 and set(found.details["controls"][i]) <= set(fact.controls)
        for p, prefix in enumerate(PREFIXES):
            assert torch.allclose(
                found.before.at(fact=i, case=p)[:4], rates(model, fact, prefix, found.details["controls"][i])
            )
            with edit.applied(model):
                assert torch.allclose(
                    found.after.at(fact=i, case=p)[:4], rates(model, fact, prefix, found.details["controls"][i])
                )
    assert not torch.equal(found.before.values, found.after.values)
    excess = found.after.at(quantity="old_first") - found.after.at(quantity="control_first")
    assert found.excess.mean.tolist() == pytest.approx(excess.mean(0).tolist())
    assert found.strongest.mean == pytest.approx(float(excess.mean(0).max()))


def test_the_draw_of_controls_hangs_on_its_seed_alone(setting):
    model, facts, _ = setting
    drawn = [
        measured.attack_by_context(model, model, facts, prefixes=PREFIXES[:1], controls=2, seed=s).details["controls"]
        for s in (0, 0, 1, 2)
    ]
    assert drawn[0] == drawn[1] and len({drawn[0], drawn[2], drawn[3]}) > 1


def test_over_all_objects_that_could_have_been_the_old_one_the_excess_is_nothing(setting):
    model, (fact, _), (edit, _) = setting
    objects = [fact.target_true, *fact.controls]
    relabelled = [fact.but(target_true=o, controls=[c for c in objects if c != o], id=o) for o in objects]
    with edit.applied(model):
        values = measured.attack_by_context(model, model, relabelled, prefixes=PREFIXES[:2], controls=None).after
    excess = values.at(quantity="old_first") - values.at(quantity="control_first")
    assert torch.allclose(excess.mean(0), torch.zeros(2), atol=1e-6)
    assert excess.abs().max() > 0.1
    over = values.at(quantity="old_over_new") - values.at(quantity="control_over_new")
    assert torch.allclose(over.mean(0), torch.zeros(2), atol=1e-6)


def test_a_model_that_copies_has_no_excess(setting, monkeypatch):
    model, facts, _ = setting

    def copying(runner, rows, batch_tokens, **_):
        for i, row in enumerate(rows):  # the likeliest token is the one that was read most often
            yield i, torch.bincount(row, minlength=model.cfg.d_vocab).float()

    monkeypatch.setattr(context_attack, "at_the_ends", copying)
    found = measured.attack_by_context(model, model, facts, prefixes=PREFIXES[:1])
    assert found.after.at(quantity="old_first").eq(1).all()
    assert found.after.at(quantity="control_first").eq(1).all()
    assert found.at(0).mean == 0.0 and found.known.all()


def test_an_object_without_a_text_is_not_asked(setting):
    model, (fact, other), _ = setting
    texts = {
        o: f"{o} is a city ." for o in (other.target_true, *other.controls, *fact.controls) if o != fact.target_true
    }
    found = measured.attack_by_context(
        model, model, [fact, other], prefixes=[fe.attacks.TextPrefix(texts)], controls=None
    )
    assert found.after.at(fact=0, quantity="old_first").isnan().all()
    assert found.excess.n.tolist() == [1]


def test_unknown_facts_are_left_out(setting):
    model, (fact, other), _ = setting
    unknown = fact.but(target_true=fact.controls[0], controls=[*fact.controls[1:], fact.target_true])
    found = measured.attack_by_context(model, model, [unknown, other], prefixes=PREFIXES[:1])
    assert found.known.tolist() == [False, True] and found.excess.n.tolist() == [1]
    assert math.isnan(found.at(0).low)
    assert "1 of 2 facts known" in repr(found) and len(found.table()) == 1


def test_what_can_not_be_asked_is_refused_before_anything_is_run(setting, monkeypatch):
    model, facts, edits = setting
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="prefixes is empty"):
            measured.attack_by_context(model, edits, facts, prefixes=[])
        with pytest.raises(ValueError, match="controls is 0"):
            measured.attack_by_context(model, edits, facts, controls=0)
        with pytest.raises(ValueError, match=f"reads {model.cfg.n_ctx}: give shorter prefixes"):
            measured.attack_by_context(model, edits, facts, prefixes=[fe.attacks.RepeatPrefix(40)])
        with pytest.raises(ValueError, match="no target_new, needed one"):
            measured.attack_by_context(model, model, [facts[0].but(target_new=None)])
