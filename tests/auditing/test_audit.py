"""An audit hands on what was measured, says no more than that, and upstream of the edit nothing moves."""

import copy
import dataclasses
import importlib
import math
import warnings

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.auditing.retained import _touched_cells
from tl_factedit.auditing.upstream import Upstream, check_upstream
from tl_factedit.backend.fingerprint import Fingerprint
from tl_factedit.backend.weights import down_proj
from tl_factedit.evaluation.scores import Answer, scores_of
from tl_factedit.measure.population import parts_of
from tl_factedit.probes.states import read_states

LAYER = 1
FORMS = [*((kind, "gpt2") for kind in tiny.KINDS), ("bridge", "llama"), ("bridge", "gptj")]


CITIES = (" Paris", " Rome", " London", " Berlin", " Madrid", " Vienna", " Tokyo", " Cairo")


def believed(model) -> fe.Fact:
    """The fact that a random model believes: its likeliest city is the old object, the next one is the new."""
    last = laws.logits(model, laws.FACT.text)[0, -1]
    ids = [int(model.to_tokens(city, prepend_bos=False)[0, -1]) for city in CITIES]
    old, new = sorted(range(len(CITIES)), key=lambda i: -float(last[ids[i]]))[:2]
    controls = [city for i, city in enumerate(CITIES) if i not in (old, new)]
    return laws.FACT.but(target_true=CITIES[old], target_new=CITIES[new], controls=controls)


@pytest.fixture(params=FORMS, ids="-".join, scope="module")
def case(request):
    """A model that is shared, as nothing here may change it, a fact, and a real edit of it that works."""
    model = tiny.model(*request.param)
    fact = believed(model)
    fit = fe.ValueFit(steps=20, kl_weight=0.0, decay=0.0)
    return model, fact, laws.rome(model, LAYER, fit=fit, contexts=("",))(model, [fact])


def scores(facts: int, **shares: float) -> fe.Scores:
    """Made-up scores: of rewrites, a share of the facts succeeds; of the others, a share of a fact's ten prompts."""
    answers = []
    for fact in range(facts):
        wins = {
            "rewrite": [fact < round(facts * shares["rewrite"])],
            "paraphrase": [i < round(10 * shares["paraphrase"]) for i in range(10)],
            "neighbour": [i < round(10 * shares["neighbour"]) for i in range(10)],
        }
        for ask, successes in wins.items():
            for success in successes:
                nll_true, nll_new = (0.1, 2.0) if success == (ask == "neighbour") else (2.0, 0.1)
                answers.append(Answer(fact, ask, "", " Paris", " Rome", nll_true, nll_new, False, 1, 1))
    made_up = fe.editing.Provenance("made up", FINGERPRINT, True, "float32", {})
    return scores_of((laws.FACT,) * facts, tuple(answers), made_up)


FINGERPRINT = Fingerprint(("a",), "b", "bridge")
GOOD = {"rewrite": 1.0, "paraphrase": 1.0, "neighbour": 1.0}
CASES = {
    "works": ({}, "INCONCLUSIVE"),
    "new object doesn't lead": ({"rewrite": 0.0}, "FAILED"),
    "neighbours fall": ({"neighbour": 0.5}, "DAMAGED"),
    "neighbours fall a little": ({"neighbour": 0.9}, "INCONCLUSIVE"),
    "fails and damages": ({"rewrite": 0.0, "neighbour": 0.0}, "FAILED"),
}


@pytest.mark.parametrize("facts", [1, 3], ids=["one fact", "three facts"])
@pytest.mark.parametrize("name", CASES)
def test_a_verdict_never_says_more_than_its_scores(case, monkeypatch, name, facts):
    model, fact, edit = case
    shares, label = CASES[name]
    before = scores(facts, rewrite=0.0, paraphrase=0.0, neighbour=1.0)
    made = iter([before, scores(facts, **{**GOOD, **shares})])
    monkeypatch.setattr("tl_factedit.auditing.gather.evaluate", lambda *args, **options: next(made))
    asked = [fact, *(fact.but(subject=subject) for subject in ("Anna", "Big Ben"))]
    verdict = fe.audit(model, edit, asked[:facts], force=True)
    assert verdict.label == label
    assert verdict.level == "per edit"  # fewer than ten facts are no population
    back = verdict.recoverable
    assert verdict.retained.estimate is None
    assert back.estimate is None or "(paraphrases, " in back.says  # where the model knows any, nothing else can say
    if label == "INCONCLUSIVE":
        for what in ("plain text", "knock-out", "routes", "decoder"):
            assert any(what in line for line in verdict.missing)
    assert f"Verdict: {label}" in repr(verdict)


