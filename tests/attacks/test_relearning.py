"""Relearning: as torch's own Adam on the weights does it, a row alone as among others, and nothing is left behind."""

import contextlib
import copy
import math

import laws
import measured
import pytest
import tiny
import torch
from oracles import attacking

import tl_factedit as fe
from tl_factedit.attacks import relearning
from tl_factedit.attacks.learner import Group as _Group
from tl_factedit.attacks.learner import adding_hooks as _adding
from tl_factedit.attacks.learner import updates_until_learnt as _updates_until_learnt
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align

LR = 1e-2


def rome(model, fact):
    stats = fe.KeyStats.identity(model, 1)
    return fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)(model, [fact])


@pytest.fixture(scope="module")
def setting(kind):
    """A model, two facts that it knows, and an edit of each."""
    model = tiny.model(kind, "gpt2")
    facts = [attacking.known_fact(model, fact) for fact in (laws.FACT, laws.OTHER)]
    return model, facts, [rome(model, fact) for fact in facts]


def literal(model, fact, target, layers, steps=30):
    return attacking.updates_until_learnt(model, fact.text, target, layers, LR, steps)


@pytest.mark.parametrize("layers", [(1,), (0, 3)])
def test_the_updates_are_those_of_adam_on_the_weights(setting, layers):
    model, facts, edits = setting
    with laws.untouched(model):
        found = measured.relearn(model, edits, facts, layers=layers, lr=LR, steps=30, controls=2)
    assert found.details["layers"] == layers and found.known.all()
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        with edit.applied(model):
            old = literal(model, fact, fact.target_true, layers)
            control = attacking.mean([literal(model, fact, text, layers) for text in found.details["controls"][i]])
        # Adam divides by root mean squares, which makes rounding grow.
        assert float(found.details["old"][i]) == pytest.approx(old, abs=0.02)
        assert float(found.details["control"][i]) == pytest.approx(control, abs=0.02)
        assert 1 < old < 30
    assert found.details["savings"].mean == pytest.approx(
        float((found.details["control"] - found.details["old"]).mean())
    )
    assert found.details["unlearnt"] == 0
    # Of each look, how often the old object is learnt by then, and how often a control is.
    for case in found.cases:
        taken = found.details["old"]
        assert found.after.at(case=case.key, quantity="old_first").tolist() == (taken <= case.key).float().tolist()
        assert 0 <= found.share("control_first", case.key) <= 1
    assert [case.key for case in found.cases] == [2, 5, 10, 20, 30] and len(found.table()) == 5
    assert found.at(30).mean == 0 and {case.shows for case in found.cases} == {"residue"}


def test_all_layers_learn_if_none_are_named(setting):
    model, facts, edits = setting
    found = measured.relearn(model, edits, facts, lr=LR, steps=10, controls=1)
    named = measured.relearn(model, edits, facts, lr=LR, steps=10, controls=1, layers=range(4))
    assert found.details["layers"] == (0, 1, 2, 3) and torch.equal(found.details["old"], named.details["old"])


def test_a_target_alone_learns_as_it_does_among_others(setting):
    model, facts, _ = setting
    rows = [align(model.tokenizer, fact, prepend_bos=True) for fact in facts]
    pupils = [(row.ids, ids) for row in rows for ids in (row.new_ids, torch.cat([row.new_ids, row.true_ids]))]
    with frozen(model):
        together = _updates_until_learnt(model, pupils, (1, 2), 3 * LR, 20, 1.0)
        alone = torch.cat([_updates_until_learnt(model, [one], (1, 2), 3 * LR, 20, 1.0) for one in pupils])
        little = _updates_until_learnt(model, pupils, (1, 2), 3 * LR, 20, 1e-9)
    assert torch.allclose(together, alone, atol=0.02) and torch.equal(alone, little)
    assert len(set(together.tolist())) == len(pupils)


def test_what_is_there_already_takes_no_update(setting):
    model, (fact, _), _ = setting
    row = align(model.tokenizer, fact, prepend_bos=True)
    with frozen(model), torch.no_grad():
        likeliest = Runner(model).logits(row.ids[None])[0, -1].argmax()[None]
    site, unembed = down_proj(model, 3), model.unembed.W_U[:, likeliest[0]].detach()
    pupils = [(row.ids, likeliest)]
    sure = (site.value_at, lambda value, hook=None: value + 100 * unembed)
    with frozen(model):
        assert float(_updates_until_learnt(model, pupils, (3,), LR, 2, 1.0)) > 0
        with model.hooks(fwd_hooks=[sure]):
            assert float(_updates_until_learnt(model, pupils, (3,), LR, 2, 1.0)) == 0


