"""An edited model written as a folder says in transformers what it says here."""

import copy
import errno
import os
import tempfile
from pathlib import Path

import laws
import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_factedit as fe
from tl_factedit.backend.weights import down_proj

IDS = torch.tensor([[0, 5, 6, 9, 12, 30, 8]])


def log_probs(model_or_hf) -> torch.Tensor:
    with torch.no_grad():
        out = model_or_hf(IDS)
    return (out if torch.is_tensor(out) else out.logits).log_softmax(-1)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def options(kind: str, arch: str, **sizes) -> dict:
    return {} if kind == "bridge" else {"hf_model": tiny.hf_model(arch, **sizes)}


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_the_folder_has_the_log_probabilities_of_the_edited_model(kind, arch, tmp_path):
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    model = tiny.model(kind, arch)
    clean = log_probs(model)
    edit = laws.rome(model, ridge=1e-2)(model, [laws.FACT])
    given = options(kind, arch)
    with edit.applied(model):
        want = log_probs(model)
        with laws.untouched(model):
            fe.save_hf(model, tmp_path / "edited", **given)
    assert (log_probs(loaded(tmp_path / "edited")) - want).abs().max() < 1e-4
    assert (want - clean).abs().max() > 1e-3, "the edit changes nothing here"
    if given:
        assert (log_probs(given["hf_model"]) - clean).abs().max() < 1e-4, "the given model was changed"


@pytest.mark.parametrize("tok", ["bytebpe", "spm"])
def test_the_tokenizer_is_there_too(kind, tok, tmp_path):
    tokenizer = tiny.tokenizer(tok)
    model = tiny.model(kind, "llama", tok=tokenizer)
    fe.save_hf(model, tmp_path / "model", **options(kind, "llama", tok=tokenizer))
    back = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("The Eiffel Tower is in Paris.", " Où est l'été ?", "東京"):
        assert back(text)["input_ids"] == model.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_keep_their_type_and_their_bits(kind, dtype, tied, tmp_path):
    sizes = {"dtype": dtype, "tied": tied}
    model = tiny.model(kind, "llama", **sizes)
    edit = laws.rome(model, ridge=1e-2)(model, [laws.FACT])
    with edit.applied(model):
        fe.save_hf(model, tmp_path / "model", **options(kind, "llama", **sizes))
        wanted = [down_proj(model, layer).W.clone() for layer in range(4)]
    back = loaded(tmp_path / "model")
    assert back.dtype == dtype
    assert (back.lm_head.weight is back.model.embed_tokens.weight) is tied
    for block, weight in zip(back.model.layers, wanted, strict=True):
        assert torch.equal(block.mlp.down_proj.weight.T, weight)


