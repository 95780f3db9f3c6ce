"""Second moments in the published layout: the same as collected ones, or refused by file."""

import laws
import numpy as np
import pytest
import tiny
import torch

import tl_factedit as fe

LAYER = 1


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.ONE_KIND[0], "gpt2", n_layers=2)


@pytest.fixture(scope="module")
def stats(model):
    return fe.key_stats(model, LAYER, laws.texts(150), n_tokens=1_000, progress=False, prepend_bos=False)[LAYER]


def published(path, moment, count, dtype=np.float32, **others):
    total = (moment.numpy() * count).astype(dtype)
    fields = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": count, "mom2.mom2": total}
    np.savez(path, **{k: v for k, v in (fields | others).items() if v is not None})
    return path


def test_a_published_moment_makes_the_edit_of_the_collected_one(model, stats, tmp_path):
    path = published(tmp_path / "c.npz", stats.moment, stats.n_tokens, np.float64)
    read = fe.KeyStats.from_npz(path, model, LAYER, prepend_bos=False)
    assert (read.layer, read.n_tokens) == (LAYER, stats.n_tokens)
    torch.testing.assert_close(read.moment, stats.moment, rtol=1e-12, atol=0)
    options = {"fit": laws.QUICK, "contexts": laws.CONTEXTS, "progress": False}
    one, other = (fe.Rome(each, **options)(model, [laws.FACT]).deltas[0].dense for each in (read, stats))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9 * float(other.abs().max()))


def test_it_says_where_it_is_from_and_is_kept_like_any_other(model, stats, tmp_path):
    read = fe.KeyStats.from_npz(published(tmp_path / "c.npz", stats.moment, 1_000), model, LAYER)
    assert read.provenance.versions == {"file": "c.npz"}
    assert read.corpus.startswith("npz ")
    assert read.provenance.prepend_bos is True  # this tokenizer adds BOS by itself
    read.save(tmp_path / "c.safetensors")
    again = fe.KeyStats.load(tmp_path / "c.safetensors")
    assert torch.equal(again.moment, read.moment) and again.provenance == read.provenance


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"mom2.count": None}, "needed 'mom2.mom2' and 'mom2.count'"),
        ({"mom2.count": 0}, "needed a number of tokens"),
        ({"mom2.count": np.array([1, 2])}, "needed a number of tokens"),
        ({"mom2.mom2": np.eye(5, dtype=np.float32)}, r"moment of \(5, 5\), but the layer has d_mlp = 64"),
        ({"mom2.mom2": np.full((64, 64), np.nan, dtype=np.float32)}, "not finite"),
        ({"mom2.mom2": -np.eye(64, dtype=np.float32)}, "negative numbers on its diagonal"),
        ({"mom2.mom2": np.triu(np.ones((64, 64), dtype=np.float32))}, "isn't symmetric"),
        ({"mom2.mom2": np.eye(64, dtype=np.int64)}, "not finite"),
        ({"mom2.mom2": np.array([{}] * 3, dtype=object)}, "isn't a file of second moments"),
    ],
)
def test_what_cannot_be_a_second_moment_of_this_layer_is_refused_by_file(model, stats, tmp_path, spoil, message):
    path = published(tmp_path / "c.npz", stats.moment, 1_000, **spoil)
    with pytest.raises(ValueError, match=rf"c\.npz.*{message}"):
        fe.KeyStats.from_npz(path, model, LAYER)


def test_what_is_no_archive_is_refused_by_file(model, tmp_path):
    path = tmp_path / "c.npz"
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"c\.npz isn't an \.npz file"):
        fe.KeyStats.from_npz(path, model, LAYER)
    with pytest.raises(ValueError, match="is a folder"):
        fe.KeyStats.from_npz(tmp_path, model, LAYER)
    with pytest.raises(FileNotFoundError):
        fe.KeyStats.from_npz(tmp_path / "d.npz", model, LAYER)
