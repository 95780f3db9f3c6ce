"""The value that is written: the loss and its descent against full forwards through public hooks, row by row."""

import copy
import random

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.backend.packed_rows import PackedRows
from tl_factedit.backend.runner import Runner
from tl_factedit.core.tokens import align
from tl_factedit.editing.value_fit import Fitted, ValueFit
from tl_factedit.editing.values import fit_values

LAYER = 1
# Partial and full forwards differ in the order of float32 sums: 1e-6 of logits of size 10. Adam divides by the
# gradient's own size, so that some ten steps of it multiply the difference by about a hundred.
LOSS, DELTA = {"rel": 2e-4, "abs": 2e-5}, {"rtol": 2e-3, "atol": 2e-3}
MANY_TOKENS = laws.FACT.but(target_new=" Rome in Italy")


@pytest.fixture(
    params=[(kind, arch) for arch in ("gpt2", "llama") for kind in tiny.KINDS], ids="-".join, scope="module"
)
def model(request):
    """Shared, as nothing here may change it."""
    return tiny.model(*request.param)


def fit(model, fact=laws.FACT, contexts=laws.CONTEXTS, *, bos=True, **options) -> Fitted:
    return laws.fit_value(
        model, fact, LAYER, contexts, fit=ValueFit(**{"steps": 6, **options}), prepend_bos=bos, progress=False
    )


def literal(model, delta, fact=laws.FACT, contexts=laws.CONTEXTS, **options) -> float:
    terms = {"bos": True, "kl_weight": 0.0625, "decay": 0.5, **options}
    with torch.no_grad():
        return float(editing.loss(model, fact, LAYER, contexts, delta.float(), **terms))


# ---------------------------------------------------------------------------------------- the literal descent