def test_a_real_edit_that_works_is_inconclusive_and_one_of_nothing_has_failed(case):
    model, fact, edit = case
    alone = fact.but(neighbours=(), neighbour_targets=())
    with laws.untouched(model):
        verdict = fe.audit(model, edit, [alone])
    assert verdict.label == "INCONCLUSIVE"
    assert "whether neighbourhood success suffers wasn't measured" in repr(verdict)
    nothing = laws.rome(model, LAYER, fit=fe.ValueFit(steps=1), contexts=("",))(model, [fact])
    with laws.untouched(model):
        failed = fe.audit(model, nothing, [alone])
    assert failed.label == "FAILED"
    assert failed.upstream.invariant and not failed.upstream.changed_after


def test_a_real_edit_that_moves_its_neighbours_has_damaged_the_model(case):
    model, fact, edit = case
    # The fact asked as its own neighbour: what the edit moves for certain.
    with pytest.warns(UserWarning, match="names its subject"):
        asked = fact.but(neighbours=[fact.text], neighbour_targets=[fact.target_true])
    verdict = fe.audit(model, edit, [asked])
    assert (verdict.before.neighbourhood.mean, verdict.after.neighbourhood.mean) == (1, 0)
    assert verdict.label == "DAMAGED"
    assert "the change isn't local" in repr(verdict)


def test_everything_upstream_is_equal_bit_for_bit_and_the_output_is_not(case):
    model, fact, edit = case
    with laws.untouched(model):
        found = check_upstream(model, edit, [fact, laws.OTHER])
    bos = edit.provenance.prepend_bos
    positions = sum(model.to_tokens(one.text, prepend_bos=bos).shape[1] for one in (fact, laws.OTHER))
    assert found == Upstream(LAYER, True, True, positions)


@pytest.mark.parametrize("what", ["W_out", "attention"])
def test_a_change_below_the_edited_layer_is_seen(kind, monkeypatch, what):
    model = tiny.model(kind, "gpt2")
    edit = laws.rome(model, 2, contexts=("",))(model, [laws.FACT])
    params = dict(model.named_parameters())
    name = next(n for n in params if ("attn" in n) and params[n].ndim > 1 and (".0." in n))
    param = down_proj(model, 0).param if what == "W_out" else params[name]
    apply_, undo_ = fe.Edit.apply_, fe.Edit.undo_

    def apply_more(self, model):
        apply_(self, model)
        param.data.mul_(2)

    def undo_more(self, model):
        param.data.div_(2)
        undo_(self, model)

    assert check_upstream(model, edit, [laws.FACT]).invariant
    monkeypatch.setattr(fe.Edit, "apply_", apply_more)
    monkeypatch.setattr(fe.Edit, "undo_", undo_more)
    assert not check_upstream(model, edit, [laws.FACT]).invariant
    verdict = fe.audit(model, edit, [laws.FACT])
    assert not verdict.upstream.invariant
    assert "NOT EQUAL, which should be impossible" in repr(verdict)


