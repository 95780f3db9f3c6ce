"""PMET: the laws of every editor, the two δ by the letter, and what is kept of them."""

import functools

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.editing.description import describe
from tl_factedit.editing.layerwise import distribute
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editing.values import fit_values

FACTS = [laws.FACT, laws.OTHER]
LAYERS = (1, 2)
FIT = ValueFit(steps=4, lr=0.2, kl_weight=1.0, clamp=0.75, ease=0.1, stop_kl=0.01)
OPTIONS = {"steps": 6, "lr": 0.1, "kl_weight": 1.0, "decay": 0.5, "clamp": 0.75, "stop_below": 0.05}
LOSS, DELTA = {"rel": 2e-4, "abs": 2e-5}, {"rtol": 2e-3, "atol": 2e-3}
FORMS = ["gpt2", "llama", "gptj"]  # the attention before the MLP, and beside it


@functools.cache
def shared(kind: str, arch: str = "gpt2", dtype: torch.dtype = torch.float32):
    return tiny.model(kind, arch, dtype=dtype)


def stats_of(model) -> dict[int, fe.KeyStats]:
    return {layer: laws.stats(model, layer) for layer in LAYERS}


def editor(stats, **options) -> fe.Pmet:
    return fe.Pmet(stats, **{"weight": 1.0, "fit": FIT, "contexts": laws.CONTEXTS, "progress": False, **options})


def fit(model, facts=FACTS, contexts=laws.CONTEXTS, **options):
    return fit_values(
        model,
        facts,
        LAYERS[-1],
        contexts,
        where="modules",
        fit=ValueFit(**{**OPTIONS, **options}),
        prepend_bos=True,
        progress=False,
    )


def by_the_letter(model, fact, contexts=laws.CONTEXTS, **options):
    return editing.fit_value(model, fact, LAYERS[-1], contexts, bos=True, where="modules", **{**OPTIONS, **options})


# ---------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("arch", [*FORMS, "gemma2"])
def test_it_obeys_the_laws_of_every_editor(kind, arch, monkeypatch, tmp_path):
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    model = shared(kind, arch)
    pmet = editor(stats_of(model))
    edit = laws.leaves_everything_as_it_was(lambda: pmet(model, FACTS), model)
    assert isinstance(pmet, fe.Editor)
    assert edit.layers == LAYERS
    laws.makes_the_same_edit_twice(lambda: pmet(model, FACTS))
    laws.writes_its_values_at_its_keys(edit, model)
    laws.comes_off_bit_for_bit(edit, model)
    laws.survives_a_file(edit, tmp_path / "edit.safetensors", model)
    laws.wants_a_new_object(pmet, model, laws.FACT, monkeypatch)


@pytest.mark.parametrize(
    "stage",
    [
        "tl_factedit.editing.layerwise.fit_values",
        "tl_factedit.editing.values.Runner.remember",
        "tl_factedit.editing.adam.Adam.step",
        "tl_factedit.editing.layerwise.Delta",
        "tl_factedit.backend.weights.DownProj.write_",
        "tl_factedit.editing.edit.diagnose",
    ],
)
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(kind, stage, monkeypatch):
    model = shared(kind)
    pmet = editor(stats_of(model))

    def fail(*_, **__):
        raise KeyboardInterrupt("injected")

    with laws.untouched(model):
        monkeypatch.setattr(stage, fail)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            pmet(model, FACTS)
        monkeypatch.undo()


def test_its_record_says_what_it_was(kind):
    model = shared(kind)
    pmet = editor(stats_of(model), objective=fe.editing.Amplify())
    said = describe(pmet)
    assert said["name"] == "Pmet" and said["weight"] == 1.0 and said["layers"] == [1, 2]
    assert (said["objective"], said["fit"]["ease"], said["fit"]["stop_kl"]) == ("Amplify()", 0.1, 0.01)
    published = fe.Pmet(stats_of(model)).fit
    assert (published.steps, published.lr, published.kl_weight, published.clamp) == (30, 0.2, 1.0, 0.75)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weight": 0.0}, "weight is 0.0, needed more than 0"), ({"ridge": -1.0}, "ridge is -1.0, needed 0 or more")],
)
def test_choices_that_mean_nothing_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        editor(stats_of(shared(kind)), **options)


