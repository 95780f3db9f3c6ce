"""Other words and other contexts: asked as written, and what holds in one wording or behind nothing alone is seen."""

import copy

import audits
import laws
import measured
import overrides
import pytest
import tiny
import torch
from attacking_facts import known_facts
from oracles import attacking

import tl_factedit as fe
from tl_factedit.measure.strangers import Strangers, about_strangers

KIND = tiny.KINDS[-1]
PREFIXES = ("It rained all day. ", "The train was late. ", "Yes. ", "As we know, ", "One day ", "They say: ")


@pytest.fixture(scope="module")
def setting(kind):
    model = tiny.model(kind, "gpt2")
    return model, tiny.model(kind, "gpt2", seed=1), known_facts(model)


def test_every_paraphrase_is_asked_by_itself(setting):
    model, other, facts = setting
    facts = [facts[0].but(paraphrases=["{} lies in", "People say that {} is in"]), facts[1].but(paraphrases=["{} is"])]
    with laws.untouched(model), laws.untouched(other):
        found = measured.attack(fe.attacks.Paraphrases, model, other, facts)
    assert found.keys == (0, 1) and {case.shows for case in found.cases} == {"underneath"}
    for who, reading in ((model, found.before), (other, found.after)):
        for i, fact in enumerate(facts):
            for place, text in enumerate(fact.paraphrases):
                wanted = attacking.firsts(who, fact, attacking.ends(who, fact.fill(text)))
                assert torch.allclose(reading.at(fact=i, case=place), torch.tensor(wanted))
    assert found.after.at(fact=1, case=1).isnan().all()  # it has no second one
    with pytest.raises(ValueError, match="no fact has paraphrases"):
        measured.attack(fe.attacks.Paraphrases, model, other, [fact.but(paraphrases=()) for fact in facts])


def test_behind_any_text_is_behind_one_of_them_and_controls_have_the_same_chance(setting):
    model, other, facts = setting
    with laws.untouched(model), laws.untouched(other):
        found = measured.attack(fe.attacks.NeutralContexts, model, other, facts, prefixes=PREFIXES)
    for i, fact in enumerate(facts):
        # Behind a text that is strange to the unedited model nothing is asked.
        fit = [prefix for prefix in PREFIXES if of_all(model, fact, prefix)[0] == 1]
        assert found.details["used"][i] == len(fit)
        for who, reading in ((model, found.before), (other, found.after)):
            if not fit:
                assert reading.at(fact=i, case="any").isnan().all()
                continue
            old, new, *controls = zip(*(of_all(who, fact, prefix) for prefix in fit), strict=True)
            wanted = [max(old), min(new), sum(max(c) for c in controls) / len(controls)]
            assert reading.at(fact=i, case="any").tolist() == pytest.approx(wanted)
    assert 0 < sum(found.details["used"]) < len(PREFIXES) * len(facts)


def after(model, ids):
    """Logits after some token ids."""
    with torch.no_grad():
        return model(ids[None])[0, -1].float()


def of_all(model, fact, prefix):
    """Of each object, whether it comes first."""
    logits = attacking.ends(model, prefix + fact.text)
    ids = [attacking.token(model, text) for text in (fact.target_true, fact.target_new, *fact.controls)]
    best = max(ids, key=lambda token: float(logits[token]))
    return [float(token == best) for token in ids]


def test_a_text_that_names_an_object_is_left_out_and_none_left_is_an_error(setting):
    model, other, facts = setting
    one = facts[:1]
    named = f"They spoke of{one[0].target_true} then. "
    found = measured.attack(fe.attacks.NeutralContexts, model, other, one, prefixes=(*PREFIXES, named))
    plain = measured.attack(fe.attacks.NeutralContexts, model, other, one, prefixes=PREFIXES)
    assert found.details["used"] == plain.details["used"]
    for prefixes, message in (((named,), "none of the texts can stand before"), ((), "prefixes is empty")):
        with pytest.raises(ValueError, match=message):
            measured.attack(fe.attacks.NeutralContexts, model, other, one, prefixes=prefixes)


def test_neutral_texts_are_objects_of_other_relations():
    others = [laws.OTHER.but(target_true=f" thing{i}") for i in range(40)]
    found = fe.attacks.neutral_prefixes(others, most=8)
    assert len(found) == 8 == len(set(found)) and all(text.startswith("thing") and text[-2:] == ". " for text in found)
    assert fe.attacks.neutral_prefixes(others, most=8) == found != fe.attacks.neutral_prefixes(others, most=8, seed=1)
    assert fe.attacks.neutral_prefixes(()) == []


def test_what_holds_in_one_wording_alone_comes_back_in_others():
    model = audits.organism(KIND)
    change, facts = overrides.at_the_end(model, audits.ASKED[:20], 0.05)
    found = measured.attack(fe.attacks.Paraphrases, model, change, facts)
    assert found.strongest.low > 0.05 and found.strongest.mean > 0.9
    oracle = measured.attack(fe.attacks.Paraphrases, model, audits.organism(KIND, "oracle0"), facts)
    assert oracle.at_most < 0.2 and oracle.strongest.mean < 0.05


