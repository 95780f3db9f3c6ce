"""The two hook factories do what their names say at the positions named, and nothing anywhere else."""

import pytest
import tiny
import torch

from tl_factedit.locate.hooks import noise_hook, restore_hook

TOKENS = torch.tensor([[0, 5, 9, 20, 7, 31], [0, 40, 41, 42, 43, 44]])
BATCH, POS, D = 2, 6, 32
MODELS = [(kind, arch) for arch in ("gpt2", "llama") for kind in tiny.KINDS]
FORMS = pytest.mark.parametrize(
    ("positions", "meant"),
    [
        (2, [2]),
        ([1, 4], [1, 4]),
        ((4, 1), [4, 1]),
        (slice(1, 3), [1, 2]),
        (slice(None), [0, 1, 2, 3, 4, 5]),
        (slice(-2, None), [4, 5]),
        (torch.tensor([3, 0]), [3, 0]),
        (torch.tensor(5), [5]),
        (-1, [5]),
        ([-6, -2], [0, 4]),
        ([], []),
    ],
    ids=str,
)


@pytest.fixture(params=MODELS, ids="-".join, scope="module")
def model(request):
    return tiny.model(*request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(model, name: str, hooks=()) -> torch.Tensor:
    """The activations at a hook, after `hooks` there."""
    kept = []
    with torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=[*hooks, (name, lambda value, hook: kept.append(value.clone()))])
    return kept[0]


# ---------------------------------------------------------------------------------------- on a model


def test_noise_at_the_embeddings_is_added_where_it_is_meant_and_reaches_the_logits(model):
    noise, clean = random(BATCH, 2, D), activations(model, "hook_embed")
    hook = ("hook_embed", noise_hook(noise, [2, 4]))
    noised = activations(model, "hook_embed", [hook])
    assert torch.equal(noised[:, [2, 4]], clean[:, [2, 4]] + noise)
    assert torch.equal(noised[:, [0, 1, 3, 5]], clean[:, [0, 1, 3, 5]])
    with torch.no_grad():
        before, after = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=[hook])
    # Causal: earlier positions can't know; later ones do.
    assert torch.equal(after[:, :2], before[:, :2])
    assert (after[:, 2:] - before[:, 2:]).abs().amax((0, 2)).min() > 1e-2


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.0.hook_attn_out"])
def test_restoring_sets_the_clean_activations_of_a_corrupted_run(model, name):
    noise = ("hook_embed", noise_hook(5 * random(1, 3, D), [1, 2, 3]))
    clean, corrupted = activations(model, name), activations(model, name, [noise])
    restored = activations(model, name, [noise, (name, restore_hook(clean, [3]))])
    assert torch.equal(restored[:, 3], clean[:, 3])
    assert torch.equal(restored[:, [0, 1, 2, 4, 5]], corrupted[:, [0, 1, 2, 4, 5]])
    assert not torch.allclose(restored[:, 3], corrupted[:, 3], atol=1e-2)


def test_restoring_every_position_of_the_residual_stream_undoes_the_corruption(model):
    noise, name = ("hook_embed", noise_hook(5 * random(1, 3, D), [1, 2, 3])), "blocks.1.hook_resid_post"
    hooks = [noise, (name, restore_hook(activations(model, name), slice(None)))]
    with torch.no_grad():
        clean = model(TOKENS)
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=hooks), clean)
        assert (model.run_with_hooks(TOKENS, fwd_hooks=[noise]) - clean).abs().max() > 0.1


def test_hooks_work_in_the_models_context_manager_and_leave_nothing(model):
    with torch.no_grad():
        clean = model(TOKENS)
        with model.hooks(fwd_hooks=[("hook_embed", noise_hook(random(1, 1, D), 2))]):
            assert not torch.equal(model(TOKENS), clean)
        assert torch.equal(model(TOKENS), clean)


def test_one_heads_output_can_be_restored_in_four_dimensions(model):
    noise, name = ("hook_embed", noise_hook(5 * random(1, 1, D), 2)), "blocks.1.attn.hook_z"
    clean, corrupted = activations(model, name), activations(model, name, [noise])
    assert clean.ndim == 4
    restored = activations(model, name, [noise, (name, restore_hook(clean, [2, 5]))])
    assert torch.equal(restored[:, [2, 5]], clean[:, [2, 5]])
    assert torch.equal(restored[:, [3, 4]], corrupted[:, [3, 4]])
    assert not torch.equal(corrupted[:, [2, 5]], clean[:, [2, 5]])


# ---------------------------------------------------------------------------------------- positions


