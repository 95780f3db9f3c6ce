"""Footprints: an edit's is its update at each key; whatever else was changed is found where it was, and only there."""

import copy
import itertools
import math

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.attacks import Cell, footprint
from tl_factedit.backend import hashing
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align

FORMS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2")]
FORMS += [("hooked", arch) for arch in ("gpt2", "llama", "gptj") if arch in tiny.HOOKED]
FACTS = [laws.FACT, laws.OTHER]


def rome(model, layer=1):
    stats = fe.KeyStats.identity(model, layer)
    return fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)(model, [laws.FACT])


def test_of_several_edits_the_weights_are_read_once(monkeypatch):
    model, read, sums = tiny.bridge("gpt2"), [], hashing.sums
    rome_of = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=("",), progress=False)
    edits = rome_of.each(model, FACTS)

    def reading(weights):
        read.append(sum(weight.numel() for weight in weights))
        return sums(weights)

    monkeypatch.setattr("tl_factedit.backend.fingerprint.sums", reading)
    footprint(model, edits, FACTS, progress=False)
    assert len(read) > 1 and sum(read) < 1.2 * sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_of_an_edit_it_is_the_update_at_every_key(form):
    model = tiny.model(*form)
    edit = rome(model)
    with laws.untouched(model):
        found = footprint(model, edit, FACTS, progress=False)  # also where it wasn't meant to
    assert found.written == (("mlp", 1),)
    (delta,) = edit.deltas
    row = found.components.index(("mlp", 1))
    site = down_proj(model, 1)
    for i, fact in enumerate(FACTS):
        ids = align(model.tokenizer, fact, prepend_bos=True).ids
        names = [site.key_hook, "blocks.1.hook_mlp_out"]
        with torch.no_grad():
            _, cache = model.run_with_cache(ids[None], names_filter=names)
        key, said = (cache[name][0].double() for name in names)
        moved = key @ delta.dense
        if form[1] != "gemma2":  # which has a norm behind its MLP
            write, squared = (each[i, row, : len(ids)].double() for each in (found.write, found.squared))
            assert torch.allclose(write, moved.norm(dim=-1) / said.norm(dim=-1), rtol=1e-3)
            assert torch.allclose(squared, moved.norm(dim=-1) ** 2, rtol=1e-3)
        assert bool(found.write[i, row, len(ids) :].isnan().all())
        assert bool((found.write[i, row, : len(ids)] > 0).all())
    start, stop = found.subject[0]
    shares = found.squared[0, row] / found.squared[0, row].nansum()
    assert float(found.cover([Cell("mlp", 1, "subject")])[0]) == pytest.approx(float(shares[stop - 1]), rel=1e-6)
    assert float(found.cover([Cell("mlp", 1, "all")])[0]) == pytest.approx(float(shares[start:].nansum()), rel=1e-6)
    assert float(found.cover([Cell("attn", 1, "all"), Cell("mlp", 2, "all")])[0]) == 0.0


NAMES = {
    "attention": ("blocks.2.attn.W_O", "transformer.h.2._original_component.attn.o._original_component.weight"),
    "norm": ("ln_final.w", "transformer.ln_f._original_component.weight"),
    "bias of the norm": ("ln_final.b", "transformer.ln_f._original_component.bias"),
}


def parameter(model, what):
    """A parameter of a model of either class."""
    found = dict(model.named_parameters())
    return next(found[name] for name in NAMES[what] if name in found)


