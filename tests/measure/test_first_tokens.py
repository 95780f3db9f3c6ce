"""Who is first: a model that overflows answers nothing, and objects that tie share it."""

import math

import jaxtyping
import laws
import measured
import pytest
import tiny
import torch
from measured import erasure_success, follow_routes
from oracles import attacking
from routes import known

import tl_factedit as fe
from tl_factedit.backend.weights import down_proj
from tl_factedit.measure.first_tokens import firsts
from tl_factedit.probes.states import read_states


def test_the_highest_is_first_ties_are_shared_and_nan_is_nothing():
    found = firsts(torch.tensor([[1.0, 3.0, 2.0], [2.0, 0.0, 2.0], [1.0, math.nan, 2.0]]))
    assert found[:2].tolist() == [[0, 1, 0], [0.5, 0, 0.5]] and found[2].isnan().all()


@pytest.fixture(scope="module")
def pair(kind):
    """A model, and one whose last down-projection overflowed."""
    model, broken = tiny.model(kind, "gpt2"), tiny.model(kind, "gpt2")
    site = down_proj(broken, broken.cfg.n_layers - 1)
    site.write_(torch.full_like(site.W, math.nan))
    assert laws.logits(broken, laws.FACT.text).isnan().all()
    facts = [
        attacking.known_fact(model, fact.but(subject=subject, id=subject))
        for fact in (laws.FACT, laws.OTHER)
        for subject in ("Anna", "Bob", "The Eiffel Tower", "Big Ben")
    ]
    return model, broken, facts


def test_no_attack_brings_an_object_back(pair):
    model, broken, facts = pair
    found = measured.read_out(model, broken, facts)
    assert found.after.values.isnan().all() and not found.before.values.isnan().all()
    references = [fact.but(subject=f"Rome {i}", id=None) for fact in (laws.FACT, laws.OTHER) for i in range(6)]
    knocked = measured.knock_out(model, broken, facts, references, widths=(1,))
    assert knocked.after.values.isnan().all()
    assert knocked.strongest.n == 0


def test_nothing_is_forgotten_and_no_route_is_gone(pair):
    model, broken, facts = pair
    gone = erasure_success(model, broken, facts)
    assert gone.before.all() and gone.prompt.n == gone.paraphrase.n == 0 and math.isnan(gone.prompt.mean)
    routes = [known(model, subject, "{} works near") for subject in ("Anna", "Bob")]
    found = follow_routes(model, broken, routes)
    assert found.executed.all() and found.old.n == found.new.n == found.old_excess.n == 0


def test_its_verdict_says_nothing(pair):
    model, broken, facts = pair
    verdict = fe.audit(model, broken, facts, reference=facts)
    assert verdict.label == "INCONCLUSIVE"


def test_one_fact_needs_no_list_and_a_generator_will_do(pair, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # this suite's types are stricter than a user's
    model, broken, (fact, *_) = pair
    for ask in (measured.read_out, measured.attack_by_context, measured.mediate, erasure_success):
        for facts in (fact, iter([fact])):
            assert ask(model, broken, facts).facts == (fact,)
    read = read_states(model, iter([fact]))
    assert read.facts == (fact,) and torch.equal(read.values, read_states(model, fact).values)