def test_a_verdict_holds_the_numbers_of_both_states(case):
    model, fact, edit = case
    with pytest.raises(ValueError, match="audit it with its own policy"):
        fe.audit(model, edit, [fact], prepend_bos=not edit.provenance.prepend_bos)
    bos = edit.provenance.prepend_bos
    verdict = fe.audit(model, edit, [fact])
    clean = fe.evaluate(model, [fact], prepend_bos=bos)
    with edit.applied(model):
        edited = fe.evaluate(model, [fact], prepend_bos=bos)
    assert verdict.before.answers == clean.answers
    assert verdict.after.answers == edited.answers
    assert clean.answers != edited.answers
    row = verdict.table().iloc[0]
    assert row["p_new_before"] == pytest.approx(clean.p_new.mean, rel=1e-6)
    assert row["p_new_after"] == pytest.approx(edited.p_new.mean, rel=1e-6)
    assert (row["old"], row["new"], row["success"]) == (fact.target_true, fact.target_new, True)
    new, old = edited.p_new.mean, edited.p_old.mean
    assert row["override_margin"] == pytest.approx(math.log(new / old), abs=1e-3)
    assert [gain.text for gain in verdict.gains] == [fact.text, fact.fill(fact.paraphrases[0])]
    assert all(gain.predicted_error <= 1e-5 for gain in verdict.gains)
    lens = verdict.lens
    upstream = [reading.at(position="subject", layer=LAYER - 1) for reading in (lens.before, lens.after)]
    after = [reading.at(position="subject", layer=LAYER) for reading in (lens.before, lens.after)]
    assert torch.equal(*upstream)
    assert not torch.equal(*after)


def test_objects_with_one_first_token_are_flagged(case):
    model, fact, edit = case
    flagged = fact.but(target_true=" Rome in Spain", target_new=" Rome in Italy", neighbours=(), neighbour_targets=())
    assert bool(fe.audit(model, edit, [flagged], force=True).table()["same_first_token"][0])
    assert not bool(fe.audit(model, edit, [fact]).table()["same_first_token"][0])


def test_two_models_are_compared_without_what_only_an_edit_has(case):
    model, fact, edit = case
    changed = copy.deepcopy(model)
    edit.apply_(changed)
    with laws.untouched(model), laws.untouched(changed):
        by_model = fe.audit(model, changed, [fact])
    by_edit = fe.audit(model, edit, [fact], prepend_bos=by_model.before.provenance.prepend_bos)
    assert by_model.label == by_edit.label
    assert by_model.after.answers == by_edit.after.answers
    assert (by_model.upstream, by_model.dose, by_model.gains) == (None, None, ())
    assert math.isnan(by_model.table()["override_margin"][0])
    assert "everything up to the key" not in repr(by_model)


def test_a_fact_alone_is_a_list_of_one(case):
    model, fact, edit = case
    assert fe.audit(model, edit, fact).facts == (fact,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_new": None}, "no target_new"),
        ({"subject": "Eiffel Tow", "prompt": "{}er is in"}, "inside token"),
    ],
    ids=["no new object", "inside a token"],
)
def test_bad_facts_are_refused_before_anything_is_run(case, monkeypatch, change, message):
    model, fact, edit = case
    fact = dataclasses.replace(fact, **change)
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
        fe.audit(model, edit, [fact])


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says so when it is made
    INSIDE_A_WORD = [fe.Route(laws.FACT, "He is in the c", "ity", " Rome")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": ["", "x y z"]}, "no tokens|no token"),
        ({"same_subject": [laws.OTHER]}, "needed the subject of a changed fact"),
        ({"routes": INSIDE_A_WORD}, "merges"),
    ],
    ids=["no text", "a question about another", "no answer"],
)
def test_what_else_cannot_be_asked_is_refused_before_anything_is_run(case, monkeypatch, given, message):
    model, fact, edit = case
    if "routes" in given:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = {"routes": [dataclasses.replace(given["routes"][0], fact=fact)]}
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
        fe.audit(model, edit, [fact], **given)


LONG = "The " * 300


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"texts": ["x y", LONG]}, r"texts\[1\], 'The The"),
        ({"routes": [fe.Route(laws.FACT, LONG + "end is", " Paris", " Rome")]}, "'The The .*room for"),
        ({"reference": [laws.OTHER.but(prompt=LONG + "{} is", id="late")]}, "reference 'late'"),
        ({"same_subject": [laws.FACT.but(prompt=LONG + "{} is", id="aside")]}, "same_subject 'aside'"),
    ],
    ids=["texts", "routes", "reference", "same_subject"],
)
def test_what_is_too_long_for_the_model_is_named_before_anything_is_run(case, monkeypatch, given, named):
    model, fact, edit = case
    refused = pytest.raises(ValueError, match=rf"{named}.*cfg\.n_ctx")
    with laws.untouched(model), laws.no_forward(monkeypatch, model), refused:
        fe.audit(model, edit, [fact], **given)


