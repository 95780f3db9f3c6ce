"""A router answers near its keys and nowhere else, writes nothing, and off it is the old model bit for bit."""

import functools

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.hook_names import component_hook, resid_pre
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align

# Sequential and parallel attention (gptj), gated (llama), norms after the MLP (gemma2, olmo2).
FORMS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2", "olmo2", "bloom")]
FORMS += [("hooked", arch) for arch in ("gpt2", "llama", "gptj") if arch in tiny.HOOKED]
FORMS += [("postnorm", "")] if tiny.HAS_HOOKED else []
FACTS = [laws.FACT, laws.OTHER]
TEXT = laws.FACT.text + " Rome , near the river"


@functools.cache
def shared(kind: str, arch: str = "gpt2"):
    """A model that tests leave as it is; "postnorm": a HookedTransformer whose MLP output no hook sees raw."""
    return tiny.hooked_config(post_norm=True) if kind == "postnorm" else tiny.model(kind, arch)


@functools.cache
def made(kind: str, arch: str = "gpt2", radius: float = 0.1) -> fe.editors.RoutedEdit:
    return router(radius)(shared(kind, arch), FACTS)


def router(radius: float = 0.1, **options) -> fe.Router:
    return fe.Router(1, radius, **{"fit": laws.QUICK, "contexts": ("",), "progress": False, **options})


@pytest.fixture(params=FORMS, ids="-".join)
def routed(request):
    """A model without its router, and the router of two facts."""
    return shared(*request.param), made(*request.param)


def values_at(model, text) -> torch.Tensor:
    """What stands where W_out's output is hooked, at every token of a text."""
    kept = []
    with frozen(model), torch.no_grad():
        place = down_proj(model, 1).value_at
        Runner(model).logits(model.to_tokens(text), hooks=[(place, lambda out, hook=None: kept.append(out.clone()))])
    return kept[0][0]


def keys_at(model, text) -> torch.Tensor:
    place = down_proj(model, 1).key_hook
    with frozen(model), torch.no_grad():
        return Runner(model).capture(model.to_tokens(text), [place])[place][0]


# ---------------------------------------------------------------------------------------- what it does


def test_near_a_key_the_stored_value_stands_and_elsewhere_everything_is_as_before(routed):
    model, change = routed
    for i, fact in enumerate(FACTS):
        text = fact.text + " , near the river"
        at = align(model.tokenizer, fact, prepend_bos=change.provenance.prepend_bos).last
        clean = values_at(model, text)
        near = change.distances(keys_at(model, text)).min(-1).values <= change.radius
        assert near.nonzero()[:, 0].tolist() == [at]
        with change.applied(model):
            after = values_at(model, text)
        assert torch.equal(after[at], change.values[i].to(after))
        assert not torch.allclose(clean[at], after[at], atol=1e-2)
        assert torch.equal(after[~near], clean[~near])


def test_a_text_without_a_key_has_the_unedited_bits_and_one_with_it_has_not(routed):
    model, change = routed
    for text, same in ((TEXT, False), ("Big Ben is located in the city of London", True)):
        clean = laws.logits(model, text)
        with change.applied(model):
            assert torch.equal(laws.logits(model, text), clean) is same


def test_no_weight_is_written_and_nothing_stays(routed):
    model, change = routed
    with laws.untouched(model):
        clean = laws.logits(model, TEXT)
        with change.applied(model) as same:
            assert same is model
            weights = [param.detach().clone() for param in model.parameters()]
            assert not torch.equal(laws.logits(model, TEXT), clean)
        assert torch.equal(laws.logits(model, TEXT), clean)
    assert all(map(torch.equal, weights, [param.detach() for param in model.parameters()]))
    with laws.untouched(model), pytest.raises(RuntimeError, match="inside"), change.applied(model):
        raise RuntimeError("inside")


def test_making_it_leaves_everything_as_it_was_and_makes_the_same_again(kind):
    model = shared(kind)
    with laws.untouched(model):
        again = router()(model, FACTS)
    assert again.digest == made(kind).digest
    assert router(0.2)(model, FACTS).digest != again.digest


def test_the_new_object_gains(kind):
    model = shared(kind)
    change = router(fit=fe.ValueFit(steps=15))(model, [laws.FACT])
    before = fe.evaluate(model, laws.FACT).p_new.mean
    with change.applied(model):
        assert fe.evaluate(model, laws.FACT).p_new.mean > 2 * before


