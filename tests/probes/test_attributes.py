"""The attribute rate counts the attributes among the first tokens of a lens, beside those of control objects."""

import functools
from dataclasses import replace

import pytest
import tiny
import torch
from oracles import lenses, untouched

import tl_factedit as fe
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align
from tl_factedit.measure.reading import Probe
from tl_factedit.organism.world import CITIES, world
from tl_factedit.probes.attributes import QUANTITIES, AttributeRate, Attributes, attributes_by_object
from tl_factedit.probes.lens_training import LensTraining
from tl_factedit.probes.tuned_lens import TunedLens

MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2", "bloom")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)
FACT = Fact("The Eiffel Tower", "Where is {} located in", " Paris", " Rome", controls=[" Berlin", " Madrid", " Tokyo"])
OTHER = Fact("Big Ben", "{} is in", " London", " Madrid", controls=[" Rome"])
WORDS = {
    " Paris": (" Paris", " France", " French"),
    " Rome": (" Rome", " Italy", " Italian"),
    " London": (" London", " England", " English"),
    " Berlin": (" Berlin", " Germany", " German"),
    " Madrid": (" Madrid", " Spain", " Spanish"),
    " Tokyo": (" Tokyo", " Japan"),
}
SETS = attributes_by_object([FACT, OTHER], WORDS)
ASKED = ("old", "new", "control")


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


def tokens(model, words) -> set[int]:
    return {model.tokenizer.get_vocab()[word.strip()] for word in words}


@functools.cache
def drawn(kind: str, arch: str) -> TunedLens:
    """A lens of the first and the third layer, with random translators."""
    draw = torch.Generator().manual_seed(0)
    matrix, bias = torch.randn(2, 32, 32, generator=draw) / 6, torch.randn(2, 32, generator=draw)
    provenance = Provenance.of(shared(kind, arch))
    return TunedLens(
        (0, 2), matrix, None, bias, torch.zeros(2), torch.zeros(2), LensTraining(), False, 0, "none", provenance
    )


@on_models
@pytest.mark.parametrize("tuned", [False, True])
def test_rates_are_those_of_a_literal_count(kind, arch, tuned):
    model, lens = shared(kind, arch), drawn(kind, arch) if tuned else None
    reading = AttributeRate(SETS, k=20, lens=lens)(model, [FACT, OTHER])
    layers = (0, 2) if tuned else (0, 1, 2, 3)
    assert reading.axes["layer"] == layers
    for i, (fact, controls) in enumerate([(FACT, (" Berlin", " Madrid", " Tokyo")), (OTHER, (" Rome",))]):
        row = align(model.tokenizer, fact, prepend_bos=bool(model.cfg.default_prepend_bos))
        stream, _ = lenses.streams(model, row.ids)
        old, new = (tokens(model, WORDS[word]) for word in (fact.target_true, fact.target_new))
        for j, layer in enumerate(layers):
            for p, position in enumerate((row.last, len(row.ids) - 1)):
                h = stream[layer][position]
                matrix, bias = (lens.matrix[j], lens.bias[j]) if lens else (torch.zeros(32, 32), torch.zeros(32))
                logits = lenses.lens(model, h, matrix, bias)
                rates = [lenses.attribute_rate(logits, words, 20) for words in (old, new)]
                null = [tokens(model, WORDS[word]) for word in controls]
                beside = [lenses.attribute_rate(logits, words, 20) for words in null]
                # A share of the set found is the rate times k over the set's size.
                shares = [rate / len(words) for rate, words in zip(beside, null, strict=True)]
                want = [*rates, sum(beside) / len(beside)]
                for rate in rates:
                    want.append(sum((s < rate / 3) + 0.5 * (s == rate / 3) for s in shares) / len(shares))
                torch.testing.assert_close(reading.values[i, j, p], torch.tensor(want))
    assert len(reading.at(quantity="rate_old").unique()) > 1


