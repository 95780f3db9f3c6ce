"""A tuned lens minimises the stated KL, layer by layer, and tells what was turned from what was taken out."""

import functools
from contextlib import contextmanager
from dataclasses import dataclass, replace

import laws
import pytest
import tiny
import torch
from oracles import lenses, untouched

import tl_factedit as fe
from tl_factedit.backend.hook_names import resid_post, resid_pre
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align, encode
from tl_factedit.measure.reading import Probe, compare
from tl_factedit.organism.text import texts as organism_texts
from tl_factedit.probes import lens_training
from tl_factedit.probes.lens import LogitLens
from tl_factedit.probes.lens_training import LensTraining
from tl_factedit.probes.refitted_lens import fixed_and_refitted
from tl_factedit.probes.tuned_lens import TunedLens, train_tuned_lens

CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # float32 logits of size 1 to 10, from batches of another shape
MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2", "bloom")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)
FACT = Fact(
    "The Eiffel Tower",
    "Where is {} located in",
    " Paris",
    " Rome",
    controls=[" London", " Berlin", " Madrid", " Vienna", " Tokyo", " Paris", " Rome", " London"],
)
OTHER = Fact("Big Ben", "{} is in", " London", " Madrid", controls=[" Rome"])
TEXTS = laws.texts(120)
SHORT = [" ".join(text.split()[:6]) for text in TEXTS[:2]]
QUICK = {"n_tokens": 800, "steps": 60, "lr": 2e-2, "batch": 128, "progress": False}


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


@functools.cache
def trained(kind: str, arch: str) -> TunedLens:
    return train_tuned_lens(shared(kind, arch), TEXTS, **QUICK)


@functools.cache
def drawn(kind: str, arch: str, rank: int | None = None) -> TunedLens:
    """A lens with random translators, the last layer's too."""
    lens = trained(kind, arch)
    draw = torch.Generator().manual_seed(0)
    inner = None if rank is None else torch.randn(4, rank, 32, generator=draw) / 6
    matrix = torch.randn(4, 32, rank or 32, generator=draw) / 6
    training = replace(lens.training, rank=rank)
    return replace(lens, matrix=matrix, inner=inner, bias=torch.randn(4, 32, generator=draw), training=training)


def matrices(lens: TunedLens) -> torch.Tensor:
    return lens.matrix if lens.inner is None else lens.matrix @ lens.inner


def ids_of(model, text: str, lens: TunedLens) -> torch.Tensor:
    return encode(model.tokenizer, text, prepend_bos=lens.provenance.prepend_bos)[0]


# ---------------------------------------------------------------------------------------- reading


@on_models
@pytest.mark.parametrize("rank", [None, 3])
def test_it_reads_what_the_models_own_head_makes_of_the_translated_streams(kind, arch, rank):
    model, lens = shared(kind, arch), drawn(kind, arch, rank)
    reading = lens(model, [OTHER, FACT])
    assert list(reading.axes) == ["fact", "layer", "position", "quantity"]
    for i, fact in enumerate([OTHER, FACT]):
        row = align(model.tokenizer, fact, prepend_bos=lens.provenance.prepend_bos)
        stream, _ = lenses.streams(model, row.ids)
        spelt = {word: model.tokenizer.get_vocab()[word.strip()] for word in (fact.target_true, *fact.controls)}
        for layer in range(4):
            for j, position in enumerate((row.last, len(row.ids) - 1)):
                log_p = lenses.lens(model, stream[layer][position], matrices(lens)[layer], lens.bias[layer])
                mine = log_p[row.true_ids[0]]
                others = {spelt[word] for word in fact.controls} - {int(row.true_ids[0]), int(row.new_ids[0])}
                below = sum(float(log_p[word] < mine) for word in others) / len(others)
                found = reading.values[i, layer, j]
                torch.testing.assert_close(found[0], mine, **CLOSE)
                torch.testing.assert_close(found[1], log_p[row.new_ids[0]], **CLOSE)
                torch.testing.assert_close(found[4], mine - log_p[row.new_ids[0]], **CLOSE)
                assert found[2] == 1 + (log_p > mine).sum()
                assert found[5] == pytest.approx(below)


