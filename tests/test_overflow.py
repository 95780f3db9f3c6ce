"""A model that overflows answers nothing: no object of it is first, and no attack on it succeeds."""

import math

import laws
import pytest
import tiny
import torch
from oracles import attacking
from test_routes import known

import tl_factedit as fe
from tl_factedit.forgetting import forgotten
from tl_factedit.model import down_proj
from tl_factedit.routes import follow_routes


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
    found = fe.read_out(model, broken, facts)
    assert found.after.values.isnan().all() and not found.before.values.isnan().all()
    references = [fact.but(subject=f"Rome {i}", id=None) for fact in (laws.FACT, laws.OTHER) for i in range(6)]
    knocked = fe.knock_out(model, broken, facts, references, widths=(1,))
    assert knocked.after.values.isnan().all()
    assert knocked.strongest.n == 0


def test_nothing_is_forgotten_and_no_route_is_gone(pair):
    model, broken, facts = pair
    gone = forgotten(model, broken, facts)
    assert gone.before.all() and gone.prompt.n == gone.paraphrase.n == 0 and math.isnan(gone.prompt.mean)
    routes = [known(model, subject, "{} works near") for subject in ("Anna", "Bob")]
    found = follow_routes(model, broken, routes)
    assert found.executed.all() and found.old.n == found.new.n == found.old_excess.n == 0


def test_its_verdict_says_nothing(pair):
    model, broken, facts = pair
    verdict = fe.audit(model, broken, facts, reference=facts)
    assert verdict.label == "INCONCLUSIVE"
