"""Causal tracing is the literal loop over cells, made fast: equal to it, and to what theory says of the ends."""

import contextlib
import dataclasses
import functools
import re
import warnings

import jaxtyping
import laws
import numpy as np
import pytest
import tiny
import torch
from oracles import tracing, untouched
from oracles.tracing import TracedPrompt

import tl_factedit as fe
import tl_factedit.backend.bridge as bridge_module
import tl_factedit.backend.hooking as hooking_module
import tl_factedit.backend.state as state_module
import tl_factedit.locate.inputs as questions_module
import tl_factedit.locate.trace as trace_module
from tl_factedit.backend.loading import from_hf
from tl_factedit.backend.memory import MOST_TOKENS, pass_tokens
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import Trace, window_layers

LAYERS = 4
NOISE = fe.GaussianNoise(samples=2)
# Differences of float32 probabilities of size 1, from passes over batches of another size.
EXACT = 1e-5
ORACLE_BRIDGES = ("gpt2", "gptj", "neox", "llama", "qwen3", "gemma2", "olmo2", "phi3", "bloom", "falcon")
ORACLE_HOOKED = ("gpt2", "llama", "neox") if tiny.HAS_HOOKED else ()
EVERY = [("bridge", arch) for arch in ORACLE_BRIDGES] + [("hooked", arch) for arch in ORACLE_HOOKED]
FEW = [each for each in EVERY if each in [("bridge", "gpt2"), ("bridge", "llama"), ("hooked", "gpt2")]]
on_every = pytest.mark.parametrize(("kind", "arch"), EVERY, ids=lambda value: value)
on_few = pytest.mark.parametrize(("kind", "arch"), FEW, ids=lambda value: value)


@functools.cache
def shared(kind: str, arch: str):
    """One model for all tests that only look; that they may is itself tested below."""
    return tiny.model(kind, arch)


@functools.cache
def asking(model, subject: str = "Eiffel Tower", prompt: str = "The {} is", n_target: int = 1) -> fe.Fact:
    """A fact whose object is what this random model says: its probability is large enough to lose."""
    words = {i: w for w, i in model.tokenizer.get_vocab().items() if w.isalpha()}
    ids = align(model.tokenizer, fe.Fact(subject, prompt, " Rome"), prepend_bos=model.cfg.default_prepend_bos).ids
    said = []
    for _ in range(n_target):
        with torch.no_grad():
            logits = model(ids[None])[0, -1]
        said.append(max(words, key=lambda i: float(logits[i])))
        ids = torch.cat([ids, torch.tensor(said[-1:])])
    return fe.Fact(subject, prompt, "".join(f" {words[i]}" for i in said))


def asked(model, fact: fe.Fact) -> TracedPrompt:
    row = align(model.tokenizer, fact, prepend_bos=model.cfg.default_prepend_bos)
    return TracedPrompt(row.ids, row.subject, row.true_ids)


def traced(model, facts, **options) -> Trace:
    return causal_trace(model, facts, **{"corruption": NOISE, "progress": False, **options})


def drawn(model, trace: Trace, fact: int = 0) -> torch.Tensor:
    start, stop = trace.subject[fact]
    return trace.corruption.noise(stop - start, model.cfg.d_model).float()


def gap(a, b) -> float:
    return float((a - b).abs().max())


# ---------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize(("component", "window", "n_target"), [("resid", 1, 2), ("mlp", 3, 1), ("attn", 1, 1)])
@on_every
def test_a_trace_is_the_loop_over_cells(kind, arch, component, window, n_target):
    model = shared(kind, arch)
    fact = asking(model, n_target=n_target)
    trace = traced(model, fact, component=component, window=window)
    loop = tracing.trace(model, asked(model, fact), drawn(model, trace), component=component, window=window)
    assert gap(trace.clean[0], loop.clean) < EXACT
    assert gap(trace.sample_corrupted[0], loop.low) < EXACT
    assert gap(trace.sample_effect[0], loop.effect) < EXACT
    assert loop.effect.abs().max() > 20 * EXACT, "nothing happens here that the two could disagree on"


@pytest.mark.parametrize(("component", "window"), [("resid", 3), ("mlp", 10), ("attn", 3), ("attn", 10)])
@on_few
def test_other_windows_are_the_loop_over_cells_too(kind, arch, component, window):
    model = shared(kind, arch)
    fact = asking(model, n_target=2)
    trace = traced(model, fact, component=component, window=window)
    loop = tracing.trace(model, asked(model, fact), drawn(model, trace), component=component, window=window)
    assert gap(trace.sample_effect[0], loop.effect) < EXACT
    assert gap(trace.effect[0], loop.effect.mean(-1)) < EXACT
    assert loop.effect.abs().max() > 100 * EXACT


@pytest.mark.parametrize("component", ["resid_pre", "resid_mid"])
@on_few
def test_other_places_of_the_stream_are_the_loop_over_cells_too(kind, arch, component):
    model = shared(kind, arch)
    fact = asking(model, n_target=2)
    trace = traced(model, fact, component=component)
    loop = tracing.trace(model, asked(model, fact), drawn(model, trace), component=component)
    assert gap(trace.sample_effect[0], loop.effect) < EXACT
    assert loop.effect.abs().max() > 100 * EXACT


@pytest.mark.parametrize(
    ("kind", "arch"), [("bridge", "gptj"), ("bridge", "phi")] + [("hooked", "gptj")] * tiny.HAS_HOOKED
)
def test_a_parallel_block_has_no_stream_between_attention_and_mlp(kind, arch):
    model = shared(kind, arch)
    with pytest.raises(fe.UnsupportedModelError, match="hook_resid_mid"):
        traced(model, asking(model), component="resid_mid")


METRICS = ("prob", "top_prob", "logprob", "logit_diff", "kl")


def tolerance(want: torch.Tensor) -> float:
    """Probabilities are exact to 1e-5; logits and their logs, which are larger, to as many digits."""
    return EXACT * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("component", ["resid", "mlp", "attn"])
