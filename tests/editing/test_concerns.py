"""An edit that did nothing says so: before fitting where that can be known, and in the sense of its objective after."""

import warnings
from dataclasses import replace

import laws
import pytest
import tiny
import torch
from test_edit import made

import tl_factedit as fe
from tl_factedit.editing.concerns import concerns_of_fits, failed, probability

LAST = 3
FIT = fe.ValueFit(steps=12)


def made_by(name: str, model, **options) -> fe.Edit:
    """An edit of one fact by an editor of this name, in layer 1 unless said otherwise."""
    layer, facts = options.pop("layer", 1), [options.pop("fact", laws.FACT)]
    stats = options.pop("stats", None)
    silent = {"progress": False, **options}
    if name == "finetune":
        return fe.FineTune(layer, **silent)(model, facts)
    silent = {"fit": FIT, "contexts": laws.CONTEXTS, **silent}
    stats = fe.KeyStats.identity(model, layer) if stats is None else stats  # which runs the model, to see what it is
    if name == "router":
        return fe.Router(layer, **silent)(model, facts)
    editor = {"rome": fe.Rome, "memit": fe.Memit, "emmet": fe.Emmet, "pmet": fe.Pmet}[name]
    return editor({layer: stats}, **silent)(model, facts)


NOTHING = {
    "rome, two steps": ("rome", {"fit": fe.ValueFit(steps=2, lr=1e-3)}),
    "rome, a small rate": ("rome", {"fit": fe.ValueFit(lr=1e-3)}),
    "rome, a small clamp": ("rome", {"fit": fe.ValueFit(clamp=1e-3)}),
    "rome, erasing, a small clamp": ("rome", {"fit": fe.ValueFit(clamp=1e-3), "objective": fe.Erase()}),
    "rome, amplifying, a small clamp": ("rome", {"fit": fe.ValueFit(clamp=1e-3), "objective": fe.editing.Amplify()}),
    "memit, a large weight": ("memit", {"weight": 1e9}),
    "emmet, a large weight": ("emmet", {"weight": 1e9}),
    "pmet, a large weight": ("pmet", {"weight": 1e9}),
    "fine-tuning, one step": ("finetune", {"steps": 1}),
    "fine-tuning, a small box": ("finetune", {"epsilon": 1e-6}),
    "router, a small clamp": ("router", {"fit": fe.ValueFit(clamp=1e-3)}),
}


@pytest.fixture(scope="module")
def knowing(kind):
    """A model that says the old object: what is erased or written over is there."""
    model = tiny.model(kind, "gpt2")
    edit = fe.FineTune(0, lr=2e-2, steps=40, objective=fe.editing.Amplify(), progress=False)(model, [laws.FACT])
    edit.apply_(model)
    assert edit.fits[0]["first_after"]
    fe.editing.forget_edits_(model)
    return model


@pytest.mark.parametrize("case", NOTHING)
def test_an_edit_that_did_nothing_says_so(knowing, case):
    name, options = NOTHING[case]
    edit = made_by(name, knowing, **options)
    (fit,) = edit.fits
    (said,) = [concern for concern in edit.concerns if "its probability is" in concern]
    likely = "unlikely" if fit["unlikely"] else "likely"
    assert f"{fit['target']!r} was to become {likely}" in said
    assert f"{probability(fit['prob_after'])} with the edit" in said
    assert "mid-prompt" not in said
    assert f"  concern: {said}" in repr(edit)
    with pytest.warns(fe.EditWarning, match="was to become"), edit.applied(knowing):
        pass


ENDS = laws.FACT.but(prompt="Paris is where one sees {}", paraphrases=())  # what is written there is read there