def test_what_is_not_learnt_in_time_counts_one_more_and_is_told(setting):
    model, facts, edits = setting
    found = measured.relearn(model, edits, facts, lr=1e-6, steps=3, controls=2)
    assert found.details["old"].tolist() == [4.0, 4.0] and found.details["control"].tolist() == [4.0, 4.0]
    assert found.details["unlearnt"] == 1.0 and found.details["savings"].mean == 0.0


def test_what_is_learnt_comes_on_top_of_a_router(setting):
    model, (fact, _), (edit, _) = setting
    routed = fe.editors.RoutedEdit.of(edit, radius=0.1)
    row = align(model.tokenizer, fact, prepend_bos=True)
    site = down_proj(model, 1)
    nothing = [torch.zeros(1, *site.W.shape)]
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        plain = _Group(runner, [(row.ids, row.new_ids)], 1).log_p(runner, [])
        with routed.applied(model):
            group = _Group(runner, [(row.ids, row.new_ids)], 1)
            over, own = group.log_p(runner, _adding([site], nothing)), group.log_p(runner, [])
    assert torch.allclose(over, own) and (over - plain).abs() > 1e-2
    with laws.untouched(model):
        found = measured.relearn(model, routed, [fact], layers=[1], lr=LR, steps=25, controls=1)
    assert 1 < float(found.details["old"]) < 25 and found.details["savings"].n == 1


def test_the_rate_is_the_largest_at_which_controls_take_eight_updates(setting):
    model, facts, _ = setting
    rates = tuple(0.03 * 2.0**-i for i in range(9))
    with laws.untouched(model):
        lr = fe.attacks.relearning_rate(model, facts, layers=[1], rates=rates)
    # One control each, as the rate is found.
    found, faster = (measured.relearn(model, model, facts, layers=[1], lr=rate, controls=1) for rate in (lr, 2 * lr))
    assert lr in rates and found.details["control"].median() >= 8 > faster.details["control"].median()
    with pytest.raises(ValueError, match="at none of the learning rates"):
        fe.attacks.relearning_rate(model, facts, layers=[1], rates=[0.5])
    with pytest.raises(ValueError, match="no fact has a control"):
        fe.attacks.relearning_rate(model, [fact.but(controls=()) for fact in facts])


def test_a_rate_that_is_not_given_is_found_on_the_unedited_model(setting, monkeypatch):
    model, facts, edits = setting
    asked = []

    def rate(where, of, **options):
        asked.append((attacking.ends(where, of[0].text), options["layers"]))
        return LR

    unedited = attacking.ends(model, facts[0].text)
    monkeypatch.setattr(relearning, "relearning_rate", rate)
    found = measured.relearn(model, edits[:1], facts[:1], layers=[1], steps=2)
    assert found.details["lr"] == LR and len(asked) == 1
    assert torch.equal(asked[0][0], unedited) and asked[0][1] == (1,)


def test_facts_that_can_not_be_compared_are_left_out(setting):
    model, (fact, other), _ = setting
    unknown = fact.but(target_true=fact.controls[0], controls=[*fact.controls[1:], fact.target_true], id="unknown")
    longer = other.but(controls=(" Paris city", " Rome city"), id="longer")
    found = measured.relearn(model, model, [unknown, longer, other], layers=[1], lr=LR, steps=10, controls=1)
    assert found.known.tolist() == [False, True, True]
    assert found.details["old"].isnan().tolist() == [True, True, False] and found.details["savings"].n == 1
    assert math.isnan(found.details["savings"].low) and "relearning" in repr(found)


def test_a_model_is_left_ready_for_copies_and_its_modes_are_kept(kind):
    model = tiny.model(kind, "llama")
    fact = attacking.known_fact(model, laws.FACT)
    edit = rome(model, fact)
    model.train()
    with torch.inference_mode():
        found = measured.relearn(model, edit, [fact], layers=[2], lr=LR, steps=10, controls=1)
    assert model.training
    model.eval()
    again = measured.relearn(model, edit, [fact], layers=[2], lr=LR, steps=10, controls=1)
    assert torch.equal(found.details["old"], again.details["old"])
    copy.deepcopy(model)