# ---------------------------------------------------------------------------------------- the two δ


@pytest.mark.parametrize("arch", FORMS)
def test_every_step_equals_the_literal_one(kind, arch):
    model = shared(kind, arch)
    for found, fact in zip(fit(model), FACTS, strict=True):
        deltas, losses = by_the_letter(model, fact)
        assert found.losses == pytest.approx(losses, **LOSS)
        torch.testing.assert_close(torch.stack([found.attn_delta, found.delta]), deltas.double(), **DELTA)
        assert min(found.attn_delta.norm(), found.delta.norm()) > 0.1
        assert found.losses[-1] < found.losses[0]


def test_each_delta_is_kept_within_its_own_clamp(kind):
    model = shared(kind)
    before = editing.before(model, laws.FACT, LAYERS[-1], bos=True, where="modules").norm(dim=-1)
    (tight,) = fit(model, [laws.FACT], clamp=0.1, lr=0.5)
    for own, norm in zip((tight.attn_delta, tight.delta), before, strict=True):
        assert float(own.norm()) == pytest.approx(0.1 * float(norm), rel=1e-4)
    assert abs(float(before[0] / before[1]) - 1) > 0.05
    assert tight.clamped > 0
    assert fit(model, [laws.FACT], clamp=100.0)[0].clamped == 0


def first_choice(model) -> fe.Fact:
    """A fact whose new object the model puts first already after the bare prompt."""
    ids = model.to_tokens(laws.FACT.text, prepend_bos=True)
    with torch.no_grad():
        said = int(model(ids)[0, -1].argmax())
    return laws.FACT.but(target_new=f" {model.tokenizer.decode([said])}")


def test_once_the_object_comes_first_it_counts_a_tenth(kind):
    model = shared(kind)
    fact = first_choice(model)
    eased, _ = by_the_letter(model, fact, ("",), ease=0.1)
    (found,) = fit(model, [fact], [""], ease=0.1)
    deltas, losses = by_the_letter(model, fact, ("",), ease=0.1)
    assert found.losses == pytest.approx(losses, **LOSS)
    # The first step is taken with all of the term, the second knows that it came first.
    whole = fit(model, [fact], [""])[0].losses
    assert found.losses[0] == pytest.approx(whole[0]) and found.losses[1] < 0.5 * whole[1]
    (other,) = fit(model, [laws.FACT], [""], ease=0.1)
    assert other.losses == pytest.approx(fit(model, [laws.FACT], [""])[0].losses)  # it never comes first
    torch.testing.assert_close(torch.stack([found.attn_delta, found.delta]), eased.double(), **DELTA)
    assert len(deltas) == 2


def test_it_stops_where_the_object_comes_first_and_kl_is_small(kind):
    model = shared(kind)
    fact = first_choice(model)
    (found,) = fit(model, [fact], [""], stop_kl=0.01)
    assert (found.stopped, len(found.losses)) == ("kl", 1)  # δ is 0 and so is KL
    assert fit(model, [laws.FACT], [""], stop_kl=0.01)[0].stopped == "steps"
    assert fit(model, [fact], [""])[0].stopped == "steps"
    # It has to come first in every context.
    (wider,) = fit(model, [fact], laws.CONTEXTS, stop_kl=1e9)
    _, losses = by_the_letter(model, fact, laws.CONTEXTS, stop_kl=1e9)
    assert wider.losses == pytest.approx(losses, **LOSS)


def test_many_at_once_are_each_as_alone(kind):
    model = shared(kind)
    facts = [laws.FACT, laws.OTHER, first_choice(model).but(prompt="{} is in the city of")]
    together = fit(model, facts, ease=0.1, stop_kl=0.01)
    for one, fact in zip(together, facts, strict=True):
        (alone,) = fit(model, [fact], ease=0.1, stop_kl=0.01)
        assert one.losses == pytest.approx(alone.losses, **LOSS)
        torch.testing.assert_close(one.delta, alone.delta, **DELTA)
        torch.testing.assert_close(one.attn_delta, alone.attn_delta, **DELTA)
        assert (one.stopped, one.clamped) == (alone.stopped, alone.clamped)


