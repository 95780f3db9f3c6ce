"""An edit goes on and comes off bit for bit, alone, among others, from a file, and when something fails."""

import contextlib
import copy
import dataclasses
import importlib
import inspect
import math
import warnings

import laws
import numpy as np
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.fingerprint import fingerprint
from tl_factedit.backend.protocol import layout
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core import files
from tl_factedit.core.tokens import align
from tl_factedit.editing.delta import LayerUpdate
from tl_factedit.editing.diagnostics import diagnose
from tl_factedit.editing.ledger import base_fingerprint
from tl_factedit.editing.off_target import measure_off_target

FORMS = [("bridge", arch) for arch in ("gpt2", "llama", "phi3", "gemma2")]
FORMS += [("hooked", arch) for arch in ("gpt2", "llama") if "hooked" in tiny.KINDS]


def made(model, layer: int = 1, *, scale: float = 1.0, fact: fe.Fact = laws.FACT, seed: int = 0) -> fe.Edit:
    """An edit with random factors: what `Edit` promises doesn't depend on where its deltas come from."""
    site = down_proj(model, layer)
    draw = torch.Generator().manual_seed(100 * layer + seed)
    key, push = (torch.randn(size, generator=draw, dtype=torch.float64) for size in site.W.shape)
    left, right = (key / (key @ key))[:, None], scale * push[None]
    return fe.Edit(
        facts=(fact,),
        deltas=(fe.editing.Delta(layer, left, right),),
        keys={layer: key[None]},
        values={layer: site.value(key)[None] + right},
        editor={"name": "random", "seed": seed},
        contexts=("",),
        diagnostics=(
            fe.editing.Diagnostics(layer, 1.0, float((left @ right).norm()), float(site.W.norm()), 1e-8, 1.0),
        ),
        fits=({"losses": [1.5, 0.5], "stopped": "steps"},),
        provenance=fe.editing.Provenance.of(model, True, weights=base_fingerprint(model)),
    )


def two_layers(model) -> fe.Edit:
    a, b = made(model, 1), made(model, 2)
    return dataclasses.replace(
        a,
        deltas=a.deltas + b.deltas,
        keys={**a.keys, **b.keys},
        values={**a.values, **b.values},
        diagnostics=a.diagnostics + b.diagnostics,
    )


def w_out(model, layer: int = 1) -> torch.Tensor:
    return down_proj(model, layer).W.clone()


