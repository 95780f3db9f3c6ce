"""A Patchscope is the model's own pass with one state replaced; where it came from it changes nothing."""

import functools
from dataclasses import replace

import laws
import pytest
import tiny
import torch
from oracles import lenses, untouched

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, continuation, encode
from tl_factedit.measure.reading import Probe, compare
from tl_factedit.probes.crossed import crossed_patchscope
from tl_factedit.probes.nulls import states_of_others
from tl_factedit.probes.patchscope import QUANTITIES, Patchscope, _log_probs, _Objects
from tl_factedit.probes.states import read_states, read_states_edited

CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # float32 log-probabilities of size 1 to 10, from batches of another shape
MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2", "bloom")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)
FACT = Fact("The Eiffel Tower", "Where is {} located in", " Paris", " Rome", controls=[" Berlin", " Madrid", " Tokyo"])
OTHER = Fact("Big Ben", "{} is in", " London", " Madrid", controls=[" Rome", " Rome", " London"])
CITY = "The city of {} is in"
LAYERS = (-1, 0, 1, 2, 3)
HELD = tiny.TWINS  # twins that don't come with the package
held = pytest.mark.skipif(not HELD.exists(), reason="the twins' weights are in a checkout, in tests/organism/weights")


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


def prompt_of(model, scope: Patchscope):
    bos = bool(model.cfg.default_prepend_bos)
    text = scope.template.replace("{}", scope.placeholder)
    return text, encode(model.tokenizer, text, prepend_bos=bos)[0], bos


def literal(model, scope: Patchscope, fact: Fact, text: str, ids: torch.Tensor, place: int, vector, layer: int):
    """Log-probability of one object by whole passes."""
    bos = bool(model.cfg.default_prepend_bos)
    target = continuation(model.tokenizer, scope.template.replace("{}", scope.placeholder), text, prepend_bos=bos)
    whole = torch.cat([ids, target[:-1]])
    log_p = lenses.patched(model, whole, layer, place, vector).log_softmax(-1)
    return sum(log_p[len(ids) - 1 + i, token] for i, token in enumerate(target.tolist()))


@on_models
@pytest.mark.parametrize("template", [CITY, "Rome is Rome . Bob is Bob . {}"])
def test_every_cell_is_a_whole_pass_with_one_state_replaced(kind, arch, template):
    model, scope = shared(kind, arch), Patchscope(template)
    _, ids, _ = prompt_of(model, scope)
    place = (ids == model.tokenizer.get_vocab()["?"]).nonzero()[-1, 0].item()
    facts = [FACT, OTHER]
    reading, states = scope(model, facts), read_states(model, facts)
    assert list(reading.axes) == ["fact", "source_layer", "target_layer", "quantity"]
    assert reading.axes["source_layer"] == reading.axes["target_layer"] == LAYERS
    for i, (fact, controls) in enumerate([(FACT, FACT.controls), (OTHER, (" Rome",))]):
        for source in (-1, 1, 3):
            vector = states.at(layer=source, position="subject")[i]
            for target in LAYERS:
                old, new, *rest = (
                    literal(model, scope, fact, text, ids, place, vector, target)
                    for text in (fact.target_true, fact.target_new, *controls)
                )
                cell = reading.values[i, LAYERS.index(source), LAYERS.index(target)]
                torch.testing.assert_close(cell[0], old, **CLOSE)
                torch.testing.assert_close(cell[1], new, **CLOSE)
                assert cell[2] == pytest.approx(sum(float(each < old) for each in rest) / len(rest))
                assert cell[3] == pytest.approx(sum(float(each < new) for each in rest) / len(rest))


