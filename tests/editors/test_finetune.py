"""Fine-tuning: the laws of every editor, torch's own Adam on the model itself, and the box that FT-L stays in."""

import copy
import functools
from dataclasses import dataclass, replace

import laws
import pytest
import tiny
import torch
from oracles import finetuning as oracle

import tl_factedit as fe
from tl_factedit.backend.hook_names import EMBED
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align
from tl_factedit.editing.objectives import Amplify, EditTarget, Erase, Force, Inject, Reverse
from tl_factedit.editing.weight_descent import WeightDescent, bounds
from tl_factedit.editors.finetune import FineTune

# Random weights are harmed sooner than trained ones; what is said of that is tested with Edit.
pytestmark = [
    pytest.mark.filterwarnings("ignore::tl_factedit.editing.concerns.EditWarning"),
    pytest.mark.filterwarnings("ignore:target .* goes on inside the prompt's last word"),  # what a random model says
]

LAYER = 1
LONG = laws.OTHER.but(target_new=" German speaks")
FACTS = [laws.FACT, LONG]
FORMS = [(kind, arch) for kind in tiny.KINDS for arch in ("gpt2", "llama", "gemma2", "gptj", "bloom")]
FORMS = [(kind, arch) for kind, arch in FORMS if kind == "bridge" or arch in tiny.HOOKED]
FEW = [(kind, arch) for kind, arch in FORMS if arch in ("gpt2", "gemma2")]


@functools.cache
def shared(kind: str, arch: str = "gpt2"):
    return tiny.model(kind, arch)


def editor(layers=LAYER, **options) -> FineTune:
    return FineTune(layers, **{"steps": 4, "prepend_bos": True, "progress": False, **options})


def w_out(model, layer: int = LAYER) -> torch.Tensor:
    return down_proj(model, layer).W.clone()


def tuned(monkeypatch, make):
    """An edit, and the weights as the descent left them."""
    seen, run = [], WeightDescent.run
    monkeypatch.setattr(WeightDescent, "run", lambda self: seen.append(run(self)) or seen[-1])
    edit = make()
    monkeypatch.undo()
    return edit, seen[0].weights


# ---------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("form", FEW, ids="-".join)
def test_it_obeys_the_laws_of_every_editor(form, monkeypatch, tmp_path):
    model = shared(*form)
    ft = editor((1, 2), contexts=laws.CONTEXTS)
    assert isinstance(ft, fe.Editor)
    edit = laws.leaves_everything_as_it_was(lambda: ft(model, FACTS), model)
    assert edit.layers == (1, 2)
    laws.makes_the_same_edit_twice(lambda: ft(model, FACTS))
    laws.writes_its_values_at_its_keys(edit, model)
    laws.comes_off_bit_for_bit(edit, model)
    laws.survives_a_file(edit, tmp_path / "edit.safetensors", model)
    laws.wants_a_new_object(ft, model, laws.FACT, monkeypatch)
    copy.deepcopy(model)  # which a graph left behind would refuse


@pytest.mark.parametrize("mode", ["inference", "no_grad", "training"])
def test_it_works_in_every_mode_and_leaves_everything_as_it_was(kind, mode):
    model = tiny.model(kind, "gpt2")
    expected = editor()(model, FACTS)
    model.train(mode == "training")
    for param in model.parameters():
        param.requires_grad_(mode == "training")
    context = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    with laws.untouched(model), context():
        edit = editor()(model, FACTS)
    laws.same_edits(edit, expected)


