"""What every method stands on: the live W_out, its key and value, and forwards that begin in the middle."""

import copy
import functools
import inspect
import warnings
from contextlib import nullcontext

import pytest
import tiny
import torch
from oracles import untouched
from torch import nn

import tl_factedit as fe
from tl_factedit.backend.fingerprint import fingerprint
from tl_factedit.backend.hook_names import EMBED, component_hook, resid_post, resid_pre
from tl_factedit.backend.loading import from_hf, from_hub
from tl_factedit.backend.packing import gather
from tl_factedit.backend.protocol import UnsupportedModelError, blocks, bos_policy, check_layer, kind, layout, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj

# Tiny models have logits of size 1 to 10; float32 sums of some hundred terms differ in the sixth digit.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.tensor([[0, 5, 9, 20, 7, 31], [0, 40, 41, 42, 43, 44], [0, 8, 6, 30, 12, 50]])
LAYERS = 4
HOOKED_ONLY = pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")

RAW = [f"bridge-{arch}" for arch in tiny.ARCHITECTURES]
COMPAT = [f"compat-{arch}" for arch in ("gpt2", "llama", "gemma2")]
PLAIN = [f"hooked-{arch}" for arch in tiny.HOOKED if arch not in tiny.MOE]
PROCESSED = [name.replace("hooked", "processed") for name in PLAIN]
POST_NORM = ["postnorm-hooked"] if tiny.HAS_HOOKED else []
ALL = [*RAW, *COMPAT, *PLAIN, *PROCESSED, *POST_NORM]
# Processing changes weights and not the way through the blocks: two processed models are enough there.
PATHS = [name for name in ALL if name not in PROCESSED or name.endswith(("-gpt2", "-llama"))]
FEW = [name for name in ALL if name.split("-")[1] in ("gpt2", "llama", "hooked")]


def build(name: str, **options):
    form, arch = name.split("-")
    if form == "bridge":
        return tiny.bridge(arch, **options)
    if form == "compat":
        model = tiny.bridge(arch, **options)
        model.enable_compatibility_mode()
        return model
    if form == "postnorm":
        return tiny.hooked_config(**options)
    return tiny.hooked(arch, processed=form == "processed", **options)


shared = functools.cache(build)  # for tests that leave a model as it was


def logits(model, tokens=TOKENS, **options):
    with torch.no_grad():
        return Runner(model).logits(tokens, **options)


def values(model, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value at every position, as the hooks see them."""
    site, runner, seen = down_proj(model, layer), Runner(model), []
    with torch.no_grad():
        if isinstance(site.value_at, str):
            kept = runner.capture(TOKENS, [site.key_hook, site.value_at])
            return kept[site.key_hook], kept[site.value_at]
        runner.logits(TOKENS, hooks=[(site.value_at, lambda value, hook: seen.append(value.clone()))])
        return runner.capture(TOKENS, [site.key_hook])[site.key_hook], *seen


def traces(model) -> dict:
    """What a forward could leave behind: hooks, replaced forwards, flags."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            "forward" in vars(module),
            len(getattr(module, "fwd_hooks", ())),
            module.training,
        )
    return found


# ---------------------------------------------------------------------------------------- W_out