@on_models
def test_a_state_put_back_where_it_came_from_reproduces_the_model_exactly(kind, arch):
    model = shared(kind, arch)
    scope = Patchscope(FACT.prompt, placeholder=FACT.subject)
    reading = scope(model, [FACT])
    row = align(model.tokenizer, FACT, prepend_bos=bool(model.cfg.default_prepend_bos))
    with frozen(model), torch.no_grad():
        log_p = Runner(model).logits(row.ids[None], at=torch.tensor([[-1]])).log_softmax(-1)[0, 0]
    want = torch.stack([log_p[row.true_ids[0]], log_p[row.new_ids[0]]])
    for layer in range(5):
        torch.testing.assert_close(reading.values[0, layer, layer, :2], want, rtol=1e-6, atol=2e-6)
    # Bit for bit, where the pass from a layer on has the shape of the whole one.
    asked = [_Objects.of(model, scope._prompt(model), FACT)]
    vectors = read_states(model, [FACT]).values[:, :, 0]
    for layer, label in enumerate(LAYERS):
        with frozen(model), torch.no_grad():
            alone = vectors[:, [layer]]
            found = _log_probs(Runner(model), scope._prompt(model), alone, (label,), asked, 4096)[0][0, 0]
        assert torch.equal(found[:2], want)
    # Elsewhere it does change something, but for the last block's state, which only its own token reads.
    moved = (reading.values[0, :, :, :2] - want).abs().amax(-1)
    apart = ~torch.eye(5, dtype=torch.bool)
    apart[:, 4] = False
    assert (moved[apart] > 1e-3).all()
    assert (moved[:, 4] < 1e-5).all()


def test_whole_objects_are_scored_token_by_token():
    model = tiny.bridge("gpt2", tok=tiny.tokenizer("bytebpe"))
    fact = Fact(
        "Danielle Darrieux",
        "The mother tongue of {} is",
        " French",
        " Swiss German",
        controls=[" Swiss Italian", " Italian", " Dutch"],
    )
    scope = Patchscope("The language of {} is", source_layers=[0, 2], target_layers=[1, 3])
    _, ids, bos = prompt_of(model, scope)
    place = [i for i, piece in enumerate(map(model.tokenizer.decode, ids)) if "?" in piece][-1]
    lengths = [len(continuation(model.tokenizer, "The language of ? is", t, prepend_bos=bos)) for t in fact.controls]
    assert max(lengths) > min(lengths)
    reading, states = scope(model, [fact]), read_states(model, [fact])
    for i, source in enumerate((0, 2)):
        for j, target in enumerate((1, 3)):
            vector = states.at(layer=source, position="subject")[0]
            old, new, *rest = (
                literal(model, scope, fact, text, ids, place, vector, target)
                for text in (fact.target_true, fact.target_new, *fact.controls)
            )
            want = torch.stack([old, new, *((torch.stack(rest) < each).float().mean() for each in (old, new))])
            torch.testing.assert_close(reading.values[0, i, j], want, **CLOSE)


def test_of_several_tokens_of_the_placeholder_the_last_is_patched(kind):
    model = shared(kind, "gpt2")
    long = Patchscope(CITY, placeholder="Big Ben")
    _, ids, _ = prompt_of(model, long)
    place = (ids == model.tokenizer.get_vocab()["Ben"]).nonzero()[0, 0].item()
    vector = read_states(model, [FACT]).at(layer=1, position="subject")[0]
    want = literal(model, long, FACT, " Paris", ids, place, vector, 2)
    found = long(model, [FACT]).at(source_layer=1, target_layer=2, quantity="logp_old")[0]
    torch.testing.assert_close(found, want, **CLOSE)


def test_facts_are_read_together_as_alone_in_passes_of_any_size(kind):
    model, scope = shared(kind, "llama"), Patchscope(CITY)
    assert isinstance(scope, Probe)
    together = scope(model, [FACT, OTHER])
    assert together.values.shape == (2, 5, 5, len(QUANTITIES))
    for i, fact in enumerate([FACT, OTHER]):
        torch.testing.assert_close(scope(model, fact).values[0], together.values[i], **CLOSE)
    small = replace(scope, batch_tokens=1)(model, [FACT, OTHER])
    torch.testing.assert_close(small.values, together.values, **CLOSE)
    some = Patchscope(CITY, source_layers=[3, 0], target_layers=[1])(model, [FACT, OTHER])
    assert some.axes["source_layer"] == (3, 0)
    torch.testing.assert_close(some.values, together.values[:, [4, 1]][:, :, [2]], **CLOSE)
    last = Patchscope(CITY, position="last")(model, [FACT])
    ends = read_states(model, [FACT])
    swapped = replace(ends, values=ends.values.flip(2))
    assert torch.equal(scope.read(model, swapped).values, last.values)
    assert not torch.allclose(last.values, together.values[:1])


