"""What is on a model is known wherever its weights are: in wrappers, in copies, and after the weights are put back."""

import copy
from itertools import pairwise

import laws
import pytest
import tiny
import torch
from test_edit import made, refused, two_layers, w_out
from transformer_lens.model_bridge import TransformerBridge

import tl_factedit as fe
from tl_factedit.backend.weights import down_proj
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.ledger import base_fingerprint, ledger_of, thinned

ARCHITECTURES = ("gpt2", "llama")


# ---------------------------------------------------------------------------------------- wrappers and copies


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_bridges_over_one_transformers_model_know_of_each_others_edits(arch):
    tok = tiny.tokenizer()
    inner = tiny.hf_model(arch, tok=tok)
    one, two = (
        TransformerBridge.boot_transformers(
            f"tiny-{arch}", hf_model=inner, tokenizer=tok, device="cpu", dtype=inner.dtype
        )
        for _ in range(2)
    )
    clean, edit = w_out(one), made(one)
    edit.apply_(one)
    assert torch.equal(w_out(two), w_out(one)) and not torch.equal(w_out(two), clean)
    assert fe.edits_on(two) == (edit,)
    refused(two, edit.apply_, "already")
    assert base_fingerprint(two).w_out == base_fingerprint(one).w_out == edit.provenance.weights.w_out
    edit.undo_(two)
    assert fe.edits_on(one) == fe.edits_on(two) == ()
    assert torch.equal(w_out(one), clean)


def test_a_compiled_model_and_the_model_know_of_each_others_edits(kind):
    model = tiny.model(kind, "gpt2")
    compiled = torch.compile(model, backend="eager")
    clean, edit = w_out(model), made(model)
    edit.apply_(compiled)
    assert fe.edits_on(model) == fe.edits_on(compiled) == (edit,)
    refused(model, edit.apply_, "already")
    with made(model, 2).applied(model):
        assert len(fe.edits_on(compiled)) == 2
    edit.undo_(model)
    assert fe.edits_on(compiled) == ()
    assert torch.equal(w_out(compiled), clean)


def test_a_copy_has_a_ledger_of_its_own(kind):
    model = tiny.model(kind, "gpt2")
    clean, edit = w_out(model), made(model)
    edit.apply_(model)
    other = copy.deepcopy(model)
    edit.undo_(other)
    assert torch.equal(w_out(other), clean) and not torch.equal(w_out(model), clean)
    assert fe.edits_on(other) == () and fe.edits_on(model) == (edit,)


# ---------------------------------------------------------------------------------------- put back by hand


@pytest.mark.parametrize("how", ["load_state_dict", "copy_"])
def test_where_the_old_weights_were_put_back_by_hand_nothing_is_on_any_more(kind, how):
    model = tiny.model(kind, "gpt2")
    edit, below = two_layers(model), made(model, 1, seed=5)
    before, fingerprint = laws.state(model), base_fingerprint(model)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {layer: w_out(model, layer) for layer in edit.layers}
    below.apply_(model)
    edit.apply_(model)
    if how == "load_state_dict":
        model.load_state_dict(original)
    else:
        for layer, weight in kept.items():
            down_proj(model, layer).write_(weight)
    assert fe.edits_on(model) == ()
    refused(model, edit.undo_, "isn't applied")
    assert base_fingerprint(model) == fingerprint
    fe.undo_all_(model)  # nothing to do
    laws.assert_same(before, laws.state(model))
    laws.comes_off_bit_for_bit(edit, model)


def test_putting_one_layer_back_takes_off_the_edits_of_that_layer_alone(kind):
    model = tiny.model(kind, "gpt2")
    one, two, clean = made(model, 1), made(model, 2), w_out(model, 1)
    one.apply_(model)
    two.apply_(model)
    down_proj(model, 1).write_(clean)
    assert fe.edits_on(model) == (two,)
    one.apply_(model)
    assert fe.edits_on(model) == (two, one)
    fe.undo_all_(model)
    assert torch.equal(w_out(model, 1), clean)


