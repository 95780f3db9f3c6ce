"""An edit in a transformers model says what it says in TransformerLens, whatever was done to the weights there."""

import copy
import warnings

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.loading import from_hf

ARCHS = ("gpt2", "gptj", "neox", "neo", "llama", "phi", "phi3", "opt", "falcon", "bloom", "gemma2")
FIT = fe.ValueFit(steps=4)


def made(model) -> fe.Edit:
    stats = laws.stats(model, 1)
    return fe.Rome(stats, ridge=1e-3, fit=FIT, contexts=laws.CONTEXTS, progress=False)(model, [laws.FACT])


def booted(hf, kind: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return from_hf(hf, tiny.tokenizer(), kind=kind, name="tiny")


def log_probs(model_or_hf, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model_or_hf(ids)
    return (out if torch.is_tensor(out) else out.logits).log_softmax(-1)


IDS = torch.tensor([[0, 5, 6, 9, 12, 30, 8]])


@pytest.mark.parametrize("arch", ARCHS)
def test_the_exported_model_has_the_logits_of_the_edited_one(kind, arch):
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    hf = tiny.hf_model(arch)
    alone = copy.deepcopy(hf)
    model = booted(hf, kind)
    edit = made(model)
    before = log_probs(alone, IDS)
    fe.export_hf_(edit, alone)
    with edit.applied(model):
        want = log_probs(model, IDS)
    assert (log_probs(alone, IDS) - want).abs().max() < 1e-5
    assert (before - want).abs().max() > 1e-3, "the edit changes nothing here"


@pytest.mark.parametrize("arch", ["gpt2", "neox", "llama"])
def test_an_edit_of_processed_weights_is_exported_to_raw_ones(kind, arch):
    hf = tiny.hf_model(arch)
    alone = copy.deepcopy(hf)
    if kind == "hooked":
        model = tiny.hooked(arch, processed=True)
    else:
        model = booted(hf, kind)
        model.enable_compatibility_mode()
    edit = made(model)
    fe.export_hf_(edit, alone)
    with edit.applied(model):
        want = log_probs(model, IDS)
    assert (log_probs(alone, IDS) - want).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_changed_copy_leaves_the_model_as_it_is(kind, arch, tied):
    edit, hf = made(tiny.model(kind, arch, tied=tied)), tiny.hf_model(arch, tied=tied)
    before = {name: param.clone() for name, param in hf.named_parameters()}
    changed, in_place = fe.export_hf(edit, hf), copy.deepcopy(hf)
    fe.export_hf_(edit, in_place)
    assert all(torch.equal(before[name], param) for name, param in hf.named_parameters())
    for (name, one), (_, other) in zip(changed.named_parameters(), in_place.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert torch.equal(one, before[name]) is not (f".{edit.layers[0]}.mlp" in name and name.endswith(DOWN[arch]))
    assert (changed.get_input_embeddings().weight is changed.get_output_embeddings().weight) is tied
    assert not {p.data_ptr() for p in changed.parameters()} & {p.data_ptr() for p in hf.parameters()}


DOWN = {"gpt2": "c_proj.weight", "llama": "down_proj.weight"}


def test_nothing_is_copied_for_what_is_refused(kind, monkeypatch):
    edit, other = made(tiny.model(kind, "gpt2")), tiny.hf_model("gpt2", seed=1)
    monkeypatch.setattr(copy, "deepcopy", lambda _: pytest.fail("a large model was copied for nothing"))
    with pytest.raises(ValueError, match="isn't the one the edit was made for"):
        fe.export_hf(edit, other)


def test_a_model_that_a_bridge_wraps_is_not_changed_unseen():
    hf = tiny.hf_model("gpt2")
    model = booted(hf, "bridge")
    edit = made(model)
    for export in (fe.export_hf, fe.export_hf_):
        with laws.untouched(model), pytest.raises(ValueError, match=r"lives inside a TransformerBridge.*save_hf"):
            export(edit, hf)


def test_an_interrupted_export_writes_nothing(kind, monkeypatch):
    edit, hf = made(tiny.model(kind, "gpt2")), tiny.hf_model("gpt2")
    kept = hf.transformer.h[1].mlp.c_proj.weight.clone()
    copied = torch.Tensor.copy_

    def interrupted(self, *args):
        copied(self, *args)
        monkeypatch.setattr(torch.Tensor, "copy_", copied)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fe.export_hf_(edit, hf)
    assert torch.equal(hf.transformer.h[1].mlp.c_proj.weight, kept)


def test_foreign_weights_are_refused_and_left_alone(kind):
    model = tiny.model(kind, "gpt2")
    edit = made(model)
    other = tiny.hf_model("gpt2", seed=1)
    before = {name: param.clone() for name, param in other.named_parameters()}
    with pytest.raises(ValueError, match="W_out of layer 0 isn't the one the edit was made for"):
        fe.export_hf_(edit, other)
    with pytest.raises(ValueError, match="of a model with 4 layers, this one has 3"):
        fe.export_hf_(edit, tiny.hf_model("gpt2", n_layers=3))
    with pytest.raises(fe.UnsupportedModelError, match="Linear keeps its blocks in none of"):
        fe.export_hf_(edit, torch.nn.Linear(2, 2))
    assert all(torch.equal(before[name], param) for name, param in other.named_parameters())


def test_an_edit_is_not_exported_twice(kind):
    edit, hf = made(tiny.model(kind, "gpt2")), tiny.hf_model("gpt2")
    fe.export_hf_(edit, hf)
    kept = hf.transformer.h[1].mlp.c_proj.weight.clone()
    with pytest.raises(ValueError, match="edited before"):
        fe.export_hf_(edit, hf)
    assert torch.equal(hf.transformer.h[1].mlp.c_proj.weight, kept)


def test_several_edits_are_exported_as_one(kind):
    model, hf = tiny.model(kind, "gpt2"), tiny.hf_model("gpt2")
    first = made(model)
    second = fe.Rome(laws.stats(model, 2), fit=FIT, contexts=laws.CONTEXTS, progress=False)(model, [laws.OTHER])
    fe.export_hf_(first, hf)
    with pytest.raises(ValueError, match=r"compose\(edits\)"):
        fe.export_hf_(second, hf)
    hf = tiny.hf_model("gpt2")
    fe.export_hf_(fe.compose([first, second]), hf)
    with first.applied(model), second.applied(model):
        assert (log_probs(hf, IDS) - log_probs(model, IDS)).abs().max() < 1e-5


def test_what_overflows_is_not_exported(kind):
    edit, hf = made(tiny.model(kind, "gpt2", dtype=torch.float16)), tiny.hf_model("gpt2", dtype=torch.float16)
    kept = hf.transformer.h[1].mlp.c_proj.weight.clone()
    with pytest.raises(ValueError, match=r"overflow torch\.float16: nothing was written"):
        fe.export_hf_(edit.scaled(1e9), hf)
    assert torch.equal(hf.transformer.h[1].mlp.c_proj.weight, kept)


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="there the type checks of the tests come first")
def test_a_list_of_edits_is_told_how_to_become_one(kind):
    model, hf = tiny.model(kind, "gpt2"), tiny.hf_model("gpt2")
    for export in (fe.export_hf, fe.export_hf_):
        with pytest.raises(ValueError, match=r"a list: needed an Edit, which several can be made: compose\(edits\)"):
            export([made(model)] * 2, hf)


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="there the type checks of the tests come first")
def test_a_router_is_not_exported(kind):
    routed = fe.editors.RoutedEdit.of(made(tiny.model(kind, "gpt2")))
    for export in (fe.export_hf, fe.export_hf_):
        with pytest.raises(ValueError, match="a RoutedEdit: needed an Edit"):
            export(routed, tiny.hf_model("gpt2"))


def test_exporting_warns_as_applying_does(kind):
    model = tiny.model(kind, "gpt2")
    first = made(model)
    with pytest.warns(fe.EditWarning, match="the update of layer 1 is"):
        fe.export_hf_(first.scaled(1e3), tiny.hf_model("gpt2"))
    with first.applied(model):
        second = fe.Rome(laws.stats(tiny.model(kind, "gpt2"), 2), fit=FIT, contexts=(), progress=False)(
            model, [laws.OTHER]
        )
    with pytest.warns(fe.EditWarning, match="made on top of 1 other edits, of which 1 aren't on"):
        fe.export_hf_(second, tiny.hf_model("gpt2"))


def test_a_model_of_transformer_lens_is_not_exported_to(kind):
    model = tiny.model(kind, "gpt2")
    edit = made(model)
    for export in (fe.export_hf, fe.export_hf_):
        with laws.untouched(model), pytest.raises(ValueError, match=r"of TransformerLens, .* edit.apply_\(model\)"):
            export(edit, model)


@pytest.mark.parametrize("export", [fe.export_hf, fe.export_hf_])
def test_a_transformers_model_whose_w_out_is_tied_is_not_written(export):
    hf = tiny.hf_model("gpt2", d_mlp=32)
    edit = made(tiny.around(tiny.hf_model("gpt2", d_mlp=32)))
    (layer,) = edit.layers
    mlp = hf.transformer.h[layer].mlp
    mlp.c_fc.weight = mlp.c_proj.weight
    before = mlp.c_proj.weight.detach().clone()
    with pytest.raises(
        fe.UnsupportedModelError, match=rf"layer {layer} is one piece of memory with .*mlp\.c_fc\.weight"
    ):
        export(edit, hf)
    assert torch.equal(mlp.c_proj.weight, before)


# ---------------------------------------------------------------------------------------- scaling and composition


def test_a_scaled_edit_moves_its_key_as_far_as_asked(kind):
    model = tiny.model(kind, "gpt2")
    edit = made(model)
    (delta,), half = edit.deltas, edit.scaled(0.5)
    torch.testing.assert_close(half.deltas[0].dense, 0.5 * delta.dense)
    key = edit.keys[1][0]
    now = edit.values[1][0] - key @ delta.dense
    torch.testing.assert_close(half.values[1][0], now + 0.5 * key @ delta.dense)
    assert half.digest != edit.digest
    with laws.untouched(model), half.applied(model):
        halfway = laws.logits(model)
    with edit.applied(model):
        assert not torch.allclose(laws.logits(model), halfway, atol=1e-4)
    nothing = edit.scaled(0.0)
    with laws.untouched(model), nothing.applied(model):
        pass
    (whole,), (part,), (none,) = edit.diagnostics, half.diagnostics, nothing.diagnostics
    assert part.update_norm == pytest.approx(0.5 * whole.update_norm)
    assert part.relative_norm == pytest.approx(0.5 * whole.relative_norm)
    assert part.value_norm == pytest.approx(float(half.values[1].norm() / now.norm()))
    assert (none.update_norm, none.relative_norm) == (0, 0) and none.value_norm == pytest.approx(1)
    assert edit.scaled(-2.0).diagnostics[0].update_norm == pytest.approx(2 * whole.update_norm)
    assert "layers {1: 0.00% of ‖W‖}" in repr(nothing) and "prob_after" not in nothing.fits[0]
    (said,) = nothing.concerns
    assert "scaled by 0.0 and changes nothing" in said


def test_composed_edits_do_what_both_do(kind):
    model = tiny.model(kind, "gpt2")
    rome = [fe.Rome(laws.stats(model, layer), fit=FIT, contexts=laws.CONTEXTS, progress=False) for layer in (1, 2)]
    edits = [rome[0](model, [laws.FACT]), rome[1](model, [laws.OTHER]), rome[0](model, [laws.OTHER])]
    both = fe.compose(edits)
    assert both.layers == (1, 2)
    assert both.deltas[0].left.shape[1] == 2
    for edit in edits:
        edit.apply_(model)
    one_by_one = laws.logits(model)
    for edit in edits:
        edit.undo_(model)
    with laws.untouched(model), both.applied(model):
        torch.testing.assert_close(laws.logits(model), one_by_one, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="edits is empty"):
        fe.compose([])
    foreign = made(tiny.model(kind, "gpt2", seed=1))
    with pytest.raises(ValueError, match=r"the edits are of weights .* needed the same"):
        fe.compose([edits[0], foreign])