@pytest.mark.parametrize(
    ("fact", "bos", "options"),
    [
        (laws.FACT, True, {}),
        (laws.FACT, False, {"kl_at": "end", "lr": 0.1}),
        (MANY_TOKENS, True, {"kl_prompts": ("{} is a", "What is {}"), "kl_weight": 1.0}),
        (laws.OTHER, True, {"clamp": 0.2, "decay": 1.0, "lr": 0.1}),
    ],
    ids=["defaults", "without bos, kl at the end", "many tokens, two kl prompts", "clamped"],
)
def test_every_step_equals_the_literal_one(model, fact, bos, options):
    options = {"steps": 6, "lr": 0.5, "clamp": 4.0, "stop_below": 0.05, "kl_weight": 0.0625, "decay": 0.5, **options}
    found = fit(model, fact, bos=bos, **options)
    delta, losses = editing.fit_value(model, fact, LAYER, laws.CONTEXTS, bos=bos, **options)
    assert found.losses == pytest.approx(losses, **LOSS)
    torch.testing.assert_close(found.delta, delta.double(), **DELTA)
    assert found.losses[-1] < found.losses[0]
    assert delta.norm() > 100 * DELTA["atol"]


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_keys_and_outputs_are_what_the_hooks_see_in_each_context(model, bos):
    found = fit(model, bos=bos, steps=1)
    assert len(found.keys) == len(found.outputs) == len(laws.CONTEXTS)
    for context, key, output in zip(laws.CONTEXTS, found.keys, found.outputs, strict=True):
        row = align(model.tokenizer, laws.FACT, prepend_bos=bos, prefix=context)
        seen_key, seen_output = editing.key_and_value(model, LAYER, row.ids.tolist(), row.last)
        torch.testing.assert_close(key, seen_key.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output, seen_output.double(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.keys[0], found.keys[1], rtol=1e-2)


# ---------------------------------------------------------------------------------------- the terms, one by one


def test_kl_is_of_the_new_prediction_from_the_old_at_the_subjects_last_token(model):
    found = fit(model, steps=2, lr=3.0, clamp=100.0, kl_weight=100.0)
    pinned = literal(model, found.delta, kl_weight=100.0)
    assert found.losses[-1] == pytest.approx(pinned, **LOSS)
    for other in ({"kl": "old‖new"}, {"kl_at": "end"}):
        assert literal(model, found.delta, kl_weight=100.0, **other) != pytest.approx(pinned, rel=1e-2)


def test_kl_at_the_end_is_read_at_the_end(model):
    found = fit(model, steps=2, lr=3.0, clamp=100.0, kl_weight=100.0, kl_at="end")
    pinned = literal(model, found.delta, kl_weight=100.0, kl_at="end")
    assert found.losses[-1] == pytest.approx(pinned, **LOSS)
    assert literal(model, found.delta, kl_weight=100.0) != pytest.approx(pinned, rel=1e-2)


def test_the_decay_is_the_norm_over_the_squared_norm(model):
    found = fit(model, steps=4, decay=5.0)
    pinned = literal(model, found.delta, decay=5.0)
    assert found.losses[-1] == pytest.approx(pinned, **LOSS)
    assert literal(model, found.delta, decay=5.0, squared=True) != pytest.approx(pinned, rel=1e-2)


def test_without_kl_prompts_there_is_no_kl(model):
    found = fit(model, steps=4, kl_prompts=())
    assert found.losses[-1] == pytest.approx(literal(model, found.delta, kl_weight=0.0), **LOSS)
    assert fit(model, steps=4, kl_weight=5.0).losses[-1] != pytest.approx(found.losses[-1], rel=1e-2)


def test_every_token_of_the_target_counts_alike(model):
    found = fit(model, MANY_TOKENS, steps=1, decay=0.0)
    row = align(model.tokenizer, MANY_TOKENS, prepend_bos=True)
    assert len(row.new_ids) == 3
    alone = [
        -literal(model, found.delta, MANY_TOKENS.but(target_new=text), ("",), decay=0.0, kl_weight=0.0)
        for text in (" Rome", " Rome in", " Rome in Italy")
    ]
    assert fit(model, MANY_TOKENS, ("",), steps=1, decay=0.0).losses[0] == pytest.approx(-alone[2], **LOSS)
    assert len({round(value, 3) for value in alone}) == 3


def test_the_projection_keeps_delta_within_the_clamp(model):
    tight, loose = fit(model, clamp=0.1), fit(model, clamp=100.0)
    v_norm = tight.outputs[0].norm()
    assert float(tight.delta.norm()) <= 0.1 * v_norm * (1 + 1e-6)
    assert tight.clamped > 0
    assert float(loose.delta.norm()) > 0.1 * v_norm
    assert loose.clamped == 0


def test_it_stops_once_the_loss_is_low_enough(model):
    whole = fit(model, steps=6)
    assert (whole.stopped, len(whole.losses)) == ("steps", 6)
    reached = sorted(whole.losses)[2]
    early = fit(model, steps=6, stop_below=reached + 1e-4)
    assert early.stopped == "loss"
    assert early.losses == whole.losses[: len(early.losses)]
    assert len(early.losses) < 6
    assert all(loss >= reached + 1e-4 for loss in early.losses[:-1]) and early.losses[-1] < reached + 1e-4


def test_the_last_step_only_reads(model):
    assert fit(model, steps=1).delta.abs().max() == 0
    two = fit(model, steps=2)
    assert two.losses[1] == pytest.approx(literal(model, two.delta), **LOSS)
    # Adam's first step is the sign of the gradient times the rate.
    torch.testing.assert_close(two.delta.abs(), torch.full_like(two.delta, 0.5), rtol=1e-3, atol=0)


def test_target_prob_is_the_mean_probability_of_the_new_object(model):
    found = fit(model, steps=6)
    assert len(found.target_prob) == len(found.losses)
    assert found.target_prob[-1] > found.target_prob[0]
    nll = literal(model, torch.zeros_like(found.delta), contexts=("",), kl_weight=0.0, decay=0.0)
    assert fit(model, contexts=("",), steps=1).target_prob[0] == pytest.approx(
        float(torch.tensor(-nll).exp()), rel=1e-4
    )


@pytest.mark.parametrize("where", ["mlp", "resid"])
@pytest.mark.parametrize("layer", [0, 3], ids=["first layer", "last layer"])
def test_the_ends_of_the_model_are_layers_like_others(model, layer, where):
    """Read at the subject itself, as above the last layer no other token hears of it."""
    fact = MANY_TOKENS.but(prompt="John lives near {}")
    options = {"steps": 4, "lr": 0.2, "clamp": 4.0, "stop_below": 0.05, "kl_weight": 0.0625, "decay": 0.5}
    (found,) = fit_values(
        model,
        [fact],
        layer,
        laws.CONTEXTS,
        where=where,
        fit=ValueFit(**options),
        prepend_bos=True,
        progress=False,
    )
    delta, losses = editing.fit_value(model, fact, layer, laws.CONTEXTS, bos=True, where=where, **options)
    assert found.losses == pytest.approx(losses, **LOSS)
    torch.testing.assert_close(found.delta, delta.double(), **DELTA)


# ---------------------------------------------------------------------------------------- pieces side by side


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("how", [{}, {"apart": True}, {"mixed": False}], ids=["together", "apart", "unmixed"])
def test_each_token_of_a_sheet_sees_its_own_sequence_so_far_and_nothing_else(seed, how):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 6) for _ in range(12)]
    begins = [draw.randint(0, 4) * (seed > 1) for _ in lengths]  # also with nothing behind
    sheet = PackedRows.of(lengths, begins, **how)
    rows, width = sheet.owner.shape
    assert width == max(lengths)
    real = 0
    for piece, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        row, start = int(sheet.row[piece]), int(sheet.start[piece])
        for query in range(start, start + length):
            real += 1
            assert int(sheet.owner[row, query]) == piece
            assert int(sheet.places[row, query]) == begin + query - start
            seen = []
            for key in sheet.visible[row, query].nonzero()[:, 0].tolist():
                depth = sheet.behind.shape[1]
                of, at = (sheet.behind, sheet.behind_places) if key < depth else (sheet.owner, sheet.places)
                key -= 0 if key < depth else depth
                seen.append((int(of[row, key]), int(at[row, key])))
            assert sorted(seen) == [(piece, place) for place in range(begin + query - start + 1)]
    # Only what fills up a row is left: it sees itself, so that no softmax is of nothing.
    assert sheet.visible.any(-1).all()
    filled = rows * width - real
    assert int(sheet.visible.sum()) == filled + sum(
        b + q + 1 for n, b in zip(lengths, begins, strict=True) for q in range(n)
    )
    assert rows == len(lengths) if "apart" in how else filled < width * len(lengths) - sum(lengths) or how != {}
    if "mixed" in how:
        assert all(len(set(row[row >= 0].tolist())) < 2 for row in sheet.behind)