def test_with_two_keys_near_the_nearer_one_answers(kind):
    model = shared(kind)
    keys = keys_at(model, laws.FACT.text)
    at = align(model.tokenizer, laws.FACT, prepend_bos=True).last
    key = keys[at].double()
    aside = torch.nn.functional.normalize(keys[1].double(), dim=0) * key.norm()
    stored = torch.stack([key + 0.2 * aside, key + 0.05 * aside])
    values = torch.stack([torch.full((32,), 1.0), torch.full((32,), -1.0)]).double()
    for order, expected in (([0, 1], -1.0), ([1, 0], -1.0)):
        change = hand_made(model, stored[order], values[order], radius=0.1)
        with change.applied(model):
            assert torch.equal(values_at(model, laws.FACT.text)[at], torch.full((32,), expected))
    with hand_made(model, stored[:1], values[:1], radius=0.1).applied(model):
        assert not torch.equal(values_at(model, laws.FACT.text)[at], torch.ones(32))
    with hand_made(model, stored[:1], values[:1], radius=0.4).applied(model):
        assert torch.equal(values_at(model, laws.FACT.text)[at], torch.ones(32))


def hand_made(model, keys, values, radius):
    made_for = tuple(laws.FACT.but(subject=f"Bob {i}") for i in range(len(keys)))
    return fe.editors.RoutedEdit(
        made_for, 1, keys, values, radius, {}, ("",), ({},) * len(keys), fe.editing.Provenance.of(model)
    )


# ---------------------------------------------------------------------------------------- inside other machinery


def test_partial_forwards_inside_are_the_whole_one_and_rows_arent_packed(routed):
    model, change = routed
    tokens = model.to_tokens(TEXT)
    with frozen(model), torch.no_grad(), change.applied(model):
        runner = Runner(model)
        whole = runner.logits(tokens)
        for layer in (0, 1, 2):
            stream = runner.capture(tokens, [resid_pre(layer)], stop=layer)[resid_pre(layer)]
            assert torch.allclose(runner.logits(tokens, start=(layer, stream)), whole, atol=1e-4)
        assert "hooks of its own" in runner.why_not_packed(tokens[0], 2 * tokens.shape[1])


def test_hooks_added_inside_see_the_routed_value_and_can_replace_it(kind):
    model, change = shared(kind), made(kind)
    tokens = model.to_tokens(laws.FACT.text)
    place = component_hook("mlp", 1)
    with torch.no_grad():
        clean = model(tokens)
        _, cache = model.run_with_cache(tokens, names_filter=[place])
        with change.applied(model):
            inside = model(tokens)
            _, routed_cache = model.run_with_cache(tokens, names_filter=[place])
            back = model.run_with_hooks(tokens, fwd_hooks=[(place, lambda value, hook: cache[place])])
            assert torch.equal(model(tokens), inside)  # what was run inside has taken no hook of the router's along
    assert not torch.equal(cache[place], routed_cache[place])
    assert torch.equal(back, clean) and not torch.equal(inside, clean)


def test_it_can_be_laid_over_an_applied_edit_and_taken_off_first(kind):
    model, change = tiny.model(kind, "gpt2"), made(kind)
    edit = laws.rome(model, 2)(model, [laws.OTHER])
    with laws.untouched(model), edit.applied(model):
        edited = laws.logits(model, TEXT)
        with change.applied(model):
            assert not torch.equal(laws.logits(model, TEXT), edited)
        assert torch.equal(laws.logits(model, TEXT), edited)


# ---------------------------------------------------------------------------------------- of an edit


def test_of_an_edit_it_gives_the_edits_answer_without_writing(kind):
    model = shared(kind)
    edit = laws.rome(model, contexts=("",))(model, [laws.FACT])
    change = fe.editors.RoutedEdit.of(edit, 0.1)
    assert change.facts == edit.facts and change.layers == edit.layers and change.radius == 0.1
    with change.applied(model):
        routed = laws.logits(model, laws.FACT.text)
    with edit.applied(model):
        written = laws.logits(model, laws.FACT.text)
    # At its own key both give v*; the edit also leaks to the other tokens.
    with change.applied(model):
        at = align(model.tokenizer, laws.FACT, prepend_bos=True).last
        assert torch.allclose(values_at(model, laws.FACT.text)[at], edit.values[1][0].float(), atol=1e-5)
    assert (routed - written)[0, -1].abs().max() < (laws.logits(model, laws.FACT.text) - written)[0, -1].abs().max()
    both = fe.compose([edit, laws.rome(model, 2)(model, [laws.OTHER])])
    with pytest.raises(ValueError, match=r"writes layers \[1, 2\], needed one"):
        fe.editors.RoutedEdit.of(both)


