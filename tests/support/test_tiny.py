"""The tiny models are equal across classes, decided by their seed, and every layer matters."""

import random

import numpy as np
import pytest
import tiny
import torch

TOKENS = torch.tensor([[0, 5, 9, 20, 7, 31], [0, 40, 41, 42, 43, 44]])


def log_probs(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return getattr(out, "logits", out).float().log_softmax(-1)


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES + tiny.MOE)
def test_bridge_equals_its_hf_model(arch):
    torch.testing.assert_close(log_probs(tiny.bridge(arch)), log_probs(tiny.hf_model(arch)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("arch", tiny.HOOKED)
def test_hooked_equals_its_bridge(arch, processed):
    hooked = tiny.hooked(arch, processed=processed)
    torch.testing.assert_close(log_probs(hooked), log_probs(tiny.bridge(arch)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_logits_differ_between_tokens_and_every_mlp_matters(arch):
    clean = log_probs(tiny.bridge(arch))
    assert clean.std(-1).min() > 0.5
    model = tiny.bridge(arch)
    for block in model.blocks:
        kept = block.mlp.W_out.detach().clone()
        with torch.no_grad():
            block.mlp.W_out.zero_()
            changed = log_probs(model)
            block.mlp.W_out.copy_(kept)
        assert (changed - clean).abs().mean() > 0.1


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_sizes_are_as_asked_and_d_mlp_is_not_d_model(kind):
    model = tiny.model(kind, "llama", n_layers=3, d_model=16, d_mlp=40, n_heads=2)
    assert len(model.blocks) == 3
    assert model.blocks[0].mlp.W_out.shape == (40, 16)
    assert (model.cfg.n_heads, model.cfg.d_head, model.cfg.n_key_value_heads) == (2, 8, 1)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_are_tied_when_asked(kind, tied):
    model = tiny.model(kind, "llama", tied=tied)
    assert torch.equal(model.embed.W_E, model.unembed.W_U.T) == tied


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_bfloat16_weights_are_the_rounded_float32_ones(kind, arch):
    fine, coarse = tiny.model(kind, arch), tiny.model(kind, arch, dtype=torch.bfloat16)
    for name, param in coarse.named_parameters():
        assert param.dtype == torch.bfloat16
        assert torch.equal(param, fine.get_parameter(name).bfloat16())
    torch.testing.assert_close(log_probs(coarse).exp(), log_probs(fine).exp(), rtol=0, atol=0.1)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES + tiny.MOE)
def test_a_seed_decides_the_weights(arch):
    assert same_weights(tiny.hf_model(arch, seed=1), tiny.hf_model(arch, seed=1))
    assert not same_weights(tiny.hf_model(arch, seed=1), tiny.hf_model(arch, seed=2))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_each_call_builds_a_fresh_model(kind, arch):
    model, again = tiny.model(kind, arch), tiny.model(kind, arch)
    before = log_probs(model)
    with torch.no_grad():
        model.blocks[1].mlp.W_out.zero_()
    assert not torch.equal(log_probs(model), before)
    assert torch.equal(log_probs(again), before)
    assert torch.equal(log_probs(tiny.model(kind, arch)), before)


def test_model_fixture_runs(model):
    assert log_probs(model).shape == (*TOKENS.shape, model.cfg.d_vocab)


def test_global_random_state_is_left_alone(kind):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    tiny.model(kind, "gpt2", seed=3)
    assert states() == before


def test_hooked_names_what_it_can_build_when_it_cannot():
    with pytest.raises(ValueError, match="does not build as a HookedTransformer"):
        tiny.hooked("gemma2")


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("post_norm", [False, True], ids=["plain", "post-norm"])
def test_hooked_config_builds_a_gated_mlp_with_and_without_post_norm(post_norm):
    before = torch.get_rng_state()
    model, again = (tiny.hooked_config(seed=4, post_norm=post_norm) for _ in range(2))
    assert same_weights(model, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.cfg.gated_mlp
    assert log_probs(model).std(-1).min() > 0.5
    # With the post-norm, what reaches the residual is not key @ W_out.
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"])
    mlp = model.blocks[1].mlp
    value = cache["blocks.1.mlp.hook_post"] @ mlp.W_out + mlp.b_out
    assert torch.allclose(value, cache["blocks.1.hook_mlp_out"], atol=1e-5) != post_norm


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_tokenizer_round_trips_and_gives_offsets(name):
    tok, text = tiny.tokenizer(name), "The Eiffel Tower is located in the city of Paris"
    assert len({tok.bos_token_id, tok.eos_token_id, tok.pad_token_id, tok.unk_token_id}) == 4
    encoded = tok(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == tok.bos_token_id
    assert tok.decode(encoded.input_ids, skip_special_tokens=True) == text
    assert "".join(text[a:b] for a, b in encoded.offset_mapping).replace(" ", "") == text.replace(" ", "")
    assert tok.get_vocab() == tiny.tokenizer(name).get_vocab()


@pytest.mark.parametrize("name", ["bytebpe", "spm", "spm-always"])
def test_subword_tokenizers_merge_common_words_and_split_rare_characters_into_bytes(name):
    tok, text = tiny.tokenizer(name), "café 🗼 Ж the Paris"
    ids = tok(text, add_special_tokens=False).input_ids
    assert tok.decode(ids) == text
    assert tok.unk_token_id not in ids
    assert len(tok(" the Paris", add_special_tokens=False).input_ids) <= 3
    assert len(tok("🗼", add_special_tokens=False).input_ids) >= 2


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tokenizer_boots_and_prepends_bos_when_asked(kind, name):
    tok = tiny.tokenizer(name)
    model = tiny.model(kind, "llama", tok=tok, n_layers=1)
    text = "The Eiffel Tower is in Paris"
    plain = tok(text, add_special_tokens=False).input_ids
    assert model.cfg.d_vocab == len(tok)
    assert model.to_tokens(text, prepend_bos=True)[0].tolist() == [tok.bos_token_id, *plain]
    assert model.to_tokens(text, prepend_bos=False)[0].tolist() == plain
