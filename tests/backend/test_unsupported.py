"""Models that aren't what the rest takes them for: refused by what they do, with a way out."""

import copy
import inspect
import warnings

import laws
import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn

import tl_factedit as fe
from tl_factedit.backend.causal import check_causal
from tl_factedit.backend.protocol import UnsupportedModelError, blocks, bos_policy, kind
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import users_hooks
from tl_factedit.backend.weights import down_proj


class Lora(nn.Module):
    """A layer under an adapter, as peft makes it: `weight` and `bias` are those of the layer below."""

    def __init__(self, base: nn.Module, strength: float, transposed: bool) -> None:
        super().__init__()
        self.base_layer = base
        wide, narrow = base.weight.shape if transposed else base.weight.shape[::-1]
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(torch.randn(wide, 2, generator=generator))
        self.B = nn.Parameter(strength * torch.randn(2, narrow, generator=generator))
        self.dropout = nn.Dropout(0.5)

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.dropout(x) @ self.A @ self.B


def adapted(arch: str, strength: float, **sizes) -> fe.Model:
    """A bridge whose W_out of layer 1 lies under an adapter."""
    model = tiny.bridge(arch, **sizes)
    out = model.blocks[1].mlp.out
    out.set_original_component(Lora(out.original_component, strength, transposed=arch == "gpt2"))
    return model.train()


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_an_adapter_over_w_out_is_refused_by_name(arch):
    model = adapted(arch, 0.1)
    with laws.untouched(model), pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mlp\.out.*Lora.*merge"):
        down_proj(model, 1)
    with pytest.raises(UnsupportedModelError, match="merge the adapter first"):
        fe.key_stats(model, [1], ["Paris is the capital of France ."], n_tokens=4, progress=False)
    down_proj(model, 0)


@pytest.mark.parametrize(
    ("arch", "sizes"), [("gpt2", {}), ("llama", {}), ("gpt2", {"d_mlp": 32}), ("llama", {"d_mlp": 32})]
)
def test_an_adapter_that_adds_nothing_is_what_it_lies_over_in_its_orientation(arch, sizes):
    plain, under = tiny.bridge(arch, **sizes), adapted(arch, 0.0, **sizes)
    assert torch.equal(down_proj(under, 1).W, down_proj(plain, 1).W)
    assert down_proj(under, 1).transposed == down_proj(plain, 1).transposed


@pytest.mark.parametrize("how", ["parametrized", "weight_norm", "wrapped"])
def test_a_weight_that_is_made_from_others_is_refused_by_name(how):
    model = tiny.bridge("llama")
    out = model.blocks[2].mlp.out
    inner = out.original_component
    if how == "parametrized":
        nn.utils.parametrizations.weight_norm(inner)
    elif how == "weight_norm":
        inner.weight = nn.Parameter(inner.weight.detach())
        g = inner.weight.norm()
        raw = nn.Parameter(inner.weight.detach().clone())
        del inner._parameters["weight"]
        inner.register_parameter("weight_v", raw)
        inner.weight = raw.detach() / raw.detach().norm() * g.detach()
    else:
        out.set_original_component(nn.Sequential(inner))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.mlp\.out.*answers something else"):
        down_proj(model, 2)


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_parametrized_w_out_of_a_hooked_transformer_is_refused():
    model = tiny.hooked("gpt2")

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    nn.utils.parametrize.register_parametrization(model.blocks[0].mlp, "W_out", Doubled())
    with pytest.raises(UnsupportedModelError, match=r"remove_parametrizations"):
        down_proj(model, 0)


# ---------------------------------------------------------------------------------------- which models