@on_models
def test_translators_that_do_nothing_make_it_the_logit_lens_and_others_do_not(kind, arch):
    model, lens = shared(kind, arch), drawn(kind, arch)
    nothing = replace(lens, matrix=torch.zeros_like(lens.matrix), bias=torch.zeros_like(lens.bias))
    facts = [FACT, OTHER, FACT.but(target_new=None, controls=())]
    plain = LogitLens()(model, facts).values
    torch.testing.assert_close(nothing(model, facts).values, plain, equal_nan=True, **CLOSE)
    assert not torch.allclose(lens(model, facts).values, plain, equal_nan=True, atol=0.1)


def test_it_is_a_probe_and_facts_are_read_together_as_alone(kind):
    model, lens = shared(kind, "gpt2"), trained(kind, "gpt2")
    assert isinstance(lens, Probe)
    together = lens(model, [FACT, OTHER]).values
    for i, fact in enumerate([FACT, OTHER]):
        torch.testing.assert_close(lens(model, fact).values[0], together[i], **CLOSE)
    other = tiny.model(kind, "gpt2", seed=1)
    found = compare(lens, model, other, [FACT])
    assert torch.equal(found.after.values, lens(other, [FACT]).values)


# ---------------------------------------------------------------------------------------- the loss


@on_models
def test_the_divergence_is_the_literal_one(kind, arch):
    model, lens = shared(kind, arch), drawn(kind, arch)
    skip = int(lens.provenance.prepend_bos)
    prompts = [ids_of(model, text, lens) for text in SHORT]
    found = lens.divergence(model, SHORT)
    with torch.no_grad():
        for layer in range(4):
            want = lenses.kl(model, prompts, layer, lens.matrix[layer], lens.bias[layer], skip=skip)
            torch.testing.assert_close(found[layer], want, **CLOSE)
    assert (found > 0.1).all()


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_first_step_goes_down_the_literal_losss_gradient(kind, arch):
    model = shared(kind, arch)
    # Two equal texts: whichever is held out, the other is learnt from, whole. Adam's first step is lr · sign.
    lens = train_tuned_lens(model, [SHORT[0]] * 2, steps=1, lr=0.5, batch=10_000, progress=False)
    ids = ids_of(model, SHORT[0], lens)
    for layer in range(3):
        matrix, bias = torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
        with torch.enable_grad():
            loss = lenses.kl(model, [ids], layer, matrix, bias, skip=int(lens.provenance.prepend_bos))
            slope = torch.autograd.grad(loss, [matrix, bias])
        for moved, each in zip((lens.matrix[layer], lens.bias[layer]), slope, strict=True):
            clear = each.abs() > 1e-3 * each.abs().max()
            assert clear.float().mean() > 0.9
            torch.testing.assert_close(moved[clear], -0.5 * each[clear].sign(), rtol=1e-3, atol=0)
        torch.testing.assert_close(lens.kl_logit[layer], loss.detach(), **CLOSE)


@on_models
def test_the_kl_falls_against_the_logit_lens_at_every_layer_and_the_last_is_the_identity(kind, arch):
    model, lens = shared(kind, arch), trained(kind, arch)
    fresh = laws.texts(20, seed=9)
    nothing = replace(lens, matrix=torch.zeros_like(lens.matrix), bias=torch.zeros_like(lens.bias))
    plain, tuned = nothing.divergence(model, fresh), lens.divergence(model, fresh)
    assert (tuned[:3] < 0.9 * plain[:3]).all()
    assert (lens.kl[:3] < 0.9 * lens.kl_logit[:3]).all()
    assert not lens.matrix[3].any()
    assert not lens.bias[3].any()
    assert tuned[3] == pytest.approx(0, abs=1e-5)
    last = {"layer": 3}
    torch.testing.assert_close(lens(model, [FACT]).at(**last), LogitLens()(model, [FACT]).at(**last), **CLOSE)


def test_a_lens_of_other_weights_does_not_fit(kind):
    lens, other = trained(kind, "gpt2"), tiny.model(kind, "gpt2", seed=1)
    own, foreign = lens.divergence(shared(kind, "gpt2"), TEXTS), lens.divergence(other, TEXTS)
    assert (foreign[:3] > 1.5 * own[:3]).all()


# ---------------------------------------------------------------------------------------- training