def disjoint(model, changed, facts, **options):
    return measured.attack(fe.attacks.DisjointRelearning, model, changed, facts, lr=LR, **options)


def test_half_of_the_facts_are_taught_together_and_the_others_looked_at(kind, setting):
    model, (fact, other), edits = setting
    both = fe.compose(edits)
    third = attacking.known_fact(model, fe.Fact("Big Ben", "{} stands near the", " Rome", " Paris"))
    facts = [fact, other, third]
    with laws.untouched(model):
        found = disjoint(model, both, facts, layers=[1, 3], force=True)
    halves = found.details["halves"]
    assert sorted(i for half in halves for i in half) == [0, 1, 2] and {len(half) for half in halves} == {1, 2}
    assert found.keys == ((LR, 1), (LR, 3)) and {case.shows for case in found.cases} == {"underneath"}
    assert found.asks_weights == "teaching" and found.known.all()
    assert found.extra["learnt"].tolist() == [1.0, 1.0]
    # As torch's Adam teaches the others on the weights themselves, prompts and first paraphrases.
    for teach, look in (halves, halves[::-1]):
        with both.applied(model):
            seen, updates = taught_together(model, [facts[i] for i in teach], (1, 3), [facts[i] for i in look])
        for time, at in enumerate(updates):
            for place, i in enumerate(look):
                case = found.keys[time]
                assert float(found.after.at(fact=i, case=case, quantity="updates")) == at
                assert found.after.at(fact=i, case=case)[:2].tolist() == list(seen[time][place][:2])
    others = {
        disjoint(model, both, facts, layers=[1], most=1, seed=seed, force=True).details["halves"] for seed in range(6)
    }
    assert len(others) > 1


def taught_together(model, facts, layers, look):
    """What the others say when the lessons are learnt and after three times as long, and how many updates that took."""
    sites = [down_proj(model, layer) for layer in layers]
    lessons = [(f, text) for f in facts for text in (f.text, *map(f.fill, f.paraphrases[:1]))]

    def said():
        return [attacking.firsts(model, f, attacking.ends(model, f.text)) for f in look]

    def log_p():
        return [
            model(model.to_tokens(text))[0, -1].log_softmax(-1)[attacking.token(model, f.target_true)]
            for f, text in lessons
        ]

    with attacking.written(sites, [site.W.clone() for site in sites]):
        params = [site.param for site in sites]
        try:
            for param in params:
                param.requires_grad_(True)
            adam = torch.optim.Adam(params, lr=LR)
            seen, due, updates = [], [], 0
            while not due or updates < due[-1]:
                now = log_p()
                if not due and sum(float(each.detach()) > math.log(0.5) for each in now) >= 0.9 * len(now):
                    due = [updates + 1, 3 * (updates + 1)]
                loss = -sum(now) / len(now)
                for param, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                    param.grad = gradient
                adam.step()
                updates += 1
                if updates in due:
                    with torch.no_grad():
                        seen.append(said())
        finally:
            for param in params:
                param.grad = None
        return seen, due


def test_what_is_not_learnt_in_time_says_nothing(setting):
    model, facts, edits = setting
    found = disjoint(model, fe.compose(edits), facts, layers=[1], most=1, force=True)
    assert not found.tested.any() and found.excess.mean.isnan().all()
    assert set(found.masked.values()) == {"what was taught isn't learnt in 1 update"}


def test_several_rates_are_several_cases(setting):
    model, facts, edits = setting
    found = measured.attack(
        fe.attacks.DisjointRelearning, model, fe.compose(edits), facts, lr=(LR, 2 * LR), layers=[1], force=True
    )
    assert found.keys == ((LR, 1), (LR, 3), (2 * LR, 1), (2 * LR, 3))
    alone = disjoint(model, fe.compose(edits), facts, layers=[1], force=True)
    assert torch.allclose(found.after.values[:, :2], alone.after.values, equal_nan=True)


TEXTS = ["Paris is a city in France", "Rome is the capital of Italy", "The tower stands near the river"]