@pytest.mark.parametrize("name", ALL)
def test_value_is_key_times_w_out_plus_bias_at_every_position(name):
    model = shared(name)
    site = down_proj(model, 1)
    key, value = values(model, 1)
    assert key.shape == (*TOKENS.shape, site.W.shape[0])
    torch.testing.assert_close(site.value(key), value.double(), **CLOSE)
    torch.testing.assert_close(site.value(key[0, 2]), value[0, 2].double(), **CLOSE)
    assert not torch.allclose(site.value(key), value.double().roll(1, 1), **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_w_out_is_live_and_comes_back_bit_for_bit(name):
    model = build(name)
    site = down_proj(model, 2)
    assert site.W.shape == (site.W.shape[0], model.cfg.d_model)
    before, kept = logits(model), site.W.clone()
    site.write_(kept + torch.randn(kept.shape, generator=torch.Generator().manual_seed(0)))
    assert (logits(model) - before).abs().max() > 1e-2
    assert not torch.equal(down_proj(model, 2).W, kept)
    site.write_(kept)
    assert torch.equal(logits(model), before)
    assert torch.equal(site.param.detach(), down_proj(model, 2).param.detach())


@pytest.mark.parametrize("name", FEW)
def test_the_stacked_w_out_of_the_model_is_a_copy_so_it_is_never_written(name):
    model = build(name)
    before = logits(model)
    with torch.no_grad():
        model.W_out[1].zero_()
    assert torch.equal(logits(model), before)
    assert down_proj(model, 1).W.any()


@pytest.mark.parametrize("name", FEW)
def test_rows_are_keys_also_when_w_out_is_square(name):
    model = build(name, d_mlp=32, d_model=32)
    site = down_proj(model, 1)
    key, value = values(model, 1)
    torch.testing.assert_close(site.value(key), value.double(), **CLOSE)
    wrong = key.double() @ site.W.T.double() + (0 if site.bias is None else site.bias.detach().double())
    assert not torch.allclose(wrong, value.double(), **CLOSE)
    kept = site.W.clone()
    site.write_(kept.clone())
    assert torch.equal(site.W, kept)
    assert site.transposed == (name in ("bridge-llama", "compat-llama"))


def test_writing_keeps_a_frozen_or_trainable_parameter_as_it_is(model):
    site = down_proj(model, 0)
    version = site.param.requires_grad
    site.write_(site.W * 2)
    assert site.param.requires_grad is version
    assert site.param.is_leaf


@pytest.mark.parametrize("layer", [-1, LAYERS, 100])
def test_a_layer_outside_the_model_is_refused_with_those_it_has(model, layer):
    assert n_layers(model) == LAYERS
    for ask in (check_layer, down_proj):
        with pytest.raises(ValueError, match=f"layer {layer} is outside.*has layers 0 to 3"):
            ask(model, layer)
    assert check_layer(model, LAYERS - 1) == LAYERS - 1


MOE = [(k, arch) for arch in tiny.MOE for k in tiny.KINDS if k == "bridge" or arch in tiny.HOOKED]


@pytest.mark.parametrize(("kind", "arch"), MOE)
def test_a_mixture_of_experts_is_refused_by_its_modules_name(kind, arch):
    model = tiny.model(kind, arch)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mlp \(\w+\) has no single W_out: mixture-of"):
        down_proj(model, 1)
    assert fingerprint(model).w_out == ("none",) * LAYERS


def test_a_block_without_mlp_is_refused_by_name():
    model = tiny.bridge("llama")
    del model.blocks[1].mlp
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mlp: this block has no MLP"):
        down_proj(model, 1)
    assert down_proj(model, 0).layer == 0


def owner(model, layer: int) -> tuple[nn.Module, str]:
    """The module that holds a layer's W_out, and the parameter's name there."""
    mlp = model.blocks[layer].mlp
    return (mlp.out.original_component, "weight") if kind(model) == "bridge" else (mlp, "W_out")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: nn.Parameter(p.detach().to(torch.int8), requires_grad=False), "torch.int8"),
        (lambda p: nn.Parameter(p.detach().reshape(-1, 1, 32)), "needed a two-dimensional"),
        (lambda p: nn.Parameter(p.detach().to("meta")), "meta device"),
        (lambda p: nn.Parameter(p.detach()[:5, :5].clone()), r"W_out is \(5, 5\), needed"),
        (lambda p: None, "W_out is NoneType|has no single W_out"),
    ],
    ids=["int8", "three-dimensional", "meta", "shape", "none"],
)
def test_weights_that_cannot_be_edited_in_place_are_refused_by_the_modules_name(model, make, words):
    module, name = owner(model, 1)
    module._parameters[name] = make(module._parameters[name])
    with pytest.raises(UnsupportedModelError, match=words) as error:
        down_proj(model, 1)
    assert "blocks.1.mlp" in str(error.value)
    assert down_proj(model, 0).layer == 0