@FORMS
def test_noise_goes_to_the_positions_meant_in_their_order(positions, meant):
    value, noise = random(BATCH, POS, D, seed=1), random(BATCH, len(meant), D)
    expected = value.clone()
    for i, position in enumerate(meant):
        expected[:, position] += noise[:, i]
    assert torch.equal(noise_hook(noise, positions)(value), expected)


@FORMS
def test_restoration_happens_at_the_positions_meant(positions, meant):
    value, clean = random(BATCH, POS, D, seed=1), random(BATCH, POS, D)
    expected = torch.stack([(clean if i in meant else value)[:, i] for i in range(POS)], 1)
    assert torch.equal(restore_hook(clean, positions)(value), expected)


def test_a_batch_of_one_serves_every_row():
    value, noise, clean = random(BATCH, POS, D, seed=1), random(1, 2, D), random(1, POS, D)
    assert torch.equal(noise_hook(noise, [1, 2])(value), noise_hook(noise.expand(BATCH, -1, -1), [1, 2])(value))
    assert torch.equal(restore_hook(clean, [1, 2])(value), restore_hook(clean.expand(BATCH, -1, -1), [1, 2])(value))


@pytest.mark.parametrize(
    "hook", [noise_hook(random(1, 2, D), [1, 2]), restore_hook(random(1, POS, D), [1, 2])], ids=["noise", "restore"]
)
def test_the_value_given_is_left_as_it_is_and_its_type_is_kept(hook):
    value = random(BATCH, POS, D, seed=1)
    before = value.clone()
    out = hook(value, hook=None)
    assert torch.equal(value, before)
    assert not torch.equal(out, value)
    assert hook(value.bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------- bad input


def test_noise_for_another_number_of_positions_is_refused_at_once():
    with pytest.raises(ValueError, match=r"noise is for 3 positions, but 2 were given: \[1, 2\]"):
        noise_hook(random(1, 3, D), [1, 2])


def test_noise_for_another_number_of_positions_than_a_slice_has_is_refused():
    with pytest.raises(ValueError, match="noise is for 3 positions, but the slice holds 2"):
        noise_hook(random(1, 3, D), slice(1, 3))(random(BATCH, POS, D))


def test_one_position_of_noise_is_not_spread_over_a_slice():
    with pytest.raises(ValueError, match="noise is for 1 positions, but the slice holds 3"):
        noise_hook(random(1, 1, D), slice(1, 4))(random(BATCH, POS, D))


def test_noise_of_another_width_is_refused():
    with pytest.raises(ValueError, match="noise is 16 wide, the activations are 32"):
        noise_hook(random(1, 1, 16), [1])(random(BATCH, POS, D))


def test_noise_for_another_batch_is_refused():
    with pytest.raises(ValueError, match="noise is for a batch of 3, the activations are 2: needed 1 or equal"):
        noise_hook(random(3, 1, D), [1])(random(BATCH, POS, D))


@pytest.mark.parametrize(("positions", "named"), [(6, 6), (-7, -7), ([0, 9], 9), (torch.tensor([1, -8]), -8)])
def test_a_position_outside_the_tokens_is_refused_by_number(positions, named):
    count = torch.as_tensor(positions).numel()
    with pytest.raises(ValueError, match=f"position {named} is outside the 6 tokens"):
        noise_hook(random(1, count, D), positions)(random(BATCH, POS, D))
    with pytest.raises(ValueError, match=f"position {named} is outside the 6 tokens"):
        restore_hook(random(1, POS, D), positions)(random(BATCH, POS, D))


@pytest.mark.parametrize("shape", [(3, POS, D), (BATCH, POS - 1, D), (BATCH, POS, 16), (BATCH, POS, D, 1)], ids=str)
def test_clean_activations_of_another_shape_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"clean activations are \(.*those at the hook \(2, 6, 32\)"):
        restore_hook(random(*shape), [1])(random(BATCH, POS, D))


def test_a_position_named_twice_or_a_mask_is_refused():
    noise = torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match="names one position twice"):
        noise_hook(noise, [1, 1])
    with pytest.raises(ValueError, match="mask of booleans"):
        noise_hook(noise, [True, False])


def test_positions_that_are_no_whole_numbers_or_meet_are_refused():
    with pytest.raises((ValueError, TypeError)) as error:  # the latter of this suite's own check of types
        noise_hook(torch.zeros(1, 2, D), torch.tensor([1.7, 2.2]))
    assert "positions" in str(error.value)
    for hook in (noise_hook(random(1, 2, D), [-1, POS - 1]), restore_hook(random(1, POS, D), [-1, POS - 1])):
        with pytest.raises(ValueError, match=rf"\[-1, {POS - 1}\] names one of the {POS} tokens twice"):
            hook(random(BATCH, POS, D))
    noise_hook(random(1, 2, D), [-1, POS - 1])(random(BATCH, POS + 1, D))