def test_drift_is_training_on_text_as_torch_does_it(setting):
    model, facts, edits = setting
    both = fe.compose(edits)
    options = {"texts": TEXTS, "steps": (2, 5), "lr": LR, "at_once": 2, "layers": [1, 3]}
    with laws.untouched(model):
        found = measured.attack(fe.attacks.Drift, model, both, facts, **options, force=True)
    assert found.keys == (2, 5) and {case.shows for case in found.cases} == {"underneath"}
    for changed, reading in ((None, found.before), (both, found.after)):
        with both.applied(model) if changed else contextlib.nullcontext():
            for count, said in trained_on(model, (2, 5), facts).items():
                for i, row in enumerate(said):
                    assert reading.at(fact=i, case=count)[:2].tolist() == list(row[:2])
    survives = found.before.at(quantity="old_first").mean(0)
    assert torch.allclose(found.extra["survives"], survives)
    assert "3 texts" in repr(fe.attacks.Drift(TEXTS)) and TEXTS[0] not in repr(fe.attacks.Drift(TEXTS))


def trained_on(model, steps, facts):
    sites = [down_proj(model, layer) for layer in (1, 3)]
    size = math.sqrt(sum(float(site.W.square().mean()) for site in sites) / 2)
    with attacking.written(sites, [site.W.clone() for site in sites]):
        params, said = [site.param for site in sites], {}
        try:
            for param in params:
                param.requires_grad_(True)
            adam = torch.optim.Adam(params, lr=LR * size)
            for step in range(max(steps)):
                losses = []
                for i in range(2):
                    ids = model.to_tokens(TEXTS[(2 * step + i) % 3])
                    log_p = model(ids)[0, :-1].log_softmax(-1)
                    losses.append(-log_p.gather(-1, ids[0, 1:, None]).mean())
                for param, gradient in zip(params, torch.autograd.grad(sum(losses) / 2, params), strict=True):
                    param.grad = gradient
                adam.step()
                if step + 1 in steps:
                    with torch.no_grad():
                        said[step + 1] = [attacking.firsts(model, f, attacking.ends(model, f.text)) for f in facts]
        finally:
            for param in params:
                param.grad = None
    return said


def test_what_can_not_be_asked_is_refused_before_anything_is_run(setting, monkeypatch):
    model, facts, edits = setting
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="layers is empty"):
            measured.relearn(model, edits, facts, layers=[])
        with pytest.raises(ValueError, match="layer 7 is outside the model"):
            measured.relearn(model, edits, facts, layers=[7])
        for lr in (0.0, -1.0, math.inf):
            with pytest.raises(ValueError, match="needed a learning rate above 0, or None"):
                measured.relearn(model, edits, facts, lr=lr)
        with pytest.raises(ValueError, match="controls is 0"):
            measured.relearn(model, edits, facts, lr=LR, controls=0)
        with pytest.raises(ValueError, match="no target_new, needed one"):
            measured.relearn(model, model, [facts[0].but(target_new=None)], lr=LR)
        with pytest.raises(ValueError, match="2 changes answer for 2 facts, needed one for all"):
            disjoint(model, edits, facts)
        with pytest.raises(ValueError, match="needed 2 at least"):
            disjoint(model, model, facts[:1])
        with pytest.raises(ValueError, match="needed 1 update and 0 paraphrases"):
            disjoint(model, model, facts, most=0)
        for lr in ((), 0.0, (LR, LR), (LR, -1.0)):
            with pytest.raises(ValueError, match="needed one learning rate above 0"):
                measured.attack(fe.attacks.DisjointRelearning, model, model, facts, lr=lr)
        with pytest.raises(ValueError, match="2 changes answer for 2 facts, needed one for all"):
            measured.attack(fe.attacks.Drift, model, edits, facts, texts=TEXTS)
        for options, message in (
            ({"texts": []}, "texts is empty"),
            ({"texts": ["Paris"], "prepend_bos": False}, "no token to predict"),
            ({"texts": TEXTS, "steps": (5, 2)}, "that ascend"),
            ({"texts": TEXTS, "lr": 0.0}, "needed more than 0"),
            ({"texts": TEXTS, "at_once": 0}, "1 text at least"),
        ):
            with pytest.raises(ValueError, match=message):
                measured.attack(fe.attacks.Drift, model, model, facts, **options)