@pytest.mark.parametrize("which", tiny.KINDS)
def test_a_model_that_reads_backwards_too_is_refused(which, tmp_path):
    model = tiny.model(which, "gpt2" if which == "hooked" else "llama")
    check_causal(model)
    if which == "hooked":
        for block in model.blocks:
            block.attn.apply_causal_mask = lambda scores, *_, **__: scores
    else:
        for layer in model.original_model.model.layers:
            layer.self_attn.is_causal = False
        attend = type(model.blocks[0].attn).forward

        def both_ways(self, *args, **kwargs):
            mask = kwargs.get("attention_mask")
            return attend(self, *args, **{**kwargs, "attention_mask": None if mask is None else 0 * mask})

        for block in model.blocks:
            object.__setattr__(block.attn, "forward", both_ways.__get__(block.attn))
    with pytest.raises(UnsupportedModelError, match=r"isn't causal.*left to right"):
        Runner(model)
    with pytest.raises(UnsupportedModelError, match="isn't causal"):
        fe.causal_trace(model, laws.FACT, progress=False)
    with pytest.raises(UnsupportedModelError, match="isn't causal"):
        fe.stats.sample_texts(model, 4, length=4, progress=False)
    with pytest.raises(UnsupportedModelError, match="isn't causal"):
        fe.KeyStats.identity(model, 1)
    with pytest.raises(UnsupportedModelError, match="isn't causal"):
        fe.alignable(model, laws.FACT)
    moments = tmp_path / "moments.npz"
    np.savez(moments, **{"mom2.count": 500, "mom2.mom2": 500 * np.eye(len(down_proj(model, 1).W))})
    with pytest.raises(UnsupportedModelError, match="isn't causal"):
        fe.KeyStats.from_npz(moments, model, 1)


@pytest.mark.parametrize("which", tiny.KINDS)
@pytest.mark.parametrize("name", ["blocks.2.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"])
def test_a_hook_is_named_as_its_user_names_it_and_once(which, name):
    model = tiny.model(which, "gpt2")
    model.add_hook(name, lambda value, hook: value)
    assert users_hooks(model) == (name,)


@pytest.mark.parametrize("which", tiny.KINDS)
@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules_is_noted_once_with_every_result(which, register):
    model = tiny.model(which, "gpt2")
    identity = fe.KeyStats.identity(model, 1)
    rome = fe.Rome(identity, contexts=("",), fit=laws.QUICK, progress=False)
    model.add_hook("blocks.2.hook_mlp_out", lambda value, hook: value)
    handles = [getattr(nn.modules.module, register)(lambda *_: None) for _ in range(2)]
    try:
        noted = [
            result.provenance.hooks
            for result in (
                rome(model, [laws.FACT]),
                fe.evaluate(model, laws.FACT),
                fe.causal_trace(model, laws.FACT, progress=False),
                fe.key_stats(model, [1], laws.texts(3), n_tokens=4, progress=False)[1],
            )
        ]
    finally:
        for handle in handles:
            handle.remove()
    assert noted == [("all modules", "blocks.2.hook_mlp_out")] * 4
    assert fe.editing.Provenance.of(model).hooks == ("blocks.2.hook_mlp_out",)


def test_a_model_without_blocks_is_refused():
    model = tiny.bridge("gpt2")
    del model._modules["blocks"]
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*has no blocks.*encoder-decoder"):
        blocks(model)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        fe.alignable(model, laws.FACT)


@pytest.mark.parametrize("which", tiny.KINDS)
def test_a_model_without_a_tokenizer_is_refused(which):
    model = tiny.model(which, "gpt2")
    model.tokenizer = None
    with pytest.raises(UnsupportedModelError, match="has no tokenizer"):
        bos_policy(model)
    with pytest.raises(UnsupportedModelError, match="has no tokenizer"):
        fe.causal_trace(model, laws.FACT, progress=False)


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_model_of_attention_alone_is_traced_but_has_no_mlp():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    tok = tiny.tokenizer()
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=16,
            n_ctx=64,
            d_head=8,
            n_heads=2,
            d_vocab=len(tok),
            attn_only=True,
            seed=0,
            device="cpu",
        ),
        tok,
        move_to_device=False,
    ).eval()
    found = fe.causal_trace(model, laws.FACT, component="attn", corruption=fe.GaussianNoise(samples=2), progress=False)
    assert found.effect.isfinite().all()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.hook_mlp_out.*component='attn'"):
        fe.causal_trace(model, laws.FACT, component="mlp", progress=False)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp.*no MLP"):
        fe.key_stats(model, [0], ["Paris is"], n_tokens=2, progress=False)


# ---------------------------------------------------------------------------------------- GPT-Neo's masks