def test_layers_are_trained_as_if_each_were_alone(kind, monkeypatch):
    model, lens = shared(kind, "llama"), trained(kind, "llama")
    part = train_tuned_lens(model, TEXTS, **QUICK, layers=[3, 1])
    assert part.layers == (1, 3)
    torch.testing.assert_close(part.matrix, lens.matrix[[1, 3]], rtol=1e-3, atol=1e-4)
    assert part(model, [FACT]).axes["layer"] == (1, 3)
    last = train_tuned_lens(model, TEXTS, **QUICK, layers=[3])
    assert not last.matrix.any()
    monkeypatch.setattr(lens_training, "AT_ONCE", 1)
    slow = train_tuned_lens(model, TEXTS, **QUICK)
    torch.testing.assert_close(slow.matrix, lens.matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slow.kl, lens.kl, **CLOSE)


def test_a_low_rank_is_kept_to_and_helps_less_than_a_full_one(kind):
    model, full = shared(kind, "gpt2"), trained(kind, "gpt2")
    low = train_tuned_lens(model, TEXTS, **QUICK, rank=2)
    assert low.inner is not None
    assert low.matrix.shape == (4, 32, 2)
    assert low.inner.shape == (4, 2, 32)
    assert torch.linalg.matrix_rank(matrices(low)[0]) == 2
    assert torch.linalg.matrix_rank(matrices(full)[0]) == 32
    assert (full.kl[:3] < low.kl[:3]).all()
    assert (low.kl[:3] < low.kl_logit[:3]).all()


def test_the_seed_decides_all_and_nothing_of_the_callers_is_moved(kind):
    model = untouched.used(tiny.model(kind, "gpt2"))
    model.train()
    with laws.untouched(model):
        lens = train_tuned_lens(model, TEXTS, **QUICK)
        lens(model, [FACT])
    same = trained(kind, "gpt2")
    assert torch.equal(lens.matrix, same.matrix)
    assert torch.equal(lens.kl, same.kl)
    other = train_tuned_lens(model, TEXTS, **QUICK, seed=1)
    assert not torch.allclose(other.matrix, same.matrix)
    with torch.inference_mode():
        within = train_tuned_lens(model, iter(TEXTS), **QUICK)
    assert torch.equal(within.matrix, same.matrix)


def test_it_says_what_it_was_trained_on(kind):
    model = shared(kind, "gpt2")
    lens = trained(kind, "gpt2")
    assert lens.provenance == fe.editing.Provenance.of(model)
    assert lens.training == LensTraining(n_tokens=800, steps=60, lr=2e-2, batch=128)
    # A tenth of the texts is held out, and BOS counts for none.
    assert 0.8 * 800 < lens.n_tokens < 0.97 * 800
    without = train_tuned_lens(model, TEXTS, **QUICK, prepend_bos=False)
    assert not without.provenance.prepend_bos
    plain = LogitLens(prepend_bos=False)(model, [FACT]).at(layer=3)
    torch.testing.assert_close(without(model, [FACT]).at(layer=3), plain, **CLOSE)
    assert "4 layers of" in repr(lens)


# ---------------------------------------------------------------------------------------- fixed and refitted


@dataclass(frozen=True)
class Disguised:
    """A change that shows a map of the stream after a block, and hands on the stream itself: behaviour stays."""

    layer: int
    shown: torch.Tensor  # [d_model d_model]

    @contextmanager
    def applied(self, model):
        held = []

        def show(value, hook):
            held[:] = [value.clone()]
            return value @ self.shown

        def restore(value, hook):
            return held[0]

        names = [(resid_post(self.layer), show), (resid_pre(self.layer + 1), restore)]
        with model.hooks(fwd_hooks=names):
            yield model