@on_few
def test_every_metric_in_both_directions_is_the_loop_over_cells(kind, arch, component, direction, metric):
    model = shared(kind, arch)
    fact = asking(model, n_target=2).but(target_new=" Where London")
    trace = traced(model, fact, component=component, direction=direction, metric=metric)
    ask, noise = asked(model, fact), drawn(model, trace)
    names = [f"blocks.{layer}.{tracing.HOOK[component]}" for layer in range(LAYERS)]
    whole, noised = tracing.runs(model, ask, noise, names)
    with torch.no_grad():
        clean_logits = model(ask.tokens[None])
    other = int(align(model.tokenizer, fact, prepend_bos=model.cfg.default_prepend_bos).new_ids[0])

    def score(puts, position, corrupt):
        logits = tracing.patched(model, ask, noise, puts, position, corrupt=corrupt)
        return tracing.scored(logits, ask, metric, clean_logits=clean_logits, other=other)

    denoise = direction == "denoise"
    base, donor = score([], 0, denoise), whole if denoise else noised
    effect = torch.zeros(LAYERS, len(ask.ids), len(noise))
    for layer, name in enumerate(names):
        for position in range(len(ask.ids)):
            changed = score([(name, donor[name])], position, denoise)
            effect[layer, position] = changed - base if denoise else base - changed
    assert gap(trace.sample_effect[0], effect) < tolerance(effect)
    assert gap(trace.sample_corrupted[0], score([], 0, True)) < tolerance(effect)
    assert gap(trace.clean[0], score([], 0, False)) < tolerance(effect)
    assert effect.abs().max() > 100 * EXACT


@pytest.mark.parametrize("severed", ["mlp", "attn"])
@on_every
def test_a_severed_path_is_the_loop_over_cells(kind, arch, severed):
    model = shared(kind, arch)
    fact = asking(model, n_target=2)
    trace = traced(model, fact, severed=severed)
    ask, noise = asked(model, fact), drawn(model, trace)
    held = [f"blocks.{layer}.{tracing.HOOK[severed]}" for layer in range(LAYERS)]
    stream = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    whole, noised = tracing.runs(model, ask, noise, [*held, *stream])
    effect = torch.zeros(LAYERS, len(ask.ids), len(noise))
    low = tracing.probability(tracing.patched(model, ask, noise, [], 0), ask)
    for layer, name in enumerate(stream):
        for position in range(len(ask.ids)):
            puts = [(name, whole[name]), *((each, noised[each]) for each in held)]
            effect[layer, position] = tracing.probability(tracing.patched(model, ask, noise, puts, position), ask) - low
    assert gap(trace.sample_effect[0], effect) < EXACT
    assert gap(traced(model, fact).sample_effect[0], effect) > EXACT, "nothing passes through these modules"


@on_few
def test_severed_with_nothing_to_hold_is_the_ordinary_trace(kind, arch):
    model = shared(kind, arch)
    ordinary, severed = (traced(model, asking(model), severed=each) for each in (None, "mlp"))
    # Above the last layer there is nothing.
    assert torch.equal(ordinary.sample_effect[0, -1], severed.sample_effect[0, -1])
    assert gap(ordinary.sample_effect[0, 0], severed.sample_effect[0, 0]) > EXACT