def test_rows_are_filled_up_by_shorter_pieces_where_the_least_is_behind():
    sheet = PackedRows.of([5, 2, 5, 3, 2], [9, 1, 1, 1, 1])
    assert sheet.row.tolist() == [0, 2, 1, 2, 3]
    assert sheet.behind.shape == (4, 9)
    # Of two rows with room, the one with less behind it.
    assert PackedRows.of([4, 4, 5, 1], [7, 2, 1, 1]).row.tolist() == [1, 2, 0, 2]


# ---------------------------------------------------------------------------------------- what it leaves behind


@pytest.mark.parametrize("mode", ["inference", "no_grad", "training", "gradients"])
def test_it_works_in_every_mode_and_leaves_everything_as_it_was(kind, mode):
    model = tiny.model(kind, "gpt2")
    expected = fit(model, steps=3)
    model.train(mode == "training")
    for param in model.parameters():
        param.requires_grad_(mode in ("training", "gradients"))
    context = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    with laws.untouched(model), context():
        found = fit(model, steps=3)
    assert torch.equal(found.delta, expected.delta)
    assert not found.delta.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_a_loss_that_is_not_finite_stops_it_and_leaves_everything_as_it_was(model, monkeypatch, bad, step):
    logits, calls = Runner.logits, []

    def broken(self, *args, **options):
        calls.append(1)
        return logits(self, *args, **options) * (bad if len(calls) == step + 1 else 1)

    with laws.untouched(model), monkeypatch.context() as patch:
        patch.setattr(Runner, "why_not_packed", lambda *_: "")  # which runs the model too, to see whether it can
        patch.setattr(Runner, "logits", broken)
        with pytest.raises(RuntimeError, match=rf"the loss of .* is (nan|inf) at step {step}.*float32"):
            fit(model)


def test_a_value_that_is_not_finite_stops_it_too(model):
    with laws.untouched(model), pytest.raises(RuntimeError, match=r"not finite|the loss is"):
        fit(model, lr=1e30, clamp=1e38)


