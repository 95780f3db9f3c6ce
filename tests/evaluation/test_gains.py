"""How much of an edit fires where: predicted by arithmetic, measured in the model; and the dose that it takes."""

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align
from tl_factedit.evaluation.dose import Dose

# Sequential and parallel attention (gptj, neox, phi), gated (llama), norms after the MLP (gemma2, olmo2).
FORMS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "neox", "phi", "gemma2", "olmo2")]
FORMS += [("hooked", arch) for arch in ("gpt2", "llama", "gptj") if arch in tiny.HOOKED]
TEXT = laws.FACT.text + " Rome , near the river"


@pytest.fixture(params=FORMS, ids="-".join, scope="module")
def edited(request):
    """A model (unedited), and an edit of it whose key is the bare prompt's."""
    model = tiny.model(*request.param)
    return model, laws.rome(model, contexts=("",))(model, [laws.FACT])


def aligned(model, edit):
    return align(model.tokenizer, laws.FACT, prepend_bos=edit.provenance.prepend_bos)


def test_the_change_of_the_value_is_gain_times_right_at_every_position(edited):
    model, edit = edited
    with laws.untouched(model):
        found = fe.evaluation.gains(model, edit, TEXT)
    # float32 sums of 64 terms, and the rounding of the weights.
    assert found.predicted_error <= 1e-5
    assert found.gain.shape == (1, len(found.tokens), 1)
    assert found.layers == (1,)
    assert len(found.tokens) == model.to_tokens(TEXT).shape[1]


def test_the_gain_is_one_at_the_key_and_less_elsewhere(edited):
    model, edit = edited
    found = fe.evaluation.gains(model, edit, TEXT)
    at = aligned(model, edit).last
    assert float(found.strength[at]) == pytest.approx(1, abs=1e-5)
    others = torch.cat([found.strength[:at], found.strength[at + 1 :]])
    assert not torch.isclose(others, torch.ones_like(others), atol=1e-3).any()
    assert (others.abs() > 1e-3).any()  # an edit isn't confined to its position


def test_a_wrong_gain_would_be_noticed(edited, monkeypatch):
    model, edit = edited
    on = fe.editing.Delta.on
    monkeypatch.setattr(fe.editing.Delta, "on", lambda self, weight: weight + 1.01 * (on(self, weight) - weight))
    assert fe.evaluation.gains(model, edit, TEXT).predicted_error == pytest.approx(0.01, rel=0.05)


def test_bypassing_the_edit_at_all_positions_gives_the_unedited_bits(edited):
    model, edit = edited
    site, tokens, kept = down_proj(model, 1), model.to_tokens(TEXT), []
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        clean = runner.logits(tokens, hooks=[(site.value_at, lambda value, hook=None: kept.append(value.clone()))])
        with edit.applied(model):
            bypassed = runner.logits(tokens, hooks=[(site.value_at, lambda value, hook=None: kept[0])])
            assert not torch.equal(runner.logits(tokens), clean)
    assert torch.equal(bypassed, clean)


def margin(model, fact) -> float:
    """log p(new) − log p(old), by whole forwards."""
    ids, answers = model.to_tokens(fact.text)[0].tolist(), []
    for target in (fact.target_new, fact.target_true):
        new = model.to_tokens(target, prepend_bos=False)[0].tolist()
        with torch.no_grad():
            log_p = model(torch.tensor([ids + new])).float().log_softmax(-1)[0]
        answers.append(sum(float(log_p[len(ids) - 1 + i, token]) for i, token in enumerate(new)))
    return answers[0] - answers[1]