def test_parameters_made_in_inference_mode_are_refused(model):
    module, name = owner(model, 1)
    with torch.inference_mode():
        module._parameters[name] = nn.Parameter(module._parameters[name].clone(), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mlp: W_out was made inside torch.inference_mode"):
        down_proj(model, 1)


# ---------------------------------------------------------------------------------------- partial forwards


@pytest.mark.parametrize("layer", range(LAYERS + 1))
@pytest.mark.parametrize("name", PATHS)
def test_a_forward_from_any_layer_is_the_whole_forward(name, layer):
    model = shared(name)
    runner, whole = Runner(model), logits(model)
    with torch.no_grad():
        torch.testing.assert_close(whole, model(TOKENS), **CLOSE)
        place = resid_pre(layer) if layer < LAYERS else resid_post(layer - 1)
        resid = runner.capture(TOKENS, [place])[place]
        torch.testing.assert_close(runner.logits(TOKENS, start=(layer, resid)), whole, **CLOSE)
        # It does begin with the given residual: another one gives other logits.
        other = runner.logits(TOKENS, start=(layer, resid.flip(0)))
        assert (other - whole).abs().max() > 1e-2


@pytest.mark.parametrize("layer", [2, LAYERS])
@pytest.mark.parametrize("name", PATHS)
def test_ragged_rows_padded_on_the_right_give_the_logits_of_each_row_alone(name, layer):
    model = shared(name)
    rows = [TOKENS[0], TOKENS[1, :3], TOKENS[2, :5]]
    at = torch.tensor([[5, 0], [2, 1], [4, 2]])
    pad = model.tokenizer.pad_token_id
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    alone = torch.stack([logits(model, row[None])[0, k] for row, k in zip(rows, at, strict=True)])
    runner = Runner(model)
    with torch.no_grad():
        place = resid_pre(layer) if layer < LAYERS else resid_post(layer - 1)
        resid = runner.capture(tokens, [place])[place]
        torch.testing.assert_close(runner.logits(tokens, at=at), alone, **CLOSE)
        torch.testing.assert_close(runner.logits(tokens, at=at, start=(layer, resid)), alone, **CLOSE)


@pytest.mark.parametrize("name", FEW)
def test_hooks_of_blocks_that_run_fire_and_those_of_skipped_blocks_do_not(name):
    runner, fired = Runner(shared(name)), []
    hooks = [(resid_post(l), lambda value, hook, l=l: fired.append(l)) for l in range(LAYERS)]
    with torch.no_grad():
        resid = runner.capture(TOKENS, [resid_pre(2)])[resid_pre(2)]
        runner.logits(TOKENS, hooks=hooks)
        assert fired == [0, 1, 2, 3]
        fired.clear()
        runner.logits(TOKENS, start=(2, resid), hooks=hooks)
        assert [l for l in fired if l >= 2] == [2, 3]
        assert not [l for l in fired if l < 2]


@pytest.mark.parametrize("name", FEW)
def test_a_hook_downstream_of_the_start_changes_the_logits_as_in_a_whole_forward(name):
    runner = Runner(shared(name))
    double = [(component_hook("mlp", 3), lambda value, hook: value * 2)]
    with torch.no_grad():
        resid = runner.capture(TOKENS, [resid_pre(2)])[resid_pre(2)]
        changed = runner.logits(TOKENS, hooks=double)
        torch.testing.assert_close(runner.logits(TOKENS, start=(2, resid), hooks=double), changed, **CLOSE)
    assert (changed - logits(runner.model)).abs().max() > 1e-2


class Stop(Exception):
    pass


def stop_here(value, hook=None):
    raise Stop


@pytest.mark.parametrize("start", [None, 0, 2, LAYERS])
@pytest.mark.parametrize("name", FEW)
def test_no_hook_or_forward_is_left_behind_also_by_an_exception(name, start):
    model = build(name)
    runner, clean = Runner(model), logits(model)
    before = traces(model)  # after a forward: TransformerLens hangs hooks of its own on norms at the first
    resid = None if start is None else (start, torch.zeros(*TOKENS.shape, model.cfg.d_model))
    # The last block's output module is run from any start but the last, where only the head is.
    place = model.unembed if start == LAYERS else model.blocks[3]
    with torch.no_grad():
        runner.logits(TOKENS, at=torch.zeros(3, 1, dtype=torch.long), start=resid)
        assert traces(model) == before
        named = [] if start == LAYERS else [(component_hook("mlp", 3), stop_here)]
        for hooks in ([(place, stop_here)], named):
            if hooks:
                with pytest.raises(Stop):
                    runner.logits(TOKENS, start=resid, hooks=hooks)
                assert traces(model) == before
        with pytest.raises(Stop):
            runner.capture(TOKENS, [resid_post(3)], hooks=[(model.blocks[3].mlp, stop_here)])
    assert traces(model) == before
    assert torch.equal(logits(model), clean)


@pytest.mark.parametrize("name", FEW)
def test_a_hook_that_was_there_before_stays_and_takes_part(name):
    model = build(name)
    clean = logits(model)
    model.add_hook(component_hook("mlp", 1), lambda value, hook: value * 2)
    hooked = logits(model)
    assert (hooked - clean).abs().max() > 1e-2
    assert torch.equal(logits(model), hooked)
    model.reset_hooks()
    assert torch.equal(logits(model), clean)


# ---------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize("name", ALL)
def test_the_residual_before_a_block_is_the_one_after_the_block_below(name):
    places = [resid_pre(0), *(f(l) for l in range(1, LAYERS) for f in (resid_pre, resid_post))]
    kept = Runner(shared(name)).capture(TOKENS, [*places, resid_post(0)])
    assert all(torch.equal(kept[resid_pre(l)], kept[resid_post(l - 1)]) for l in range(1, LAYERS))
    assert not torch.equal(kept[resid_pre(1)], kept[resid_pre(2)])


@pytest.mark.parametrize("name", ALL)
def test_attention_and_mlp_add_up_to_the_residuals_change(name):
    places = [resid_pre(1), *(component_hook(what, 1) for what in ("attn", "mlp", "resid"))]
    pre, attn, mlp, post = (Runner(shared(name)).capture(TOKENS, places)[place] for place in places)
    torch.testing.assert_close(pre + attn + mlp, post, **CLOSE)


@pytest.mark.parametrize("stop", [1, LAYERS - 1])
@pytest.mark.parametrize("name", PATHS)
def test_capture_up_to_a_layer_sees_the_same_and_runs_no_further(name, stop):
    model, fired = shared(name), []
    runner = Runner(model)
    places = [resid_pre(0), down_proj(model, stop - 1).key_hook, resid_post(stop - 1), resid_pre(stop)]
    whole = runner.capture(TOKENS, places)
    part = runner.capture(TOKENS, places, stop=stop, hooks=[(resid_post(stop), lambda value, hook: fired.append(stop))])
    assert all(torch.equal(part[place], whole[place]) for place in places)
    assert not fired


@pytest.mark.parametrize("name", FEW)
def test_capture_from_a_start_is_that_of_the_whole_forward(name):
    runner = Runner(shared(name))
    whole = runner.capture(TOKENS, [resid_pre(1), resid_post(2), component_hook("mlp", 2)])
    part = runner.capture(TOKENS, [resid_post(2), component_hook("mlp", 2)], start=(1, whole[resid_pre(1)]), stop=3)
    for place, value in part.items():
        torch.testing.assert_close(value, whole[place], **CLOSE)


@pytest.mark.parametrize("name", FEW)
def test_capture_comes_after_the_hooks_and_is_a_detached_copy(name):
    runner = Runner(shared(name))
    clean = runner.capture(TOKENS, [EMBED])[EMBED]
    changed = runner.capture(TOKENS, [EMBED], hooks=[(EMBED, lambda value, hook: value + 1)])[EMBED]
    assert torch.equal(changed, clean + 1)
    assert not clean.requires_grad
    clean.zero_()
    assert runner.capture(TOKENS, [EMBED])[EMBED].any()


@pytest.mark.parametrize("name", FEW)
def test_a_hook_that_never_fires_is_named(name):
    with pytest.raises(UnsupportedModelError, match=r"blocks\.3\.hook_resid_post.*never fired"):
        Runner(shared(name)).capture(TOKENS, [resid_post(3)], stop=2)


@pytest.mark.parametrize("name", FEW)
def test_a_hook_that_the_model_lacks_is_named(name):
    model = untouched.used(shared(name))
    before = untouched.state(model)
    for place in ("blocks.9.hook_resid_post", "hook_nowhere"):
        with pytest.raises(UnsupportedModelError, match=f"has no hook '{place}'"):
            Runner(model).logits(TOKENS, hooks=[(EMBED, lambda value, hook: value), (place, lambda value, hook: value)])
    assert untouched.state(model) == before


@pytest.mark.parametrize("name", FEW)
def test_hooks_go_with_the_pass_and_a_callers_stay(name):
    model, seen = shared(name), []
    runner, mine = Runner(model), lambda value, hook: seen.append(hook.name)
    with model.hooks(fwd_hooks=[(EMBED, mine)]):
        level = model.context_level
        with pytest.raises(ZeroDivisionError):
            runner.logits(TOKENS, hooks=[(EMBED, lambda value, hook: 1 / 0)])
        assert model.context_level == level
        assert len(model.hook_dict[EMBED].fwd_hooks) == 1
        runner.logits(TOKENS, at=torch.tensor([[0]] * len(TOKENS)))
        assert len(model.hook_dict[EMBED].fwd_hooks) == 1
    assert len(seen) == 2
    assert not model.hook_dict[EMBED].fwd_hooks


@pytest.mark.parametrize("name", FEW)
def test_a_pass_inside_a_pass_takes_down_its_own_hooks_alone(name):
    model, fired = shared(name), []
    runner = Runner(model)

    def ask_again(value, hook):
        fired.append(1)
        if len(fired) == 1:  # the same place is hooked while it fires
            runner.logits(TOKENS, hooks=[(EMBED, lambda value, hook: fired.append(2))])
            assert len(model.hook_dict[EMBED].fwd_hooks) == 1

    runner.logits(TOKENS, hooks=[(EMBED, ask_again)])
    assert fired == [1, 1, 2]
    assert not model.hook_dict[EMBED].fwd_hooks


@pytest.mark.parametrize("name", FEW)
def test_rows_longer_than_the_context_are_refused(name):
    model = shared(name)
    runner, long = Runner(model), torch.ones(1, model.cfg.n_ctx + 1, dtype=torch.long)
    words = f"has {model.cfg.n_ctx + 1} tokens, .* was made for {model.cfg.n_ctx} .*shorten the prompt"
    with torch.no_grad():
        for call in (runner.logits, lambda tokens: runner.capture(tokens, [resid_post(0)])):
            with pytest.raises(ValueError, match=words):
                call(long)
            call(long[:, 1:])


def test_an_unknown_component_is_refused():
    with pytest.raises(ValueError, match=r"'head' is unknown, needed one of \['attn', 'mlp', 'resid', "):
        inspect.unwrap(component_hook)("head", 1)


def test_gather_takes_each_rows_own_positions():
    rows = torch.arange(12.0).reshape(2, 3, 2)
    assert gather(rows, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


# ---------------------------------------------------------------------------------------- gradients


def gradient(model, start: int | None, context=nullcontext) -> torch.Tensor:
    """d loss / d delta, where delta is added to the value of layer 1 at the third token."""
    with context(), frozen(model):
        runner, site = Runner(model), down_proj(model, 1)
        resid = None
        if start is not None:
            with torch.no_grad():
                resid = (start, runner.capture(TOKENS, [resid_pre(start)])[resid_pre(start)])
        with torch.enable_grad():
            delta = torch.zeros(model.cfg.d_model, requires_grad=True)

            def add(value, hook=None):
                value = value.clone()
                value[:, 2] = value[:, 2] + delta
                return value

            out = runner.logits(TOKENS, at=torch.tensor([[5], [4], [3]]), start=resid, hooks=[(site.value_at, add)])
            loss = out.log_softmax(-1)[:, 0, 7].sum()
            (grad,) = torch.autograd.grad(loss, delta)
    return grad


def finite_difference(model) -> torch.Tensor:
    """The first two entries of the same gradient, in float64 differences of float32 logits."""
    site, out = down_proj(model, 1), []
    for i in range(2):
        pair = []
        for step in (0.01, -0.01):

            def add(value, hook=None, i=i, step=step):
                value = value.clone()
                value[:, 2, i] += step
                return value

            found = logits(model, at=torch.tensor([[5], [4], [3]]), hooks=[(site.value_at, add)])
            pair.append(found.double().log_softmax(-1)[:, 0, 7].sum())
        out.append((pair[0] - pair[1]) / 0.02)
    return torch.stack(out)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_a_vector_added_to_the_value_with_frozen_weights(name):
    model = shared(name)
    whole = gradient(model, None)
    assert whole.abs().max() > 1e-4
    torch.testing.assert_close(gradient(model, 1), whole, rtol=1e-4, atol=1e-5)
    # Central differences of step 0.01: error 1e-4 of curvature and 1e-6 / 0.01 of rounding.
    torch.testing.assert_close(whole[:2].double(), finite_difference(model), rtol=2e-2, atol=2e-3)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("start", [None, 1])
@pytest.mark.parametrize("name", FEW)
def test_gradients_are_the_same_whatever_mode_the_caller_is_in(name, context, start):
    model = shared(name)
    assert torch.equal(gradient(model, start, context), gradient(model, start))


# ---------------------------------------------------------------------------------------- frozen


def mixed(model):
    """Put a model into a state that no single flag describes."""
    model.train()
    model.blocks[1].eval()
    for i, param in enumerate(model.parameters()):
        param.requires_grad_(i % 3 != 0)
    return model


def flags(model) -> tuple:
    roots = [model, *([model.original_model] if kind(model) == "bridge" else [])]  # neither lists the other's all
    return (
        [m.training for root in roots for m in root.modules()],
        [p.requires_grad for root in roots for p in root.parameters()],
    )


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_quiet_puts_every_flag_back(model, raises, context):
    mixed(model)
    before = flags(model)
    assert True in before[0] and False in before[0] and True in before[1] and False in before[1]
    with context():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        try:
            with frozen(model):
                assert not any(flags(model)[0])
                assert not any(flags(model)[1])
                assert torch.is_grad_enabled() == modes[0]
                assert not torch.is_inference_mode_enabled()
                if raises:
                    raise Stop
        except Stop:
            assert raises
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    assert flags(model) == before


def test_quiet_can_be_nested(model):
    before = flags(mixed(model))
    with frozen(model):
        with frozen(model):
            pass
        assert not any(flags(model)[0] + flags(model)[1])
    assert flags(model) == before


def test_dropout_is_off_inside_quiet_and_on_outside():
    hf = tiny.hf_model("gpt2")
    model = from_hf(hf, tiny.tokenizer())
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(TOKENS), model(TOKENS))
        with frozen(model):
            first, second = model(TOKENS), model(TOKENS)
        assert torch.equal(first, second)
        assert not torch.equal(model(TOKENS), first)


# ---------------------------------------------------------------------------------------- fingerprint


@HOOKED_ONLY
@pytest.mark.parametrize("arch", [arch for arch in tiny.ARCHITECTURES if arch in tiny.HOOKED or not tiny.HAS_HOOKED])
def test_equal_weights_match_across_the_classes_and_other_weights_do_not(arch):
    bridge, hooked = fingerprint(tiny.bridge(arch)), fingerprint(tiny.hooked(arch))
    assert (bridge.layout, hooked.layout) == ("bridge", "hooked")
    assert bridge.matches(hooked) and hooked.matches(bridge)
    assert not bridge.matches(fingerprint(tiny.hooked(arch, seed=1)))


@pytest.mark.parametrize("name", ALL)
def test_a_fingerprint_repeats(name):
    first, again, other = fingerprint(shared(name)), fingerprint(build(name)), fingerprint(build(name, seed=1))
    assert first == again
    assert first.matches(again)
    assert not first.matches(other)
    assert len(set(first.w_out)) == LAYERS
    assert str(first) == str(again) != str(other)


@pytest.mark.parametrize("name", [*FEW, "bridge-phi3", "bridge-gemma2"])
def test_one_element_of_any_parameter_changes_the_fingerprint(name):
    model = build(name)
    before = fingerprint(model)
    unnoticed = []
    for where, param in model.named_parameters():
        last = param.detach()[(-1,) * param.ndim]  # a view
        kept = last.clone()
        last += 0.5
        if fingerprint(model).matches(before):
            unnoticed.append(where)
        last.copy_(kept)
    assert not unnoticed
    assert fingerprint(model) == before


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_no_parameter_of_the_wrapped_transformers_model_is_overlooked(arch):
    hf = tiny.hf_model(arch)
    model = from_hf(hf, tiny.tokenizer())
    wrapped = {id(param) for param in hf.parameters()}
    assert wrapped
    assert wrapped <= {id(param) for param in model.parameters()}


@pytest.mark.parametrize("name", FEW)
def test_the_edited_layer_is_the_one_whose_hash_differs(name):
    model = build(name)
    before, site = fingerprint(model), down_proj(model, 2)
    site.write_(site.W * 1.5)
    after = fingerprint(model)
    assert [a == b for a, b in zip(before.w_out, after.w_out, strict=True)] == [True, True, False, True]
    assert after.rest == before.rest
    assert not after.matches(before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bridge-llama", "bridge"), ("compat-llama", "bridge+compat")]
    + ([("hooked-llama", "hooked"), ("processed-llama", "hooked")] if tiny.HAS_HOOKED else []),
)
def test_the_layout_names_class_and_processing(name, expected):
    assert layout(shared(name)) == expected


def test_a_copy_has_the_fingerprint_of_its_original(model):
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model)