def test_edits_on_one_another_are_written_as_they_are_applied(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    editor = laws.rome(model, ridge=1e-2)
    for fact in (laws.FACT, laws.OTHER):
        editor(model, [fact]).apply_(model)
    fe.save_hf(model, tmp_path / "both", **options(kind, "gpt2"))
    written = loaded(tmp_path / "both").transformer.h[1].mlp.c_proj.weight
    assert torch.equal(written, down_proj(model, 1).W)


def test_a_bridge_that_was_changed_in_another_way_is_written_as_it_is(tmp_path):
    model = tiny.bridge("llama")
    with torch.no_grad():
        model.blocks[0].attn.q.weight.mul_(1.5)
        down_proj(model, 2).param.add_(0.1)
    fe.save_hf(model, tmp_path / "tuned")
    assert (log_probs(loaded(tmp_path / "tuned")) - log_probs(model)).abs().max() < 1e-4


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_processed_hooked_model_is_written_into_raw_weights(tmp_path):
    model = tiny.hooked("gpt2", processed=True)
    edit = laws.rome(model, ridge=1e-2)(model, [laws.FACT])
    with edit.applied(model):
        fe.save_hf(model, tmp_path / "edited", hf_model=tiny.hf_model("gpt2"))
        assert (log_probs(loaded(tmp_path / "edited")) - log_probs(model)).abs().max() < 1e-4


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_hooked_model_that_was_changed_by_more_than_edits_is_refused(tmp_path):
    model, hf = tiny.hooked("gpt2"), tiny.hf_model("gpt2")
    with pytest.raises(ValueError, match=r"converted copies of the weights.*hf_model="):
        fe.save_hf(model, tmp_path / "model")
    with torch.no_grad():
        model.blocks[0].attn.W_Q.mul_(1.5)
    with pytest.raises(ValueError, match="changed by more than the edits"):
        fe.save_hf(model, tmp_path / "model", hf_model=hf)
    assert list(tmp_path.iterdir()) == []


def test_a_bridge_whose_parts_disagree_is_refused(tmp_path):
    """A joint projection that was split: what is run isn't what stands under the model's own name."""
    model = tiny.bridge("gpt2")
    with torch.no_grad():
        model.blocks[0].attn.q.weight.mul_(1.5)
    try:
        fe.save_hf(model, tmp_path / "model")
    except ValueError as error:
        assert "answers otherwise" in str(error)
        assert list(tmp_path.iterdir()) == []
    else:  # where TransformerLens splits it by views
        assert (log_probs(loaded(tmp_path / "model")) - log_probs(model)).abs().max() < 1e-4


def test_what_can_not_be_written_is_refused_before_anything_is(kind, tmp_path, monkeypatch):
    model, given = tiny.model(kind, "gpt2"), options(kind, "gpt2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    with laws.no_forward(monkeypatch, model):
        for folder, why in (
            (tmp_path / "full", "holds files already, needed a new or empty folder"),
            (tmp_path / "full" / "config.json", "is a file, needed a folder"),
        ):
            with pytest.raises(ValueError, match=why):
                fe.save_hf(model, folder, **given)
    if kind == "bridge":
        with pytest.raises(ValueError, match="hf_model is for a HookedTransformer"):
            fe.save_hf(model, tmp_path / "new", hf_model=tiny.hf_model("gpt2"))
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value * 2)
    with pytest.raises(ValueError, match=r"hooks are on .* at .*blocks.0"):
        fe.save_hf(model, tmp_path / "new", **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


FULL = OSError(errno.ENOSPC, "No space left on device")
OF_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
DENIED = PermissionError(errno.EACCES, "Permission denied", "elsewhere")


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("weights", FULL),
        ("weights", OF_SAFETENSORS),
        ("tokenizer", FULL),
        ("reading back", OF_SAFETENSORS),
        ("draft", DENIED),
        ("move", DENIED),
    ],
)
def test_a_disk_that_is_full_or_denied_is_named_and_nothing_is_left(kind, where, error, there, tmp_path, monkeypatch):
    model, given, folder = tiny.model(kind, "gpt2"), options(kind, "gpt2"), tmp_path / "model"
    if there:
        folder.mkdir()

    def half(self, draft, *args, **kwargs):
        (Path(draft) / "config.json").write_text("{}")
        raise error

    def fail(*args, **kwargs):
        raise error

    target, how = {
        "weights": ((transformers.PreTrainedModel, "save_pretrained"), half),
        "tokenizer": ((transformers.PreTrainedTokenizerBase, "save_pretrained"), half),
        "reading back": ((transformers.AutoModelForCausalLM, "from_pretrained"), fail),
        "draft": ((tempfile, "mkdtemp"), fail),
        "move": ((Path, "replace"), fail),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, how)
        with laws.untouched(model), pytest.raises(OSError, match=r"it can't be written .*; nothing is left") as found:
            fe.save_hf(model, folder, **given)
    assert found.value.filename == str(folder)
    assert found.value.errno == (errno.EACCES if error is DENIED else errno.ENOSPC)
    assert [path.name for path in tmp_path.rglob("*")] == (["model"] if there else [])
    fe.save_hf(model, folder, **given)
    assert (folder / "model.safetensors").exists()


def test_a_bridge_in_compatibility_mode_is_refused(tmp_path):
    model = tiny.bridge("gpt2")
    model.enable_compatibility_mode()
    with pytest.raises(fe.UnsupportedModelError, match="compatibility mode"):
        fe.save_hf(model, tmp_path / "model")


def test_an_empty_folder_is_taken_and_its_mode_is_the_umasks(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    (tmp_path / "model").mkdir()
    old = os.umask(0o022)
    try:
        fe.save_hf(model, tmp_path / "model", **options(kind, "gpt2"))
    finally:
        os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_exported_and_one_that_is_saved_are_the_same(kind, tmp_path):
    model, hf = tiny.model(kind, "llama"), tiny.hf_model("llama")
    edit = laws.rome(model, ridge=1e-2)(model, [laws.FACT])
    with edit.applied(model):
        fe.save_hf(model, tmp_path / "saved", **options(kind, "llama"))
    fe.export_hf(edit, hf).save_pretrained(tmp_path / "exported")
    one, other = (loaded(tmp_path / name).state_dict() for name in ("saved", "exported"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_copy_of_an_edited_bridge_is_saved_with_its_edit(tmp_path):
    model = tiny.bridge("gpt2")
    edit = laws.rome(model, ridge=1e-2)(model, [laws.FACT])
    with edit.applied(model):
        fe.save_hf(copy.deepcopy(model), tmp_path / "model")
        assert (log_probs(loaded(tmp_path / "model")) - log_probs(model)).abs().max() < 1e-4