@pytest.mark.parametrize("target_new", [" Rome", " Rome in Italy"])
def test_at_dose_one_the_margin_is_that_of_the_edited_model(edited, target_new):
    model, edit = edited
    fact = laws.FACT.but(target_new=target_new)
    with laws.untouched(model):
        found = fe.evaluation.dose_curve(model, edit, [fact], force=True)
    clean = margin(model, fact)
    with edit.applied(model):
        assert float(found.override_margin[0]) == pytest.approx(margin(model, fact), abs=1e-4)
        assert abs(margin(model, fact) - clean) > 1e-2


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_the_curve_is_the_margin_with_the_value_scaled_by_hand_and_no_matter_of_batches(edited, batch_tokens):
    model, edit = edited
    row = aligned(model, edit)
    site, doses = down_proj(model, 1), (-0.5, 0.0, 0.4, 1.0, 1.5)
    found = fe.evaluation.dose_curve(model, edit, [laws.FACT, laws.FACT], doses=doses, batch_tokens=batch_tokens)
    assert found.margin.shape == (2, 5)
    for i, dose in enumerate(doses):

        def scale(value, hook=None, dose=dose):
            moved = value.clone()
            moved[:, row.last] += (dose - 1) * edit.deltas[0].right[0].float()  # the gain there is 1
            return moved

        with frozen(model), torch.no_grad(), edit.applied(model):
            runner = Runner(model)
            log_p = runner.logits(row.ids[None], hooks=[(site.value_at, scale)])[0, -1].float().log_softmax(-1)
        expected = float(log_p[row.new_ids[0]] - log_p[row.true_ids[0]])
        assert float(found.margin[0, i]) == pytest.approx(expected, abs=1e-4)
        assert float(found.margin[1, i]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("margin", "critical"),
    [
        ([-2.0, -1.0, 1.0], 0.75),
        ([-1.0, 3.0, 4.0], 0.125),
        ([1.0, -1.0, 1.0], 0.25),
        ([-1.0, 0.0, 1.0], 0.5),
        ([0.0, 0.0, 1.0], 0.0),
        ([1.0, 2.0, 3.0], float("nan")),
        ([-3.0, -2.0, -1.0], float("nan")),
    ],
)
def test_the_critical_dose_is_the_first_crossing_between_doses(margin, critical):
    dose = Dose(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([margin]))
    assert float(dose.critical[0]) == pytest.approx(critical, nan_ok=True)
    assert float(dose.override_margin[0]) == margin[2]


def test_an_edit_of_two_layers_has_the_gains_of_both(kind):
    model = tiny.model(kind, "gpt2")
    first = laws.rome(model, 1, contexts=("",))(model, [laws.FACT])
    with first.applied(model):
        stats = fe.KeyStats.identity(model, 2)
        second = fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)(model, [laws.FACT])
    both = fe.Edit(
        **{
            **{name: getattr(first, name) for name in ("facts", "editor", "contexts", "fits", "provenance")},
            "deltas": first.deltas + second.deltas,
            "keys": {**first.keys, **second.keys},
            "values": {**first.values, **second.values},
            "diagnostics": first.diagnostics + second.diagnostics,
        }
    )
    found = fe.evaluation.gains(model, both, TEXT)
    at = align(model.tokenizer, laws.FACT, prepend_bos=True).last
    assert found.layers == (1, 2)
    assert found.predicted_error <= 1e-5
    assert found.gain[:, at, 0].tolist() == pytest.approx([1, 1], abs=1e-4)
    with both.applied(model):
        measured = margin(model, laws.FACT)
    assert float(fe.evaluation.dose_curve(model, both, [laws.FACT]).override_margin[0]) == pytest.approx(
        measured, abs=1e-4
    )


def test_bos_follows_the_edit_unless_asked_otherwise(edited):
    model, edit = edited
    by_default, with_bos, without = (
        fe.evaluation.gains(model, edit, TEXT, prepend_bos=bos) for bos in (None, True, False)
    )
    assert with_bos.tokens == ("<bos>", *without.tokens)
    assert by_default.tokens == (with_bos if edit.provenance.prepend_bos else without).tokens


def test_an_update_of_nothing_changes_nothing(kind):
    model = tiny.model(kind, "gpt2")
    edit = laws.rome(model, fit=fe.ValueFit(steps=1))(model, [laws.FACT])
    assert fe.evaluation.gains(model, edit, TEXT).predicted_error == 0


@pytest.mark.parametrize("call", ["gains", "dose_curve"])
def test_an_edit_that_is_on_already_is_refused_before_anything_is_run(edited, monkeypatch, call):
    model, edit = edited
    what = {"gains": TEXT, "dose_curve": [laws.FACT]}[call]
    on = (edit.applied(model), laws.untouched(model), laws.no_forward(monkeypatch, model))
    with on[0], on[1], on[2], pytest.raises(ValueError, match="already"):
        getattr(fe.evaluation, call)(model, edit, what)


def test_a_dose_needs_two_objects(edited):
    model, edit = edited
    with laws.untouched(model), pytest.raises(ValueError, match="no target_new"):
        fe.evaluation.dose_curve(model, edit, [laws.FACT.but(target_new=None)])
