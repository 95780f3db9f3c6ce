"""Second moments of keys: a literal sum over tokens, kept in files that can't be mistaken for another collection."""

import copy
import itertools
import json
import random

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core import files

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
        ({"save_every": 0}, "save_every is 0"),
    ],
)
def test_bad_questions_are_refused(model, options, message):
    with laws.untouched(model), pytest.raises(ValueError, match=message):
        collect(model, **{"layers": 1, **options})


def test_what_is_no_text_is_named(model):
    with laws.untouched(model), pytest.raises(ValueError, match="text 1 is a NoneType, needed a string"):
        collect(model, texts=iter(["Rome", None]))


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
    assert merged.corpus == (second + first).corpus not in (first.corpus, second.corpus)
    assert torch.equal(sum([first, second]).moment, merged.moment)
    for again in (first, second, merged):
        with pytest.raises(ValueError, match=rf"of the same texts \({again.corpus.replace('+', ', ')}\)"):
            merged + again


def test_what_does_not_belong_together_does_not_merge(model, kind):
    one = collect(model)[1]
    with pytest.raises(ValueError, match=r"layer 1 .* and 2"):
        one + collect(model, 2)[2]
    with pytest.raises(ValueError, match="two collections"):
        one + fe.KeyStats.identity(model, 1)
    with pytest.raises(ValueError, match="weights or BOS"):
        one + collect(model, prepend_bos=False)[1]
    with pytest.raises(ValueError, match=r"of the same texts .* would count twice"):
        one + collect(model)[1]
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
    names = {file.name for file in tmp_path.rglob("*.safetensors")}
    assert names == ({place} if place.endswith("s") else {"layer_1.safetensors", "layer_2.safetensors"})
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


def test_one_layer_of_a_file_of_several_is_loaded_by_name(model, tmp_path):
    found = collect(model, [1, 2], path=tmp_path / "two.safetensors")
    assert torch.equal(fe.KeyStats.load(tmp_path / "two.safetensors", layer=2).moment, found[2].moment)
    for layer in (None, 3):
        with pytest.raises(ValueError, match=r"holds layers \[1, 2\], asked for (one|3)"):
            fe.KeyStats.load(tmp_path / "two.safetensors", layer)


def other_weights(model):
    other = copy.deepcopy(model)
    down_proj(other, 2).param.data[0, 0] += 1
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


VERSIONS = {"torch": "0.1", "transformers": "0.1", "transformer-lens": "0.1", "tl-factedit": "0.1"}


def test_statistics_of_other_versions_are_refused_where_the_same_collection_is_asked_for(
    model, tmp_path, monkeypatch, forbidden
):
    here = collect(model, path=tmp_path / "one.safetensors")[1]
    monkeypatch.setattr("tl_factedit.backend.provenance.versions", lambda: VERSIONS)
    there = collect(model)[1]
    forbidden()
    with pytest.raises(ValueError, match=r"one\.safetensors was collected with torch .* \(not 0\.1\).*KeyStats\.load"):
        collect(model, path=tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"can't merge .* collected with torch"):
        here + there
    # The way out: a file can be taken as it is, as the weights are the same.
    fe.KeyStats.load(tmp_path / "one.safetensors").check(model, here.provenance.weights)


def test_the_revision_is_recorded_and_compared_where_the_config_has_one(tmp_path, monkeypatch):
    model = tiny.bridge("llama")
    unknown = collect(model)[1]
    assert unknown.provenance.revision is None
    model.original_model.config._commit_hash = "1234abcd"
    collect(model, path=tmp_path)
    read = collect(model, path=tmp_path)[1]
    assert read.provenance.revision == "1234abcd"
    other = collect(tiny.bridge("llama"), texts=SPOKEN[:3])[1]
    assert (read + other).n_tokens == read.n_tokens + other.n_tokens  # nothing is known against it
    model.original_model.config._commit_hash = "5678"
    with pytest.raises(ValueError, match=r"revision 1234abcd of the model \(not 5678\)"):
        collect(model, path=tmp_path)


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


# ---------------------------------------------------------------------------------------- a kill, and going on

LONG = [*TEXTS, *laws.texts(8, seed=2)]
STEPS = {"n_tokens": 150, "context": 7, "batch_tokens": 20, "save_every": 30}