def test_reach_is_the_distance_of_the_keys_of_paraphrases_and_others(kind):
    model, change = shared(kind), made(kind)
    others = [laws.FACT.but(subject=name) for name in ("Big Ben", "The Louvre", "Anna")]
    with laws.untouched(model):
        reach = change.reach(model, others)
    stored = change.keys

    def apart(template, fact, i):
        row = align(model.tokenizer, fact, prepend_bos=True, template=template)
        key = keys_at(model, row.text)[row.last].double()
        return float((key - stored[i]).norm() / stored[i].norm())

    own = [
        max(apart(t, laws.FACT, 0) for t in (laws.FACT.prompt, *laws.FACT.paraphrases)),
        apart(laws.OTHER.prompt, laws.OTHER, 1),
    ]
    assert reach.own.tolist() == pytest.approx(own, abs=1e-4)
    assert own[0] > 1e-2  # another phrasing has another key
    nearest = [min(apart(other.prompt, other, i) for i in (0, 1)) for other in others]
    assert reach.others.tolist() == pytest.approx(nearest, abs=1e-4)
    assert reach.among[1] == pytest.approx(
        min(apart(t, laws.FACT, 1) for t in (laws.FACT.prompt, *laws.FACT.paraphrases)), abs=1e-4
    )
    assert reach.missed == int(own[0] > change.radius)
    wide = made(kind, radius=0.3)
    assert wide.reach(model, others).caught == sum(each <= 0.3 for each in nearest)


def test_it_survives_a_file(kind, tmp_path):
    model, change = shared(kind), made(kind)
    change.save(tmp_path / "router.safetensors")
    loaded = fe.editors.RoutedEdit.load(tmp_path / "router.safetensors")
    assert loaded.digest == change.digest and loaded.facts == change.facts
    assert (loaded.provenance, loaded.contexts, loaded.radius) == (change.provenance, change.contexts, change.radius)
    with change.applied(model):
        here = laws.logits(model, TEXT)
    with loaded.applied(model):
        assert torch.equal(laws.logits(model, TEXT), here)
    with pytest.raises(ValueError, match="needed 'edit'"):
        fe.Edit.load(tmp_path / "router.safetensors")


# ---------------------------------------------------------------------------------------- what it refuses


def test_keys_within_a_radius_of_each_other_are_refused(kind):
    model = shared(kind)
    same = laws.FACT.but(prompt="{} stands near", target_new=" Berlin", paraphrases=())
    with pytest.raises(ValueError, match=r"within the radius of 0\.1"):
        router()(model, [laws.FACT, same])  # one subject at the beginning of both: one key
    with pytest.raises(ValueError, match="within the radius of 3"):
        router(3.0)(model, FACTS)
    stored = made(kind).keys
    apart = float((stored[0] - stored[1]).norm() / stored.norm(dim=-1).max())
    values = torch.zeros(2, 32, dtype=torch.float64)
    hand_made(model, stored, values, 0.99 * apart)
    with pytest.raises(ValueError, match=f"needed less than {apart:.3f}"):
        hand_made(model, stored, values, 1.01 * apart)


def test_bad_input_is_refused_before_any_pass(kind, monkeypatch):
    model, other = shared(kind), tiny.model(kind, "gpt2", seed=1)
    change = made(kind)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="needed more than 0"):
            router(bad)
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match="no target_new"):
            router()(model, [laws.FACT.but(target_new=None)])
        with pytest.raises(ValueError, match="outside the model"):
            fe.Router(9)(model, FACTS)
        with pytest.raises(ValueError, match="made for weights"), change.applied(other):
            pass
    with pytest.raises(ValueError, match="a stored key is 0"):
        hand_made(model, torch.zeros(1, 64, dtype=torch.float64), torch.zeros(1, 32, dtype=torch.float64), 0.1)