def test_packed_values_are_those_of_whole_sequences(kind, monkeypatch):
    model = shared(kind, "llama")
    packed = fit(model)
    monkeypatch.setattr(Runner, "why_not_packed", lambda *_: "said so by a test")
    for one, other in zip(packed, fit(model), strict=True):
        assert one.losses == pytest.approx(other.losses, **LOSS)
        torch.testing.assert_close(one.delta, other.delta, **DELTA)


# ---------------------------------------------------------------------------------------- what is written


def literal(stats):
    return lambda layer, keys, residuals: editing.least_squares(stats[layer].moment, keys, residuals, 1.0)


@pytest.mark.parametrize("arch", FORMS)
def test_given_z_the_updates_are_those_of_the_literal_loop(kind, arch):
    model = shared(kind, arch, torch.float64)
    stats = stats_of(model)
    before = [editing.before(model, fact, LAYERS[-1], bos=True)[0] for fact in FACTS]
    wanted = torch.stack(before) + torch.randn(2, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    pmet, asked = editor(stats), [fe.editing.EditTarget(fact) for fact in FACTS]
    with frozen(model), torch.no_grad():
        prepared = {layer: pmet.solver(stats[layer]) for layer in LAYERS}
        found, _ = distribute(
            model,
            asked,
            LAYERS,
            wanted,
            prepared,
            laws.CONTEXTS,
            where="modules",
            prepend_bos=True,
            divide="root",
            progress=False,
        )
    loop = functools.partial(editing.spread, model, FACTS, list(LAYERS), laws.CONTEXTS, wanted, literal(stats))
    expected = loop(bos=True, reached="hook_mlp_out", root=True)
    for each in found:
        keys, residuals, delta = expected[each.delta.layer]
        for mine, theirs in ((each.keys, keys), (each.residuals, residuals), (each.delta.dense, delta)):
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    # Divided evenly, or with the stream in place of what W_out answers, it would be another edit.
    for wrong in (loop(bos=True, reached="hook_mlp_out"), loop(bos=True, root=True)):
        assert (wrong[1][2] - expected[1][2]).norm() > 1e-2 * expected[1][2].norm()


def test_with_its_own_z_it_makes_the_edit_of_the_literal_loop(kind):
    """To 1 %, as Adam multiplies what float32 sums differ by."""
    model = shared(kind, "gpt2", torch.float64)
    stats = stats_of(model)
    edit = editor(stats)(model, FACTS)
    options = {"ease": 0.1, "stop_kl": 0.01, "steps": 4, "lr": 0.2}
    wanted = torch.stack(
        [
            editing.before(model, fact, LAYERS[-1], bos=True)[0] + by_the_letter(model, fact, **options)[0][1]
            for fact in FACTS
        ]
    )
    expected = editing.spread(
        model,
        FACTS,
        list(LAYERS),
        laws.CONTEXTS,
        wanted,
        literal(stats),
        bos=True,
        reached="hook_mlp_out",
        root=True,
    )
    for delta in edit.deltas:
        theirs = expected[delta.layer][2]
        assert (delta.dense - theirs).norm() <= 1e-2 * theirs.norm()


def test_nothing_but_w_out_of_its_layers_is_written(kind):
    model = shared(kind)
    edit = editor(stats_of(model))(model, FACTS)
    sites = {id(down_proj(model, layer).param) for layer in LAYERS}
    before = {id(param): param.detach().clone() for param in model.parameters()}
    with edit.applied(model):
        changed = {id(param) for param in model.parameters() if not torch.equal(param, before[id(param)])}
    assert changed == sites


def test_the_delta_of_the_attention_is_dropped(kind):
    """With next to no weight and the bare prompt, W_out of the one layer answers with its own δ and no more."""
    model = shared(kind)
    stats = {2: laws.stats(model, 2)}
    edit = editor(stats, weight=1e-9, contexts=[""])(model, [laws.FACT])
    (found,) = fit(model, [laws.FACT], [""], ease=0.1, stop_kl=0.01, steps=4, lr=0.2)
    assert found.attn_delta.norm() > 0.1
    wanted = found.outputs[0] + found.delta
    with edit.applied(model):
        ids = model.to_tokens(laws.FACT.text, prepend_bos=True)[0].tolist()
        after = editing.seen(model, "blocks.2.hook_mlp_out", ids)[3].double()
    torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-3)
    assert (found.outputs[0] - wanted).norm() > 0.1