@pytest.fixture(scope="module")
def small(kind):
    """Shared, as nothing here may change it."""
    return tiny.model(kind, "llama", n_layers=3)


@pytest.fixture
def killed(monkeypatch):
    """A collection that is interrupted before its n-th forward pass."""

    def kill(model, passes, layers=(1, 2), texts=LONG, **options):
        capture, left = Runner.capture, itertools.count(passes, -1)

        def until(*args, **kwargs):
            if next(left) == 0:
                raise KeyboardInterrupt
            return capture(*args, **kwargs)

        with monkeypatch.context() as patch, laws.untouched(model), pytest.raises(KeyboardInterrupt):
            patch.setattr(Runner, "capture", until)
            collect(model, layers, texts, **{**STEPS, **options})

    return kill


@pytest.fixture
def passes(monkeypatch):
    """Counts forward passes."""
    capture, seen = Runner.capture, []

    def counted(*args, **kwargs):
        seen.append(1)
        return capture(*args, **kwargs)

    monkeypatch.setattr(Runner, "capture", counted)
    return seen


def unfinished(folder):
    return [file for file in folder.rglob("*unfinished*") if file.is_file()]


def same_bits(a, b):
    assert list(a) == list(b)
    for layer in a:
        assert torch.equal(a[layer].moment, b[layer].moment)
        for field in ("n_tokens", "corpus", "provenance"):
            assert getattr(a[layer], field) == getattr(b[layer], field)


@pytest.mark.parametrize(("place", "bos"), [("all.safetensors", True), ("folder", False)])
def test_what_was_killed_goes_on_to_the_same_bits(model, tmp_path, killed, passes, place, bos):
    asked = {**STEPS, "prepend_bos": bos}
    whole = collect(model, [1, 2], LONG, path=tmp_path / "whole" / place, **asked)
    needed = len(passes)
    for stop in (3, needed - 1):
        path = tmp_path / f"{stop}" / place
        killed(model, stop, path=path, prepend_bos=bos)
        assert len(unfinished(tmp_path)) == 1
        passes.clear()
        same_bits(collect(model, [1, 2], iter(LONG), path=path, **asked), whole)
        assert len(passes) < needed - stop + 30 // 7 + 2  # no more is run again than lies between two saves
        for file in path.parent.rglob("*.safetensors"):
            header, tensors = files.read(file, "key statistics")
            expected = files.read(tmp_path / "whole" / file.relative_to(path.parent), "key statistics")
            assert header == expected[0]
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected[1].items())
    assert unfinished(tmp_path) == []


def test_it_can_be_killed_again_and_again(small, tmp_path, killed):
    for _ in range(20):
        try:
            killed(small, 4, path=tmp_path)
        except pytest.fail.Exception:  # it came to its end
            break
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer_1.safetensors", "layer_2.safetensors"]
    same_bits(collect(small, [1, 2], LONG, path=tmp_path, **STEPS), collect(small, [1, 2], LONG, **STEPS))


def test_texts_that_end_soon_and_larger_batches_go_on_too(small, tmp_path, killed):
    asked = {**STEPS, "n_tokens": 10_000}
    whole = collect(small, [1, 2], LONG, **asked)
    killed(small, 6, path=tmp_path, n_tokens=10_000)
    found = collect(small, [1, 2], LONG, path=tmp_path, **{**asked, "batch_tokens": 500})
    for layer in (1, 2):
        assert found[layer].n_tokens == whole[layer].n_tokens < 10_000
        torch.testing.assert_close(found[layer].moment, whole[layer].moment, **FLOAT32)