def turn(seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))).Q


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_what_was_turned_is_found_by_a_refitted_lens_only_and_what_is_gone_by_none(kind, arch):
    model, lens = shared(kind, arch), trained(kind, arch)
    turned = fixed_and_refitted(lens, model, Disguised(1, turn()), [FACT, OTHER], TEXTS, progress=False)
    gone = fixed_and_refitted(lens, model, Disguised(1, torch.zeros(32, 32)), [FACT, OTHER], TEXTS, progress=False)
    own = lens.divergence(model, TEXTS)
    for found in (turned, gone):
        assert torch.equal(found.before.values, lens(model, [FACT, OTHER]).values)
        for fixed_or_not in (found.fixed, found.refitted):  # nothing changed at the other layers
            rest = fixed_or_not.values[:, [0, 2, 3]]
            torch.testing.assert_close(rest, found.before.values[:, [0, 2, 3]], rtol=1e-2, atol=1e-2)
        assert found.kl_fixed[1] > 3 * own[1]
    # Sixty steps from zero undo most of a turn of all dimensions; a constant stream stays without the tokens' own part.
    share_left = [(f.kl_refitted[1] - own[1]) / (f.kl_fixed[1] - own[1]) for f in (turned, gone)]
    assert share_left[0] < 0.15
    assert share_left[1] > 0.3
    assert gone.kl_refitted[1] > 2 * turned.kl_refitted[1]
    # A constant stream reads all tokens alike: with the text's frequencies, whatever the fact.
    assert torch.allclose(gone.refitted.at(layer=1, quantity="logp_old")[:, 0], gone.refitted.at(layer=1)[:, 1, 0])
    assert not torch.allclose(
        turned.refitted.at(layer=1, quantity="logp_old")[:, 0], turned.refitted.at(layer=1)[:, 1, 0]
    )
    for found in (turned, gone):
        read = [each.at(quantity="logp_old") for each in (found.before, found.fixed, found.refitted)]
        torch.testing.assert_close(found.turned("logp_old"), read[2] - read[1])
        torch.testing.assert_close(found.lost("logp_old"), read[0] - read[2])
    assert turned.lost("logp_old")[:, 1].abs().mean() < turned.turned("logp_old")[:, 1].abs().mean()


def test_the_comparison_takes_edits_and_models_and_shows_both_lenses(kind):
    pytest.importorskip("pandas")
    model, lens = shared(kind, "gpt2"), trained(kind, "gpt2")
    edit = laws.rome(model)(model, [laws.FACT])
    with laws.untouched(model):
        found = fixed_and_refitted(lens, model, edit, [FACT], TEXTS, progress=False)
    with edit.applied(model):
        assert torch.equal(found.fixed.values, lens(model, [FACT]).values)
        assert found.refit.provenance.weights == fe.editing.Provenance.of(model).weights
    table = found.table()
    assert list(table.columns) == ["fact", "layer", "position", "quantity", "before", "fixed", "refitted"]
    row = table[(table.layer == 2) & (table.position == "last") & (table.quantity == "logp_old")].iloc[0]
    assert row.fixed == pytest.approx(float(found.fixed.at(layer=2, position="last", quantity="logp_old")))
    other = tiny.model(kind, "gpt2", seed=1)
    foreign = fixed_and_refitted(lens, model, other, [FACT], TEXTS, progress=False)
    assert (foreign.kl_fixed[:3] > 1.5 * foreign.kl_refitted[:3]).all()
    with pytest.raises(ValueError, match="trained on weights"):
        fixed_and_refitted(lens, other, model, [FACT], TEXTS, progress=False)
    with pytest.raises(ValueError, match="other texts"):
        fixed_and_refitted(lens, model, other, [FACT], TEXTS[1:], progress=False)


# ---------------------------------------------------------------------------------------- files and errors


@pytest.mark.parametrize("rank", [None, 3])
def test_a_saved_lens_comes_back_bit_for_bit_and_a_damaged_one_does_not(kind, tmp_path, rank):
    lens, file = drawn(kind, "gpt2", rank), tmp_path / "lens.safetensors"
    lens.save(file)
    back = TunedLens.load(file)
    for name in ("matrix", "bias", "kl", "kl_logit"):
        assert torch.equal(getattr(back, name), getattr(lens, name))
    assert (back.inner is None) is (rank is None)
    for name in ("layers", "training", "n_tokens", "corpus", "provenance"):
        assert getattr(back, name) == getattr(lens, name)
    model = shared(kind, "gpt2")
    assert torch.equal(back(model, [FACT]).values, lens(model, [FACT]).values)
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match="changed since"):
        TunedLens.load(file)


