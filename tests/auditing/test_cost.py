"""What an audit will cost is said before it is made; what is said grows with what is asked."""

import copy
from dataclasses import replace

import pytest
import tiny
from attacking_facts import known_facts

import tl_factedit as fe
from tl_factedit.auditing import cost

A = fe.attacks
TEXTS = ("Paris is a city in France", "Rome is the capital of Italy")


@pytest.fixture
def population(kind):
    model = tiny.model(kind, "gpt2")
    return fe.Population.of(model, tiny.model(kind, "gpt2", seed=1), known_facts(model), progress=False)


@pytest.mark.parametrize(
    ("attack", "more"),
    [
        (A.KnockOut(), {"widths": (1, 2)}),
        (A.ReadOut(), {"paraphrases": 2}),
        (A.ContextAttack(), {"controls": 9}),
        (A.WeightReversal(), {"neighbours": 9}),
        (A.Rounding(), {"bits": (8, 4, 3)}),
        (A.DisjointRelearning(), {"lr": (1e-3, 2e-3, 3e-3)}),
        (A.Drift(TEXTS), {"steps": (20, 200)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_more_work_costs_more(population, monkeypatch, attack, more):
    monkeypatch.setattr(cost, "_tokens_a_second", lambda *_: 100.0)
    (less,), (dearer,) = (cost.reckoned(population, [a]).values() for a in (attack, replace(attack, **more)))
    assert 0 < less < dearer


def test_an_attack_of_ones_own_is_not_reckoned(population):
    assert cost.reckoned(population, [lambda _: None]) == {}


def test_the_whole_and_the_dearest_are_told():
    said = cost.announced({"KnockOut": 30.0, "Drift": 300.0, "ReadOut": 1.0, "Rounding": 2.0})
    assert said == "audit: its attacks will take some 6 min here (Drift 5 min, KnockOut 30 s, Rounding 2 s)"


def test_it_is_said_before_anything_else_and_only_where_all_was_asked_for(kind, monkeypatch):
    model, written = tiny.model(kind, "gpt2"), []
    facts = known_facts(model)
    monkeypatch.setattr("tl_factedit.auditing.gather.tqdm.write", written.append)
    fe.audit(model, copy.deepcopy(model), facts, full=True, progress=False)
    fe.audit(model, copy.deepcopy(model), facts)
    assert not written
    fe.audit(model, copy.deepcopy(model), facts, full=True, progress=True)
    assert len(written) == 1 and written[0].startswith("audit: its attacks will take some")