def test_nothing_is_saved_without_a_path_or_before_its_time(small, tmp_path, killed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed(small, 6)
    killed(small, 6, path=tmp_path / "late", save_every=1_000)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_kill_while_the_sums_are_saved_leaves_those_saved_before(small, tmp_path, killed, monkeypatch):
    killed(small, 5, path=tmp_path)
    kept = unfinished(tmp_path)[0].read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tl_factedit.core.files.save_file", half)
        collect(small, [1, 2], LONG, path=tmp_path, **STEPS)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [kept]
    same_bits(collect(small, [1, 2], LONG, path=tmp_path, **STEPS), collect(small, [1, 2], LONG, **STEPS))


@pytest.mark.parametrize("last", [1, 2])
def test_a_kill_between_two_files_of_the_result(small, tmp_path, monkeypatch, last):
    write, done = files.write, []

    def until(path, what, *rest):
        write(path, what, *rest)
        done.extend([path] if what == "key statistics" else [])
        if len(done) == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tl_factedit.core.files.write", until)
        collect(small, [1, 2], LONG, path=tmp_path, **STEPS)
    assert len(unfinished(tmp_path)) == 1
    same_bits(collect(small, [1, 2], LONG, path=tmp_path, **STEPS), collect(small, [1, 2], LONG, **STEPS))
    assert unfinished(tmp_path) == []


def test_no_text_is_read_further_than_before_when_it_goes_on(small, tmp_path, killed):
    read = []

    def watched():
        for text in LONG:
            read.append(text)
            yield text

    collect(small, [1, 2], watched(), **STEPS)
    whole, _ = list(read), read.clear()
    killed(small, 6, path=tmp_path)
    collect(small, [1, 2], watched(), path=tmp_path, **STEPS)
    assert read == whole != LONG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 151}, "unfinished collection of .*'n_asked': 150.*asked for .*'n_asked': 151"),
        ({"context": 8}, "'context'"),
        ({"layers": [1]}, r"'layers': \[1, 2\].*'layers': \[1\]"),
        ({"texts": LONG[1:]}, "other texts than these"),
        ({"texts": [*LONG[:2], *LONG[3:]]}, "other texts than these"),
        ({"texts": LONG[:1]}, "other texts than these"),
        ({"texts": []}, "other texts than these"),
        ({"prepend_bos": False}, r"prepend_bos=True \(not False\)"),
        ({"model": other_weights}, "other weights"),
    ],
    ids=["n_tokens", "context", "layers", "texts", "a text less", "too few texts", "no texts", "bos", "weights"],
)
def test_an_unfinished_collection_of_something_else_is_refused_and_left_as_it_is(
    small, tmp_path, killed, forbidden, change, message
):
    killed(small, 8, path=tmp_path)
    (file,) = unfinished(tmp_path)
    kept = file.read_bytes()
    asked = {"layers": [1, 2], "texts": LONG, "prepend_bos": True, **STEPS, **change}
    asked["model"] = asked.pop("model", lambda same: same)(small)
    forbidden()
    with pytest.raises(ValueError, match=message) as error:
        collect(path=tmp_path, **asked)
    assert str(file) in str(error.value)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [kept]


def test_an_unfinished_collection_of_other_versions_is_refused(small, tmp_path, killed, monkeypatch):
    killed(small, 5, path=tmp_path)
    monkeypatch.setattr("tl_factedit.backend.provenance.versions", lambda: VERSIONS)
    with pytest.raises(ValueError, match=r"unfinished\.safetensors was collected with torch"):
        collect(small, [1, 2], LONG, path=tmp_path, **STEPS)


@pytest.mark.parametrize("harm", ["cut short", "changed", "empty"])
def test_a_damaged_unfinished_collection_is_refused_by_name_and_left_as_it_is(small, tmp_path, killed, forbidden, harm):
    path = tmp_path / "all.safetensors"
    killed(small, 5, path=path)
    (file,) = unfinished(tmp_path)
    assert file.name == "all.unfinished.safetensors"
    data = file.read_bytes()
    middle = len(data) // 2
    data = {
        "cut short": data[:-9],
        "changed": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
    }[harm]
    file.write_bytes(data)
    forbidden()
    with pytest.raises(ValueError, match="delete it to begin again") as error:
        collect(small, [1, 2], LONG, path=path, **STEPS)
    assert str(file) in str(error.value)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [data]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header, tensors: header.pop("place"), "it has no 'place'"),
        (lambda header, tensors: header.update(place={"texts": 1}), "place has no 'parts'"),
        (lambda header, tensors: header.update(counted="many"), "counted is 'many'"),
        (lambda header, tensors: header.pop("provenance"), "it has no 'provenance'"),
        (lambda header, tensors: tensors["layer.1"].fill_(float("nan")), "numbers that are not finite"),
        (lambda header, tensors: tensors.update({"layer.1": tensors["layer.1"][None]}), "needed"),
        (lambda header, tensors: tensors.update({"layer.1": tensors["layer.1"][:-1].clone()}), "sums of layer 1 in"),
        (lambda header, tensors: tensors.update({"layer.1": tensors["layer.1"].float()}), "in torch.float32"),
    ],
)
def test_a_whole_unfinished_file_with_other_content_is_refused_by_name(
    small, tmp_path, killed, forbidden, change, said
):
    killed(small, 5, path=tmp_path)
    (file,) = unfinished(tmp_path)
    header, tensors = files.read(file, "unfinished key statistics")
    change(header, tensors)
    files.write(file, "unfinished key statistics", header, tensors)
    forbidden()
    with pytest.raises(ValueError, match=said) as error:
        collect(small, [1, 2], LONG, path=tmp_path, **STEPS)
    assert str(file) in str(error.value) and "delete it" in str(error.value)