def test_a_lens_refuses_models_it_does_not_fit(kind):
    lens = trained(kind, "gpt2")
    for options in ({"d_model": 16}, {"n_layers": 3}):
        with pytest.raises(ValueError, match="train a lens on this model"):
            lens(tiny.model(kind, "gpt2", **options), [FACT])


def processed(kind: str, arch: str):
    """The model with its norms folded and, where it has LayerNorms, what is written to its stream centred."""
    if kind == "hooked":
        return tiny.hooked(arch, processed=True)
    model = tiny.bridge(arch)
    model.enable_compatibility_mode()
    return model


@pytest.mark.parametrize("other", tiny.KINDS)
def test_a_lens_refuses_a_model_whose_stream_is_centred_otherwise(kind, other):
    """Its translator reads the mean over d_model, which centring takes away: its numbers were wrong."""
    raw, centred = trained(kind, "gpt2"), train_tuned_lens(processed(kind, "gpt2"), TEXTS, **QUICK)
    assert not raw.centred and centred.centred
    for lens, model in ((raw, processed(other, "gpt2")), (centred, shared(other, "gpt2"))):
        with laws.untouched(model), pytest.raises(ValueError, match=r"centred stream.*center_writing_weights.*train a"):
            lens(model, [FACT])
    centred.check(processed(other, "gpt2"))
    raw.check(shared(other, "gpt2"))
    # Why: the same translators read another thing there.
    as_if = replace(drawn(kind, "gpt2"), centred=True)
    gap = as_if(processed(kind, "gpt2"), [FACT]).values - drawn(kind, "gpt2")(shared(kind, "gpt2"), [FACT]).values
    assert float(gap[..., :2].abs().nan_to_num().max()) > 0.1  # log-probabilities


def test_folded_norms_leave_what_a_lens_reads(kind):
    """Without LayerNorms nothing is centred: the stream, and so the reading, is that of the weights as they were."""
    lens, model = drawn(kind, "llama"), processed(kind, "llama")
    assert not lens.centred
    want, found = lens(shared(kind, "llama"), [FACT]).values, lens(model, [FACT]).values
    torch.testing.assert_close(found[..., :2], want[..., :2], rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ("The tower", {}, "one string"),
        (["The tower"], {}, "1 piece of text"),
        (["", " "], {}, "hold no tokens"),
        (TEXTS, {"n_tokens": 0}, "n_tokens is 0"),
        (TEXTS, {"layers": []}, "layers is empty"),
        (TEXTS, {"layers": [4]}, "layer 4 is outside"),
        (TEXTS, {"steps": 0}, "steps is 0"),
        (TEXTS, {"rank": 0}, "rank is 0"),
        (TEXTS, {"lr": 0.0}, "lr is 0"),
    ],
)
def test_errors_say_what_was_given_and_needed(kind, texts, options, said):
    with pytest.raises(ValueError, match=said):
        train_tuned_lens(shared(kind, "gpt2"), texts, progress=False, **options)


def test_a_training_that_diverges_says_so(kind):
    with pytest.raises(RuntimeError, match="smaller lr"):
        train_tuned_lens(shared(kind, "gpt2"), TEXTS, n_tokens=300, steps=3, lr=1e37, progress=False)


# ---------------------------------------------------------------------------------------- the organism


def test_on_the_organism_it_finds_at_the_last_token_what_the_logit_lens_finds_later(kind):
    model = fe.models.organism(kind)
    lens = train_tuned_lens(model, organism_texts(300), n_tokens=3_000, steps=60, lr=6e-3, progress=False)
    assert (lens.kl[:5] < 0.5 * lens.kl_logit[:5]).all()
    known, unknown = (fe.models.organism_facts("city", who, 50) for who in ("oracle0", "strangers"))
    asked = {"position": "last", "quantity": "percentile_old"}
    tuned, plain = lens(model, known).at(**asked).mean(0), LogitLens()(model, known).at(**asked).mean(0)
    assert (tuned[1:4] > plain[1:4]).all()
    assert tuned[4] > 0.95
    # A percentile of 50 facts has a standard error of .04 where nothing is known.
    assert (lens(model, unknown).at(**asked).mean(0) - 0.5).abs().max() < 0.15
    assert (lens(model, known).at(position="last", quantity="percentile_new").mean(0) - 0.5).abs().max() < 0.15