# ---------------------------------------------------------------------------------------- on and off


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_an_edit_comes_off_bit_for_bit(form):
    model = tiny.model(*form)
    laws.comes_off_bit_for_bit(made(model), model)
    laws.comes_off_bit_for_bit(two_layers(model), model)
    laws.writes_its_values_at_its_keys(two_layers(model), model)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("layers", [(1, 1), (1, 2)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("first_off", [0, 1], ids=["first in first out", "last in first out"])
def test_of_two_edits_either_can_go_first_and_leaves_the_other_to_the_bit(form, layers, first_off):
    model = tiny.model(*form)
    edits = made(model, layers[0], seed=1), made(model, layers[1], seed=2)
    clean = laws.logits(model)
    before = laws.state(model)
    goes, stays = edits[first_off], edits[1 - first_off]
    with stays.applied(model):
        alone = laws.logits(model)
    for edit in edits:
        edit.apply_(model)
    assert not torch.equal(laws.logits(model), alone)
    goes.undo_(model)
    assert torch.equal(laws.logits(model), alone)
    stays.undo_(model)
    laws.assert_same(before, laws.state(model))
    assert torch.equal(laws.logits(model), clean)


def test_subtracting_the_delta_would_not_do(kind):
    # The opposite of a bit-exact undo: the reason why the weights are kept.
    model = tiny.model(kind, "gpt2")
    edit, before = made(model, scale=100), w_out(model)
    with pytest.warns(fe.EditWarning, match="the update of layer 1 is .* of ‖W‖"):
        edit.apply_(model)
    edited = w_out(model)
    edit.undo_(model)
    assert torch.equal(w_out(model), before)
    assert not torch.equal((edited.double() - edit.deltas[0].dense).float(), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_applied_takes_the_edit_off_even_when_the_body_raises(model, error):
    edit, before = made(model), w_out(model)
    with laws.untouched(model), pytest.raises(error), edit.applied(model) as same:
        assert same is model
        assert not torch.equal(w_out(model), before)
        raise error


def test_edits_nest(model):
    first, second = made(model, seed=1), made(model, seed=2)
    with laws.untouched(model), first.applied(model):
        outer = w_out(model)
        with second.applied(model):
            assert not torch.equal(w_out(model), outer)
        assert torch.equal(w_out(model), outer)


def test_the_weights_are_the_exact_sum_rounded_once(model):
    edit, before = made(model, scale=3), w_out(model)
    with edit.applied(model):
        assert torch.equal(w_out(model), (before.double() + edit.deltas[0].dense).float())
    delta = edit.deltas[0]
    torch.testing.assert_close(delta.matrix.AB, delta.dense, rtol=1e-12, atol=1e-12)
    assert edit.layers == (1,)
    assert made(model).digest == made(model).digest != made(model, seed=5).digest


@pytest.mark.parametrize("mode", ["inference", "no_grad", "training"])
def test_applying_works_in_every_mode_and_leaves_it(model, mode):
    edit = made(model)
    model.train(mode == "training")
    for param in model.parameters():
        param.requires_grad_(mode == "training")
    context = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    with laws.untouched(model), context():
        edit.apply_(model)
        assert all(param.requires_grad == (mode == "training") for param in model.parameters())
        edit.undo_(model)
    with laws.untouched(model):
        with context():
            edit.apply_(model)
        edit.undo_(model)


# ---------------------------------------------------------------------------------------- refusals


def refused(model, action, message):
    before = laws.state(model)
    with pytest.raises(ValueError, match=message):
        action(model)
    laws.assert_same(before, laws.state(model))


def test_an_edit_is_not_applied_twice_nor_taken_off_where_it_is_not(model):
    edit = made(model)
    refused(model, edit.undo_, "the edit of 'The Eiffel Tower' isn't applied to .*: apply_ it first")
    edit.apply_(model)
    refused(model, edit.apply_, "is applied to .* already: undo_ it first")
    refused(model, made(model, seed=3).undo_, "isn't applied")
    with pytest.raises(ValueError, match="already"), edit.applied(model):
        raise AssertionError("the body was run")
    assert laws.state(model).edits == (edit.digest,)
    edit.undo_(model)
    refused(model, edit.undo_, "isn't applied")


@pytest.mark.parametrize("how", ["added to", "loaded"])
def test_weights_that_were_changed_since_are_not_touched(model, how):
    edit, other, original = made(model), made(model, seed=2), copy.deepcopy(model.state_dict())
    edit.apply_(model)
    if how == "added to":
        with torch.no_grad():
            down_proj(model, 1).param.add_(0.25)
    else:  # not those from before the edit, which would take it off (see test_ledger)
        model.load_state_dict({name: value * 0.5 for name, value in original.items()})
    refused(model, edit.undo_, "W_out of layer 1 was changed since .*nothing was written")
    refused(model, other.apply_, "W_out of layer 1 was changed since .*nothing was written")


def test_processing_the_weights_of_an_edited_bridge_is_noticed():
    model = tiny.bridge("gpt2")
    edit = made(model)
    edit.apply_(model)
    model.enable_compatibility_mode()
    assert layout(model) == "bridge+compat"
    refused(model, edit.undo_, "changed since .*weight processing")


def test_another_layer_that_was_changed_is_noticed_when_applying(model):
    edit = made(model)
    with torch.no_grad():
        down_proj(model, 3).param.add_(0.25)
    refused(model, edit.apply_, "made for weights .* has weights")


@pytest.mark.parametrize("other", [{"seed": 9}, {"n_layers": 3}], ids=repr)
def test_a_model_with_other_weights_is_refused(model, kind, other):
    edit = made(model)
    refused(tiny.model(kind, "gpt2", **other), edit.apply_, "made for weights .*apply it to the model it was made on")


def test_check_says_what_apply_would_say_and_writes_nothing(model):
    edit = made(model)
    with laws.untouched(model):
        edit.check(model)
    with edit.applied(model):
        refused(model, edit.check, "already")


def test_an_edit_that_overflows_the_weights_type_is_refused(kind):
    model = tiny.model(kind, "gpt2", dtype=torch.float16)
    refused(model, made(model, scale=1e9).apply_, "overflow torch.float16: nothing was written")
    laws.comes_off_bit_for_bit(made(model), model)


# ---------------------------------------------------------------------------------------- something fails


@pytest.mark.parametrize("call", ["apply_", "undo_"])
@pytest.mark.parametrize(
    ("fails", "error"), [(1, KeyboardInterrupt), (2, OSError)], ids=["at the first layer", "at the second layer"]
)
def test_a_write_that_fails_midway_leaves_all_layers_as_they_were(model, monkeypatch, call, error, fails):
    edit, write, calls = two_layers(model), DownProj.write_, []
    if call == "undo_":
        edit.apply_(model)
    seen = laws.logits(model)
    before = laws.state(model)

    def broken(site, weight):
        calls.append(site.layer)
        if len(calls) == fails:
            write(site, weight * 0.5)
            raise error
        write(site, weight)

    monkeypatch.setattr(DownProj, "write_", broken)
    with pytest.raises(error):
        getattr(edit, call)(model)
    monkeypatch.undo()
    laws.assert_same(before, laws.state(model))
    assert torch.equal(laws.logits(model), seen)
    getattr(edit, call)(model)
    assert not torch.equal(laws.logits(model), seen)


@pytest.mark.parametrize("call", ["apply_", "undo_"])
@pytest.mark.parametrize("stage", ["down_proj", "hash_all", "keep"])
def test_an_interrupt_anywhere_in_a_call_leaves_the_model_as_it_was(kind, monkeypatch, call, stage):
    model = tiny.model(kind, "gpt2")
    edit = two_layers(model)
    if call == "undo_":
        edit.apply_(model)
    before = laws.state(model)
    modules = [importlib.import_module(f"tl_factedit.editing.{name}") for name in ("edit", "ledger")]
    modules = [module for module in modules if hasattr(module, stage)]
    original, reached = getattr(modules[0], stage), 0
    for at in range(1, 200):
        calls, interrupted = [], False

        def broken(*args, at=at, calls=calls):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, stage, broken)
            try:
                getattr(edit, call)(model)
            except KeyboardInterrupt:
                interrupted = True
        if not interrupted:
            break
        reached += 1
        laws.assert_same(before, laws.state(model))
    assert reached and not interrupted
    assert laws.state(model).edits != before.edits


# ---------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_as_applied_begins_leaves_no_edit_on(kind, monkeypatch, when):
    model = tiny.model(kind, "gpt2")
    edit, apply_ = made(model), fe.Edit.apply_

    def interrupted(self, model):
        if when == "after":
            apply_(self, model)
        raise KeyboardInterrupt("injected")

    monkeypatch.setattr(fe.Edit, "apply_", interrupted)
    with laws.untouched(model), pytest.raises(KeyboardInterrupt, match="injected"), edit.applied(model):
        pass


@pytest.mark.parametrize("write", [1, 2])
def test_an_interrupt_as_applied_ends_takes_the_edit_off_all_the_same(kind, monkeypatch, write):
    model = tiny.model(kind, "gpt2")
    edit = fe.compose([made(model, 1), made(model, 2)])
    write_, writes = DownProj.write_, []

    def failing(self, weight):
        writes.append(1)
        if len(writes) == write:
            raise KeyboardInterrupt("injected")
        write_(self, weight)

    with laws.untouched(model), pytest.raises(KeyboardInterrupt, match="injected"), edit.applied(model):
        monkeypatch.setattr(DownProj, "write_", failing)


def test_a_warning_points_at_the_line_that_applies(model):
    edit = made(model, scale=1e4)
    for apply in (edit.apply_, lambda model: edit.scaled(2.0).applied(model).__enter__()):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            apply(model)
        assert [each.filename for each in found if each.category is fe.EditWarning] == [__file__]
        fe.undo_all_(model)


def test_scalars_of_numpy_and_torch_survive_a_file(model, tmp_path):
    edit = made(model)
    said = {"name": "by hand", "layer": np.int64(3), "weight": np.float32(0.5), "alpha": torch.tensor(0.5)}
    dataclasses.replace(edit, editor=said).save(tmp_path / "edit.safetensors")
    loaded = fe.Edit.load(tmp_path / "edit.safetensors")
    assert loaded.editor == {"name": "by hand", "layer": 3, "weight": 0.5, "alpha": 0.5}
    with pytest.raises(TypeError, match="a set can't be kept in a file"):
        dataclasses.replace(edit, editor={"name": {1}}).save(tmp_path / "other.safetensors")


def test_an_edit_that_is_on_already_stays_on_when_applied_refuses_it(model):
    edit = made(model)
    edit.apply_(model)
    written = w_out(model)
    with pytest.raises(ValueError, match="already"), edit.applied(model):
        pass
    assert torch.equal(w_out(model), written)
    edit.undo_(model)


def test_what_is_on_a_model_is_told_in_order_and_undone_at_once(kind):
    model = tiny.model(kind, "gpt2")
    first, second = made(model, 1), made(model, 2)
    third = made(model, 1, seed=7)
    assert fe.edits_on(model) == ()
    with laws.untouched(model):
        fe.undo_all_(model)  # nothing to do
        for edit in (second, first, third):
            edit.apply_(model)
        assert fe.edits_on(model) == (second, first, third)
        first.undo_(model)
        assert fe.edits_on(model) == (second, third)
        fe.undo_all_(model)
        assert fe.edits_on(model) == ()


def test_all_is_not_undone_where_something_else_has_written(model):
    made(model, 1).apply_(model)
    site = down_proj(model, 1)
    site.write_(site.W + 1)
    with pytest.raises(ValueError, match="changed since"):
        fe.undo_all_(model)
    assert len(fe.edits_on(model)) == 1


def test_a_change_is_not_written_twice_inside_a_composed_edit(kind):
    model = tiny.model(kind, "gpt2")
    first, second = made(model, 1), made(model, 2)
    both = fe.compose([first, second])
    nested = fe.compose([both, made(model, 2, seed=7)])
    for twice in ([first, first], [both, first], [second, nested], [first.scaled(1.0), first]):
        with pytest.raises(ValueError, match="one change is in several of the edits"):
            fe.compose(twice)
    assert set(nested.parts) > {first.digest, second.digest, both.digest}
    with laws.untouched(model):
        for on, off in ((first, both), (both, first), (nested, second), (second, nested)):
            with on.applied(model), pytest.raises(ValueError, match="hold the same change"):
                off.apply_(model)
        with first.applied(model), second.applied(model):
            pass


def test_a_change_and_the_same_scaled_are_one_change(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    first, second = made(model, 1), made(model, 2)
    both = fe.compose([first, second])
    twice, half = first.scaled(2.0), first.scaled(0.5)
    half.save(tmp_path / "half")
    inside = fe.compose([fe.Edit.load(tmp_path / "half"), second])
    pairs = [(first, twice), (half, twice), (both, twice), (both.scaled(0.5), second), (inside, first), (inside, both)]
    pairs += [(inside.scaled(3.0), twice), (first.scaled(0.0), first)]
    with laws.untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", fe.EditWarning)
        for pair in pairs:
            with pytest.raises(ValueError, match=r"in several of the edits.*edit.scaled\(1.5\), not the edit and half"):
                fe.compose(pair)
            for on, off in (pair, pair[::-1]):
                with on.applied(model), pytest.raises(ValueError, match=r"scaled from it\), needed it once: undo_"):
                    off.apply_(model)
        with inside.applied(model):
            composed = laws.logits(model)
        with half.applied(model), second.applied(model):
            assert torch.equal(laws.logits(model), composed)


def test_what_was_made_on_top_of_an_edit_misses_it_where_it_is_scaled(kind):
    model = tiny.model(kind, "gpt2")
    first, editor = made(model, 1), laws.rome(model, 2, fit=fe.ValueFit(steps=2, lr=0.01))
    with first.applied(model):
        second = editor(model, [laws.FACT])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fe.EditWarning)
        first.scaled(0.5).apply_(model)
    with pytest.warns(fe.EditWarning, match="made on top of 1 other edits, of which 1 aren't on"):
        second.apply_(model)
    fe.undo_all_(model)
    nested = fe.compose([fe.compose([first, made(model, 3)]), second])
    assert nested.provenance.edits == ()


def test_a_layer_is_changed_once(model):
    edit = made(model)
    (delta,) = edit.deltas
    with pytest.raises(ValueError, match="needed one a layer"):
        dataclasses.replace(edit, deltas=(delta, delta))


def test_an_edit_made_on_top_of_others_says_so_where_they_are_not(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    first = made(model, 1)
    editor = laws.rome(model, 2, fit=fe.ValueFit(steps=2, lr=0.01))
    with first.applied(model):
        second = editor(model, [laws.FACT])
    assert second.provenance.edits == (first.digest,)
    assert second.provenance.weights == first.provenance.weights
    second.save(tmp_path / "second.safetensors")
    alone = fe.Edit.load(tmp_path / "second.safetensors")
    assert alone.provenance == second.provenance
    with pytest.warns(fe.EditWarning, match="made on top of 1 other edits, of which 1 aren't on"), alone.applied(model):
        pass
    with warnings.catch_warnings(), first.applied(model):
        warnings.filterwarnings("error", message=".*made on top of", category=fe.EditWarning)
        with second.applied(model):
            pass
    both = fe.compose([first, second])
    assert both.provenance.edits == () and both.parts == (first.digest, second.digest)
    assert fe.compose([second]).provenance.edits == (first.digest,)


def test_a_w_out_that_two_layers_share_is_refused_and_stays(monkeypatch):
    model = tiny.bridge("gpt2")
    edit = made(model, 1)
    inner = [block.mlp.out.original_component for block in model.blocks]
    monkeypatch.setattr(inner[2], "weight", inner[1].weight)
    shared = dataclasses.replace(
        edit, provenance=fe.editing.Provenance.of(model, True, weights=base_fingerprint(model))
    )
    with laws.untouched(model):
        with pytest.raises(fe.UnsupportedModelError, match=r"layers \[1, 2\] share one W_out"):
            shared.apply_(model)
        with pytest.raises(fe.UnsupportedModelError, match="share one W_out"):
            laws.rome(model, 1)(model, [laws.FACT])


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["one parameter", "one memory"])
def test_a_w_out_that_is_another_weight_too_is_refused_and_stays(kind, arch, how):
    model = tiny.model(kind, arch, d_mlp=32)
    edit = made(model, 1)
    if kind == "hooked":
        mlp = model.blocks[1].mlp
        mlp.W_in = mlp.W_out if how == "one parameter" else torch.nn.Parameter(mlp.W_out.detach()[:])
        other = r"blocks\.1\.mlp\.W_in"
    else:
        up = getattr(model.blocks[1].mlp, "in").original_component
        weight = model.blocks[1].mlp.out.original_component.weight
        up.weight = weight if how == "one parameter" else torch.nn.Parameter(weight.detach().T)
        other = rf"blocks\.1\.mlp\.{'c_fc' if arch == 'gpt2' else 'up_proj'}\.weight"
    tied = dataclasses.replace(edit, provenance=fe.editing.Provenance.of(model, True, weights=base_fingerprint(model)))
    with laws.untouched(model):
        for call in (lambda: tied.apply_(model), lambda: laws.rome(model, 1)(model, [laws.FACT])):
            with pytest.raises(
                fe.UnsupportedModelError, match=rf"W_out of layer 1 is one piece of memory with {other}"
            ):
                call()
        with made(model, 2).applied(model):
            pass


def test_weights_side_by_side_in_one_piece_of_memory_are_apart(kind):
    """As a file leaves them that is mapped into memory."""
    model = tiny.model(kind, "gpt2")
    params = list({id(param): param for param in model.parameters()}.values())
    memory = torch.cat([param.detach().flatten() for param in params])
    for param, piece in zip(params, memory.split([param.numel() for param in params]), strict=True):
        param.data = piece.view(param.shape)
    with laws.untouched(model), made(model, 1).applied(model):
        pass


def test_a_copy_of_an_edited_model_has_a_ledger_of_its_own(model):
    edit, clean = made(model), w_out(model)
    edit.apply_(model)
    twin = copy.deepcopy(model)
    edit.undo_(twin)
    assert torch.equal(w_out(twin), clean)
    assert not torch.equal(w_out(model), clean)
    refused(model, edit.apply_, "already")
    edit.undo_(model)
    assert torch.equal(w_out(model), clean)


def test_an_edit_survives_a_file(model, tmp_path):
    laws.survives_a_file(two_layers(model), tmp_path / "two.safetensors", model)
    edit = laws.rome(model)(model, [laws.FACT.but(id=7, relation="P276")])
    laws.survives_a_file(edit, tmp_path / "folder" / "rome.safetensors", model)
    assert "'The Eiffel Tower': Paris→ Rome" in repr(fe.Edit.load(tmp_path / "folder" / "rome.safetensors"))


def test_a_loaded_edit_is_known_to_be_applied_already(model, tmp_path):
    edit = made(model)
    edit.save(tmp_path / "edit.safetensors")
    edit.apply_(model)
    loaded = fe.Edit.load(tmp_path / "edit.safetensors")
    refused(model, loaded.apply_, "already")
    loaded.undo_(model)
    assert laws.state(model).edits == ()


@pytest.mark.parametrize("damage", ["cut short", "changed", "of another kind"])
def test_a_damaged_edit_file_is_refused_by_name(kind, tmp_path, damage):
    model, file = tiny.model(kind, "gpt2"), tmp_path / "edit.safetensors"
    made(model).save(file)
    data = bytearray(file.read_bytes())
    if damage == "cut short":
        data = data[:-100]
    elif damage == "changed":
        data[-100] ^= 1
    else:
        file.unlink()
        fe.KeyStats.identity(model, 1).save(file)
        data = file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"edit\.safetensors.*{'needed .edit.' if 'kind' in damage else damage}"):
        fe.Edit.load(file)
    assert file.read_bytes() == data


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("arch", ["gpt2", "llama", "neox"])
def test_an_edit_made_on_a_bridge_fits_the_hooked_model_of_the_same_weights(arch, tmp_path):
    bridge, hooked = tiny.bridge(arch), tiny.hooked(arch)
    made(bridge).save(tmp_path / "edit.safetensors")
    edit = fe.Edit.load(tmp_path / "edit.safetensors")
    changes = []
    for model in (bridge, hooked):
        clean = laws.logits(model).log_softmax(-1)
        with edit.applied(model):
            assert torch.equal(w_out(model), w_out(bridge if model is hooked else model)) == (model is bridge)
            changes.append(laws.logits(model).log_softmax(-1) - clean)
    assert changes[0].abs().max() > 0.1
    # Two implementations in float32, of log-probabilities of size 10.
    torch.testing.assert_close(changes[0], changes[1], rtol=0, atol=1e-3)
    refused(tiny.hooked(arch, seed=9), edit.apply_, "made for weights")


# ---------------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["large", "rounded away"])
def test_in_bfloat16_exactness_is_what_the_stored_weights_give(kind, scale):
    model = tiny.model(kind, "gpt2", dtype=torch.bfloat16)
    fit = fe.ValueFit(steps=3, lr=0.5 * scale)
    edit = fe.Rome(laws.stats(model, 1), fit=fit, contexts=laws.CONTEXTS, progress=False)(model, [laws.FACT])
    site, key = down_proj(model, 1), edit.keys[1]
    before, wanted = site.value(key), edit.values[1]
    says = pytest.warns(fe.EditWarning, match="rounding .* loses") if scale < 1 else contextlib.nullcontext()
    with says, edit.applied(model):
        measured = float((site.value(key) - wanted).norm() / (wanted - before).norm())
    assert edit.diagnostics[0].exactness == pytest.approx(measured, rel=1e-6)
    assert measured > 1e-4  # no bfloat16 edit is exact to float32's digits
    assert (measured > 0.5) == (scale < 1)
    laws.comes_off_bit_for_bit(made(model), model)


def test_an_update_of_nothing_is_exact(model):
    edit = laws.rome(model, fit=fe.ValueFit(steps=1))(model, [laws.FACT])
    assert edit.deltas[0].right.abs().max() == 0
    assert edit.diagnostics[0].exactness == 0
    assert math.isfinite(edit.diagnostics[0].division_factor)


def test_the_fingerprint_of_the_base_does_not_see_edits(model):
    base = fingerprint(model)
    with made(model).applied(model), made(model, 2).applied(model):
        assert fingerprint(model) != base
        assert base_fingerprint(model) == base


# ---------------------------------------------------------------------------------------- off_target


def moved_by(model, edit: fe.Edit, layer: int, text: str) -> torch.Tensor:
    """‖k_t Δ‖ at every token of a text, with the keys of the edited model, seen by TransformerLens' own hooks."""
    name = f"blocks.{layer}.mlp.hook_post"
    (delta,) = [delta for delta in edit.deltas if delta.layer == layer]
    with edit.applied(model), torch.no_grad():
        _, cache = model.run_with_cache(model.to_tokens(text, prepend_bos=True), names_filter=[name])
    return (cache[name][0].double() @ delta.dense).norm(dim=-1)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_spill_is_the_most_that_another_token_gets_beside_the_one_that_is_meant(form):
    model = tiny.model(*form)
    edit = dataclasses.replace(two_layers(model), facts=(laws.FACT, laws.OTHER), fits=({}, {}))
    with laws.untouched(model):
        found, ends = fe.editing.off_target_share(model, edit), fe.editing.off_target_share(model, edit, at="end")
        near = fe.editing.off_target_share(model, edit, neighbours=True)
    for layer in (1, 2):
        for i, fact in enumerate(edit.facts):
            moved = moved_by(model, edit, layer, fact.text)
            last = align(model.tokenizer, fact, prepend_bos=True).last
            others = [moved[t] for t in range(len(moved)) if t != last]
            assert found[layer][i] == pytest.approx(float(max(others) / moved[last]), rel=1e-3)
            assert ends[layer][i] == pytest.approx(float(moved[:-1].max() / moved[-1]), rel=1e-3)
            asked = [moved_by(model, edit, layer, text).max() for text in fact.neighbours]
            assert near[layer][i] == pytest.approx(float(max([*others, *asked]) / moved[last]), rel=1e-3)
    with edit.applied(model):
        assert fe.editing.off_target_share(model, edit)[2] == pytest.approx(found[2], rel=1e-3)
    with pytest.raises(ValueError, match="at 'last' is unknown, needed 'subject' or 'end'"):
        inspect.unwrap(measure_off_target)(model, edit.facts, edit.deltas, prepend_bos=True, at="last")
    # In the unedited model the keys of the second layer are others.
    alone = measure_off_target(model, edit.facts, edit.deltas[1:], prepend_bos=True)
    assert alone[2] != pytest.approx(found[2], rel=1e-3)


def test_an_update_that_only_its_own_key_sees_does_not_spill(kind):
    model = tiny.model(kind, "gpt2")
    row = align(model.tokenizer, laws.FACT, prepend_bos=True)
    name = "blocks.1.mlp.hook_post"
    with torch.no_grad():
        keys = model.run_with_cache(row.ids[None], names_filter=[name])[1][name][0].double()
    others = torch.cat([keys[: row.last], keys[row.last + 1 :]])
    seen = torch.linalg.qr(others.T).Q
    own = keys[row.last] - seen @ (seen.T @ keys[row.last])
    right = torch.ones(1, model.cfg.d_model, dtype=torch.float64)
    blind, plain = fe.editing.Delta(1, own[:, None], right), fe.editing.Delta(1, keys[row.last][:, None], right)
    assert measure_off_target(model, [laws.FACT], [blind], prepend_bos=True)[1][0] < 1e-4
    assert measure_off_target(model, [laws.FACT], [plain], prepend_bos=True)[1][0] > 0.1
    nothing = fe.editing.Delta(1, own[:, None], 0 * right)
    assert measure_off_target(model, [laws.FACT], [nothing], prepend_bos=True)[1] == (0.0,)


def test_the_spill_of_a_foreign_edit_is_not_measured(kind):
    model = tiny.model(kind, "gpt2")
    refused(
        tiny.model(kind, "gpt2", seed=9),
        lambda other: fe.editing.off_target_share(other, made(model)),
        "made for weights",
    )


# ---------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("rank", [1, 7, 32, 60])
def test_the_norm_of_factors_is_that_of_their_product(rank):
    draw = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((64, rank), (rank, 32)))
    left[:, rank // 2] = left[:, 0] * (1 + 1e-9)  # what cancels must not cost digits
    right[rank // 2] = -right[0]
    delta = fe.editing.Delta(0, left, right)
    assert delta.norm == pytest.approx(float(delta.dense.norm()), rel=1e-9, abs=1e-12)


def test_a_full_change_is_added_to_the_bit(model):
    site, before = down_proj(model, 1), w_out(model)
    other = site.W + 0.1 * torch.randn(site.W.shape, generator=torch.Generator().manual_seed(0))
    delta = fe.editing.Delta.full(1, other.double() - site.W.double())
    assert torch.equal(delta.on(site.W), other)
    edit = dataclasses.replace(made(model), deltas=(delta,))
    laws.comes_off_bit_for_bit(edit, model)
    with laws.untouched(model), made(model, seed=4).applied(model), edit.applied(model), made(model, 2).applied(model):
        assert not torch.equal(site.W, other)
    edit.apply_(model)
    more = made(model, seed=4)
    more.apply_(model)
    edit.undo_(model)
    assert torch.equal(site.W, more.deltas[0].on(before))
    more.undo_(model)


def test_of_a_fact_that_nothing_is_wanted_of_nothing_is_missing(model):
    site = down_proj(model, 1)
    keys = torch.eye(64, dtype=torch.float64)[:2]
    residuals = torch.stack([torch.ones(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)])
    update = LayerUpdate(fe.editing.Delta(1, keys[:1].T, residuals[:1] / 2), keys, residuals)
    found = diagnose(site, update, off_target=[0.5, 0.0])
    assert found.unmet == pytest.approx((0.5, 0.0))
    assert found.off_target == (0.5, 0.0)


def test_files_from_before_there_was_a_spill_are_read(model, tmp_path):
    edit, file = made(model), tmp_path / "edit.safetensors"
    edit.save(file)
    header, tensors = files.read(file, "edit")
    for diagnostics in header["diagnostics"]:
        del diagnostics["off_target"], diagnostics["unmet"], diagnostics["key_cosines"], diagnostics["weight"]
        diagnostics["key_cosine"] = 0.5
    files.write(file, "edit", header, tensors)
    loaded = fe.Edit.load(file)
    laws.same_edits(loaded, edit)
    assert loaded.diagnostics[0].off_target == ()


def test_the_table_has_a_row_a_layer_and_the_worst_fact(model):
    edit = two_layers(model)
    worse = dataclasses.replace(edit.diagnostics[0], off_target=(0.1, 0.4), unmet=(0.3, 0.2))
    table = dataclasses.replace(edit, diagnostics=(worse, edit.diagnostics[1])).table()
    assert list(table.layer) == [1, 2]
    assert table.relative_norm[0] == pytest.approx(edit.diagnostics[0].relative_norm)
    assert (table.off_target[0], table.unmet[0]) == (0.4, 0.3)
    assert math.isnan(table.off_target[1]) and math.isnan(table.unmet[1])


def test_a_notebook_shows_the_table_and_the_concerns_and_nothing_else_as_html(model):
    edit = made(model, fact=laws.FACT.but(subject="<script>", id="<b>"))
    shown = edit._repr_html_()
    assert "<table" in shown and "&lt;script&gt;" in shown and "<script>" not in shown
    assert "<ul>" not in shown
    large = edit.scaled(1e4)
    assert "<ul><li>the update of layer 1 is" in large._repr_html_()
    assert "<b>" not in large._repr_html_()


# ---------------------------------------------------------------------------------------- concerns


CONCERNS = {
    "hardly sees its key": {"division_factor": -0.02},
    "rounding to the weights' type loses 30%": {"exactness": 0.3},
    "another token of a prompt gets 9 times": {"off_target": (0.0, 9.0)},
    "60% of what the facts need is not met in the last layer, 2": {"unmet": (0.5, 0.7)},
}


@pytest.mark.parametrize("concern", CONCERNS)
def test_what_may_disable_a_model_or_miss_a_fact_is_said_once_with_what_to_do(model, concern):
    edit = two_layers(model)
    last = dataclasses.replace(edit.diagnostics[1], **CONCERNS[concern])
    bad = dataclasses.replace(edit, diagnostics=(edit.diagnostics[0], last))
    assert edit.concerns == ()
    (said,) = bad.concerns
    assert concern in said
    with pytest.warns(fe.EditWarning, match="the edit of 'The Eiffel Tower': .*" + concern):
        bad.apply_(model)
    bad.undo_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bad.applied(model), made(model, 1, fact=laws.OTHER, seed=7).applied(model):
            pass
    with pytest.warns(fe.EditWarning), dataclasses.replace(bad).applied(model):  # another object
        pass


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("bfloat16", "load the model in float32"), ("float32", "whether anything had to be written")]
)
def test_what_is_so_already_is_no_remedy_for_what_rounding_loses(model, dtype, remedy):
    edit = two_layers(model)
    lost = dataclasses.replace(edit.diagnostics[1], exactness=0.3)
    provenance = dataclasses.replace(edit.provenance, dtype=dtype)
    (said,) = dataclasses.replace(edit, diagnostics=(edit.diagnostics[0], lost), provenance=provenance).concerns
    assert said.endswith(remedy if dtype == "bfloat16" else f"{remedy} (see fits)")