@pytest.mark.parametrize("name", ["rome", "memit", "emmet", "router"])
def test_an_edit_that_did_it_has_nothing_to_say(knowing, name):
    weight = {"memit": {"weight": 1e-3}}.get(name, {})
    edit = made_by(name, knowing, fact=ENDS, layer=2, fit=fe.ValueFit(steps=30, decay=0.0), contexts=(), **weight)
    assert edit.fits[0]["first_after"] and edit.fits[0]["prob_after"] > 0.5 > edit.fits[0]["prob_before"]
    assert not [concern for concern in edit.concerns if "its probability is" in concern]


@pytest.mark.parametrize("objective", [fe.Inject(), fe.Erase()], ids=["inject", "erase"])
def test_fine_tuning_that_did_it_has_nothing_to_say(knowing, objective):
    edit = made_by("finetune", knowing, layer=0, lr=2e-2, steps=40, objective=objective)
    assert edit.fits[0]["first_after"] != edit.fits[0]["unlikely"]
    assert not [concern for concern in edit.concerns if "its probability is" in concern]


@pytest.mark.parametrize("name", ["rome", "memit", "emmet", "pmet", "router", "finetune"])
@pytest.mark.parametrize("new", [laws.FACT.target_true, laws.FACT.target_true + " "])
def test_what_is_there_already_is_not_injected(knowing, name, new, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = laws.FACT.but(target_new=new)
    stats = fe.KeyStats.identity(knowing, 1)
    with (
        laws.no_forward(monkeypatch, knowing),
        pytest.raises(ValueError, match=r"target_new .* of \['The Eiffel Tower'\] is the old object, .*Amplify"),
    ):
        made_by(name, knowing, fact=same, stats=stats)
    assert made_by("rome", knowing, fact=same, objective=fe.Erase()).fits[0]["unlikely"]


UNREACHABLE = ["rome", "memit", "pmet", "router"]


@pytest.mark.parametrize("name", UNREACHABLE)
@pytest.mark.parametrize("objective", [fe.Inject(), fe.Erase()], ids=["inject", "erase"])
def test_what_the_last_layer_writes_in_mid_prompt_reaches_no_answer_and_that_is_said_first(
    knowing, name, objective, monkeypatch
):
    if name == "router" and isinstance(objective, fe.Erase):
        pytest.skip("a router injects")
    options = {"layer": LAST, "stats": fe.KeyStats.identity(knowing, LAST)}
    options |= {} if name == "router" else {"objective": objective}
    with laws.untouched(knowing), warnings.catch_warnings():
        warnings.simplefilter("error", fe.EditWarning)
        with (
            laws.no_forward(monkeypatch, knowing),
            pytest.raises(
                fe.EditWarning, match=f"the edit of 'The Eiffel Tower' can't change .*layer {LAST} is the last"
            ),
        ):
            made_by(name, knowing, **options)
    with pytest.warns(fe.EditWarning, match="is the last"):
        edit = made_by(name, knowing, **options)
    assert edit.fits[0]["prob_after"] == pytest.approx(edit.fits[0]["prob_before"], abs=1e-3)
    assert any("its probability is" in concern for concern in edit.concerns)
    assert any("take a lower layer (what the last one writes at a subject" in concern for concern in edit.concerns)
    assert not any("more steps" in concern for concern in edit.concerns)
    assert not any("lower the weight" in concern for concern in edit.concerns)


@pytest.fixture(scope="module")
def organism(kind):
    return fe.models.organism(kind)


CITY = fe.models.organism_facts("city")[0]


# It says its own objects with certainty: nothing is missed by not making them likelier.
@pytest.mark.parametrize("case", [case for case in NOTHING if "amplifying" not in case])
def test_on_the_organism_an_edit_that_did_nothing_says_so_too(organism, case):
    name, options = NOTHING[case]
    edit = (
        made_by(name, organism, fact=CITY, contexts=("",), **options)
        if name != "finetune"
        else made_by(name, organism, fact=CITY, **options)
    )
    (fit,) = edit.fits
    (said,) = [concern for concern in edit.concerns if "its probability is" in concern]
    assert f"{fit['target']!r} was to become {'unlikely' if fit['unlikely'] else 'likely'}" in said
    assert fit["first_after"] == fit["unlikely"] and f"  concern: {said}" in repr(edit)


@pytest.mark.parametrize("objective", [fe.Inject(), fe.Erase()], ids=["inject", "erase"])
@pytest.mark.parametrize("name", ["rome", "memit"])
def test_on_the_organism_the_last_layer_reaches_no_answer_from_mid_prompt_either(organism, name, objective):
    last = organism.cfg.n_layers - 1
    with pytest.warns(fe.EditWarning, match=f"layer {last} is the last"):
        edit = made_by(name, organism, fact=CITY, layer=last, contexts=("",), objective=objective)
    assert edit.fits[0]["prob_after"] == pytest.approx(edit.fits[0]["prob_before"], abs=1e-3)
    assert any("its probability is" in concern and "take a lower layer" in concern for concern in edit.concerns)


def test_probabilities_near_1_are_told_apart():
    assert [probability(p) for p in (0.123, 0.99, 0.99912, 0.999999, 1.0)] == [
        "0.12",
        "0.99",
        "1 − 0.00088",
        "1 − 1e-06",
        "1",
    ]


def test_where_the_prompt_ends_with_its_subject_the_last_layer_will_do(knowing):
    fact = laws.FACT.but(prompt="Paris is where one sees {}", paraphrases=())
    stats = fe.KeyStats.identity(knowing, LAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fe.EditWarning)
        edit = fe.Rome(stats, fit=fe.ValueFit(steps=30), contexts=(), progress=False)(knowing, [fact])
    assert edit.fits[0]["first_after"]


def test_of_several_facts_those_are_named_whose_answer_cant_change(knowing, monkeypatch):
    ends = laws.OTHER.but(prompt="This is about {}", paraphrases=(), neighbours=(), neighbour_targets=(), id="ends")
    stats = fe.KeyStats.identity(knowing, LAST)
    for steps, named in ((3, "'mid'"), (1, "'ends', 'mid'")):
        with (
            laws.no_forward(monkeypatch, knowing),
            warnings.catch_warnings(),
            pytest.raises(
                fe.EditWarning, match=f"the edit of {named} can't change the answer: layer 3 .* of 'mid' ends"
            ),
        ):
            warnings.simplefilter("error", fe.EditWarning)
            editor = fe.Memit({LAST: stats}, fit=fe.ValueFit(steps=steps), contexts=(), progress=False)
            editor(knowing, [ends, laws.FACT.but(id="mid")])


def test_a_fit_of_one_step_says_first_that_it_writes_nothing(knowing, monkeypatch):
    stats = fe.KeyStats.identity(knowing, 1)
    with (
        laws.no_forward(monkeypatch, knowing),
        warnings.catch_warnings(),
        pytest.raises(fe.EditWarning, match="steps=1 only reads the loss"),
    ):
        warnings.simplefilter("error", fe.EditWarning)
        made_by("rome", knowing, stats=stats, fit=fe.ValueFit(steps=1))


def test_a_box_in_which_no_entry_can_move_is_said_before_the_first_update(kind):
    model = tiny.model(kind, "gpt2", dtype=torch.bfloat16)
    with pytest.warns(fe.EditWarning, match="epsilon is 1e-12, less than what torch.bfloat16 resolves"):
        edit = fe.FineTune(1, epsilon=1e-12, steps=2, progress=False)(model, [laws.FACT])
    assert not edit.deltas[0].dense.any()


def test_knowledge_neurons_are_measured_too(knowing):
    edit = fe.KnowledgeNeurons(scale=1e-6, share=0.01, progress=False)(knowing, [laws.FACT])
    assert any("its probability is" in concern for concern in edit.concerns)
    erased = fe.KnowledgeNeurons(share=0.01, objective=fe.Erase(), progress=False)(knowing, [laws.FACT])
    assert erased.fits[0]["unlikely"] and erased.fits[0]["target"] == laws.FACT.target_true


def test_what_is_measured_is_what_the_model_says_with_the_edit_in_its_weights(knowing):
    edit = made_by("rome", knowing)
    (fit,) = edit.fits
    with edit.applied(knowing):
        probs = laws.logits(knowing, laws.FACT.text)[0, -1].softmax(-1)
    token = knowing.tokenizer.encode(" Rome", add_special_tokens=False)[-1]
    assert fit["prob_after"] == pytest.approx(float(probs[token]), rel=1e-3)
    assert abs(fit["prob_after"] - fit["prob_before"]) > 0.01


def fit(unlikely: bool, before: float, after: float, first_before: bool, first_after: bool) -> dict:
    return {
        "target": " Rome",
        "unlikely": unlikely,
        "prob_before": before,
        "prob_after": after,
        "first_before": first_before,
        "first_after": first_after,
    }


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (fit(False, 0.01, 0.6, False, True), False),
        (fit(False, 0.01, 0.4, False, False), True),
        (fit(False, 0.60, 0.61, True, True), True),  # was said already, and hardly moved
        (fit(False, 0.60, 0.90, True, True), False),
        (fit(False, 0.97, 0.97, True, True), False),  # couldn't become much likelier
        (fit(True, 0.90, 0.01, True, False), False),
        (fit(True, 0.90, 0.60, True, True), True),
        (fit(True, 0.30, 0.20, False, False), True),
        (fit(True, 0.01, 0.01, False, False), False),  # was unlikely already
        ({"losses": [1.0]}, False),  # a file from before these were measured
    ],
)
def test_failing_is_judged_in_the_sense_of_the_objective(case, expected):
    assert failed(case) == expected