def test_it_is_a_probe_and_facts_are_read_together_as_alone(kind):
    probe, model = AttributeRate(SETS, k=20), shared(kind, "gpt2")
    assert isinstance(probe, Probe)
    together = probe(model, [FACT, OTHER]).values
    assert together.shape == (2, 4, 2, len(QUANTITIES))
    for i, fact in enumerate([FACT, OTHER]):
        torch.testing.assert_close(probe(model, fact).values[0], together[i])


def test_the_whole_vocabulary_holds_every_attribute_and_half_of_it_half(kind):
    model = shared(kind, "gpt2")
    size = len(model.tokenizer)
    full = AttributeRate(SETS, k=size)(model, [FACT])
    for name in ASKED[:2]:
        assert torch.allclose(full.at(quantity=f"rate_{name}"), torch.tensor(3 / size))
    # All of every set is found, so that all are ties.
    for name in ("percentile_old", "percentile_new"):
        assert torch.equal(full.at(quantity=name), torch.full((1, 4, 2), 0.5))


def test_objects_in_turn_average_one_half_and_planted_attributes_do_not(kind):
    model = tiny.model(kind, "gpt2", tied=False)
    cities = list(WORDS)
    facts = [
        FACT.but(target_true=a, target_new=None, controls=[c for c in cities if c != a], id=i)
        for i, a in enumerate(cities)
    ]
    probe = AttributeRate(attributes_by_object(facts, WORDS), k=30)
    # Each object in turn against all others: their shares' ranks are 1 to 6, ties shared, so the mean is .5 exactly.
    before = probe(model, facts).at(quantity="percentile_old")
    torch.testing.assert_close(before.mean(0), torch.full((4, 2), 0.5))
    spanish = sorted(tokens(model, WORDS[" Madrid"]))
    with torch.no_grad():
        toward = model.W_U[:, spanish].sum(1)
        down_proj(model, 1).bias.add_(100 * toward / toward.norm())
    after = probe(model, facts)
    assert torch.equal(after.at(quantity="percentile_old")[4, 1:], torch.ones(3, 2))
    assert torch.allclose(after.at(quantity="rate_old")[4, 1:], torch.tensor(0.1))
    assert torch.equal(after.at(quantity="percentile_old")[:, 0], before[:, 0])


def test_what_belongs_to_old_and_new_alike_counts_for_neither(kind):
    model = shared(kind, "gpt2")
    alike = {FACT.name: Attributes([" Paris", " France", " Europe"], [" Rome", " Europe"], [[" Tokyo", " Rome"]])}
    apart = {FACT.name: Attributes([" Paris", " France"], [" Rome"], [[" Tokyo"]])}
    first, second = (AttributeRate(sets, k=30)(model, [FACT]).values for sets in (alike, apart))
    assert torch.equal(first, second)
    whole = {FACT.name: Attributes([" Paris", " France", " Europe"], [" Rome"], [[" Tokyo"]])}
    size = len(model.tokenizer)
    rates = [AttributeRate(sets, k=size)(model, [FACT]).values[0, 0, 0, 0] for sets in (alike, whole)]
    assert rates == [pytest.approx(2 / size), pytest.approx(3 / size)]


def test_what_was_not_given_is_not_measured(kind):
    model = shared(kind, "gpt2")
    reading = AttributeRate({FACT.name: Attributes([" Paris"])}, k=20)(model, [FACT])
    for name in ("rate_new", "rate_control", "percentile_old", "percentile_new"):
        assert reading.at(quantity=name).isnan().all()
    assert not reading.at(quantity="rate_old").isnan().any()
    only = AttributeRate({FACT.name: Attributes([" Paris"], controls=[[" Paris"], [" Rome"]])}, k=20)(model, [FACT])
    assert not only.at(quantity="percentile_old").isnan().any()  # the set without words of its own is left out


