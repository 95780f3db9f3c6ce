"""Single heads and neurons: the literal loop that sets one of them at one token, and 0 where nothing can reach."""

import functools

import pytest
import tiny
import torch
from oracles import tracing

import tl_factedit as fe
from tl_factedit.backend.hook_names import unit_hook
from tl_factedit.core.tokens import align

FACT = fe.Fact("Eiffel Tower", "The {} is in", " Rome")
NOISE = fe.GaussianNoise(samples=2)
ARCHS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "bloom")] + (
    [("hooked", "gpt2"), ("hooked", "llama")] if tiny.HAS_HOOKED else []
)


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


def traced(model, facts=FACT, unit="head", **options):
    return fe.locate.trace_units(
        model, facts, unit, **{"corruption": NOISE, "progress": False, "metric": "logprob", **options}
    )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("unit", ["head", "neuron"])
@pytest.mark.parametrize(("kind", "arch"), ARCHS)
def test_a_unit_is_the_loop_over_units(kind, arch, unit, direction):
    model, units = shared(kind, arch), [0, 2, 3]
    found = traced(model, unit=unit, units=units, layers=[0, 2], at="last subject", direction=direction)
    row = align(model.tokenizer, FACT, prepend_bos=model.cfg.default_prepend_bos)
    asked = tracing.TracedPrompt(row.ids, row.subject, row.true_ids)
    noise = found.corruption.noise(row.subject[1] - row.subject[0], model.cfg.d_model).float()
    names = [unit_hook(unit, layer) for layer in (0, 2)]
    whole, noised = tracing.runs(model, asked, noise, names)
    denoise = direction == "denoise"

    def score(puts, each=None):
        logits = tracing.patched(model, asked, noise, puts, row.last, corrupt=denoise, unit=each)
        return tracing.scored(logits, asked, "logprob", clean_logits=logits)

    base = score([])
    want = torch.zeros(2, len(units), 2)
    for i, name in enumerate(names):
        for j, each in enumerate(units):
            change = score([(name, (whole if denoise else noised)[name])], each) - base
            want[i, j] = change if denoise else -change
    assert (found.sample_effect[0] - want).abs().max() < 2e-5
    assert want.abs().max() > 1e-3
    assert (found.sample_effect[0].roll(1, 1) - want).abs().max() > 1e-4


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_before_the_subject_nothing_has_an_effect(kind):
    model = shared(kind, "gpt2")
    assert not traced(model, at=1, prepend_bos=True).sample_effect.any()
    assert traced(model, at=2, prepend_bos=True).sample_effect.any()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_heads_of_many_facts_come_in_a_table_largest_first(kind):
    model = shared(kind, "gpt2")
    facts = [FACT, FACT.but(subject="Big Ben"), fe.Fact("Rome", "{} is", " Paris")]
    found = traced(model, facts, at="last")
    assert found.effect.shape == (3, 4, 4)
    table = found.table()
    assert len(table) == 16
    assert table.effect.is_monotonic_decreasing
    best = table.iloc[0]
    assert best.effect == pytest.approx(float(found.effect[:, int(best.layer), int(best["head"])].mean()), abs=1e-6)
    assert "largest mean effect" in repr(found)
    alone = traced(model, facts[1], at="last", corruption=found.corruption)
    assert (alone.effect[0] - found.effect[1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, "layer 4 is outside the model"),
        ({"units": [4]}, r"units is \[4\] of layers .*, needed some of 0 … 3"),
        ({"layers": []}, "units is"),
        ({"at": 40}, "at is 40, needed one of"),
        ({"facts": []}, "facts is empty"),
    ],
)
def test_what_is_not_there_is_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        traced(shared(kind, "gpt2"), **options)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_order_of_layers_changes_no_number(kind):
    model = shared(kind, "gpt2")
    whole = traced(model)
    for layers in ([3, 1, 0], [2, 2, 0], 1):
        found = traced(model, layers=layers)
        assert found.layers == tuple(sorted({layers} if isinstance(layers, int) else set(layers)))
        torch.testing.assert_close(found.effect, whole.effect[:, list(found.layers)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_refuses_what_causal_trace_refuses(kind):
    model = shared(kind, "gpt2")
    same = FACT.but(target_true=" Rome Paris", target_new=" Rome Italy")
    for facts, options, message in (
        (same, {"metric": "logit_diff"}, "compares first tokens"),
        (FACT, {"metric": "logit_diff"}, "nothing to set against"),
        (FACT, {"memory": 0.0}, "memory is 0.0"),
        ([FACT, FACT], {}, "is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            traced(model, facts, **options)