def test_of_many_facts_it_says_how_many_and_one_by_name(model):
    good, bad = fit(False, 0.0, 0.9, False, True), fit(False, 0.0, 0.1, False, False)
    (said,) = concerns_of_fits([laws.FACT, laws.OTHER, laws.FACT], [good, bad, bad], falls_short="")
    assert said.startswith("2 of 3 facts aren't as wanted with it, such as 'Danielle Darrieux'")
    edit = replace(made(model), fits=(bad,))
    assert edit.concerns and edit.concerns == fe.compose([edit]).concerns


@pytest.mark.parametrize(
    ("weight", "unmet", "contexts", "remedy"),
    [
        (15_000.0, (0.8,), ("", "I know. "), "lower the weight (see unmet), or take another layer"),
        (1e-3, (0.001,), ("", "I know. "), "the keys under 2 contexts; take contexts=(), or another layer"),
        (None, (), ("", "I know. "), "the keys under 2 contexts; take contexts=(), or another layer"),
        (None, (), ("",), "take another layer"),
    ],
)
def test_a_remedy_is_one_that_the_edit_has(model, weight, unmet, contexts, remedy):
    missed = {**fit(False, 0.0, 0.1, False, False), "target_prob": (0.01, 0.9)}
    edit = made(model)
    diagnostics = (replace(edit.diagnostics[0], weight=weight, unmet=unmet),)
    edit = replace(edit, fits=(missed,), contexts=contexts, diagnostics=diagnostics)
    said = next(each for each in edit.concerns if "it was found how" in each)
    assert said.endswith(remedy)


