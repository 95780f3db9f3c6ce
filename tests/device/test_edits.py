"""An edit made where the model was is applied, undone, saved, loaded and exported where it is now."""

import laws
import pytest
import second_device
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.bridge import BridgeBackend
from tl_factedit.backend.fingerprint import fingerprint
from tl_factedit.backend.protocol import device, told_where_it_is
from tl_factedit.backend.weights import down_proj

second_device.install_or_skip()

LAYERS = (1, 2)
FACTS = [laws.FACT, laws.OTHER]
QUICK = {"fit": fe.ValueFit(steps=3), "contexts": ("", "What is it ? "), "progress": False}
PLACES = ("cpu", "fakegpu:0", "fakegpu:1")
KINDS = pytest.mark.parametrize("kind", tiny.KINDS)
ARCHS = pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])


def model_on(where, kind, arch="gpt2", **options):
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    return second_device.move_(tiny.model(kind, arch, **options), where)


def made(model):
    """An edit of each editor."""
    stats = fe.key_stats(model, list(LAYERS), laws.texts(60), n_tokens=700, progress=False)
    return {
        "rome": fe.Rome(stats[1], ridge=1e-2, **QUICK)(model, FACTS[:1]),
        "memit": fe.Memit(stats, weight=10.0, **QUICK)(model, FACTS),
        "emmet": fe.Emmet(stats, ridge=1e-2, **QUICK)(model, FACTS),
        "alphaedit": fe.AlphaEdit(stats, share=0.5, **QUICK)(model, FACTS),
        "pmet": fe.Pmet(stats, weight=10.0, **QUICK)(model, FACTS),
        "finetune": fe.FineTune(1, steps=2, progress=False)(model, FACTS),
        "router": fe.Router(1, fit=QUICK["fit"], contexts=("",), progress=False)(model, FACTS[:1]),
    }


def split(kind, arch="gpt2"):
    """A model over two devices: block 0 on the first; of a HookedTransformer blocks 0 and 1."""
    if kind == "hooked":
        if arch not in tiny.HOOKED:
            pytest.skip("no HookedTransformer of this architecture")
        return second_device.split_hooked_(tiny.model(kind, arch))
    model = tiny.around(second_device.split_hf(tiny.hf_model(arch), below=2))
    model.cfg.n_devices = 2
    return model


def devices_of(model):
    return {str(param.device) for param in model.parameters()}


def bits(model):
    return [param.detach().cpu().clone() for param in model.parameters()]


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@KINDS
@ARCHS
@pytest.mark.parametrize(("here", "there"), [("cpu", "fakegpu:1"), ("fakegpu:0", "cpu")])
def test_an_edit_made_on_one_device_does_on_another_what_it_does_there(here, there, kind, arch, tmp_path):
    one, other = model_on(here, kind, arch), model_on(there, kind, arch)
    before = bits(other)
    assert fingerprint(one) == fingerprint(other)
    for name, edit in made(one).items():
        edit.save(tmp_path / name)
        again = type(edit).load(tmp_path / name)
        with second_device.watch() as seen, again.applied(other):
            found = laws.logits(other)
        with edit.applied(one):
            want = laws.logits(one)
        assert seen.refused == [], name
        assert torch.allclose(found, want, atol=1e-5), name
        assert not torch.allclose(found, laws.logits(other), atol=1e-4), name
        assert same_bits(bits(other), before), name


@KINDS
@pytest.mark.parametrize(("here", "there"), [("cpu", "fakegpu:1"), ("fakegpu:0", "cpu"), ("fakegpu:0", "fakegpu:1")])
def test_a_model_that_moves_with_its_edits_on_it_keeps_them_and_can_be_rid_of_them(here, there, kind):
    model = model_on(here, kind)
    before = bits(model)
    edits = made(model)
    first, second = edits["memit"], edits["emmet"]
    first.apply_(model)
    second.apply_(model)
    second_device.move_(model, there)
    assert [edit.digest for edit in fe.edits_on(model)] == [first.digest, second.digest]
    first.undo_(model)  # the one below: the other is written anew
    assert [edit.digest for edit in fe.edits_on(model)] == [second.digest]
    alone = model_on(there, kind)
    second.apply_(alone)
    assert same_bits(bits(model), bits(alone))
    second_device.move_(model, here)
    fe.undo_all_(model)
    assert same_bits(bits(model), before)


@KINDS
def test_weights_from_before_the_edits_that_are_loaded_elsewhere_take_them_off(kind):
    model = model_on("cpu", kind)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    made(model)["memit"].apply_(model)
    second_device.move_(model, "fakegpu:0")
    assert len(fe.edits_on(model)) == 1
    model.load_state_dict(state)
    assert fe.edits_on(model) == ()


@pytest.mark.parametrize(("here", "there"), [("cpu", "fakegpu:1"), ("fakegpu:0", "cpu")])
def test_an_edit_is_exported_to_a_model_elsewhere(here, there, tmp_path):
    model = model_on(here, "bridge")
    edit = made(model)["memit"]
    hf = second_device.move_(tiny.hf_model("gpt2"), there)
    copied = fe.export_hf(edit, hf)
    fe.export_hf_(edit, hf)
    with edit.applied(model):
        want = model.original_model(torch.tensor([[1, 2, 3]], device=device(model))).logits.cpu()
        fe.save_hf(model, tmp_path / "saved")
    saved = type(hf).from_pretrained(tmp_path / "saved").eval()
    for changed in (hf, copied, saved):
        ids = torch.tensor([[1, 2, 3]], device=next(changed.parameters()).device)
        assert torch.allclose(changed(ids).logits.cpu(), want, atol=1e-5)
    assert str(next(copied.parameters()).device) == there