MADE_FOR = {
    "another fact": laws.OTHER,
    "another subject": laws.FACT.but(subject="Big Ben"),
    "another new object": None,
    "another prompt": laws.FACT.but(prompt="Where is {} ? in"),
}


@pytest.mark.parametrize("name", MADE_FOR)
@pytest.mark.parametrize("routed", [False, True])
def test_facts_that_a_change_was_not_made_for_are_refused(case, monkeypatch, name, routed):
    model, fact, edit = case
    change = fe.editors.RoutedEdit.of(edit) if routed else edit
    asked = MADE_FOR[name] or fact.but(target_new=fact.controls[0], controls=fact.controls[1:])
    named = rf"fact {asked.name!r} .*isn't one that the change was made for \({fact.text!r}\)"
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        for facts in ([asked], [fact, asked]):
            with pytest.raises(ValueError, match=rf"(?s){named}.*force=True"):
                fe.audit(model, change, facts, progress=False)


def test_the_curious_may_ask_all_the_same(case):
    model, fact, edit = case
    verdict = fe.audit(model, edit, [laws.OTHER.but(controls=fact.controls)], force=True, progress=False)
    assert verdict.facts[0].subject == laws.OTHER.subject
    with pytest.raises(ValueError, match="is in 0 of the 1 changes"):
        fe.audit(model, [edit], [laws.OTHER], force=True, progress=False)


def test_what_else_a_fact_holds_is_no_matter_to_what_it_was_made_for(case):
    model, fact, edit = case
    asked = fact.but(paraphrases=(), neighbours=(), neighbour_targets=(), relation="city", id="mine")
    assert fe.audit(model, edit, [asked], progress=False).facts[0].name == "mine"


def test_an_edit_that_is_on_or_of_another_model_is_refused_before_anything_is_run(case, kind, monkeypatch):
    model, fact, edit = case
    on = (edit.applied(model), laws.untouched(model), laws.no_forward(monkeypatch, model))
    with on[0], on[1], on[2], pytest.raises(ValueError, match="already: undo_ it first"):
        fe.audit(model, edit, [fact])
    other = tiny.model(kind, "gpt2", seed=8)
    with (
        laws.untouched(other),
        laws.no_forward(monkeypatch, other),
        pytest.raises(ValueError, match="made for weights"),
    ):
        fe.audit(other, edit, [fact])


@pytest.mark.parametrize(
    ("stage", "call"),
    [
        ("gather.evaluate", 1),
        ("gather.evaluate", 2),
        ("upstream.check_upstream", 1),
        ("gather.gains", 2),
        ("gather.dose_curve", 1),
        ("audit.judge", 1),
    ],
)
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(case, monkeypatch, stage, call):
    model, fact, edit = case
    module, name = stage.split(".")
    module = importlib.import_module(f"tl_factedit.auditing.{module}")
    original, calls = getattr(module, name), []

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt("injected")
        return original(*args, **options)

    with laws.untouched(model):
        monkeypatch.setattr(module, name, fail)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            fe.audit(model, edit, [fact])
        monkeypatch.undo()


def test_a_fact_counts_once_whatever_it_is_called(case, monkeypatch):
    model, fact, edit = case
    with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="is asked twice, needed each fact once"):
        fe.audit(model, edit, [fact, fact.but(id="again", paraphrases=())])


def test_of_edits_in_several_layers_only_what_all_of_them_touch_is_retained_or_not(kind):
    model = tiny.model(kind, "gpt2")
    edits = [laws.rome(model, layer)(model, [fact]) for layer, fact in ((0, laws.FACT), (2, laws.OTHER))]
    states = read_states(model, [laws.FACT, laws.OTHER])

    def first(changed, facts=(laws.FACT, laws.OTHER)):
        cells = _touched_cells(states, parts_of(model, changed, facts))
        assert torch.equal(cells.all(1), cells.any(1))
        return states.layers[int(cells.all(1).float().argmax())]

    assert first(edits) == 2 and first(edits, [laws.FACT]) == 0
    assert first(fe.compose(edits)) == 0  # one change of both layers, for both facts
    assert first(tiny.model(kind, "gpt2", seed=1)) == 0