def test_half_an_edit_that_was_put_back_is_refused_with_a_way_out(kind):
    model = tiny.model(kind, "gpt2")
    edit, clean = two_layers(model), {layer: w_out(model, layer) for layer in (1, 2)}
    edit.apply_(model)
    down_proj(model, 1).write_(clean[1])
    refused(model, edit.undo_, r"W_out of layer 1 was changed since .*into all of its layers.*forget_edits_\(model\)")
    down_proj(model, 2).write_(clean[2])
    assert fe.edits_on(model) == ()
    edit.apply_(model)


def test_weights_changed_by_something_else_can_be_taken_for_what_they_are(kind):
    model = tiny.model(kind, "gpt2")
    edit = made(model)
    edit.apply_(model)
    with torch.no_grad():
        down_proj(model, 1).param.add_(0.25)
    for refuses in (edit.undo_, made(model, 2).apply_, fe.undo_all_):
        refused(model, refuses, r"forget_edits_\(model\)")
    trained = w_out(model)
    fe.editing.forget_edits_(model)
    assert fe.edits_on(model) == () and torch.equal(w_out(model), trained)
    refused(model, edit.apply_, "made for weights .* has weights")
    laws.comes_off_bit_for_bit(made(model), model)


def test_an_edit_that_writes_nothing_is_on_all_the_same(kind):
    model = tiny.model(kind, "gpt2")
    nothing = made(model).scaled(0.0)
    nothing.apply_(model)
    assert fe.edits_on(model) == (nothing,)
    nothing.undo_(model)
    assert fe.edits_on(model) == ()


# ---------------------------------------------------------------------------------------- stacks


def stacked(model, count: int) -> tuple[list[fe.Edit], list[torch.Tensor]]:
    """Edits applied one on the other, and the weights from before each."""
    edits, before = [made(model, seed=seed, scale=0.3) for seed in range(count)], []
    for edit in edits:
        before.append(w_out(model))
        edit.apply_(model)
    return edits, before


def test_a_stack_comes_off_from_above_without_writing_it_anew_each_time(kind, monkeypatch):
    model, count = tiny.model(kind, "gpt2"), 24
    edits, before = stacked(model, count)
    written, on = [], Delta.on

    def counted(self, weight):
        written.append(1)
        return on(self, weight)

    monkeypatch.setattr(Delta, "on", counted)
    for edit, weight in zip(reversed(edits), reversed(before), strict=True):
        assert len(ledger_of(model).between.get(1, ())) <= count.bit_length()
        edit.undo_(model)
        assert torch.equal(w_out(model), weight)
    assert len(written) <= count * count.bit_length()  # and not count² / 2
    assert fe.edits_on(model) == () and ledger_of(model).between == {}


@pytest.mark.parametrize("order", ["from below", "from the middle"])
def test_in_any_order_what_stays_is_to_the_bit_what_it_would_be_alone(kind, order):
    model, count = tiny.model(kind, "gpt2"), 9
    clean = w_out(model)
    edits, _ = stacked(model, count)
    left = list(edits)
    for edit in edits if order == "from below" else edits[4:] + edits[:4]:
        edit.undo_(model)
        left.remove(edit)
        expected = clean
        for other in left:
            expected = other.deltas[0].on(expected)
        assert torch.equal(w_out(model), expected)
        assert fe.edits_on(model) == tuple(left)
        for kept, weight in ledger_of(model).between.get(1, {}).items():
            expected = clean
            for other in left[:kept]:
                expected = other.deltas[0].on(expected)
            assert torch.equal(weight, expected)


def test_of_the_weights_between_edits_some_are_kept_at_every_distance():
    kept: dict[int, torch.Tensor] = {}
    for top in range(2, 200):
        kept = thinned({**kept, top - 1: torch.empty(0)}, top)
        assert len(kept) <= top.bit_length()
        assert max(kept) == top - 1
        assert all(top - lower <= 3 * (top - upper) for lower, upper in pairwise([0, *kept]))