@KINDS
@ARCHS
def test_edits_of_layers_on_two_devices(kind, arch):
    one, other = model_on("cpu", kind, arch), split(kind, arch)
    assert devices_of(other) == {"fakegpu:0", "fakegpu:1"}
    before = bits(other)
    assert {str(down_proj(other, layer).W.device) for layer in LAYERS} == {"fakegpu:0", "fakegpu:1"}
    with second_device.watch() as seen:
        found, want = made(other), made(one)
        for layers in (LAYERS, LAYERS[::-1]):
            name = f"finetune {layers}"
            found[name], want[name] = (fe.FineTune(layers, steps=2, progress=False)(m, FACTS) for m in (other, one))
        neurons = fe.KnowledgeNeurons(steps=3, layers=LAYERS, share=0.0, progress=False)
        found["neurons"], want["neurons"] = neurons(other, FACTS[:1]), neurons(one, FACTS[:1])
        for name, edit in found.items():
            with edit.applied(other), want[name].applied(one):
                assert torch.allclose(laws.logits(other), laws.logits(one), atol=1e-5), name
            assert same_bits(bits(other), before), name
    assert seen.refused == []


@KINDS
def test_a_model_over_two_devices_is_run_packed(kind):
    want = fe.causal_trace(model_on("cpu", kind), FACTS, progress=False)
    found = fe.causal_trace(split(kind), FACTS, progress=False)
    assert found.unpacked == want.unpacked == ""
    assert torch.allclose(found.effect, want.effect, atol=1e-5, equal_nan=True)


def mixed_up(tokens):
    return tokens + torch.zeros(tokens.shape, dtype=torch.long)  # on the CPU


def full(tokens):
    raise torch.OutOfMemoryError("out of memory")


def broken(tokens):
    raise torch.AcceleratorError("device-side assert triggered")


def too_wide(tokens):
    return tokens @ tokens


@pytest.mark.parametrize("planted", [mixed_up, full, *([broken] if hasattr(torch, "AcceleratorError") else [])])
def test_an_error_of_the_device_in_the_packed_path_comes_out(planted, monkeypatch):
    model = model_on("fakegpu:0", "bridge")
    monkeypatch.setattr(BridgeBackend, "packed", lambda self, tokens, *rest: planted(tokens))
    with pytest.raises(RuntimeError):
        fe.causal_trace(model, laws.FACT, progress=False)
    with pytest.raises(RuntimeError):
        fe.editing.fit_values(model, FACTS, 1, ("",), fit=fe.ValueFit(steps=2), prepend_bos=True, progress=False)


def test_an_error_of_shapes_in_the_packed_path_is_said_and_makes_it_slow(monkeypatch):
    model = model_on("fakegpu:0", "bridge")
    want = fe.causal_trace(model, laws.FACT, progress=False)
    monkeypatch.setattr(BridgeBackend, "packed", lambda self, tokens, *rest: too_wide(tokens.float()))
    found = fe.causal_trace(model, laws.FACT, progress=False)
    assert want.unpacked == "" and "shapes cannot be multiplied" in found.unpacked
    assert torch.allclose(found.effect, want.effect, atol=1e-5, equal_nan=True)


# ------------------------------------------------------------------------------------ what was begun elsewhere


def test_where_the_weights_were_is_said_and_makes_no_difference(tmp_path):
    here, there, both = model_on("cpu", "bridge"), model_on("fakegpu:1", "bridge"), split("bridge")
    both.cfg.model_name = here.cfg.model_name
    one, other, third = (fe.editing.Provenance.of(model) for model in (here, there, both))
    assert (one.devices, other.devices, third.devices) == (("cpu",), ("fakegpu:1",), ("fakegpu:0", "fakegpu:1"))
    assert one == other == third and one.origin() == other.origin() and one.to_json() != other.to_json()
    assert fe.editing.Provenance.from_json(other.to_json()).devices == ("fakegpu:1",)
    edit = made(there)["memit"]
    edit.save(tmp_path / "edit")
    assert fe.Edit.load(tmp_path / "edit").provenance.devices == ("fakegpu:1",)
    page = fe.show.report(tmp_path / "report.html", fe.causal_trace(there, laws.FACT, progress=False)).read_text()
    assert "float32 on fakegpu:1" in page


def test_what_was_begun_on_one_device_is_resumed_on_another(tmp_path):
    here, there = model_on("cpu", "bridge"), model_on("fakegpu:1", "bridge")
    edit, probe = made(here)["memit"], fe.LogitLens()
    calls = {
        "trace": lambda model: fe.causal_trace(model, FACTS, folder=tmp_path / "trace", progress=False).effect,
        "stats": lambda model: (
            fe.key_stats(model, [1], laws.texts(20), n_tokens=100, path=tmp_path / "stats", progress=False)[1].moment
        ),
        "compare": lambda model: (
            fe.compare(probe, model, edit, FACTS, folder=tmp_path / "compare", progress=False).after.values
        ),
    }
    for name, call in calls.items():
        want = call(here)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert before
        assert torch.allclose(call(there).cpu(), want, rtol=0.0, atol=0.0, equal_nan=True), name
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}, name


# ------------------------------------------------------------------------------------ where a model is


@KINDS
@pytest.mark.parametrize("where", PLACES)
def test_the_device_is_that_of_the_weights_whatever_the_configuration_says(kind, where):
    model = model_on(where, kind)
    model.cfg.device = "cuda:7"
    assert str(device(model)) == where
    with told_where_it_is(model):
        assert model.cfg.device == where
    assert model.cfg.device == "cuda:7"
    if kind == "bridge":  # a HookedTransformer goes by its configuration itself
        assert fe.causal_trace(model, laws.FACT, progress=False).unpacked == ""