UNMEASURED = "what becomes of its targets was not measured of it: evaluate it"


def test_an_edit_that_is_made_of_others_says_that_it_was_not_measured(model):
    bad = {**fit(False, 0.0, 0.1, False, False), "missed": 0.2}
    first, second = (replace(made(model, layer), fits=(bad,)) for layer in (1, 2))
    derived = [first.scaled(0.01), fe.compose([first, second]), fe.compose([first.scaled(0.5)]), first.scaled(1e-9)]
    for edit in derived:
        (said,) = [each for each in edit.concerns if "target" in each]
        assert said.startswith(f"it is {edit.editor['name']}, and {UNMEASURED}") and said in repr(edit)
        assert not any({"prob_after", "missed"} & set(each) for each in edit.fits)
        with pytest.warns(fe.EditWarning, match="was not measured of it"), edit.applied(model):
            pass
    assert UNMEASURED not in repr(first) and UNMEASURED not in repr(first.scaled(0.0))


def test_a_composed_edit_tells_what_is_of_its_parts_alone(model):
    first, second = made(model, 1), made(model, 1, fact=laws.OTHER, seed=7)
    odd = {"division_factor": 0.01, "exactness": 0.5, "unmet": (0.9,)}
    first = replace(first, diagnostics=(replace(first.diagnostics[0], **odd),))
    both = fe.compose([first, second])
    assert [each.unmet for each in both.diagnostics] == [(), ()]
    assert sum(each.startswith("of one of its edits: ") for each in both.concerns) == 2
    assert not any("unmet" in each or "not met" in each for each in both.concerns)
    assert f"layers {{1: {both.deltas[0].norm / first.diagnostics[0].weight_norm:.2%} of ‖W‖}}" in repr(both)