def test_an_edit_composed_of_others_of_another_rank_is_audited(kind):
    model = tiny.model(kind, "gpt2")
    both = laws.rome(model, 2)(model, [laws.OTHER])
    memit = fe.Memit({1: fe.KeyStats.identity(model, 1)}, fit=laws.QUICK, contexts=("",), progress=False)
    edit = fe.compose([memit(model, [laws.FACT, laws.OTHER.but(subject="Anna")]), both])
    assert [delta.left.shape[1] for delta in edit.deltas] == [2, 1]
    found = fe.evaluation.gains(model, edit, laws.FACT.text)
    assert found.gain.shape[::2] == (2, 2) and found.gain[1, :, 1].eq(0).all() and found.predicted_error < 1e-3
    assert fe.audit(model, edit, [believed(model)]).gains[0].gain.shape[-1] == 2


def test_a_usual_attack_that_cannot_be_run_is_noted_and_one_of_the_users_own_raises(kind):
    model = tiny.model(kind, "gpt2")
    fact = believed(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "ln_f" in name or "ln_final" in name)[0] += 0.1
    verdict = fe.audit(model, other, [fact], full=True, progress=False)
    noted = [line for line in verdict.missing if "couldn't be run" in line]
    assert any(line.startswith("WeightReversal couldn't be run: no matrix differs") for line in noted)
    assert verdict.attack("weight reversal") is None and "weight reversal" in verdict.findings.untried
    with pytest.raises(ValueError, match="no matrix differs"):
        fe.audit(model, other, [fact], attacks=[fe.attacks.WeightReversal()], progress=False)


def test_all_attacks_are_corrected_together(case):
    model, fact, edit = case
    facts = [fact.but(id=str(i)) for i in range(1)]
    verdict = fe.audit(model, edit, facts, full=True, progress=False)
    tests = sum(int(recovery.tested.sum()) for recovery in verdict.attacks)
    assert {finding.tests for finding in verdict.findings.attacks} == {tests} and tests > 5
    assert {"drift", "disjoint relearning"} <= set(verdict.findings.untried)  # no texts; one subject


def test_of_one_fact_nothing_is_bounded_and_no_bound_is_told(case):
    model, fact, edit = case
    assert "nan" not in fe.audit(model, edit, [fact], progress=False).explain()


@pytest.mark.parametrize("shared", [1, 2])
def test_facts_whose_objects_begin_with_one_token_are_told_where_nothing_can_be_said(kind, shared):
    model = fe.models.organism(kind)
    facts = fe.models.organism_facts("city")[:2]
    for i, fact in enumerate(facts[:shared]):
        facts[i] = fact.but(
            target_true=f"{fact.target_true} {str(fact.target_new).strip()}", target_new=fact.target_true
        )
    edits = [fe.FineTune(1, steps=12, lr=3e-3, progress=False)(model, fact) for fact in facts]
    verdict = fe.audit(model, edits, facts, progress=False)
    first = facts[0]
    which = "all facts" if shared == 2 else "1 of 2 facts"
    said = (
        f"the objects of {which} begin with one token ({first.target_true!r} and {first.target_new!r}), which is what"
    )
    assert verdict.label == "INCONCLUSIVE" and verdict.missing[0].startswith(said)
    assert said in verdict.explain() and said in repr(verdict) and "begin with one token" in verdict._repr_html_()
    assert "begin with one token" not in repr(fe.audit(model, edits[1:], facts[1:], progress=False)) or shared == 2


def test_where_nothing_can_be_said_all_that_is_missing_is_told_in_short(case):
    model, fact, edit = case
    verdict = fe.audit(model, edit, [fact], progress=False)
    lacks = ("no paraphrases", "a decoder: " + "long " * 60, "texts.")
    lost = dataclasses.replace(verdict, label="INCONCLUSIVE", by=frozenset(), missing=lacks)
    assert "What is missing: no paraphrases; a decoder: long" in lost.explain()
    assert lost.explain().endswith(" …; texts.") and len(lost.explain()) < 300
    assert "First of what is missing: no paraphrases." in repr(lost) and lacks[1].strip() in repr(lost)
    alone = dataclasses.replace(lost, missing=lacks[:1])
    assert alone.explain().endswith("no stronger label. What is missing: no paraphrases.")
    nothing = dataclasses.replace(lost, missing=())
    assert nothing.explain() == "What was measured supports no stronger label."