@pytest.mark.parametrize("room", [64, 24])
def test_rows_stay_within_the_masks_of_gpt_neo(room):
    """21 tokens and a mask of 64: the pieces of all cells of a row, and what is behind them, would be longer."""
    model = tiny.bridge("neo")
    for module in model.original_model.modules():
        if module._buffers.get("bias") is not None and module.bias.ndim == 4:
            module.bias = module.bias[:, :, :room, :room]
    long = laws.FACT.but(prompt=laws.FACT.prompt.replace("{}", "{} " + "is of the " * 4, 1))
    noise = fe.GaussianNoise(samples=2)
    found = fe.causal_trace(model, long, component="attn", corruption=noise, progress=False)
    assert bool(found.unpacked) == (2 * len(found.tokens[0]) > room)
    Plain = type(Runner(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plain, "why_not_packed", lambda *_: "said so by a test")
        whole = fe.causal_trace(model, long, component="attn", corruption=noise, progress=False)
    torch.testing.assert_close(found.effect, whole.effect, atol=1e-5, rtol=0, equal_nan=True)


def test_a_transformers_model_of_masked_words_has_no_way_in():
    config = transformers.BertConfig(
        vocab_size=70, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(UnsupportedModelError, match="neither"):
        inspect.unwrap(kind)(transformers.BertForMaskedLM(config))


def calls_of(model: fe.Model, fact: fe.Fact) -> list:
    return [
        lambda: fe.causal_trace(model, fact, progress=False),
        lambda: fe.evaluate(model, fact),
        lambda: fe.known(model, fact),
        lambda: fe.answers(model, fact, progress=False),
        lambda: fe.alignable(model, fact),
        lambda: fe.key_stats(model, [1], ["Paris is"], n_tokens=2, progress=False),
        lambda: fe.KeyStats.identity(model, 1),
        lambda: fe.FineTune(1, steps=1, progress=False)(model, [fact]),
    ]


def test_a_bridge_of_a_masked_model_is_refused_by_every_call():
    config = transformers.BertConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = fe.models.from_hf(transformers.BertForMaskedLM(config).eval(), tiny.tokenizer())
    for call in calls_of(model, laws.FACT):
        with pytest.raises(UnsupportedModelError, match=r"BertForMaskedLM.*isn't causal.*left to right"):
            call()


def test_a_bridge_of_an_encoder_decoder_is_refused_by_every_call():
    config = transformers.T5Config(
        vocab_size=len(tiny.tokenizer()),
        d_model=16,
        num_layers=2,
        num_heads=2,
        d_ff=32,
        d_kv=8,
        decoder_start_token_id=0,
    )
    model = fe.models.from_hf(transformers.T5ForConditionalGeneration(config).eval(), tiny.tokenizer())
    for call in calls_of(model, laws.FACT):
        with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration.*no blocks.*encoder-decoder"):
            call()


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_hooked_transformer_that_attends_both_ways_is_refused_by_every_call():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    tok = tiny.tokenizer()
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=64,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        act_fn="gelu",
        d_vocab=len(tok),
        attention_dir="bidirectional",
        seed=0,
        device="cpu",
    )
    model = HookedTransformer(config, tok, move_to_device=False).eval()
    for call in calls_of(model, laws.FACT):
        with pytest.raises(UnsupportedModelError, match="isn't causal"):
            call()


HEADS = ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"]


@pytest.mark.parametrize("which", tiny.KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("head", HEADS)
def test_a_transformers_model_without_a_head_over_words_is_refused_as_it_is_wrapped(which, arch, head):
    config = tiny.hf_model(arch).config
    model = getattr(transformers, head).from_config(config)
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__} has no head that says words.*CausalLM"):
        fe.models.from_hf(model, tiny.tokenizer(), kind=which)


def quantised(model: nn.Module) -> nn.Module:
    """Linear layers in int8, as ``torch.ao`` makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is going away
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


@pytest.mark.parametrize("which", tiny.KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_layers_that_pytorch_quantised_are_refused_as_they_are_wrapped(which, arch):
    model = quantised(tiny.hf_model(arch))
    with pytest.raises(UnsupportedModelError, match=r"of \w+ForCausalLM|LMHeadModel is quantised by PyTorch"):
        fe.models.from_hf(model, tiny.tokenizer(), kind=which)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_bridge_that_was_quantised_later_is_traced_but_not_edited(arch, monkeypatch):
    model = quantised(tiny.bridge(arch))
    stats = fe.KeyStats.identity(model, 1)
    assert fe.causal_trace(model, laws.FACT, corruption=fe.GaussianNoise(samples=2), progress=False).effect.any()
    with laws.no_forward(monkeypatch, model):
        for editor in (fe.Rome(stats, progress=False), fe.FineTune(1, progress=False)):
            with pytest.raises(
                UnsupportedModelError, match=r"unembed .*is quantised by PyTorch \(torch.ao.*unquantised"
            ):
                editor(model, [laws.FACT])


@pytest.mark.parametrize("which", tiny.KINDS)
@pytest.mark.parametrize("arch", ["mixtral", "olmoe"])
def test_a_mixture_of_experts_is_traced_but_not_edited(which, arch, monkeypatch):
    if which == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("builds as a bridge only")
    model = tiny.model(which, arch)
    found = fe.causal_trace(model, laws.FACT, component="mlp", corruption=fe.GaussianNoise(samples=2), progress=False)
    assert found.effect.isfinite().any() and len(fe.known(model, laws.FACT)) == 1
    with laws.no_forward(monkeypatch, model):
        for call in (
            lambda: fe.key_stats(model, [1], ["Paris is"], n_tokens=2, progress=False),
            lambda: fe.KeyStats.identity(model, 1),
            lambda: fe.FineTune(1, progress=False)(model, [laws.FACT]),
            lambda: fe.KnowledgeNeurons(progress=False)(model, [laws.FACT]),
        ):
            with pytest.raises(UnsupportedModelError, match=r"no single W_out: mixture-of-experts.*dense layer"):
                call()


# ---------------------------------------------------------------------------------------- another tokenizer


def with_tokenizer(which: tiny.Kind, tok: transformers.PreTrainedTokenizerFast) -> fe.Model:
    """A model of the usual 121 tokens with another tokenizer."""
    model = tiny.model(which, "llama")
    model.tokenizer = tok
    return model


def asking(model: fe.Model, fact: fe.Fact) -> dict:
    """Calls that would run a text."""
    return {
        "trace": lambda: fe.causal_trace(model, fact, progress=False),
        "known": lambda: fe.known(model, fact),
        "evaluate": lambda: fe.evaluate(model, fact),
        "answers": lambda: fe.answers(model, fact, progress=False),
        "edit": lambda: fe.FineTune(1, progress=False)(model, [fact]),
        "audit": lambda: fe.audit(model, copy.deepcopy(model), [fact], progress=False),
    }


@pytest.mark.parametrize("which", tiny.KINDS)
def test_a_tokenizer_with_words_that_the_model_has_no_embedding_for_is_refused(which, monkeypatch):
    tok = tiny.tokenizer()
    first = len(tok)
    tok.add_tokens(["Zorp", "Blurk"])
    model = with_tokenizer(which, tok)
    said = rf"has 2 tokens that \S+ has no embedding for, such as 'Zorp' \(token {first} of {first}\).*resize"
    with laws.no_forward(monkeypatch, model):
        calls = asking(model, laws.FACT)
        calls["stats"] = lambda: fe.key_stats(model, [1], ["Paris is"], n_tokens=2, progress=False)
        calls["alignable"] = lambda: fe.alignable(model, laws.FACT)
        for call in calls.values():
            with pytest.raises(UnsupportedModelError, match=said):
                call()


@pytest.mark.parametrize("which", tiny.KINDS)
def test_a_control_token_without_an_embedding_is_refused_where_a_text_holds_it(which, monkeypatch):
    tok = tiny.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    model = with_tokenizer(which, tok)
    assert fe.known(model, laws.FACT).equals(fe.known(tiny.model(which, "llama"), laws.FACT))
    held = laws.FACT.but(prompt="<extra> " + laws.FACT.prompt, paraphrases=(), neighbours=(), neighbour_targets=())
    good, ((fact, why),) = fe.alignable(model, [laws.FACT, held])
    assert good == [laws.FACT] and fact == held and "holds '<extra>', a token that" in why
    for call in asking(model, held).values():
        with pytest.raises(ValueError, match=r"holds '<extra>', a token that .* has no embedding for"):
            call()
    with pytest.raises(ValueError, match="holds '<extra>'"):
        fe.key_stats(model, [1], ["Paris is <extra> in"], n_tokens=4, progress=False)


def test_a_model_that_was_made_in_inference_mode_is_read_and_not_edited(kind):
    with torch.inference_mode():
        made = tiny.model(kind, "gpt2")
    plain = tiny.model(kind, "gpt2")
    assert fe.evaluate(made, laws.FACT).p_new == fe.evaluate(plain, laws.FACT).p_new
    traces = [fe.causal_trace(model, laws.FACT, progress=False) for model in (made, plain)]
    assert torch.equal(traces[0].effect, traces[1].effect)
    with pytest.raises(fe.UnsupportedModelError, match="inference_mode"):
        fe.Rome(fe.KeyStats.identity(plain, 1), contexts=("",), progress=False)(made, [laws.FACT])
