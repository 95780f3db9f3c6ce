"""Second moments of keys: a literal sum over tokens, kept in files that can't be mistaken for another collection."""

import copy
import random

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.model import Runner, down_proj

TEXTS = ["The Eiffel Tower is in Paris", "Rome", *laws.texts(3, seed=1, words=12), "  ", "John speaks French . " * 3]
SPOKEN = [text for text in TEXTS if text.strip()]
# The keys are float32 and padding changes the order of float32 sums; everything after is float64.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def collect(model, layers=1, texts=TEXTS, **options):
    return fe.key_stats(model, layers, texts, progress=False, **options)


@pytest.fixture(
    params=[(kind, arch) for arch in ("gpt2", "llama") for kind in tiny.KINDS], ids="-".join, scope="module"
)
def model(request):
    """Shared, as nothing here may change it."""
    return tiny.model(*request.param)


@pytest.fixture
def forbidden(monkeypatch):
    """From when it is called on, a forward pass fails."""

    def forbid():
        def fail(*_, **__):
            raise AssertionError("a forward pass was run")

        for method in ("logits", "capture"):
            monkeypatch.setattr(Runner, method, fail)

    return forbid


# ---------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize(("n_tokens", "context"), [(10_000, 256), (10_000, 7), (31, 7), (5, 256)])
def test_it_equals_a_literal_sum_over_tokens(kind, arch, bos, n_tokens, context):
    # In float64 throughout, so that the order of sums is the only difference.
    model = tiny.model(kind, arch, dtype=torch.float64)
    asked = {"n_tokens": n_tokens, "context": context}
    found = collect(model, [0, 2], prepend_bos=bos, **asked)
    expected, count = editing.second_moments(model, [0, 2], SPOKEN, bos=bos, **asked)
    for layer in (0, 2):
        assert found[layer].n_tokens == count
        torch.testing.assert_close(found[layer].moment, expected[layer], rtol=1e-9, atol=1e-12)
        assert torch.equal(found[layer].moment, found[layer].moment.T)
    assert not torch.allclose(found[0].moment, found[2].moment, rtol=1e-2)
    assert found[0].n_tokens == n_tokens or n_tokens == 10_000


def test_float32_models_are_summed_in_float64(model):
    found = collect(model)[1]
    expected, _ = editing.second_moments(model, [1], SPOKEN, n_tokens=10**6, context=256, bos=True)
    assert found.moment.dtype == torch.float64
    torch.testing.assert_close(found.moment, expected[1], **FLOAT32)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_the_size_of_a_batch_is_irrelevant(kind, arch, batch_tokens):
    model = tiny.model(kind, arch, dtype=torch.float64)
    torch.testing.assert_close(
        collect(model, batch_tokens=batch_tokens)[1].moment, collect(model)[1].moment, rtol=1e-10, atol=1e-12
    )


def test_bos_counts_and_changes_the_moment(model):
    with_bos, without = (collect(model, prepend_bos=bos)[1] for bos in (True, False))
    assert with_bos.n_tokens == without.n_tokens + len(SPOKEN)
    assert not torch.allclose(with_bos.moment, without.moment, rtol=1e-2)
    assert with_bos.provenance.prepend_bos and not without.provenance.prepend_bos


def test_no_more_text_is_read_than_is_needed(model):
    read = []

    def endless():
        while True:
            read.append(1)
            yield "The Eiffel Tower is in Paris"

    assert collect(model, texts=endless(), n_tokens=20)[1].n_tokens == 20
    assert len(read) == 3  # seven tokens each, with BOS


@pytest.mark.parametrize("layers", [2, [2], (2, 2)], ids=repr)
def test_one_layer_or_several(model, layers):
    assert list(collect(model, layers)) == [2]


@pytest.mark.parametrize("mode", ["plain", "inference", "no_grad", "training"])
def test_it_works_in_every_mode_and_leaves_everything_as_it_was(model, mode):
    expected = collect(model)[1].moment
    context = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    model.train(mode == "training")
    try:
        with laws.untouched(model), context():
            found = collect(model)[1].moment
    finally:
        model.eval()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "layers is empty"),
        ({"layers": [4]}, "layer 4 is outside the model"),
        ({"layers": [-1]}, "layer -1 is outside the model"),
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"context": 1}, "context is 1, needed at least 2"),
        ({"texts": "Paris"}, r"one string.*write \[text\]"),
        ({"texts": []}, "hold no tokens"),
        ({"texts": [" ", "\n"]}, "hold no tokens"),
    ],
)
def test_bad_questions_are_refused(model, options, message):
    with laws.untouched(model), pytest.raises(ValueError, match=message):
        collect(model, **{"layers": 1, **options})