@pytest.mark.parametrize("arch", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("fails", [False, True], ids=["done", "interrupted"])
def test_no_graph_is_kept_so_that_the_model_can_still_be_copied(kind, arch, fails, monkeypatch):
    model = tiny.model(kind, arch)
    if fails:

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("tl_factedit.editing.adam.Adam.step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(model, steps=2)
    else:
        fit(model, steps=2)
    held = [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    assert all(value.grad_fn is None for value in held)
    assert torch.equal(laws.logits(copy.deepcopy(model)), laws.logits(model))


# ---------------------------------------------------------------------------------------- bad choices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, needed at least 1"),
        ({"kl_at": "start"}, "kl_at 'start' is unknown"),
        ({"kl_prompts": "{} is a"}, r"kl_prompts is the string .*write \['{} is a'\]"),
    ],
)
def test_bad_choices_are_refused_at_once(options, message):
    choice = ValueFit()
    for name, value in options.items():  # past the type checker of these tests
        object.__setattr__(choice, name, value)
    with pytest.raises(ValueError, match=message):
        choice.__post_init__()


@pytest.mark.parametrize("contexts", [(), ("What is it ? ",)], ids=["none", "no bare one"])
def test_the_bare_context_comes_first(model, contexts):
    with pytest.raises(ValueError, match="must begin with the bare one"):
        fit(model, contexts=contexts)


@pytest.mark.parametrize("template", ["He is a", "{} and {}"])
def test_kl_prompts_are_templates(model, template):
    with pytest.raises(ValueError, match="needed exactly one"):
        fit(model, kl_prompts=(template,))


# ---------------------------------------------------------------------------------------- contexts


@pytest.fixture(scope="module")
def drawn(model):
    return fe.stats.SampledContexts(lengths=((3, 4), (2, 7)), seed=5).draw(model)


def test_contexts_are_the_bare_one_and_as_many_samples_as_asked(model, drawn):
    assert drawn[0] == ""
    assert len(drawn) == 6
    assert all(context.endswith(". ") for context in drawn[1:])
    words = [len(context.removesuffix(". ").split()) for context in drawn[1:]]
    assert all(count <= most for count, most in zip(words, (4, 4, 4, 7, 7), strict=True))
    assert words[3] > 4 or words[4] > 4


def test_contexts_are_decided_by_the_seed_alone(model, drawn):
    sampler = fe.stats.SampledContexts(lengths=((3, 4), (2, 7)), seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        with laws.untouched(model):
            assert sampler.draw(model) == drawn
    assert fe.stats.SampledContexts(lengths=((3, 4), (2, 7)), seed=6).draw(model) != drawn


def test_likelier_tokens_only(model):
    greedy = fe.stats.SampledContexts(lengths=((4, 5),), top_k=1).draw(model)
    assert len(set(greedy[1:])) == 1


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_both_classes_draw_the_same_contexts(arch):
    sampler = fe.stats.SampledContexts(lengths=((4, 5),))
    assert sampler.draw(tiny.bridge(arch)) == sampler.draw(tiny.hooked(arch))


def test_sampled_texts_are_decided_by_the_seed_alone(model):
    with laws.untouched(model):
        texts = fe.stats.sample_texts(model, 25, length=10, seed=3, progress=False)
    assert len(texts) == 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert fe.stats.sample_texts(model, 25, length=10, seed=3, progress=False) == texts
    assert fe.stats.sample_texts(model, 25, length=10, seed=4, progress=False) != texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0, needed at least 1"),
        ({"length": 65}, "reads: 64 tokens"),
        ({"batch": 0}, "batch is 0, needed at least 1"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_sampled_are_refused(model, options, message, monkeypatch):
    assert model.cfg.n_ctx == 64
    with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
        fe.stats.sample_texts(model, 10, **options)
    assert len(fe.stats.sample_texts(model, 10, length=64, progress=False)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (10, 5)}, "lengths has 10, needed pairs"),
        ({"lengths": ((10, 0),)}, r"lengths has \(10, 0\), needed pairs"),
        ({"starts": "The"}, r"starts is the string 'The', needed a list: write \['The'\]"),
        ({"top_k": 0}, "top_k is 0, needed at least 1"),
    ],
)
def test_contexts_that_cannot_be_sampled_are_refused(options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        fe.stats.SampledContexts(**options)
    if isinstance(error.value, ValueError):  # and not this suite's own check of types, which comes first
        error.match(message)