def test_objects_in_turn_average_one_half(kind):
    cities = [" Paris", " Rome", " Berlin", " Madrid", " Tokyo"]
    facts = [
        FACT.but(target_true=a, target_new=None, controls=[c for c in cities if c != a], id=i)
        for i, a in enumerate(cities)
    ]
    reading = Patchscope(CITY)(shared(kind, "gpt2"), facts)
    torch.testing.assert_close(reading.at(quantity="percentile_old").mean(0), torch.full((5, 5), 0.5))
    assert reading.at(quantity="logp_new").isnan().all()
    assert reading.at(quantity="percentile_new").isnan().all()
    bare = Patchscope(CITY)(shared(kind, "gpt2"), [FACT.but(controls=[" Paris"])])
    assert bare.at(quantity="percentile_old").isnan().all()
    assert not bare.at(quantity="logp_new").isnan().any()


def test_states_of_others_are_those_of_the_relations_other_objects(kind):
    model = shared(kind, "gpt2")
    facts = [
        FACT.but(subject=name, target_true=old, target_new=new, relation=relation, id=name)
        for name, old, new, relation in (
            ("John", " Paris", " Rome", "a"),
            ("Mary", " Paris", " Rome", "a"),
            ("Alice", " Rome", " Berlin", "a"),
            ("Bob", " Tokyo", " Rome", "a"),
            ("Anna", " Tokyo", None, "b"),
            ("Einstein", " Madrid", None, "b"),
        )
    ]
    states = read_states(model, facts)
    found = [states_of_others(states, seed=seed) for seed in range(8)]
    # Not itself, not with its old object, not with its new one as the old, not of another relation.
    allowed = [{3}, {3}, {0, 1, 3}, {0, 1}, {5}, {4}]
    for i, places in enumerate(allowed):
        assert {j for other in found for j in range(6) if torch.equal(other.values[i], states.values[j])} == places
    assert found[0].facts == states.facts
    assert "of other subjects" in found[0].model
    with pytest.raises(ValueError, match="no other fact of relation 'a'"):
        states_of_others(states.take([0, 1, 2, 4, 5]))


# ---------------------------------------------------------------------------------------- edited and unedited


def test_states_and_readers_are_crossed(kind):
    model, scope = shared(kind, "gpt2"), Patchscope(CITY)
    edit = laws.rome(model, layer=1)(model, [laws.FACT])
    facts = [laws.FACT, laws.FACT.but(subject="Big Ben")]
    with laws.untouched(model):
        crossed = crossed_patchscope(scope, model, edit, facts)
    found = crossed.reading
    plain = compare(scope, model, edit, facts)
    before, after = read_states(model, facts), read_states_edited(model, edit, facts)

    def at(source: str, target: str) -> torch.Tensor:
        return found.at(source_model=source, target_model=target)

    assert torch.equal(at("unedited", "unedited"), plain.before.values)
    assert torch.equal(at("changed", "changed"), plain.after.values)
    assert torch.equal(at("changed", "unedited"), scope.read(model, after).values)
    with edit.applied(model):
        assert torch.equal(at("unedited", "changed"), scope.read(model, before).values)
    # What comes before the edit is the same in both models, so that only the reader can make a difference …
    for target in ("unedited", "changed"):
        same = at("unedited", target) - at("changed", target)
        assert not same[:, :2].any()
        assert same[0, 2:, :4].abs().amax(-1).min() > 1e-4
    # … and it does where the vector runs through the edited layer again.
    assert (at("unedited", "unedited") - at("unedited", "changed"))[0, :, :2].abs().max() > 1e-3


def test_target_layers_before_the_edited_one_are_told_apart(kind):
    model = shared(kind, "gpt2")
    edit = laws.rome(model, layer=1)(model, [laws.FACT])
    crossed = crossed_patchscope(Patchscope(CITY), model, edit, [laws.FACT])
    assert crossed.edited_layers == (1,)
    assert crossed.passes_again.tolist() == [True, True, False, False, False]  # of -1, 0, 1, 2, 3
    clear = crossed.clear()
    assert clear.axes["target_layer"] == (1, 2, 3)
    assert torch.equal(clear.values, crossed.reading.values[..., 2:, :])
    early = crossed_patchscope(Patchscope(CITY, target_layers=[0]), model, edit, [laws.FACT])
    with pytest.raises(ValueError, match="at every target layer"):
        early.clear()
    other = crossed_patchscope(Patchscope(CITY), model, tiny.model(kind, "gpt2", seed=1), [laws.FACT])
    assert other.edited_layers is None
    assert other.passes_again.all()