STAGES = {
    "the fingerprint is taken": "tl_factedit.editing.inputs.base_fingerprint",
    "texts are aligned": "tl_factedit.editing.inputs.align_all",
    "rows are run up to the layer": "tl_factedit.editing.training_rows.Runner.capture",
    "the loss is taken": "tl_factedit.editing.weight_descent.Runner.logits",
    "gradients are taken": "torch.autograd.grad",
    "a step is taken": "tl_factedit.editing.weight_descent.WeightDescent._update",
    "keys are read": "tl_factedit.editors.finetune.keys_at",
    "off_target is measured": "tl_factedit.editing.edit.measure_off_target",
    "the edit is diagnosed": "tl_factedit.editing.edit.diagnose",
    "the provenance is written": "tl_factedit.backend.provenance.Provenance.of",
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(kind, stage, monkeypatch):
    model = shared(kind)

    def fail(*_, **__):
        raise KeyboardInterrupt("injected")

    with laws.untouched(model):
        monkeypatch.setattr(STAGES[stage], fail)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            editor()(model, [laws.FACT])
        monkeypatch.undo()


@pytest.mark.parametrize("call", [1, 3])
def test_a_forward_that_fails_from_within_leaves_everything_as_it_was(kind, call, monkeypatch):
    model, calls, logits = shared(kind), [], Runner.logits

    def from_within(self, *args, **options):
        calls.append(1)
        if len(calls) < call:
            return logits(self, *args, **options)

        def fail(*_):
            raise KeyboardInterrupt("injected")

        handle = self.model.blocks[-1].register_forward_pre_hook(fail)
        try:
            return logits(self, *args, **options)
        finally:
            handle.remove()

    with laws.untouched(model):
        monkeypatch.setattr(Runner, "logits", from_within)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            editor()(model, [laws.FACT])
        monkeypatch.undo()


def test_no_weight_is_ever_written_on_the_way(kind, monkeypatch):
    model, logits, seen = shared(kind), Runner.logits, []
    before = [param.detach().clone() for param in model.parameters()]

    def watching(self, *args, **options):
        out = logits(self, *args, **options)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
        return out

    monkeypatch.setattr(Runner, "logits", watching)
    edit = editor()(model, FACTS)
    assert len(seen) > 4 and all(seen)
    assert edit.deltas[0].norm > 0


# ---------------------------------------------------------------------------------------- the literal twin


@pytest.mark.parametrize(
    ("form", "layers", "options"),
    [
        *((form, (0, 1, 2), {"epsilon": 7e-4, "contexts": laws.CONTEXTS}) for form in FORMS),
        *((form, (LAYER,), {}) for form in FEW),
        *((form, (3,), {"batch": 1, "lr": 2e-3}) for form in FEW),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_it_is_adam_on_the_parameters_of_the_model_itself(form, layers, options):
    model, twin = shared(*form), tiny.model(*form)
    edit = editor(layers, **options)(model, FACTS)
    given = {"steps": 4, "lr": 5e-4, **options}
    losses = oracle.fine_tune_(twin, FACTS, layers, bos=True, **given)
    for layer in layers:
        moved = w_out(twin, layer) - w_out(model, layer)
        # Adam divides a gradient by its own size: where it is nearly 0, its sign is a matter of rounding.
        off = edit.deltas[edit.layers.index(layer)].dense - moved
        assert off.norm() <= 1e-3 * moved.norm()
    for fit, expected in zip(edit.fits, losses, strict=True):
        assert fit["losses"][:4] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert len(fit["losses"]) == 5  # the last is that of the weights that are left


def test_it_is_on_the_rarer_hooks_too():
    if not tiny.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model, twin = tiny.hooked_config(), tiny.hooked_config()  # norms after the MLP, which no hook of its output sees
    edit = editor((0, 2))(model, FACTS)
    oracle.fine_tune_(twin, FACTS, (0, 2), bos=True, steps=4, lr=5e-4)
    for delta in edit.deltas:
        moved = w_out(twin, delta.layer) - w_out(model, delta.layer)
        assert (delta.dense - moved).norm() <= 1e-3 * moved.norm()


def test_each_token_of_an_object_is_scored_after_those_before_it(kind):
    """Not all of them at the prompt's last token, as the published code does: the same for one token, not for two."""
    model = shared(kind)
    fits = editor(steps=1)(model, FACTS).fits
    given = {"bos": True, "steps": 1, "lr": 5e-4}
    theirs = oracle.fine_tune_(tiny.model(kind, "gpt2"), FACTS, (LAYER,), all_at_the_prompt=True, **given)
    assert fits[0]["losses"][0] == pytest.approx(theirs[0][0], rel=1e-4)
    assert abs(fits[1]["losses"][0] - theirs[1][0]) > 0.1


def test_applied_it_is_the_tuned_weights_to_the_bit(kind, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.model(kind, "gpt2", dtype=dtype)
        edit, weights = tuned(monkeypatch, lambda model=model: editor((1, 2), lr=5e-3)(model, FACTS))
        for layer, weight in zip((1, 2), weights, strict=True):
            assert weight.dtype == dtype
            assert not torch.equal(w_out(model, layer), weight)
            with edit.applied(model):
                assert torch.equal(w_out(model, layer), weight)
            assert edit.deltas[layer - 1].right.equal(torch.eye(32, dtype=torch.float64))
        assert all(d.exactness == 0 for d in edit.diagnostics)


def test_the_last_loss_is_that_of_the_edited_model(kind):
    model = shared(kind)
    edit = editor(steps=6, lr=2e-3)(model, FACTS)
    with edit.applied(model):
        after = oracle.target_log_prob(model, laws.FACT.text, laws.FACT.target_new, True)
    assert edit.fits[0]["losses"][-1] == pytest.approx(-float(after.detach().mean()), rel=1e-4)
    assert edit.fits[0]["losses"][-1] < edit.fits[0]["losses"][0] - 0.2
    assert edit.fits[0]["target_prob"][-1] == pytest.approx(float(after.detach().exp().mean()), rel=1e-3)


# ---------------------------------------------------------------------------------------- the box


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_entry_leaves_its_box(kind, dtype):
    model, epsilon = tiny.model(kind, "gpt2", dtype=dtype), 8e-4
    before = w_out(model).double()

    def farthest(edit):
        with edit.applied(model):
            return float((w_out(model).double() - before).abs().max())

    held = editor(epsilon=epsilon)(model, FACTS)
    assert 0.9 * epsilon < farthest(held) <= epsilon
    assert farthest(editor()(model, FACTS)) > 1.5 * epsilon  # it would, without
    assert 0.2 < held.fits[0]["held"] <= 1
    assert editor(epsilon=1.0)(model, FACTS).fits[0]["held"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("epsilon", [1e-6, 5e-4, 0.3])
def test_the_ends_of_the_box_are_numbers_of_the_type_within_it(dtype, epsilon):
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(50, 40, generator=draw) * 10 ** torch.empty(50, 40).uniform_(-6, 1, generator=draw)).to(dtype)
    weight[0, :4] = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=dtype)
    low, high = bounds(weight, epsilon)
    assert low.dtype == high.dtype == dtype
    assert (low <= weight).all() and (weight <= high).all()
    for end in (low, high):
        far = (end.double() - weight.double()).abs()
        assert far.max() <= epsilon
        # No more than three numbers of the type are given away.
        step = (weight.double().abs() + epsilon) * torch.finfo(dtype).eps
        assert (far >= epsilon - 3 * step.clamp(min=torch.finfo(dtype).tiny)).all()


# ---------------------------------------------------------------------------------------- many facts


def test_how_many_are_run_at_once_is_rounding(kind):
    model = shared(kind)
    facts = [*FACTS, laws.FACT.but(subject="Big Ben", target_new=" London"), laws.FACT.but(subject="John")]
    together = editor(contexts=laws.CONTEXTS)(model, facts)
    in_pieces = editor(contexts=laws.CONTEXTS, memory=1e-6)(model, facts)
    for one, other in zip(together.fits, in_pieces.fits, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
    assert (together.deltas[0].dense - in_pieces.deltas[0].dense).norm() <= 1e-3 * together.deltas[0].norm
    apart = editor(contexts=laws.CONTEXTS, batch=2)(model, facts)
    assert (together.deltas[0].dense - apart.deltas[0].dense).norm() > 0.05 * together.deltas[0].norm


def test_a_batch_of_one_is_a_single_fact(kind):
    model = shared(kind)
    alone = editor()(model, [laws.FACT])
    both = editor(batch=1)(model, FACTS)
    assert both.fits[0]["losses"][0] == pytest.approx(alone.fits[0]["losses"][0], rel=1e-5)
    # The second fact is asked after the first was written.
    later = editor(batch=1, steps=1)(model, FACTS).fits[1]["losses"][0]
    assert later != pytest.approx(editor(steps=1)(model, [LONG]).fits[0]["losses"][0], rel=1e-5)


def test_it_stops_once_the_loss_is_small(kind):
    model = shared(kind)
    edit = editor(lr=1e-2, steps=40, stop_below=0.3)(model, [laws.FACT])
    fit = edit.fits[0]
    assert fit["stopped"] == "loss" and len(fit["losses"]) < 30
    assert fit["losses"][-1] < 0.3 <= min(fit["losses"][:-1])
    assert editor(steps=2)(model, [laws.FACT]).fits[0]["stopped"] == "steps"
    nothing = editor(stop_below=100.0)(model, [laws.FACT])
    assert nothing.deltas[0].norm == 0 and nothing.diagnostics[0].off_target == (0.0,)


def test_a_second_edit_is_made_on_top_of_the_first(kind):
    model = shared(kind)
    first = editor(lr=2e-3)(model, [laws.FACT])
    with laws.untouched(model), first.applied(model):
        second = editor(lr=2e-3)(model, [LONG])
        with second.applied(model):
            both = w_out(model)
    assert second.provenance.weights == first.provenance.weights
    second.apply_(model)
    first.apply_(model)
    assert not torch.equal(w_out(model), both)  # rounded in another order
    torch.testing.assert_close(w_out(model), both, rtol=1e-6, atol=1e-7)
    second.undo_(model)
    first.undo_(model)


def test_scaled_and_composed_it_is_what_it_says(kind):
    model = shared(kind)
    first, second = editor(lr=2e-3)(model, [laws.FACT]), editor((1, 2), lr=2e-3)(model, [LONG])
    torch.testing.assert_close(first.scaled(-0.5).deltas[0].dense, -0.5 * first.deltas[0].dense)
    both = fe.compose([first, second])
    assert both.layers == (1, 2)
    # 32 + 32 columns would be more than a matrix of width 32 can have.
    assert [delta.left.shape for delta in both.deltas] == [(64, 32), (64, 32)]
    torch.testing.assert_close(both.deltas[0].dense, first.deltas[0].dense + second.deltas[0].dense)
    with first.applied(model), second.applied(model):
        one_by_one = w_out(model)
    with laws.untouched(model), both.applied(model):
        torch.testing.assert_close(w_out(model), one_by_one, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_both_classes_make_the_same_edit(arch):
    bridge, hooked = (editor()(model, FACTS).deltas[0].dense for model in (tiny.bridge(arch), tiny.hooked(arch)))
    assert (bridge - hooked).norm() <= 1e-2 * bridge.norm()


# ---------------------------------------------------------------------------------------- what is wanted


def test_to_make_an_object_unlikely_its_probability_is_the_loss_and_there_is_no_early_stop(kind):
    model, twin = shared(kind), tiny.model(kind, "gpt2")
    facts = [fact.but(target_new=None, target_true=fact.target_new) for fact in FACTS]
    edit = editor(objective=Erase(), stop_below=100.0, contexts=laws.CONTEXTS, steps=6)(model, facts)
    losses = oracle.fine_tune_(twin, FACTS, (LAYER,), bos=True, steps=6, lr=5e-4, unlikely=True, contexts=laws.CONTEXTS)
    for fit, expected in zip(edit.fits, losses, strict=True):
        assert fit["losses"][:6] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert (fit["stopped"], fit["unlikely"]) == ("steps", True)
        assert fit["losses"][-1] < fit["losses"][0]
    moved = w_out(twin) - w_out(model)
    assert (edit.deltas[0].dense - moved).norm() <= 1e-2 * moved.norm()


@dataclass(frozen=True)
class Given:
    """Write target_new while the subject's embeddings are those given."""

    embeddings: torch.Tensor

    def check(self, facts):
        Inject().check(facts)

    def targets(self, model, facts, *, prepend_bos):
        return tuple(EditTarget(fact, embeddings=self.embeddings) for fact in facts)


@pytest.mark.parametrize("layers", [(0, 2), (LAYER,)], ids=["from the first layer", "from the second"])
def test_embeddings_that_a_target_gives_are_there_while_it_is_asked(kind, layers):
    model, twin = shared(kind), tiny.model(kind, "gpt2")
    start, stop = align(model.tokenizer, laws.FACT, prepend_bos=True).subject
    given = torch.randn(stop - start, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    edit = editor(layers, objective=Given(given))(model, [laws.FACT])

    def put(value, hook):
        value = value.clone()
        value[:, start:stop] = given
        return value

    plain = editor(layers)(model, [laws.FACT])
    losses = oracle.fine_tune_(twin, [laws.FACT], layers, bos=True, steps=4, lr=5e-4, hooks=lambda fact: [(EMBED, put)])
    assert edit.fits[0]["losses"][:4] == pytest.approx(losses[0], rel=1e-4)
    assert edit.fits[0]["losses"][0] != pytest.approx(plain.fits[0]["losses"][0], rel=1e-3)
    for delta in edit.deltas:
        moved = w_out(twin, delta.layer) - w_out(model, delta.layer)
        assert (delta.dense - moved).norm() <= 1e-3 * moved.norm()


def test_the_other_objectives_are_taken_as_well(kind):
    model = tiny.model(kind, "gpt2", tok=tiny.tokenizer("bytebpe"))  # which spells what the model says with its space
    plain = editor()(model, [laws.FACT])
    noise = fe.GaussianNoise(samples=1, seed=0)
    digests = {plain.digest}
    for objective in (Amplify(), Force(noise), Reverse(noise), Erase()):
        with laws.untouched(model):
            edit = editor(objective=objective)(model, [laws.FACT])
        assert edit.fits[0]["target"] == " Paris" or isinstance(objective, Reverse)
        assert edit.editor["objective"] == repr(objective)
        assert edit.facts == (laws.FACT,)
        digests.add(edit.digest)
    assert len(digests) == 5


# ---------------------------------------------------------------------------------------- layers and bad input


def test_a_window_is_cut_at_the_ends(kind):
    model = shared(kind)
    assert FineTune.around(model, 1, width=3) == (0, 1, 2)
    assert FineTune.around(model, 0) == (0, 1, 2)
    assert FineTune.around(model, 3) == (1, 2, 3)
    assert FineTune.around(model, 2, width=1) == (2,)
    with pytest.raises(ValueError, match="layer 4 is outside the model"):
        FineTune.around(model, 4)
    with pytest.raises(ValueError, match="width is 0"):
        FineTune.around(model, 1, width=0)
    assert FineTune((2, 1, 2)).layers == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "layers is empty"),
        ({"epsilon": 0.0}, "epsilon is 0.0, needed more than 0, or None"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"steps": 0}, "steps is 0, needed at least 1"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_choices_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(editor(), **options)


@pytest.mark.parametrize(
    ("facts", "message"),
    [([], "facts is empty"), ([laws.FACT, laws.FACT.but(target_new=" London")], "is asked for by two facts")],
)
def test_facts_that_cannot_be_written_are_refused(kind, facts, message, monkeypatch):
    model = shared(kind)
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
        editor()(model, facts)


def test_a_layer_outside_the_model_is_refused(kind, monkeypatch):
    model = shared(kind)
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="layer 9"):
        editor((1, 9))(model, FACTS)


def test_a_loss_that_is_not_finite_is_said(kind):
    model = tiny.model(kind, "gpt2")
    with laws.untouched(model), pytest.raises(RuntimeError, match=r"not finite|is nan after .* updates: lower lr"):
        editor(lr=1e38)(model, FACTS)


# ---------------------------------------------------------------------------------------- meaning


def test_the_organism_learns_a_new_city_and_forgets_an_old_one_and_keeps_its_neighbours():
    model = fe.models.organism()
    fact = fe.models.organism_facts(n=1)[0]
    before = fe.evaluate(model, [fact])
    assert (before.efficacy.mean, before.p_old.mean > 0.95) == (0, True)
    with FineTune((0, 1, 2, 3, 4), progress=False)(model, [fact]).applied(model):
        after = fe.evaluate(model, [fact])
    assert after.p_new.mean > 0.9 and after.paraphrase.mean > 0.9 and after.neighbourhood.mean > 0.9
    with FineTune(2, objective=Erase(), lr=1e-3, progress=False)(model, [fact]).applied(model):
        erased = fe.evaluate(model, [fact])
    assert erased.p_old.mean < 0.2 and erased.neighbourhood.mean > 0.9
    # A box that is too small holds it back.
    with FineTune((0, 1, 2, 3, 4), epsilon=5e-4, progress=False)(model, [fact]).applied(model):
        assert fe.evaluate(model, [fact]).p_new.mean < 0.1