def test_bounds_are_not_crossed_by_less(model):
    edit = two_layers(model)
    fine = {"division_factor": 0.06, "exactness": 0.09, "off_target": (0.9,), "unmet": (0.9, 0.0)}
    last = dataclasses.replace(edit.diagnostics[1], **fine)
    first = dataclasses.replace(edit.diagnostics[0], unmet=(0.9, 0.9))  # which the last layer takes up
    assert dataclasses.replace(edit, diagnostics=(first, last)).concerns == ()


def test_the_size_that_counts_is_that_of_the_change_itself(model):
    edit = made(model)
    once = edit.diagnostics[0].relative_norm
    (unmeasured,) = edit.scaled(1.4 / once).concerns
    assert "was not measured of it" in unmeasured
    said, _ = edit.scaled(1.6 / once).concerns
    assert "the update of layer 1 is 160% of ‖W‖" in said
    assert edit.scaled(-1.6 / once).concerns == (said, unmeasured)
    half = edit.scaled(0.8 / once)
    assert half.concerns == (unmeasured,)

    def another(alpha: float) -> fe.Edit:
        return dataclasses.replace(edit.scaled(alpha), editor=edit.editor)

    together, _ = fe.compose([half, another(0.801 / once)]).concerns
    assert "160%" in together
    opposite = fe.compose([edit.scaled(9 / once), another(-9 / once)])
    assert opposite.concerns == (unmeasured.replace("scaled", "composed"),)


def test_where_warnings_are_errors_nothing_is_written(model):
    edit = made(model).scaled(1e4)
    before = laws.state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(fe.EditWarning):
                edit.apply_(model)
            laws.assert_same(before, laws.state(model))


def test_a_file_whose_fits_or_diagnostics_do_not_fit_is_refused(model, tmp_path):
    edit, path = made(model), tmp_path / "edit"
    dataclasses.replace(edit, fits=(*edit.fits, {}, {})).save(path)
    with pytest.raises(ValueError, match=r"edit doesn't hold a valid edit \(fits are .*needed one for each"):
        fe.Edit.load(path)
    dataclasses.replace(edit, diagnostics=tuple(dataclasses.replace(d, layer=17) for d in edit.diagnostics)).save(path)
    with pytest.raises(ValueError, match="diagnostics are of layer 17"):
        fe.Edit.load(path)
