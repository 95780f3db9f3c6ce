"""States are what TransformerLens itself keeps, at the last subject token and the last token, whatever is batched."""

import functools

import laws
import pytest
import tiny
import torch
from oracles import probing, untouched

from tl_factedit.backend.protocol import UnsupportedModelError
from tl_factedit.backend.runner import Runner
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align
from tl_factedit.probes.nulls import RandomWeights
from tl_factedit.probes.states import Applicable, HiddenStates, read_states, read_states_edited

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, batches of another shape
MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2", "bloom", "olmo2")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama", "gptj")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)
FACTS = [
    Fact("The Eiffel Tower", "Where is {} located in the city of", " Paris", " Rome"),
    Fact("Big Ben", "{} is in", " London", " Madrid"),
    Fact("Danielle Darrieux", "The mother tongue of {} is", " French", " German"),
    Fact("John", "{} lives in the city of", " Rome", " Vienna"),
    Fact("Mary", "{}", " Rome", " Vienna"),
]


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


def expected(model, fact: Fact, names, template=None) -> torch.Tensor:
    row = align(model.tokenizer, fact, prepend_bos=bool(model.cfg.default_prepend_bos), template=template)
    return probing.states(model, row.ids, [row.subject[1] - 1, len(row.ids) - 1], names)


@on_models
def test_states_are_what_the_cache_holds_of_each_prompt_alone(kind, arch):
    model = shared(kind, arch)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(4))]
    found = read_states(model, FACTS, batch_tokens=25)  # of 4 to 9 tokens each, so that batches are padded
    assert found.layers == (-1, 0, 1, 2, 3)
    assert found.positions == ("subject", "last")
    assert found.values.dtype == torch.float32
    for fact, states in zip(FACTS, found.values, strict=True):
        torch.testing.assert_close(states, expected(model, fact, names), **CLOSE)
    # A subject that ends the prompt stands at both positions; others don't.
    apart = (found.values[:, :, 0] - found.values[:, :, 1]).norm(dim=-1)
    assert (apart[4] == 0).all()
    assert (apart[:4] > 1e-2).all()


@pytest.mark.parametrize(
    ("component", "hook"), [("resid_mid", "hook_resid_mid"), ("mlp", "hook_mlp_out"), ("attn", "hook_attn_out")]
)
def test_other_components_have_a_row_a_block(kind, component, hook):
    model = shared(kind, "llama")
    found = read_states(model, FACTS, component=component)
    assert found.layers == (0, 1, 2, 3)
    names = [f"blocks.{layer}.{hook}" for layer in range(4)]
    torch.testing.assert_close(found.values[0], expected(model, FACTS[0], names), **CLOSE)


def test_facts_are_read_together_as_alone_whatever_the_size_of_batches(kind):
    model = shared(kind, "gpt2")
    together = read_states(model, FACTS)
    for size in (1, 12, 10_000):
        torch.testing.assert_close(read_states(model, FACTS, batch_tokens=size).values, together.values, **CLOSE)
    backwards = read_states(model, FACTS[::-1])
    torch.testing.assert_close(backwards.values.flip(0), together.values, **CLOSE)


def test_another_template_and_another_policy_of_bos_are_other_states(kind):
    model = shared(kind, "gpt2")
    usual, template = read_states(model, FACTS), "What is the language of {} in"
    other = read_states(model, FACTS, template=template)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(4))]
    torch.testing.assert_close(other.values[2], expected(model, FACTS[2], names, template), **CLOSE)
    assert not torch.allclose(other.values, usual.values)
    policy = bool(model.cfg.default_prepend_bos)
    assert torch.equal(read_states(model, FACTS, prepend_bos=policy).values, usual.values)
    assert not torch.allclose(read_states(model, FACTS, prepend_bos=not policy).values, usual.values)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_each_fact_is_read_under_its_own_change_or_all_under_one(kind, arch):
    model = tiny.model(kind, arch)
    edits = [laws.rome(model, layer=1)(model, [fact]) for fact in FACTS[:2]]
    assert isinstance(edits[0], Applicable)
    before = read_states(model, FACTS[:2])
    each = read_states_edited(model, edits, FACTS[:2])
    one = read_states_edited(model, edits[0], FACTS[:2])
    for i, edit in enumerate(edits):
        with edit.applied(model):
            by_hand = read_states(model, FACTS[:2])
        torch.testing.assert_close(each.values[i], by_hand.values[i], **CLOSE)
        if i == 0:
            torch.testing.assert_close(one.values, by_hand.values, **CLOSE)
    assert not torch.allclose(each.values[1], one.values[1])
    # Up to the edited block all is as before; its output at the subject is not.
    torch.testing.assert_close(each.values[:, :2], before.values[:, :2], **CLOSE)
    assert ((each.values - before.values)[:, 2, 0].norm(dim=-1) > 1e-2).all()
    assert torch.equal(read_states(model, FACTS[:2]).values, before.values)
    assert each.model.endswith("changed")


@on_models
def test_the_model_is_left_as_it_was_also_by_an_error(kind, arch, monkeypatch):
    model = untouched.used(tiny.model(kind, arch))
    model.train()
    before = untouched.state(model)
    assert torch.equal(read_states(model, FACTS).values, read_states(shared(kind, arch), FACTS).values)
    read_states_edited(model, [RandomWeights(0), RandomWeights(1)], FACTS[:2])
    assert untouched.state(model) == before

    def refuse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "capture", refuse)
    with pytest.raises(KeyboardInterrupt):
        read_states_edited(model, RandomWeights(0), FACTS)
    with pytest.raises(KeyboardInterrupt):
        read_states_edited(model, [RandomWeights(0)], FACTS[:1])
    assert untouched.state(model) == before


def test_what_cannot_be_read_is_refused(kind, monkeypatch):
    model = shared(kind, "gpt2")
    with pytest.raises(ValueError, match="facts is empty"):
        read_states(model, [])
    with pytest.raises(ValueError, match="1 changes for 2 facts, needed one for each fact"):
        read_states_edited(model, [RandomWeights()], FACTS[:2])
    monkeypatch.setattr("tl_factedit.backend.runner.Runner.capture", lambda *_, **__: {})
    with pytest.raises(UnsupportedModelError, match="never fired"):
        read_states(model, FACTS)


def test_states_are_taken_and_asked_by_their_labels(kind):
    states = read_states(shared(kind, "gpt2"), FACTS)
    some = states.take([3, 1])
    assert some.facts == (FACTS[3], FACTS[1])
    assert len(some) == 2
    assert torch.equal(some.at(layer=2, position="last"), states.values[[3, 1], 3, 1])
    with pytest.raises(ValueError, match="layer 7 is not among the states'"):
        states.at(layer=7, position="last")
    with pytest.raises(ValueError, match="position 'end' is not among"):
        states.at(layer=0, position="end")
    with pytest.raises(ValueError, match="facts, layers and positions are"):
        HiddenStates(states.values, states.layers, ("subject",), states.facts, "x")


def test_features_of_names_stand_in_for_states():
    features = HiddenStates.of_features(torch.arange(10.0).reshape(5, 2), FACTS, "spelling")
    assert features.layers == ("spelling",)
    assert torch.equal(features.at(layer="spelling", position="subject"), torch.arange(10.0).reshape(5, 2))