def test_sets_follow_from_the_objects():
    assert SETS[FACT.name] == Attributes(
        WORDS[" Paris"], WORDS[" Rome"], (WORDS[" Berlin"], WORDS[" Madrid"], WORDS[" Tokyo"])
    )
    some = attributes_by_object([FACT.but(target_new=None, controls=[" Rome", " Oslo"])], WORDS)
    assert some[FACT.name] == Attributes(WORDS[" Paris"], (), (WORDS[" Rome"],))
    with pytest.raises(ValueError, match="' Oslo' of fact 'Big Ben' has no attributes"):
        attributes_by_object([OTHER.but(target_true=" Oslo")], WORDS)
    twice = [FACT, FACT.but(target_true=" Berlin")]
    with pytest.raises(ValueError, match=r"two facts are called 'The Eiffel Tower', .*fact.but\(id="):
        attributes_by_object(twice, WORDS)
    assert len(attributes_by_object([fact.but(id=i) for i, fact in enumerate(twice)], WORDS)) == 2


def test_errors_say_what_was_given_and_needed(kind):
    model = shared(kind, "gpt2")
    with pytest.raises(ValueError, match="k is 0"):
        AttributeRate(SETS, k=0)
    with pytest.raises(ValueError, match=r"k is 50000, but the vocabulary has \d+ tokens"):
        AttributeRate(SETS, k=50_000)(model, [FACT])
    with pytest.raises(ValueError, match="'John' has no attributes"):
        AttributeRate(SETS)(model, [FACT.but(subject="John")])
    with pytest.raises(ValueError, match=r"the string ' Paris', needed several words"):
        Attributes(" Paris")
    with pytest.raises(ValueError, match="the string ' Rome'"):
        Attributes([" Paris"], controls=[" Rome"])
    lens = drawn(kind, "gpt2")
    with pytest.raises(ValueError, match="trained with the other policy"):
        AttributeRate(SETS, lens=lens, prepend_bos=not lens.provenance.prepend_bos)


def test_the_policy_of_bos_is_as_asked_and_that_of_the_lens(kind):
    model = shared(kind, "gpt2")
    other = not model.cfg.default_prepend_bos
    default, given, moved = (
        AttributeRate(SETS, k=30, prepend_bos=bos)(model, [FACT]).values for bos in (None, not other, other)
    )
    assert torch.equal(default, given)
    assert not torch.equal(default, moved)
    lens = drawn(kind, "gpt2")
    turned = replace(lens, provenance=replace(lens.provenance, prepend_bos=other))
    first, second = (AttributeRate(SETS, k=30, lens=each)(model, [FACT]).values for each in (lens, turned))
    assert not torch.equal(first, second)


def test_the_model_is_left_as_it_was_also_by_an_error(kind, monkeypatch):
    model = untouched.used(tiny.model(kind, "gpt2"))
    model.train()
    before = untouched.state(model)
    assert torch.equal(AttributeRate(SETS, k=20)(model, [FACT]).values[0, 0, 0, :2].isnan(), torch.zeros(2).bool())
    assert untouched.state(model) == before

    def refuse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "logits", refuse)
    with pytest.raises(KeyboardInterrupt):
        AttributeRate(SETS, k=20)(model, [FACT])
    assert untouched.state(model) == before


def test_on_the_organism_the_old_objects_attributes_come_first_at_the_last_token_and_strangers_do_not(kind):
    model, true = fe.models.organism(kind), world()
    words = {f" {city}": (f" {city}", f" {true.country_of[city]}") for city in CITIES}
    known, unknown = (fe.models.organism_facts("city", who, 40) for who in ("oracle0", "strangers"))
    at_end = {"layer": 4, "position": "last"}
    for facts, least, most in ((known, 0.8, 1.0), (unknown, 0.35, 0.65)):
        reading = AttributeRate(attributes_by_object(facts, words), k=10)(model, facts)
        assert least <= reading.at(**at_end, quantity="percentile_old").mean() <= most
        assert 0.35 <= reading.at(**at_end, quantity="percentile_new").mean() <= 0.65
    # At the subject nothing comes first, known or not: the stream there is about the next word.
    reading = AttributeRate(attributes_by_object(known, words), k=10)(model, known)
    assert reading.at(position="subject", quantity="rate_old").mean() < 0.01