def test_a_model_that_overflows_is_noticed(kind):
    model = tiny.model(kind, "gpt2")
    down_proj(model, 0).param.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="not finite"):
        collect(model)


# ---------------------------------------------------------------------------------------- identity, merging


def test_the_identity_fits_any_weights_of_its_size(model):
    plain = fe.KeyStats.identity(model, 1)
    assert torch.equal(plain.moment, torch.eye(64, dtype=torch.float64))
    assert (plain.n_tokens, plain.provenance) == (0, None)
    assert "any model" in repr(plain)
    with pytest.raises(ValueError, match="layer 9 is outside"):
        fe.KeyStats.identity(model, 9)


def test_two_collections_merge_into_the_joint_one(kind):
    model = tiny.model(kind, "gpt2", dtype=torch.float64)
    first, second, both = (collect(model, texts=part)[1] for part in (SPOKEN[:3], SPOKEN[3:], SPOKEN))
    merged = first + second
    assert merged.n_tokens == both.n_tokens
    torch.testing.assert_close(merged.moment, both.moment, rtol=1e-10, atol=1e-12)
    assert merged.corpus not in (first.corpus, second.corpus)


def test_what_does_not_belong_together_does_not_merge(model, kind):
    one = collect(model)[1]
    with pytest.raises(ValueError, match=r"layer 1 .* and 2"):
        one + collect(model, 2)[2]
    with pytest.raises(ValueError, match="two collections"):
        one + fe.KeyStats.identity(model, 1)
    with pytest.raises(ValueError, match="weights or BOS"):
        one + collect(model, prepend_bos=False)[1]
    with pytest.raises(ValueError, match="weights or BOS"):
        one + collect(tiny.model(kind, "gpt2", seed=7))[1]


# ---------------------------------------------------------------------------------------- files


def test_a_saved_file_comes_back_bit_for_bit(model, tmp_path):
    saved = collect(model)[1]
    saved.save(tmp_path / "new" / "layer.safetensors")
    loaded = fe.KeyStats.load(tmp_path / "new" / "layer.safetensors")
    assert torch.equal(loaded.moment, saved.moment)
    assert loaded.moment.dtype == torch.float64
    for field in ("layer", "n_tokens", "corpus", "provenance"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["layer.safetensors"]


def test_the_identity_survives_a_file_too(model, tmp_path):
    fe.KeyStats.identity(model, 1).save(tmp_path / "plain.safetensors")
    assert fe.KeyStats.load(tmp_path / "plain.safetensors").provenance is None


@pytest.mark.parametrize("place", ["all.safetensors", "folder", "folder-1.5B"])
def test_a_second_call_reads_what_the_first_has_written_without_running_the_model(model, tmp_path, forbidden, place):
    path = tmp_path / place
    first = collect(model, [1, 2], path=path)
    files = {file.name for file in tmp_path.rglob("*.safetensors")}
    assert files == ({place} if place.endswith("s") else {"layer_1.safetensors", "layer_2.safetensors"})
    forbidden()
    again = collect(model, [1, 2], path=path, texts=iter(TEXTS))
    assert all(torch.equal(again[layer].moment, first[layer].moment) for layer in (1, 2))
    assert list(collect(model, 2, path=path)) == [2]
    with pytest.raises(AssertionError, match="a forward pass was run"):
        collect(model, [1, 2])


def test_a_folder_with_some_of_the_layers_gets_the_others(model, tmp_path):
    collect(model, 1, path=tmp_path / "folder")
    kept = (tmp_path / "folder" / "layer_1.safetensors").read_bytes()
    found = collect(model, [0, 1], texts=iter(TEXTS), path=tmp_path / "folder")
    assert (tmp_path / "folder" / "layer_1.safetensors").read_bytes() == kept
    expected = collect(model, [0, 1])
    assert list(found) == [0, 1]
    for layer in (0, 1):
        torch.testing.assert_close(found[layer].moment, expected[layer].moment, rtol=1e-10, atol=1e-12)
        assert found[layer].corpus == expected[layer].corpus


def test_a_file_cannot_be_given_another_layer_afterwards(model, tmp_path):
    collect(model, 1, path=tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"one\.safetensors holds layers \[1\], not \[2\]"):
        collect(model, [1, 2], path=tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="holds layers"):
        collect(model, [1, 2], path=tmp_path / "two.safetensors")
        fe.KeyStats.load(tmp_path / "two.safetensors")


def other_weights(model):
    other = copy.deepcopy(model)
    down_proj(other, 3).param.data[0, 0] += 1
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 10}, "collected with .*'n_asked': 20.*asked for .*'n_asked': 10"),
        ({"context": 100}, "'context'"),
        ({"texts": TEXTS[1:]}, "other texts"),
        ({"texts": []}, "other texts"),
        ({"prepend_bos": False}, "prepend_bos=True"),
        ({"model": other_weights}, "other weights"),
    ],
    ids=["n_tokens", "context", "texts", "no texts", "bos", "weights"],
)
@pytest.mark.parametrize("layers", [1, [1, 2]], ids=["whole", "part"])
def test_files_of_another_collection_are_refused_and_left_as_they_are(
    model, tmp_path, forbidden, change, message, layers
):
    collect(model, 1, n_tokens=20, path=tmp_path)
    file = tmp_path / "layer_1.safetensors"
    kept = file.read_bytes()
    change = {"n_tokens": 20, "prepend_bos": True, **change}
    asked = change.pop("model", lambda same: same)(model)
    forbidden()
    with pytest.raises(ValueError, match=message) as error:
        collect(asked, layers, path=tmp_path, **change)
    assert str(file) in str(error.value)
    assert file.read_bytes() == kept
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_corpus_that_goes_on_is_another_if_the_first_ended_too_soon(model, tmp_path):
    collect(model, texts=TEXTS[:4], n_tokens=500, path=tmp_path)
    with pytest.raises(ValueError, match="other texts"):
        collect(model, texts=TEXTS, n_tokens=500, path=tmp_path)
    collect(model, texts=TEXTS[:4], n_tokens=10, path=tmp_path / "short")
    assert collect(model, texts=TEXTS, n_tokens=10, path=tmp_path / "short")[1].n_tokens == 10