@pytest.mark.parametrize("arch", ["gpt2", "neox", "falcon", "bloom", "llama"])
def test_a_second_bridge_over_one_transformers_model_leaves_the_fingerprint_of_the_first(arch):
    hf = tiny.hf_model(arch)
    first = tiny.around(hf)
    before = fingerprint(first)
    stats = fe.KeyStats.identity(first, 1)
    second = tiny.around(hf)
    assert fingerprint(first) == fingerprint(second) == before
    stats.check(first, fingerprint(first))
    for param in (next(iter(second.blocks[0].attn.q.parameters())), next(iter(first.blocks[0].attn.q.parameters()))):
        with torch.no_grad():
            param[0] += 1
        assert fingerprint(first).rest != before.rest
        with torch.no_grad():
            param[0] -= 1


# ---------------------------------------------------------------------------------------- what a model is


def test_a_transformers_model_is_refused_with_the_way_out():
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel is neither.*boot_transformers"):
        inspect.unwrap(kind)(tiny.hf_model("gpt2"))


@pytest.mark.parametrize("ask", [n_layers, bos_policy, fingerprint], ids=lambda ask: ask.__name__)
def test_whatever_is_asked_first_refuses_a_transformers_model(ask, monkeypatch):
    for each in (kind, blocks, n_layers):  # past the type checks of this test suite
        for module in ("protocol", "fingerprint"):
            monkeypatch.setattr(f"tl_factedit.backend.{module}.{each.__name__}", inspect.unwrap(each), raising=False)
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel is neither.*from_hf"):
        inspect.unwrap(ask)(tiny.hf_model("gpt2"))


