"""Read-outs name what the definitions say, and nothing in excess of an object that means nothing."""

import math

import laws
import measured
import pytest
import tiny
import torch
from oracles import attacking

import tl_factedit as fe
from tl_factedit.attacks.readout import ATTACKS

VOCABULARY = len(tiny.tokenizer())


def rome(model, fact, layer=1):
    stats = fe.KeyStats.identity(model, layer)
    return fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)(model, [fact])


@pytest.fixture(scope="module")
def setting(kind):
    """A model, two facts that it knows, and an edit of each."""
    model = tiny.model(kind, "gpt2")
    facts = [attacking.known_fact(model, fact) for fact in (laws.FACT, laws.OTHER)]
    return model, facts, [rome(model, fact) for fact in facts]


def named(model, fact, k):
    """The three sets, as written."""
    seen = attacking.lens(model, fact.text)
    rivals = {attacking.token(model, text): text for text in (fact.target_true, *fact.controls)}
    return (
        attacking.head_projection(seen, k),
        attacking.probability_delta(seen, k),
        {max(rivals, key=lambda token: float(seen[-1, token]))},
    )


def as_written(model, fact, k):
    rows = []
    for tokens in named(model, fact, k):
        old, new, *controls = (
            float(attacking.token(model, text) in tokens)
            for text in (fact.target_true, fact.target_new, *fact.controls)
        )
        rows.append([old, new, sum(controls) / len(controls), float(len(tokens))])
    return torch.tensor(rows)


@pytest.mark.parametrize("k", [1, 5])
def test_the_candidates_are_those_of_the_definitions(setting, k):
    model, facts, edits = setting
    with laws.untouched(model):
        found = measured.read_out(model, edits, facts, k=k)
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        assert torch.allclose(found.before.at(fact=i), as_written(model, fact, k))
        with edit.applied(model):
            assert torch.allclose(found.after.at(fact=i), as_written(model, fact, k))
    assert not torch.equal(found.before.values, found.after.values)


def filled(rows, budget):
    """The first of all rows, then the second of all, until there are so many."""
    found = []
    for rank in range(rows.shape[1]):
        for row in rows:
            token = int(row.argsort(descending=True)[rank])
            if token not in found:
                found.append(token)
            if len(found) == budget:
                return set(found)
    return set(found)


@pytest.mark.parametrize("paraphrases", [0, 2])
def test_with_a_budget_the_sets_are_filled_rank_by_rank_from_the_last_layer_down(setting, paraphrases):
    model, facts, _ = setting
    found = measured.read_out(model, model, facts, budget=7, paraphrases=paraphrases)
    assert found.attack == "read-out of 7"
    for i, fact in enumerate(facts):
        texts = [fact.text, *map(fact.fill, fact.paraphrases[:paraphrases])]
        seen = [attacking.lens(model, text).flip(0) for text in texts]
        steps = [-each.softmax(-1).diff(dim=0) for each in seen]  # the last layer stands first
        sets = filled(torch.cat(seen), 7), filled(torch.cat([part for each in steps for part in (each, -each)]), 7)
        for case, tokens in zip(ATTACKS, sets, strict=False):
            assert found.after.at(fact=i, case=case, quantity="size") == len(tokens) == 7
            wanted = [float(attacking.token(model, text) in tokens) for text in (fact.target_true, fact.target_new)]
            assert found.after.at(fact=i, case=case)[:2].tolist() == wanted


def test_some_layers_alone_give_the_candidates_of_these(setting):
    model, facts, _ = setting
    found = measured.read_out(model, model, facts[:1], layers=[2, 0], k=4)
    seen = attacking.lens(model, facts[0].text)
    assert found.details["layers"] == (0, 2)
    sizes = found.after.at(fact=0, quantity="size").tolist()
    assert sizes[0] == len(attacking.head_projection(seen[[0, 2]], 4))
    assert sizes[1] == len(attacking.probability_delta(seen[[0, 2]], 4))
    assert found.after.at(fact=0, case="runner_up", quantity="old_first") == 1  # of the output, whatever is read


def test_an_unchanged_model_has_its_own_readings_and_knows_its_facts(setting):
    model, facts, _ = setting
    found = measured.read_out(model, model, facts)
    assert torch.equal(found.before.values, found.after.values)
    assert found.known.all()
    assert found.at("runner_up").mean == 1.0 and found.best.key == "runner_up"
    assert found.strongest.low <= found.at("runner_up").low  # corrected
    assert "runner up: excess 1.00" in repr(found)


@pytest.mark.parametrize("k", [1, 6])
def test_over_all_objects_that_could_have_been_the_old_one_the_excess_is_nothing(setting, k):
    model, (fact, _), (edit, _) = setting
    objects = [fact.target_true, *fact.controls]
    relabelled = [fact.but(target_true=o, controls=[c for c in objects if c != o], id=o) for o in objects]
    with edit.applied(model):
        values = measured.read_out(model, model, relabelled, k=k).after
    excess = values.at(quantity="old_first") - values.at(quantity="control_first")
    assert torch.allclose(excess.mean(0), torch.zeros(len(ATTACKS)), atol=1e-6)
    assert excess.abs().max() > 0.1


def test_an_attack_that_names_everything_finds_nothing(setting):
    model, facts, edits = setting
    found = measured.read_out(model, edits, facts, k=VOCABULARY)
    for attack in ("head_projection", "probability_delta"):
        assert found.at(attack).mean == 0.0
        assert found.after.at(case=attack, quantity="size").eq(VOCABULARY).all()


def test_the_excess_of_a_layer_is_of_its_own_top_tokens(setting):
    model, facts, _ = setting
    found = measured.read_out(model, model, facts, k=7)
    expected = []
    for fact in facts:
        seen = attacking.lens(model, fact.text)
        tops = [attacking.head_projection(row[None], 7) for row in seen]
        own = attacking.token(model, fact.target_true)
        controls = [attacking.token(model, text) for text in fact.controls]
        expected.append([(own in top) - sum(c in top for c in controls) / len(controls) for top in tops])
    assert found.details["by_layer"].mean.tolist() == pytest.approx(torch.tensor(expected).mean(0).tolist(), abs=1e-6)


def test_facts_that_say_nothing_are_left_out(setting):
    model, (fact, other), _ = setting
    unknown = fact.but(target_true=fact.controls[0], controls=[*fact.controls[1:], fact.target_true], id="unknown")
    alike = fact.but(target_new=fact.target_true + " city", id="alike")
    found = measured.read_out(model, model, [unknown, alike, other])
    assert found.known.tolist() == [False, False, True]
    assert found.after.at(fact=1).isnan().all()
    assert found.at("runner_up").n == 1 and math.isnan(found.at("runner_up").low)
    assert found.table().n.tolist() == [1, 1, 1]


def test_what_can_not_be_asked_is_refused_before_anything_is_run(setting, monkeypatch):
    model, facts, edits = setting
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="no target_new, needed one"):
            measured.read_out(model, model, [facts[0].but(target_new=None)])
        with pytest.raises(ValueError, match="k is 0"):
            measured.read_out(model, edits, facts, k=0)
        with pytest.raises(ValueError, match="budget is 0"):
            measured.read_out(model, edits, facts, budget=0)
        with pytest.raises(ValueError, match="layers is empty"):
            measured.read_out(model, edits, facts, layers=[])
        with pytest.raises(ValueError, match="layer 9 is outside the model"):
            measured.read_out(model, edits, facts, layers=[9])
        with pytest.raises(ValueError, match="facts is empty"):
            measured.read_out(model, edits, [])