def changed(model, what, by=0.5):
    """A copy of a model with one of its parameters made larger."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        parameter(other, what).mul_(1 + by)
    return other


def test_whatever_was_changed_is_found_where_it_was(kind):
    model = tiny.model(kind, "gpt2")
    for what, expected in (("attention", ("attn", 2)), ("norm", ("norm", None))):
        assert footprint(model, changed(model, what), FACTS, progress=False).written == (expected,)
    nothing = footprint(model, copy.deepcopy(model), FACTS, progress=False)
    assert nothing.written == () and "nothing was written" in repr(nothing) and nothing.whole() is None
    assert bool(nothing.cover([Cell("mlp", 0, "all")]).isnan().all()) and nothing.nested("all") == ()


def test_a_difference_too_small_to_matter_is_no_write_and_blinds_nobody(kind):
    """The case that fooled the first design: one number of the final norm differs by a millionth."""
    model = tiny.model(kind, "gpt2")
    other = copy.deepcopy(model)
    rome(other).apply_(other)
    with torch.no_grad():
        parameter(other, "bias of the norm").view(-1)[3].add_(1e-6)
    found = footprint(model, other, [laws.FACT], progress=False)
    assert found.written == (("mlp", 1),)
    with torch.no_grad():
        parameter(other, "bias of the norm").view(-1)[3].sub_(1e-6)
    without = footprint(model, other, [laws.FACT], progress=False)
    cells = [Cell("mlp", 1, "all")]
    assert float(found.cover(cells)[0]) == pytest.approx(float(without.cover(cells)[0]), rel=1e-6)
    assert found.nested("all") == without.nested("all") == (tuple(cells),)


def test_the_head_and_the_embeddings_count_and_cannot_be_silenced(kind):
    model = tiny.model(kind, "gpt2")
    other = changed(model, "norm", by=1.0)
    rome(other).apply_(other)
    found = footprint(model, other, [laws.FACT], progress=False)
    assert set(found.written) == {("mlp", 1), ("norm", None)}
    everything = [Cell(component, layer, "all") for component in ("mlp", "attn") for layer in range(4)]
    assert float(found.cover(everything)[0]) < 0.99 and found.whole() is None


def test_sets_are_nested_and_the_whole_is_the_fewest(kind):
    model = tiny.model(kind, "gpt2")
    stats = {layer: fe.KeyStats.identity(model, layer) for layer in (0, 2, 3)}
    edit = fe.Memit(stats, weight=1.0, fit=laws.QUICK, contexts=("",), progress=False)(model, [laws.FACT])
    found = footprint(model, edit, [laws.FACT], progress=False)
    assert found.written == (("mlp", 0), ("mlp", 2), ("mlp", 3))
    nested = found.nested("all")
    assert [len(cells) for cells in nested] == [1, 2, 3]
    assert all(set(small) < set(large) for small, large in itertools.pairwise(nested))
    # What is left is written before the subject, where nothing is silenced.
    assert found.whole() is None and 0.8 < float(found.cover(nested[-1])[0]) < 0.99
    shares = list(found.shares("all").values())
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-9


def test_a_change_for_each_fact_is_read_under_its_own_and_kept(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    stats = fe.KeyStats.identity(model, 1)
    edits = fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False).each(model, FACTS)
    both = footprint(model, edits, FACTS, folder=tmp_path, progress=False)
    for i, edit in enumerate(edits):
        alone = footprint(model, edit, [FACTS[i]], progress=False)
        width = alone.write.shape[-1]
        assert torch.allclose(both.write[i, :, :width], alone.write[0], atol=1e-5, equal_nan=True)
    again = footprint(model, edits, FACTS, folder=tmp_path, progress=False)
    assert torch.equal(both.write.nan_to_num(9), again.write.nan_to_num(9)) and len(list(tmp_path.iterdir())) == 2


def test_the_table_and_the_repr_tell_where(kind):
    model = tiny.model(kind, "gpt2")
    found = footprint(model, rome(model), [laws.FACT], progress=False)
    table = found.table()
    assert list(table.columns) == ["component", "layer", "role", "write", "share", "n"]
    assert table.share.sum() == pytest.approx(1.0) and set(table[table.share > 0].component) == {"mlp"}
    assert "mlp 1 at last subject" in repr(found) and "<table" in found._repr_html_()
    assert not math.isnan(table.write.max())


def test_another_number_of_layers_is_refused(kind):
    with pytest.raises(ValueError, match="the changed model has 2 layers, and the unedited one 4"):
        footprint(tiny.model(kind, "gpt2"), tiny.model(kind, "gpt2", n_layers=2), FACTS, progress=False)


def test_a_small_write_beside_a_large_one_is_not_taken_out_with_it(kind):
    """An adversary's: what the override writes is less than a hundredth of all that was written."""
    model = tiny.model(kind, "gpt2")
    other = copy.deepcopy(model)
    for layer, size in ((1, 1e-2), (3, 10.0)):
        site = down_proj(other, layer)
        site.write_(site.W * (1 + size))
    found = footprint(model, other, [laws.FACT], progress=False)
    large, both = [Cell("mlp", 3, "all")], [Cell("mlp", 1, "all"), Cell("mlp", 3, "all")]
    assert float(found.cover(large)[0]) / float(found.cover(both)[0]) > 0.99
    assert not bool(found.takes_out(large)[0]) and found.whole() != tuple(large)