def test_bos_is_as_asked_or_else_the_models_default(model):
    for default in (True, False):
        model.cfg.default_prepend_bos = default
        assert bos_policy(model) is default
        assert bos_policy(model, True) is True
        assert bos_policy(model, False) is False


# ---------------------------------------------------------------------------------------- making models


@pytest.mark.parametrize(
    ("kind", "arch"),
    [("bridge", arch) for arch in tiny.ARCHITECTURES]
    + [("hooked", arch) for arch in tiny.HOOKED if arch not in tiny.MOE],
)
def test_a_model_from_transformers_has_its_log_probabilities(kind, arch):
    with torch.no_grad():
        expected = tiny.hf_model(arch)(TOKENS).logits.log_softmax(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TransformerLens 3.9 announces 4.0
            model = from_hf(tiny.hf_model(arch), tiny.tokenizer(), kind=kind, name="mine")
        # 1e-4: TransformerLens sums attention in another order; measured 1e-6 to 4e-5.
        torch.testing.assert_close(model(TOKENS).log_softmax(-1), expected, rtol=0, atol=1e-4)
    assert (model.cfg.model_name, layout(model)) == ("mine", kind)
    assert not model.training
    assert (down_proj(model, 0).W != 0).any()


def test_a_bridge_wraps_the_transformers_model_and_a_hooked_transformer_copies_it(kind):
    hf = tiny.hf_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = from_hf(hf, tiny.tokenizer(), kind=kind)
    with torch.no_grad():
        before = hf(TOKENS).logits
        site = down_proj(model, 1)
        site.write_(site.W * 2)
        assert torch.equal(hf(TOKENS).logits, before) == (kind == "hooked")


def test_a_model_from_transformers_tokenises_with_its_own_tokenizer(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = from_hf(tiny.hf_model("llama"), tiny.tokenizer(), kind=kind)
    expected = tiny.tokenizer()("The Eiffel Tower").input_ids
    assert model.to_tokens("The Eiffel Tower", prepend_bos=True)[0].tolist() == expected


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind 'jax' is unknown, needed 'bridge' or 'hooked'"):
        inspect.unwrap(from_hf)(tiny.hf_model("llama"), tiny.tokenizer(), kind="jax")


@pytest.mark.skipif(tiny.HAS_HOOKED, reason="TransformerLens 3 has a HookedTransformer")
def test_hooked_where_there_is_none_is_refused_with_the_way_out(monkeypatch):
    with pytest.raises(ValueError, match=r"TransformerLens 4 no longer has: take kind='bridge', or install"):
        from_hf(tiny.hf_model("llama"), tiny.tokenizer(), kind="hooked")
    with pytest.raises(ValueError, match="take kind='bridge'"):
        from_hub("gpt2", kind="hooked")
    monkeypatch.setattr(fe.models, "smollm2_hf", lambda **_: pytest.fail("it was loaded first"))
    for load in (fe.models.smollm2, functools.partial(fe.models.load, "smollm2")):
        with pytest.raises(ValueError, match="take kind='bridge'"):
            load("hooked")


def test_a_name_the_hub_does_not_give_is_in_the_error(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((OSError, ValueError), match="no-such-owner/no-such-model"):
            from_hub("no-such-owner/no-such-model", kind=kind)