def test_each_fact_is_read_under_its_own_change(kind):
    model, scope = shared(kind, "gpt2"), Patchscope(CITY, target_layers=[0, 1])
    facts = [laws.FACT, laws.FACT.but(subject="Big Ben")]
    editor = laws.rome(model, layer=1)
    edits = [editor(model, [fact]) for fact in facts]
    found = crossed_patchscope(scope, model, edits, facts).reading
    for i, (edit, fact) in enumerate(zip(edits, facts, strict=True)):
        alone = crossed_patchscope(scope, model, edit, [fact]).reading
        torch.testing.assert_close(found.values[:, :, [i]], alone.values, **CLOSE)
    assert not torch.allclose(
        found.values[1, 1], crossed_patchscope(scope, model, edits[0], facts).reading.values[1, 1]
    )


# ---------------------------------------------------------------------------------------- errors, nothing left behind


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "The city of"}, 'holds 0 "{}"'),
        ({"template": "{} of {}"}, 'holds 2 "{}"'),
        ({"placeholder": " "}, "placeholder is ' '"),
        ({"position": "first"}, "position 'first'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said):
    with pytest.raises((ValueError, TypeError), match=said if "position" not in options else "position"):
        Patchscope(**options)


def test_errors_say_what_was_given_and_needed(kind):
    model = shared(kind, "gpt2")
    for options, said in (
        ({"source_layers": [4]}, "source layer 4"),
        ({"target_layers": [-2]}, "target layer -2"),
        ({"target_layers": []}, "target_layers is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            Patchscope(CITY, **options)(model, [FACT])
    with pytest.raises(ValueError, match="facts is empty"):
        Patchscope(CITY)(model, [])
    with pytest.raises(ValueError, match="have 32 dimensions, the target's model has 16"):
        Patchscope(CITY).read(tiny.model(kind, "gpt2", d_model=16), read_states(model, [FACT]))


def test_the_policy_of_bos_is_as_asked(kind):
    model = shared(kind, "gpt2")
    other = not model.cfg.default_prepend_bos
    default, given, moved = (
        Patchscope(CITY, prepend_bos=bos)(model, [FACT]).values for bos in (None, not other, other)
    )
    assert torch.equal(default, given)
    assert not torch.allclose(default, moved)


def test_the_model_is_left_as_it_was_also_by_an_error(kind, monkeypatch):
    model = untouched.used(tiny.model(kind, "gpt2"))
    model.train()
    before = untouched.state(model)
    assert torch.equal(Patchscope(CITY)(model, [FACT]).values, Patchscope(CITY)(shared(kind, "gpt2"), [FACT]).values)
    assert untouched.state(model) == before

    def refuse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "logits", refuse)
    with pytest.raises(KeyboardInterrupt):
        Patchscope(CITY)(model, [FACT])
    assert untouched.state(model) == before


# ---------------------------------------------------------------------------------------- the organism


@held
def test_on_the_organism_a_relation_prompt_finds_the_city_in_the_subjects_state(kind):
    scope = Patchscope(
        "The birthplace of {} is", placeholder="Tolliver", source_layers=[-1, 1], target_layers=[0, 1, 5]
    )
    known, unknown = (fe.models.organism_facts("city", who, 40) for who in ("oracle0", "strangers"))
    base = fe.models.organism(kind)
    reading = scope(base, known)
    found = reading.at(quantity="percentile_old").mean(0)
    assert (found[1, :2] > 0.95).all()
    assert reading.at(source_layer=1, target_layer=1, quantity="logp_old").exp().mean() > 0.8
    # The embedding of the last name, and a state that the last token no longer reads, hold nothing of it.
    assert (found[0] - 0.5).abs().max() < 0.2
    assert (found[1, 2] - 0.5).abs() < 0.2
    assert (scope(base, unknown).at(quantity="percentile_old").mean(0) - 0.5).abs().max() < 0.2
    others = scope.read(base, states_of_others(read_states(base, known)))
    assert (others.at(quantity="percentile_old").mean(0) - 0.5).abs().max() < 0.2
    moved = fe.models.organism(kind, "oracle0", path=HELD)
    there = scope(moved, known)
    assert (there.at(quantity="percentile_old").mean(0) - 0.5).abs().max() < 0.2
    assert (there.at(source_layer=1, quantity="percentile_new").mean(0)[:2] > 0.95).all()