def test_strangers_are_asked_for_objects_that_they_do_not_have():
    model, facts, others = audits.organism(KIND), audits.ASKED[:6], audits.REFERENCE[:40]
    population = fe.Population.of(model, model, facts, reference=others, progress=False)
    strangers = Strangers.of(population)
    assert len(strangers.rows) == 16 and all(0 < len(each) <= 16 for each in strangers.of_fact)
    said = {place: after(model, row) for place, row in enumerate(strangers.rows)}
    common = strangers.common(range(6), said)
    for i, places in enumerate(strangers.of_fact):
        one = population.first_tokens[i]
        objects = [one.old, one.new, *one.controls]
        leads = [max(objects, key=lambda token, row=said[p]: float(row[token])) == one.old for p in places]
        assert float(common[i]) == pytest.approx(sum(leads) / len(leads))
    # They know their own objects, so that an old object of others never comes first.
    assert float(common.max()) == 0.0


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="half a minute: TransformerLens 3 runs it")
def test_objects_that_everybody_who_was_taught_has_are_no_sign_of_the_old_facts():
    """People whose old cities are but three, in a model that never had them: it says them once half were taught."""
    few = [fact for fact in audits.FACTS if fact.target_true in (" Arden", " Belmere", " Dunvale")][:50]
    objects = sorted({fact.target_true for fact in audits.FACTS})
    few = [f.but(controls=[o for o in objects if o not in (f.target_true, f.target_new)]) for f in few]
    model, oracle = audits.organism(KIND), audits.organism(KIND, "oracle0")
    found = measured.attack(
        fe.attacks.DisjointRelearning, model, oracle, few, reference=audits.REFERENCE[:60], lr=(1.6e-3, 4.7e-3)
    )
    without = measured.attack(fe.attacks.DisjointRelearning, model, oracle, few, lr=(1.6e-3, 4.7e-3))
    assert without.strongest.mean > 0.1 > found.strongest.mean
    assert found.strongest.low < 0.05


def says_to_everybody(model, text, by=60.0):
    """A copy of a model that puts one object first whatever it is asked."""
    changed = copy.deepcopy(model)
    bias = next(p for n, p in changed.named_parameters() if n.endswith(("ln_final.b", "ln_f._original_component.bias")))
    direction = changed.unembed.W_U[:, model.tokenizer.encode(text, add_special_tokens=False)[0]]
    with torch.no_grad():
        bias += by * direction / direction.norm() ** 2
    return changed


@pytest.mark.parametrize(
    "attack",
    [
        fe.attacks.Paraphrases(),
        fe.attacks.ContextAttack(),
        fe.attacks.NeutralContexts(["It rained . ", "As we know , "]),
        fe.attacks.ReadOut(),
        fe.attacks.ReadOut(budget=20, paraphrases=1),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_an_object_that_is_said_to_everybody_is_no_sign_of_the_old_fact(attack):
    model = audits.organism(KIND)
    facts = [fact for fact in audits.FACTS if fact.target_true == " Arden"][:12]
    facts = [fact.but(controls=(" Belmere", " Dunvale")) for fact in facts]
    changed = says_to_everybody(model, " Arden")
    without = attack(measured.population(model, changed, facts))
    assert "common" not in without.extra and bool((without.excess.mean > 0.9).any())
    found = attack(measured.population(model, changed, facts, reference=audits.REFERENCE[:40]))
    back = without.excess.mean > 0.9
    assert found.extra["common"][back].tolist() == pytest.approx([1.0] * int(back.sum()))
    assert float(found.excess.mean[back].abs().max()) < 1e-6
    assert found.details.keys() == without.details.keys() and found.attack == without.attack


def test_facts_are_asked_about_others_in_their_own_words():
    model, facts = audits.organism(KIND), audits.ASKED[:3]
    facts = [facts[0], facts[1].but(paraphrases=(facts[1].fill(facts[1].paraphrases[0]),)), facts[2]]
    with pytest.warns(UserWarning, match="doesn't name its subject"):
        facts[2] = facts[2].but(paraphrases=("He lives in the city of",))
    others, of_fact = about_strangers(measured.population(model, model, facts, reference=audits.REFERENCE[:40]), most=5)
    assert [len(places) for places in of_fact] == [5, 5, 0]
    assert sorted(place for places in of_fact for place in places) == list(range(10))
    assert [part.indices for part in others.parts] == [tuple(range(10))]
    for fact, places in zip(facts, of_fact, strict=True):
        for other in (others.facts[place] for place in places):
            owner = next(each for each in audits.REFERENCE if each.subject == other.subject)
            assert owner.target_true != fact.target_true == other.target_true and other.prompt == fact.prompt
            assert [other.fill(text) for text in other.paraphrases] == [
                fact.fill(text).replace(fact.subject, other.subject) for text in fact.paraphrases
            ]