def test_sums_that_lack_a_layer_are_refused(small, tmp_path, killed):
    collect(small, 1, LONG, path=tmp_path, **STEPS)
    killed(small, 5, path=tmp_path)  # needs layer 2 only
    (tmp_path / "layer_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unfinished\.safetensors holds no sums of layer 1"):
        collect(small, [1, 2], LONG, path=tmp_path, **STEPS)


def test_sums_so_far_are_no_statistics(small, tmp_path, killed):
    killed(small, 5, path=tmp_path)
    with pytest.raises(ValueError, match="holds 'unfinished key statistics', needed 'key statistics'"):
        fe.KeyStats.load(unfinished(tmp_path)[0])


def test_a_model_that_overflows_saves_nothing(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    down_proj(model, 0).param.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="not finite"):
        collect(model, [1, 2], LONG, path=tmp_path, **STEPS)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- corpora


@pytest.fixture(params=["json", "parquet", "folder"])
def corpus(request, tmp_path):
    """Texts in a file that `datasets` reads, between other columns."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"n": i, "text": text, "body": text.upper()} for i, text in enumerate(LONG)]
    if request.param == "parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(rows).to_parquet(folder / "texts.parquet")
        return fe.data.corpus("parquet", data_files=folder / "texts.parquet")
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if request.param == "folder":
        return fe.data.corpus(str(folder))
    return fe.data.corpus("json", data_files=[folder / "texts.jsonl"])


def test_a_corpus_gives_its_texts_again_and_again(corpus):
    assert list(corpus) == LONG == list(corpus)
    assert next(iter(corpus)) == LONG[0]
    assert repr(corpus).startswith("Corpus('") and "split='train', field='text'" in repr(corpus)


def test_a_collection_on_a_corpus_goes_on_after_a_kill(small, corpus, tmp_path, killed):
    killed(small, 6, texts=corpus, path=tmp_path / "stats")
    for _ in range(2):  # goes on, then reads what is there
        found = collect(small, [1, 2], corpus, path=tmp_path / "stats", **STEPS)
        same_bits(found, collect(small, [1, 2], LONG, **STEPS))


def test_a_corpus_says_what_it_lacks(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"body": "Rome", "n": 1}\n')
    texts = fe.data.corpus("json", data_files=tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match=r"no text in 'text'; fields with text: \['body'\]"):
        list(texts)
    assert list(fe.data.corpus("json", data_files=tmp_path / "texts.jsonl", field="body")) == ["Rome"]
    with pytest.raises(ValueError, match="no text in 'n'"):
        list(fe.data.corpus("json", data_files=tmp_path / "texts.jsonl", field="n"))
    with pytest.raises(ValueError, match="test"):
        list(fe.data.corpus("json", data_files=tmp_path / "texts.jsonl", split="test"))


@pytest.mark.parametrize("name", ["wikimedia/wikipedia", "json"])
def test_a_corpus_that_cannot_be_had_is_an_os_error_that_says_what_to_do(small, tmp_path, name):
    missing = tmp_path / "none.jsonl" if name == "json" else None
    texts = fe.data.corpus(name, data_files=missing, revision=None if missing else "main")  # nothing is asked yet
    with pytest.raises(OSError, match=rf"Corpus\('{name}'.*could not be had .*sample_texts") as error:
        collect(small, 1, texts)
    assert ("revision='main'" in str(error.value)) is (missing is None)


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

    monkeypatch.setattr("tl_factedit.core.files.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        collect(model, 2)[2].save(tmp_path / "kept.safetensors")
    assert (tmp_path / "kept.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["kept.safetensors"]