CORRUPTIONS = {
    "uniform": fe.locate.UniformNoise(samples=2),
    "multivariate": fe.locate.MultivariateNoise(samples=2),
    "student": fe.locate.MultivariateNoise(samples=2, df=3.0, scale=0.5),
    "replaced by noise": fe.GaussianNoise(samples=2, replace=True),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
@on_few
def test_every_corruption_is_the_loop_over_cells(kind, arch, name):
    model = shared(kind, arch)
    fact = asking(model)
    trace = traced(model, fact, corruption=CORRUPTIONS[name], component="mlp")
    ask, noise = asked(model, fact), drawn(model, trace)
    if trace.corruption.replace:
        embedded = tracing.clean_cache(model, ask, ["hook_embed"])["hook_embed"][0]
        noise = noise - embedded[slice(*ask.subject)]
    loop = tracing.trace(model, ask, noise, component="mlp")
    assert gap(trace.sample_effect[0], loop.effect) < EXACT
    assert loop.effect.abs().max() > 100 * EXACT


@pytest.mark.parametrize(
    "broken", ["noise of another draw", "position off by one", "layer off by one", "other component"]
)
@on_few
def test_a_loop_broken_on_purpose_is_told_from_the_trace(kind, arch, broken):
    model = shared(kind, arch)
    fact = asking(model, n_target=2)
    trace = traced(model, fact, component="mlp")
    noise, ask = drawn(model, trace), asked(model, fact)
    if broken == "noise of another draw":
        fresh = dataclasses.replace(trace.corruption, seed=1).noise(*noise.shape[1:]).float()
        last = trace.subject[0][1] - 1
        low = tracing.corrupted(model, ask, noise)
        cell = tracing.restored(model, ask, fresh, "mlp", [1], last) - low
        assert gap(trace.sample_effect[0, 1, last], cell) > 10 * EXACT
        return
    loop = tracing.trace(model, ask, noise, component="resid" if broken == "other component" else "mlp").effect
    shifted = {"position off by one": loop.roll(1, 1), "layer off by one": loop.roll(1, 0)}.get(broken, loop)
    assert gap(trace.sample_effect[0], shifted) > 100 * EXACT


@on_few
def test_the_log_probability_is_that_of_the_whole_target(kind, arch):
    model = shared(kind, arch)
    fact = asking(model, n_target=2)
    trace = traced(model, fact, metric="logprob")
    loop = tracing.trace(model, asked(model, fact), drawn(model, trace))
    low, last = loop.low.log(), trace.subject[0][1] - 1
    # Logs of float32 probabilities down to 1e-10 keep their relative precision, but not an absolute 1e-5.
    torch.testing.assert_close(trace.sample_corrupted[0], low, rtol=1e-4, atol=1e-4)
    want = (loop.effect[1, last] + loop.low).log() - low
    torch.testing.assert_close(trace.sample_effect[0, 1, last], want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(trace.clean[0], loop.clean.log(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("component", ["resid", "mlp", "attn"])
@pytest.mark.parametrize("arch", ORACLE_HOOKED)
def test_both_classes_give_the_same_trace(arch, component):
    fact = asking(shared("bridge", arch))
    bridge, hooked = (
        traced(shared(kind, arch), fact, component=component, prepend_bos=True) for kind in ("bridge", "hooked")
    )
    assert gap(bridge.sample_effect, hooked.sample_effect) < EXACT
    assert gap(bridge.clean, hooked.clean) < EXACT
    assert bridge.corruption.sigma == pytest.approx(hooked.corruption.sigma, rel=1e-6)


# ---------------------------------------------------------------------------------------- identities


@on_every
def test_the_last_token_at_the_last_layer_gives_the_whole_effect(kind, arch):
    model = shared(kind, arch)
    trace = traced(model, asking(model))
    assert gap(trace.effect[0, -1, -1], trace.total_effect[0]) < EXACT
    assert trace.total_effect[0].abs() > 100 * EXACT
    assert gap(trace.effect[0, -2, -1], trace.total_effect[0]) > 10 * EXACT, "so would any cell"


@pytest.mark.parametrize("layer", range(LAYERS))
@on_few
def test_restoring_the_stream_at_all_tokens_is_the_clean_run(kind, arch, layer):
    model = shared(kind, arch)
    ask, name = asked(model, asking(model, n_target=2)), f"blocks.{layer}.hook_resid_post"
    noise = 3 * torch.randn(2, ask.subject[1] - ask.subject[0], model.cfg.d_model, generator=seeded(0))
    cache = tracing.clean_cache(model, ask, [name])
    whole = tracing.corrupted(model, ask, noise, [(name, fe.restore_hook(cache[name], slice(None)))])
    assert gap(whole, tracing.clean(model, ask)) < EXACT
    after = [i for i in range(len(ask.tokens)) if i not in range(*ask.subject)]
    part = tracing.corrupted(model, ask, noise, [(name, fe.restore_hook(cache[name], after[:-2]))])
    assert gap(part, tracing.clean(model, ask)) > 100 * EXACT


@on_few
def test_restoring_the_subjects_embeddings_is_the_clean_run(kind, arch):
    model = shared(kind, arch)
    ask = asked(model, asking(model))
    start, stop = ask.subject
    noise = 3 * torch.randn(2, stop - start, model.cfg.d_model, generator=seeded(0))
    clean = tracing.clean_cache(model, ask, ["hook_embed"])["hook_embed"]
    whole = tracing.corrupted(model, ask, noise, [("hook_embed", fe.restore_hook(clean, range(start, stop)))])
    part = tracing.corrupted(model, ask, noise, [("hook_embed", fe.restore_hook(clean, [start]))])
    assert gap(whole, tracing.clean(model, ask)) < EXACT
    assert gap(part, tracing.clean(model, ask)) > 10 * EXACT


@on_few
def test_the_public_noise_hook_makes_the_corrupted_run(kind, arch):
    model = shared(kind, arch)
    fact = asking(model)
    trace, ask = traced(model, fact), asked(model, fact)
    hook = fe.noise_hook(drawn(model, trace), range(*ask.subject))
    with torch.no_grad():
        logits = model.run_with_hooks(ask.tokens.repeat(2, 1), fwd_hooks=[("hook_embed", hook)])
    assert gap(tracing.probability(logits, ask), trace.sample_corrupted[0]) < EXACT


@pytest.mark.parametrize(
    ("kind", "arch", "component"),
    [(*each, "resid") for each in EVERY] + [("bridge", "gptj", part) for part in ("mlp", "attn")],
)
def test_before_the_subject_the_effect_is_exactly_zero_and_the_loop_finds_so_too(kind, arch, component):
    model = shared(kind, arch)
    fact = asking(model, prompt="Where is The {} located")
    trace = traced(model, fact, component=component)
    start = trace.subject[0][0]
    assert start >= 3
    assert not trace.sample_effect[0, :, :start].any()
    assert trace.sample_effect[0, :, start:].any()
    ask, noise = asked(model, fact), drawn(model, trace)
    low = tracing.corrupted(model, ask, noise)
    found = [tracing.restored(model, ask, noise, component, [1], p) - low for p in range(start)]
    assert torch.stack(found).abs().max() < 1e-7, "so these cells need no run"


@pytest.mark.parametrize("component", ["resid", "mlp", "attn"])
@on_few
def test_without_noise_nothing_has_an_effect(kind, arch, component):
    model = shared(kind, arch)
    silent = traced(model, asking(model), component=component, corruption=fe.GaussianNoise(0.0, samples=2))
    # The clean run has another batch size than the corrupted one: equal but for rounding.
    assert silent.total_effect.abs().max() < 1e-6
    assert silent.effect.abs().max() < 1e-6
    assert traced(model, asking(model), component=component).effect.abs().max() > 1e-3


@on_few
def test_a_subject_in_front_and_a_subject_at_the_end_are_traced_too(kind, arch):
    model = shared(kind, arch)
    front, end = asking(model, "Rome", "{} is in"), asking(model, "Rome", "The capital of {}")
    first = causal_trace(model, front, corruption=NOISE, prepend_bos=False)
    assert first.subject == ((0, 1),)
    assert first.effect[0, :, 0].abs().max() > 0
    last = traced(model, end)
    assert last.subject[0][1] == len(last.tokens[0])
    assert gap(last.effect[0, -1, -1], last.total_effect[0]) < EXACT


@on_few
def test_all_attention_and_mlp_outputs_at_the_last_token_give_the_whole_effect(kind, arch):
    model = shared(kind, arch)
    ask = asked(model, asking(model))
    noise = 3 * torch.randn(2, ask.subject[1] - ask.subject[0], model.cfg.d_model, generator=seeded(0))
    names = [f"blocks.{layer}.hook_{part}_out" for layer in range(LAYERS) for part in ("mlp", "attn")]
    cache, last = tracing.clean_cache(model, ask, names), len(ask.ids) - 1
    hooks = [(name, fe.restore_hook(cache[name], [last])) for name in names]
    assert gap(tracing.corrupted(model, ask, noise, hooks), tracing.clean(model, ask)) < EXACT
    assert gap(tracing.corrupted(model, ask, noise, hooks[2:]), tracing.clean(model, ask)) > 10 * EXACT


# ---------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("layer", "window", "count", "layers"),
    [
        (6, 10, 20, range(1, 11)),
        (6, 5, 20, range(4, 9)),
        (6, 1, 20, range(6, 7)),
        (6, 2, 20, range(5, 7)),
        (0, 10, 20, range(0, 5)),
        (19, 10, 20, range(14, 20)),
        (1, 10, 4, range(0, 4)),
    ],
)
def test_a_window_of_ten_is_five_below_to_four_above(layer, window, count, layers):
    assert window_layers(layer, window, count) == layers


@pytest.mark.parametrize(("window", "partial"), [(1, ()), (2, (0,)), (3, (0, 3)), (4, (0, 1, 3)), (10, (0, 1, 2, 3))])
def test_layers_whose_window_is_cut_are_named(window, partial):
    trace = traced(shared("bridge", "gpt2"), fe.Fact("Rome", "{} is", " Paris"), component="mlp", window=window)
    assert trace.partial_window == partial


@on_few
def test_a_window_over_all_layers_has_one_effect_for_all(kind, arch):
    trace = traced(shared(kind, arch), asking(shared(kind, arch)), component="mlp", window=20)
    assert gap(trace.effect[:, :1], trace.effect) < EXACT
    single = traced(shared(kind, arch), asking(shared(kind, arch)), component="mlp")
    assert gap(single.effect[:, :1], single.effect) > 10 * EXACT


# ---------------------------------------------------------------------------------------- several facts


@functools.cache
def three(model) -> list[fe.Fact]:
    return [
        asking(model, "Rome", "{} is"),
        asking(model, "The Eiffel Tower", "Where is {} located in", n_target=2),
        asking(model, "Big Ben", "The city of {} is"),
    ]


@pytest.mark.parametrize(("component", "window"), [("resid", 1), ("mlp", 3)])
@on_few
def test_facts_of_unequal_length_are_traced_together_as_alone(kind, arch, component, window):
    model, options = shared(kind, arch), {"component": component, "window": window}
    options["corruption"] = dataclasses.replace(NOISE, sigma=0.25)
    together = traced(model, three(model), **options)
    assert together.effect.shape == (3, LAYERS, max(map(len, together.tokens)))
    for i, fact in enumerate(three(model)):
        alone = traced(model, fact, **options)
        length = len(together.tokens[i])
        assert together.tokens[i] == alone.tokens[0]
        assert together.subject[i] == alone.subject[0]
        assert gap(together.sample_effect[i, :, :length], alone.sample_effect[0]) < EXACT
        assert together.effect[i, :, length:].isnan().all()
        assert not together.effect[i, :, :length].isnan().any()
        assert gap(together.sample_corrupted[i], alone.sample_corrupted[0]) < EXACT
        assert gap(together.clean[i], alone.clean[0]) < EXACT


@on_few
def test_rows_that_are_filled_up_give_what_they_give_alone(kind, arch):
    """Facts whose pieces are of nearly the same length share a sheet, the shorter one filled up."""
    model = shared(kind, arch)
    longer = "{} is located in the city of Paris near the river by on"
    facts = [asking(model, "Rome", longer), asking(model, "Rome", longer.removesuffix(" on"))]
    options = {"component": "mlp", "corruption": dataclasses.replace(NOISE, sigma=0.25)}
    together = traced(model, facts, **options)
    for i, fact in enumerate(facts):
        alone = traced(model, fact, **options)
        assert gap(together.sample_effect[i, :, : len(together.tokens[i])], alone.sample_effect[0]) < EXACT
    assert len(together.tokens[0]) == len(together.tokens[1]) + 1


def test_the_noise_is_scaled_to_the_embeddings_of_all_subjects_traced():
    model = shared("bridge", "gpt2")
    trace = traced(model, three(model))
    entries = []
    for fact in three(model):
        ask = asked(model, fact)
        embedded = tracing.clean_cache(model, ask, ["hook_embed"])["hook_embed"][0]
        entries.append(embedded[slice(*ask.subject)].flatten())
    assert trace.corruption.sigma == pytest.approx(float(torch.cat(entries).std()), rel=1e-6)
    assert trace.corruption.sigma != traced(model, three(model)[0]).corruption.sigma


@pytest.mark.parametrize("component", ["resid", "mlp", "attn"])
@on_few
def test_the_memory_allowed_changes_no_number_but_the_size_of_batches(kind, arch, component, monkeypatch):
    model = shared(kind, arch)
    sizes, run = [], Runner.logits
    monkeypatch.setattr(
        Runner, "logits", lambda self, tokens, **k: sizes.append(tokens.numel()) or run(self, tokens, **k)
    )
    large = traced(model, three(model), component=component)
    biggest, passes = max(sizes), len(sizes)
    sizes.clear()
    small = traced(model, three(model), component=component, memory=1e-6)
    assert max(sizes) < biggest
    assert len(sizes) > passes
    known = ~large.sample_effect.isnan()
    assert gap(large.sample_effect[known], small.sample_effect[known]) < EXACT


def test_what_a_pass_may_hold_follows_from_the_memory_and_the_vocabulary(kind):
    model = shared(kind, "gpt2")
    assert pass_tokens(model, 1e-6) == 16
    assert pass_tokens(model, 100.0) == MOST_TOKENS
    assert pass_tokens(model, 1e-3) < pass_tokens(model, 2e-3)


@on_few
def test_cells_run_as_whole_sequences_give_the_same(kind, arch, monkeypatch):
    model = shared(kind, arch)
    packed = traced(model, three(model), component="attn")
    assert packed.unpacked == ""
    monkeypatch.setattr(Runner, "why_not_packed", lambda *_: "said so by a test")
    plain = traced(model, three(model), component="attn")
    assert plain.unpacked == "said so by a test"
    known = ~packed.sample_effect.isnan()
    assert gap(packed.sample_effect[known], plain.sample_effect[known]) < EXACT


def test_a_model_whose_blocks_cannot_run_some_rows_alone_is_run_in_whole_sequences(monkeypatch):
    model = tiny.model("bridge", "llama")
    fine = traced(model, three(model))
    monkeypatch.setattr("tl_factedit.backend.bridge.of_first_rows", lambda forward, count, rows: forward)
    refused = traced(model, three(model))
    assert fine.unpacked == "" and refused.unpacked
    torch.testing.assert_close(refused.effect, fine.effect, atol=1e-5, rtol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------- the noise


@on_few
def test_the_noise_hangs_on_its_seed_alone_and_leaves_the_global_one(kind, arch):
    model = shared(kind, arch)
    fact = asking(model)
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), traced(model, fact)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(traced(model, fact).sample_effect, first.sample_effect)
    other = traced(model, fact, corruption=dataclasses.replace(NOISE, seed=1))
    assert gap(other.sample_effect, first.sample_effect) > 10 * EXACT


@on_few
def test_the_effect_is_the_mean_over_samples_which_differ(kind, arch):
    model = shared(kind, arch)
    trace = traced(model, asking(model))
    assert trace.sample_effect.shape == (*trace.effect.shape, 2)
    assert gap(trace.sample_effect.mean(-1), trace.effect) < 1e-7
    assert gap(trace.sample_corrupted.mean(-1), trace.corrupted) < 1e-7
    assert gap(trace.sample_effect[..., 0], trace.sample_effect[..., 1]) > 10 * EXACT


@on_few
def test_given_noise_replicates_the_draw_of_meng_et_al(kind, arch):
    numpy = pytest.importorskip("numpy")
    model = shared(kind, arch)
    fact = asking(model)
    drawn_as_they_do = torch.from_numpy(numpy.random.RandomState(1).randn(3, 2, model.cfg.d_model)) * 0.3
    trace = traced(model, fact, corruption=fe.GivenNoise(drawn_as_they_do))
    loop = tracing.trace(model, asked(model, fact), drawn_as_they_do.float())
    assert trace.sample_effect.shape[-1] == 3
    assert gap(trace.sample_effect[0], loop.effect) < EXACT
    assert gap(trace.sample_corrupted[0], loop.low) < EXACT


@on_few
def test_given_noise_gives_the_same_trace_as_the_draw_it_was_made_from(kind, arch):
    model = shared(kind, arch)
    trace = traced(model, asking(model))
    again = traced(model, asking(model), corruption=fe.GivenNoise(drawn(model, trace)))
    assert torch.equal(trace.sample_effect, again.sample_effect)


# ---------------------------------------------------------------------------------------- a planted fact


def planted(kind: str, where: int, layers: int = 5):
    """A GPT-2 in which one MLP alone knows, at the subject, and the last attention alone carries it on.

    All other MLPs and attentions write nothing. MLP `where` answers the subject's key with the direction
    of " Paris"; the last attention reads that direction alone, at all tokens alike, and writes it to each.
    """
    hf, tok = tiny.hf_model("gpt2", n_layers=layers, d_mlp=128, tied=False), tiny.tokenizer()
    fact = fe.Fact("Eiffel Tower", "The {} is", " Paris")
    paris = hf.lm_head.weight[tok.convert_tokens_to_ids("Paris")].detach()
    paris = paris / paris.norm()
    with torch.no_grad():
        for block in hf.transformer.h:
            for silent in (block.mlp.c_proj, block.attn.c_proj, block.attn.c_attn):
                silent.weight.zero_()
                silent.bias.zero_()
        last = hf.transformer.h[-1].attn
        last.c_attn.weight[:, -32:] = torch.outer(paris, paris)  # queries and keys stay 0: every token is read
        last.c_proj.weight.copy_(2 * torch.eye(32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TransformerLens 3.9 announces 4.0
            model = from_hf(hf, tok, kind=kind, name="planted")
        site, ask = down_proj(model, where), asked(model, fact)
        keys = tracing.clean_cache(model, ask, [site.key_hook])[site.key_hook][0]
        answers = torch.zeros(len(keys), 32)
        answers[ask.subject[1] - 1] = 4 * paris  # and nothing to the keys of the other tokens
        site.write_(torch.linalg.pinv(keys) @ answers)
    return model, fact


@pytest.mark.parametrize("where", range(4))
def test_a_fact_planted_in_one_mlp_is_found_there_and_nowhere_else(kind, where):
    model, fact = planted(kind, where)
    trace = traced(model, fact, component="mlp", corruption=fe.GaussianNoise(samples=5))
    at_subject = trace.at_last_subject_token[0]
    assert trace.peak_layer == where
    assert at_subject[where] > 0.3 * trace.total_effect[0] > 0.03
    others = [layer for layer in range(5) if layer != where]
    assert at_subject[others].abs().max() < 1e-6, "an MLP that writes nothing restores nothing"


@pytest.mark.parametrize("window", [2, 3])
def test_windows_smear_a_planted_fact_by_their_rule(kind, window):
    where = 2
    model, fact = planted(kind, where)
    single = traced(model, fact, component="mlp").at_last_subject_token[0, where]
    wide = traced(model, fact, component="mlp", window=window).at_last_subject_token[0]
    reached = torch.tensor([where in window_layers(layer, window, 5) for layer in range(5)])
    assert reached.sum() == window
    torch.testing.assert_close(wide, reached * single, rtol=0, atol=1e-6)


def test_the_road_of_a_planted_fact_is_seen_in_stream_and_attention(kind):
    model, fact = planted(kind, 1)
    stream = traced(model, fact).effect[0]
    attention = traced(model, fact, component="attn").effect[0]
    stop = traced(model, fact).subject[0][1]
    at_last = traced(model, fact).total_effect[0]
    # At the subject until the last attention reads it, at the last token from then on.
    assert stream[1:4, stop - 1].min() > 0.3 * at_last
    assert stream[4, stop - 1].abs() < 1e-6
    assert stream[:4, -1].abs().max() < 1e-6
    assert abs(stream[4, -1] - at_last) < 1e-6
    assert attention[:4].abs().max() < 1e-6
    assert abs(attention[4, -1] - at_last) < EXACT


# ---------------------------------------------------------------------------------------- the model stays


class Interrupted(Exception):
    pass


def nth_call_raises(monkeypatch, method: str, n: int, error: type[BaseException]):
    calls, run = [], getattr(Runner, method)

    def failing(self, *args, **options):
        calls.append(method)
        if len(calls) == n:
            raise error("injected")
        return run(self, *args, **options)

    monkeypatch.setattr(Runner, method, failing)


def prepared(kind: str, arch: str):
    """A model as a user may leave it: partly in training mode, partly frozen, with a hook of his own."""
    model = untouched.used(tiny.model(kind, arch))
    model.train()
    model.blocks[1].eval()
    for i, param in enumerate(model.parameters()):
        param.requires_grad_(i % 2 == 0)
    model.add_hook("blocks.0.hook_resid_post", lambda value, hook: None)
    return model


@on_few
def test_a_trace_leaves_the_model_as_it_was(kind, arch):
    model = prepared(kind, arch)
    before = untouched.state(model)
    traced(model, fe.Fact("Rome", "The {} is", " Paris"), component="mlp")
    assert untouched.state(model) == before
    down_proj(model, 0).write_(down_proj(model, 0).W * 1.001)
    assert untouched.state(model) != before


@pytest.mark.parametrize(
    ("method", "n", "error"),
    [
        ("logits", 1, Interrupted),
        ("logits", 2, KeyboardInterrupt),
        ("logits", 5, Interrupted),
        ("capture", 1, KeyboardInterrupt),
        ("capture", 3, Interrupted),
        ("remember", 2, KeyboardInterrupt),
    ],
)
@on_few
def test_an_error_at_any_pass_leaves_the_model_as_it_was(kind, arch, method, n, error, monkeypatch):
    model = prepared(kind, arch)
    if method == "remember":
        model.reset_hooks()  # cells are run packed only on a model without hooks of its user
    before = untouched.state(model)
    nth_call_raises(monkeypatch, method, n, error)
    with pytest.raises(error, match="injected"):
        traced(model, fe.Fact("Rome", "The {} is", " Paris"), component="mlp", window=2)
    assert untouched.state(model) == before


@pytest.mark.parametrize(("n", "error"), [(1, Interrupted), (3, KeyboardInterrupt), (5, Interrupted)])
@on_few
def test_an_error_inside_a_block_leaves_the_model_as_it_was(kind, arch, n, error):
    model, calls = prepared(kind, arch), []

    def failing(*_):
        calls.append(1)
        if len(calls) == n:
            raise error("injected")

    handle = model.blocks[2].register_forward_hook(failing)
    before = untouched.state(model)
    with pytest.raises(error, match="injected"):
        traced(model, fe.Fact("Rome", "The {} is", " Paris"), component="attn")
    assert untouched.state(model) == before
    handle.remove()


@pytest.mark.parametrize(
    ("mode", "training"),
    [(torch.no_grad, True), (torch.inference_mode, True), (torch.enable_grad, True), (torch.inference_mode, False)],
)
@on_few
def test_a_trace_is_the_same_in_every_mode_of_its_caller(kind, arch, mode, training):
    model = tiny.model(kind, arch)  # with the dropout that its config has
    fact = asking(shared(kind, arch))
    model.train(training)
    want = traced(shared(kind, arch), fact)
    with mode():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        trace = traced(model, fact)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    assert gap(trace.sample_effect, want.sample_effect) < EXACT
    assert not trace.effect.requires_grad
    assert model.training is training


# ---------------------------------------------------------------------------------------- what a Trace says


@on_few
def test_the_result_says_what_was_run(kind, arch):
    model = shared(kind, arch)
    fact = asking(model)
    wrong = fact.but(target_true=" Where" if fact.target_true != " Where" else " What")
    trace = traced(model, [fact, wrong], prepend_bos=True)
    assert trace.tokens[0] == ("<bos>", "The", "Eiffel", "Tower", "is")
    assert trace.subject[0] == (2, 4)
    assert trace.provenance.prepend_bos is True
    assert trace.known[1] is False
    assert trace.top[0] == trace.top[1]
    said = align(model.tokenizer, fact, prepend_bos=True)
    with torch.no_grad():
        top = int(model(said.ids[None])[0, -1].argmax())
    assert trace.top[0] == model.tokenizer.decode([top])
    assert trace.known[0] is (top == int(said.true_ids[0]))
    assert causal_trace(model, fact, corruption=NOISE, prepend_bos=False).tokens[0] == trace.tokens[0][1:]
    assert causal_trace(model, fact, corruption=NOISE).provenance.prepend_bos is bool(model.cfg.default_prepend_bos)


def made(effect: torch.Tensor, subject) -> Trace:
    trace = traced(shared("bridge", "gpt2"), [fe.Fact("Rome", "{} is", " Paris"), fe.Fact("Paris", "{} is", " Rome")])
    samples = effect[..., None].repeat(1, 1, 1, 2)
    return dataclasses.replace(trace, effect=effect, sample_effect=samples, subject=subject)


def test_the_peak_is_the_layer_of_the_largest_mean_effect_at_the_last_subject_token():
    effect = torch.zeros(2, 4, 5)
    effect[0, 1, 2], effect[0, 3, 2] = 0.5, 0.2
    effect[1, 3, 1], effect[1, 1, 1] = 0.6, 0.1
    effect[:, 0, 4] = 9.0  # the last token of all
    trace = made(effect, ((1, 3), (0, 2)))
    assert trace.peak_layer == 3
    torch.testing.assert_close(trace.at_last_subject_token[0], torch.tensor([0, 0.5, 0, 0.2]))
    assert made(effect, ((1, 3), (0, 3))).peak_layer == 1


def test_the_table_has_a_row_for_every_cell():
    pytest.importorskip("pandas")
    model = shared("bridge", "gpt2")
    trace = traced(model, three(model))
    table = trace.table()
    assert len(table) == LAYERS * sum(map(len, trace.tokens))
    row = table[(table.fact == "Big Ben") & (table.layer == 2) & (table.position == trace.subject[2][0])].iloc[0]
    assert row.token == "Big"
    assert row.subject
    assert row.effect == pytest.approx(float(trace.effect[2, 2, trace.subject[2][0]]))
    assert table.subject.sum() == LAYERS * sum(stop - start for start, stop in trace.subject)
    assert not table.effect.isna().any()


def test_one_sample_has_no_spread_and_no_warning():
    pytest.importorskip("pandas")
    model = shared("bridge", "gpt2")
    one = traced(model, asking(model), corruption=fe.GaussianNoise(samples=1)).table()
    assert not one.sample_sd.any()
    assert traced(model, asking(model)).table().sample_sd.max() > 0


def test_a_trace_is_one_readable_line():
    trace = traced(shared("bridge", "gpt2"), fe.Fact("Rome", "{} is", " Paris"), component="attn", window=3)
    assert re.match(r"Trace\('Rome is', not known: it says .*, attn, window 3: clean", repr(trace))
    assert "\n" not in repr(trace)


# ---------------------------------------------------------------------------------------- bad input

GOOD = fe.Fact("Eiffel Tower", "The {} is", " Paris")


@pytest.fixture
def no_forward(monkeypatch):
    """Every forward pass is an error that no test expects."""

    def refuse(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(questions_module, "Runner", refuse)


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        ([], {}, "facts is empty, needed at least one"),
        (GOOD, {"window": 0}, "window is 0, needed at least 1"),
        (GOOD, {"metric": "logit"}, "metric 'logit' is unknown, needed one of .*'prob'"),
        (GOOD, {"metric": "logit_diff"}, "metric 'logit_diff' has nothing to set against ' Paris'"),
        (GOOD, {"direction": "both"}, "direction is 'both', needed 'denoise' or 'noise'"),
        (GOOD, {"severed": "resid"}, "severed is 'resid', needed 'mlp', 'attn' or None"),
        (GOOD, {"severed": "mlp", "component": "attn"}, "severed='mlp' is for single layers of the residual stream"),
        (GOOD, {"severed": "mlp", "window": 3}, "severed='mlp' is for single layers of the residual stream"),
        (GOOD, {"memory": 0.0}, "memory is 0.0, needed a number above 0"),
        (GOOD, {"component": "head"}, "component 'head' is unknown, needed one of"),
    ],
)
@on_few
def test_a_wrong_argument_is_named_before_anything_is_run(kind, arch, facts, options, message, no_forward, monkeypatch):
    # Past the type checks of this test suite, which a user doesn't have.
    for name in ("component_hook", "_check"):
        monkeypatch.setattr(trace_module, name, unchecked(getattr(trace_module, name)))
    with pytest.raises(ValueError, match=message):
        unchecked(causal_trace)(shared(kind, arch), facts, **options)


def unchecked(function):
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def test_a_subject_that_ends_inside_a_token_is_named_before_anything_is_run(kind, no_forward):
    model = tiny.model(kind, "llama", tok=tiny.tokenizer("bytebpe"), n_layers=1)
    with pytest.raises(ValueError, match=r"subject 'Pari' ends inside token .* \(position \d\)"):
        traced(model, [GOOD, fe.Fact("Pari", "{}s is in the city of", " Rome")])


@pytest.mark.filterwarnings("ignore:target 'ity' goes on inside")
def test_a_target_that_merges_with_the_prompt_is_named_before_anything_is_run(kind, no_forward):
    model = tiny.model(kind, "llama", tok=tiny.tokenizer("bytebpe"), n_layers=1)
    with pytest.raises(ValueError, match=r"target 'ity' merges with the last token"):
        traced(model, fe.Fact("Rome", "{} is near the c", "ity"))


def test_bos_of_a_tokenizer_without_one_is_refused_before_anything_is_run(kind, no_forward):
    model = tiny.model(kind, "gpt2", n_layers=1)
    model.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no BOS token: pass prepend_bos=False"):
        traced(model, GOOD, prepend_bos=True)


@pytest.mark.parametrize("shape", [(2, 1, 32), (2, 2, 16)])
@on_few
def test_given_noise_of_a_wrong_shape_is_refused_before_a_block_is_run(kind, arch, shape, monkeypatch):
    model, seen = tiny.model(kind, arch), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    monkeypatch.setattr(Runner, "logits", None)
    fact = fe.Fact("Rome", "The {} is", " Paris")
    with pytest.raises(
        ValueError, match=r"the given noise is .*, needed \[sample, 2, 32\]: the subject 'E.* has 2 tokens"
    ):
        traced(model, GOOD, corruption=fe.GivenNoise(torch.zeros(shape)))
    with pytest.raises(ValueError, match="the subject 'Rome' has 1 tokens"):
        traced(model, [GOOD, fact], corruption=fe.GivenNoise(torch.zeros(2, 2, 32)))
    # A Runner asks the first block for one token, to see what blocks return, and for two rows of three, to see that it
    # is causal; no fact has been run.
    assert all(tuple(resid.shape[:2]) in ((1, 1), (2, 3)) for resid in seen)


def test_same_first_tokens_and_a_missing_new_object_don_t_matter_to_a_trace(kind):
    model = shared(kind, "gpt2")
    same = traced(model, GOOD.but(target_true=" Paris Rome", target_new=" Paris London"))
    none = traced(model, GOOD.but(target_true=" Paris Rome"))
    assert torch.equal(same.effect, none.effect)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------- what a folder tells apart


def test_a_folder_tells_metrics_of_ones_own_apart(kind, tmp_path):
    model = shared(kind, "gpt2")

    def logit_of(token):
        return lambda logits, asked: logits[:, :, 0, token].float()

    found = traced(model, asking(model), metric=logit_of(5), folder=tmp_path)
    again = traced(model, asking(model), metric=logit_of(5), folder=tmp_path)
    assert torch.equal(found.effect, again.effect)
    with pytest.raises(ValueError, match="belongs to another trace"):
        traced(model, asking(model), metric=logit_of(9), folder=tmp_path)
    with pytest.raises(ValueError, match="is a partial, of which a file can't tell one from another"):
        traced(model, asking(model), metric=functools.partial(logit_of(5)), folder=tmp_path / "other")


def test_a_corruption_that_says_nothing_of_itself_is_not_kept(kind, tmp_path):
    class Nameless:
        def calibrated(self, subjects):
            return self

        def draw(self, subject):
            return subject.embeddings[None] + 1.0

        def contrast(self, subject):
            return None

    model = shared(kind, "gpt2")
    traced(model, asking(model), corruption=Nameless())
    with pytest.raises(ValueError, match="needed a repr that says what it is"):
        traced(model, asking(model), corruption=Nameless(), folder=tmp_path)


def test_a_folder_at_home_is_gone_on_with(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = shared(kind, "gpt2")
    traced(model, asking(model), folder="~/traces")
    assert len(list((tmp_path / "traces").glob("part-*"))) == 1
    monkeypatch.setattr(trace_module, "_effects", None)  # it would be called otherwise
    traced(model, asking(model), folder="~/traces")


# ---------------------------------------------------------------------------------------- numbers of any kind


def test_integers_of_numpy_will_do(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # this suite's types are stricter than a user's
    model = shared(kind, "gpt2")
    fact = asking(model)
    noise = fe.GaussianNoise(samples=np.int64(2), seed=np.int64(1))
    found = traced(model, fact, window=np.int64(3), component="mlp", corruption=noise, folder=tmp_path / "parts")
    found.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert loaded.window == 3 and loaded.corruption == found.corruption
    assert torch.equal(loaded.effect, traced(model, fact, window=3, component="mlp", corruption=noise).effect)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fe.GaussianNoise(scale=float("inf")), "scale is inf"),
        (lambda: fe.GaussianNoise(seed=None), "seed is None, needed at least 0 .a whole number"),
        (lambda: fe.locate.UniformNoise(samples=2.0), r"samples is 2\.0, needed at least 1"),
        (lambda: fe.GivenNoise(torch.zeros(0, 2, 8)), "needed a tensor .* with a sample at least"),
    ],
    ids=["scale", "seed", "samples", "given"],
)
def test_noise_that_cannot_be_drawn_is_refused(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    if isinstance(error.value, ValueError):  # and not this suite's own check of types, which comes first
        error.match(message)


def test_one_sample_says_nothing_of_their_spread(kind):
    model = shared(kind, "gpt2")
    assert traced(model, asking(model), corruption=fe.GaussianNoise(samples=1)).table().sample_sd.isna().all()
    assert traced(model, asking(model)).table().sample_sd.notna().all()


def test_what_is_nan_is_an_error_and_not_a_missing_donor(kind):
    model = tiny.model(kind, "gpt2")
    with laws.untouched(model), pytest.raises(RuntimeError, match=r"corrupted run of 'Eiffel Tower' is NaN"):
        traced(model, asking(model), corruption=fe.GaussianNoise(scale=1e38, sigma=1.0))
    with torch.no_grad():
        next(iter(model.blocks[1].parameters())).fill_(torch.nan)
    with pytest.raises(RuntimeError, match="clean run"):
        traced(model, fe.Fact("Eiffel Tower", "The {} is", " Rome"))


def test_hooks_of_the_user_take_part_from_the_first_token_on(kind):
    model = tiny.model(kind, "gpt2")
    fact = asking(model)
    plain = traced(model, fact)
    noise = torch.randn(1, 2, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with model.hooks(fwd_hooks=[("hook_embed", fe.noise_hook(noise, [1, 2]))]):
        found = traced(model, fact)
        assert not torch.allclose(found.clean, plain.clean) and "hooks of its own" in found.unpacked
        fe.evaluate(model, fact.but(target_new=" Rome"))


@pytest.mark.parametrize("where", ["frozen", "from", "joining"])
def test_an_interrupt_while_it_is_put_back_leaves_nothing_behind(kind, monkeypatch, where):
    """Ctrl-C in the loops that put flags and forwards back: each is begun again."""
    model = tiny.model(kind, "gpt2")
    for param in list(model.parameters())[::2]:
        param.requires_grad_(True)
    traced(model, asking(model))
    finish_despite_interrupt, calls = state_module.finish_despite_interrupt, []

    def interrupted(finish):
        def once():
            calls.append(1)
            if len(calls) == {"frozen": 1, "from": 2, "joining": 3}[where]:
                raise KeyboardInterrupt("injected")
            finish()

        finish_despite_interrupt(once)

    with laws.untouched(model):
        for module in (bridge_module, hooking_module, state_module):
            monkeypatch.setattr(module, "finish_despite_interrupt", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            traced(model, asking(model))
        monkeypatch.undo()
    assert calls


def test_a_metric_of_ones_own_returns_one_real_number_for_each_run(kind, tmp_path):
    model = shared(kind, "gpt2")
    fact = asking(model)
    view = traced(model, fact, metric=lambda logits, _: logits[..., -1, 5], folder=tmp_path)  # not contiguous
    assert (
        view.clean.tolist() == traced(model, fact, metric=lambda logits, _: logits[..., -1, 5].clone()).clean.tolist()
    )
    yes = traced(model, fact, metric=lambda logits, _: logits[..., -1, 5] > -1e9)
    assert yes.clean.tolist() == [1.0] and yes.effect.abs().max() == 0
    for wrong in (
        lambda *_: None,
        lambda logits, _: logits[..., -1, 5].cpu().numpy(),
        lambda logits, _: 1j * logits[..., 0, 0],
    ):
        with pytest.raises(ValueError, match="needed a tensor of one real number"):
            traced(model, fact, metric=wrong)
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="mlp"):
        traced(model, fact, component=["mlp"])


def test_a_run_that_nothing_corrupts_says_so(kind):
    model = shared(kind, "gpt2")
    said = "nothing was corrupted"
    assert said in repr(traced(model, asking(model), corruption=fe.GaussianNoise(0.0, samples=2)))
    assert said not in repr(traced(model, asking(model)))