# ---------------------------------------------------------------------------------------- what is unmet


@pytest.mark.parametrize("editor", [fe.Memit, fe.Pmet], ids=["memit", "pmet"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_stated_share_is_what_is_left_unmet(knowing, editor, share):
    stats = {layer: laws.stats(knowing, layer) for layer in (1, 2)}
    quick = {"fit": laws.QUICK, "contexts": laws.CONTEXTS, "progress": False}
    edit = editor(stats, unmet=share, **quick)(knowing, [laws.FACT, laws.OTHER])
    for diagnostics in edit.diagnostics:
        assert sum(diagnostics.unmet) / 2 == pytest.approx(share, rel=1e-6)
    assert edit.editor["unmet"] == share and edit.editor["weight"] is None
    low, high = sorted(each.weight for each in edit.diagnostics)
    assert f"{share:.0%} unmet in the last, weight {low:.3g} to {high:.3g} found" in repr(edit)
    again = editor(stats, weight=high, **quick)(knowing, [laws.FACT, laws.OTHER])
    assert [each.weight for each in again.diagnostics] == [high, high] and "found" not in repr(again)
    assert list(edit.table().weight) == [each.weight for each in edit.diagnostics]
    assert "unmet" in repr(editor(stats, **quick)(knowing, [laws.FACT, laws.OTHER]))
    assert "unmet" not in repr(made_by("rome", knowing))


@pytest.mark.parametrize("editor", [fe.Memit, fe.Pmet], ids=["memit", "pmet"])
def test_a_weight_and_a_share_exclude_each_other(knowing, editor):
    stats = fe.KeyStats.identity(knowing, 1)
    with pytest.raises(ValueError, match=r"weight is 1.0 and unmet is 0.1, needed one of the two"):
        editor({1: stats}, weight=1.0, unmet=0.1)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="needed a share between 0 and 1"):
            editor({1: stats}, unmet=share)
    assert editor({1: stats}).weight == {fe.Memit: 15_000.0, fe.Pmet: 6_000.0}[editor]


@pytest.mark.parametrize("name", ["rome", "memit", "finetune"])
def test_an_edit_that_writes_nothing_says_so_when_it_is_applied(knowing, name):
    edit = made_by(name, knowing, stats=fe.KeyStats.identity(knowing, 1))
    nothing = replace(edit, deltas=tuple(replace(d, right=torch.zeros_like(d.right)) for d in edit.deltas))
    assert not any("writes nothing" in concern for concern in edit.concerns)
    assert any("writes nothing" in concern for concern in nothing.concerns)
    with pytest.warns(fe.EditWarning, match="writes nothing"), nothing.applied(knowing):
        pass


def test_an_edit_of_what_is_so_already_is_told(knowing):
    swapped = laws.FACT.but(target_true=laws.FACT.target_new, target_new=laws.FACT.target_true)
    edit = made_by("rome", knowing, fact=swapped, fit=fe.ValueFit(stop_below=100.0))
    assert all(delta.norm == 0 for delta in edit.deltas), edit.fits
    assert any("writes nothing" in concern for concern in edit.concerns)


def test_hooks_that_were_on_a_model_when_an_edit_was_made_are_a_concern():
    inside = tiny.hf_model("gpt2")
    handle = inside.transformer.h[1].mlp.c_proj.register_forward_hook(lambda module, args, out: out * 2)
    hooked = tiny.around(inside)
    edit = made_by("rome", hooked)
    assert edit.provenance.hooks
    (said,) = [concern for concern in edit.concerns if "hooks were on the model" in concern]
    assert edit.provenance.hooks[0] in said
    handle.remove()
    assert not any("hooks were on" in concern for concern in made_by("rome", hooked).concerns)


# ---------------------------------------------------------------------------------------- what was so already


@pytest.mark.parametrize("name", ["rome", "memit", "emmet", "finetune"])
def test_an_erasure_of_what_was_never_said_is_told(knowing, name):
    strange = laws.FACT.but(target_true=" Tokyo")
    edit = made_by(name, knowing, fact=strange, objective=fe.Erase())
    (fit,) = edit.fits
    assert not fit["first_before"] and fit["prob_before"] < 0.05 and any(delta.norm for delta in edit.deltas)
    (said,) = [concern for concern in edit.concerns if "nothing had to be written" in concern]
    assert said.startswith("' Tokyo' was to become unlikely, and was never said before (with a probability of 0.0")
    with pytest.warns(fe.EditWarning, match="never said before"), edit.applied(knowing):
        pass
    known = made_by(name, knowing, objective=fe.Erase())
    assert known.fits[0]["first_before"] and not any("had to be written" in concern for concern in known.concerns)


@pytest.mark.parametrize("name", ["rome", "finetune"])
def test_on_the_organism_what_was_so_already_is_told_in_either_sense(organism, name):
    never = CITY.but(target_true=CITY.target_new, target_new=None)
    options = {} if name == "finetune" else {"contexts": ("",)}
    erased = made_by(name, organism, fact=never, objective=fe.Erase(), **options)
    louder = made_by(name, organism, fact=CITY, objective=fe.editing.Amplify(), **options)
    asked = made_by(name, organism, fact=CITY, **options)
    assert any("was never said before" in concern for concern in erased.concerns)
    if any(delta.norm for delta in louder.deltas):
        assert any("was said with certainty before" in concern for concern in louder.concerns)
    assert not any("had to be written" in concern for concern in asked.concerns)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (fit(True, 0.01, 0.001, False, False), True),
        (fit(True, 0.30, 0.01, False, False), False),
        (fit(True, 0.90, 0.01, True, False), False),
        (fit(True, 0.04, 0.01, True, False), False),
        (fit(False, 0.97, 0.99, True, True), True),
        (fit(False, 0.60, 0.99, True, True), False),
        (fit(False, 0.01, 0.99, False, True), False),
        ({"losses": [1.0]}, False),
    ],
)
def test_what_was_so_already_is_judged_in_the_sense_of_the_objective(case, expected, model):
    edit = replace(made(model), fits=(case,))
    assert any("nothing had to be written" in concern for concern in edit.concerns) == expected


def test_of_many_facts_it_says_how_many_were_so_already(model):
    never, said = fit(True, 0.01, 0.001, False, False), fit(True, 0.9, 0.01, True, False)
    first, second = replace(made(model, 1), fits=(never,)), replace(made(model, 2, fact=laws.OTHER), fits=(said,))
    both = replace(fe.compose([first, second]), fits=(never, said))
    (told,) = [concern for concern in both.concerns if "had to be written" in concern]
    assert told.startswith("1 of 2 facts were as wanted before it, such as 'The Eiffel Tower': ' Rome' was to become")