def test_a_collection_of_an_edited_model_is_of_other_weights(model, tmp_path):
    edit = laws.rome(model)(model, [laws.FACT])
    with edit.applied(model):
        edited = collect(model, n_tokens=1_000, path=tmp_path / "edited")[1]
    with pytest.raises(ValueError, match="other weights"):
        collect(model, n_tokens=1_000, path=tmp_path / "edited")
    assert edited.provenance.weights != edit.provenance.weights


# ---------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small file of statistics."""
    model = tiny.bridge("gpt2", d_model=8, d_mlp=4, n_heads=2, n_layers=1)
    file = tmp_path_factory.mktemp("stats") / "layer_0.safetensors"
    collect(model, 0, path=file)
    return model, file.read_bytes()


def refused(model, file, data):
    file.write_bytes(data)
    for read in (lambda: fe.KeyStats.load(file), lambda: collect(model, 0, path=file)):
        with pytest.raises(ValueError) as error:
            read()
        assert str(file) in str(error.value)
    assert file.read_bytes() == data
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused_by_name_and_left_as_it_is(saved, tmp_path, share):
    model, data = saved
    refused(model, tmp_path / "layer_0.safetensors", data[: int(share * len(data))])


@pytest.mark.parametrize("start", range(16))
def test_a_changed_byte_anywhere_is_noticed(saved, tmp_path, start):
    model, data = saved
    file = tmp_path / "layer_0.safetensors"
    for place in random.Random(start).sample(range(start * len(data) // 16, (start + 1) * len(data) // 16), 12):
        changed = bytearray(data)
        changed[place] ^= 1
        refused(model, file, bytes(changed))


@pytest.mark.parametrize("name", [b"header", b"sha256", b"format", b"what"])
def test_a_renamed_field_of_the_header_is_noticed(saved, tmp_path, name):
    model, data = saved
    refused(model, tmp_path / "layer_0.safetensors", data.replace(b'"' + name + b'"', b'"' + name[::-1] + b'"', 1))


def test_a_file_of_another_kind_is_refused_and_a_missing_one_is_no_value_error(model, tmp_path):
    laws.rome(model)(model, [laws.FACT]).save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="holds 'edit', needed 'key statistics'"):
        fe.KeyStats.load(tmp_path / "edit.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        fe.KeyStats.load(tmp_path / "none.safetensors")


def test_a_write_that_is_interrupted_leaves_the_old_file(model, tmp_path, monkeypatch):
    first = collect(model)[1]
    first.save(tmp_path / "kept.safetensors")
    before = (tmp_path / "kept.safetensors").read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_factedit.files.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        collect(model, 2)[2].save(tmp_path / "kept.safetensors")
    assert (tmp_path / "kept.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["kept.safetensors"]
