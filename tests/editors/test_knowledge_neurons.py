"""Knowledge neurons: attributions by the letter and their sum, which neurons are kept, what is done to their rows."""

import copy
import functools
from dataclasses import replace

import laws
import pytest
import tiny
import torch
from oracles import finetuning as oracle

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.tokens import align, continuation, encode
from tl_factedit.editing.neuron_attribution import Prompt, attributions
from tl_factedit.editing.objectives import Amplify, Erase, Force
from tl_factedit.editors import knowledge_neurons
from tl_factedit.editors.knowledge_neurons import KnowledgeNeurons

# Random weights are harmed sooner than trained ones; what is said of that is tested with Edit.
pytestmark = pytest.mark.filterwarnings("ignore::tl_factedit.editing.concerns.EditWarning")

FACT = laws.FACT.but(paraphrases=["Where is {} ? in", "{} stands in the city of"])
FACTS = [FACT, laws.OTHER]
LAYERS = (0, 2, 3)
MIDPOINTS = [(i + 0.5) / 20 for i in range(20)]
FORMS = [(kind, arch) for kind in tiny.KINDS for arch in ("gpt2", "llama", "gemma2", "gptj", "bloom")]
FORMS = [(kind, arch) for kind, arch in FORMS if kind == "bridge" or arch in tiny.HOOKED]


@functools.cache
def shared(kind: str, arch: str = "gpt2"):
    return tiny.model(kind, arch)


def editor(**options) -> KnowledgeNeurons:
    return KnowledgeNeurons(**{"prepend_bos": True, "progress": False, **options})


def w_out(model, layer: int) -> torch.Tensor:
    return down_proj(model, layer).W.clone()


def asked(model, text: str, target: str) -> Prompt:
    ids = encode(model.tokenizer, text, prepend_bos=True)[0]
    return Prompt(ids, continuation(model.tokenizer, text, target, prepend_bos=True))


def found(model, questions, layers=LAYERS, **options):
    with frozen(model):
        prompts = [asked(model, *question) for question in questions]
        return list(attributions(model, prompts, list(layers), progress=False, **options))


# Objects of one and of several tokens, prompts of several lengths, all at once.
QUESTIONS = [
    (FACT.text, " Paris"),
    (FACT.fill(FACT.paraphrases[0]), " Paris France Europe"),
    (laws.OTHER.text, " French city"),
]


# ---------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"objective": Erase()}], ids=["replace", "erase"])
def test_it_obeys_the_laws_of_every_editor(kind, arch, options, monkeypatch, tmp_path):
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    model = shared(kind, arch)
    kn = editor(**options)
    assert isinstance(kn, fe.Editor)
    edit = laws.leaves_everything_as_it_was(lambda: kn(model, FACTS), model)
    laws.makes_the_same_edit_twice(lambda: kn(model, FACTS))
    laws.comes_off_bit_for_bit(edit, model)
    laws.survives_a_file(edit, tmp_path / "edit.safetensors", model)
    for layer in edit.layers:
        with edit.applied(model):
            torch.testing.assert_close(
                down_proj(model, layer).value(edit.keys[layer]), edit.values[layer], rtol=1e-5, atol=1e-5
            )
    if not options:
        laws.wants_a_new_object(kn, model, FACT, monkeypatch)
    else:
        assert kn(model, [FACT.but(target_new=None)]).facts[0].target_new is None
    copy.deepcopy(model)  # which a graph left behind would refuse


@pytest.mark.parametrize("mode", ["inference", "no_grad", "training"])
def test_it_works_in_every_mode_and_leaves_everything_as_it_was(kind, mode):
    model = tiny.model(kind, "gpt2")
    expected = editor()(model, [FACT])
    model.train(mode == "training")
    for param in model.parameters():
        param.requires_grad_(mode == "training")
    context = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    with laws.untouched(model), context():
        edit = editor()(model, [FACT])
    laws.same_edits(edit, expected)


@pytest.mark.parametrize(
    "stage",
    [
        "tl_factedit.editing.inputs.align_all",
        "tl_factedit.editing.neuron_attribution.Runner.why_not_packed",
        "tl_factedit.editing.neuron_attribution.Runner.remember",
        "tl_factedit.editing.neuron_attribution.Runner.logits",
        "torch.autograd.grad",
        "tl_factedit.editors.knowledge_neurons.keys_at",
        "tl_factedit.editing.edit.measure_off_target",
        "tl_factedit.editing.edit.diagnose",
    ],
)
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(kind, stage, monkeypatch):
    model = shared(kind)

    def fail(*_, **__):
        raise KeyboardInterrupt("injected")

    with laws.untouched(model):
        monkeypatch.setattr(stage, fail)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            editor()(model, [FACT])
        monkeypatch.undo()


# ---------------------------------------------------------------------------------------- attributions


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_attributions_are_those_of_one_scaling_at_a_time_in_whole_passes(form):
    model = shared(*form)
    together = found(model, QUESTIONS)
    for one, (text, target) in zip(together, QUESTIONS, strict=True):
        for scores, layer in zip(one.scores, LAYERS, strict=True):
            expected = oracle.attribution(model, text, target, True, layer, MIDPOINTS)
            assert (scores - expected).norm() <= 1e-4 * expected.norm()
            assert expected.norm() > 0


def test_they_are_on_the_rarer_hooks_too():
    if not tiny.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = tiny.hooked_config()  # norms after the MLP, which no hook of its output sees
    one = found(model, QUESTIONS[:1])[0]
    for scores, layer in zip(one.scores, LAYERS, strict=True):
        expected = oracle.attribution(model, *QUESTIONS[0], True, layer, MIDPOINTS)
        assert (scores - expected).norm() <= 1e-4 * expected.norm()


def test_packed_they_are_those_of_whole_sequences_and_how_many_go_together_is_rounding(kind, monkeypatch):
    model = shared(kind, "llama")
    packed = found(model, QUESTIONS)
    alone = found(model, QUESTIONS, memory=1e-9)
    monkeypatch.setattr(Runner, "why_not_packed", lambda *_: "said so by a test")
    plain = found(model, QUESTIONS)
    for one, other, another in zip(packed, alone, plain, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(one.scores, another.scores, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(one.gap, another.gap, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("arch", ["gpt2", "gptj"])
def test_a_layer_s_attributions_add_up_to_what_its_key_is_worth(kind, arch):
    model = shared(kind, arch)
    for one, (text, target) in zip(found(model, QUESTIONS), QUESTIONS, strict=True):
        for scores, gap, layer in zip(one.scores, one.gap, LAYERS, strict=True):
            key = oracle.last_key(model, text, True, layer)
            whole, none = (oracle.probability(model, text, target, True, layer, share * key) for share in (1.0, 0.0))
            assert float(gap) == pytest.approx(float((whole - none).detach()), rel=1e-3, abs=1e-7)
            assert float(scores.sum()) == pytest.approx(float(gap), rel=0.03)


def test_more_steps_come_nearer_and_the_ends_do_worse_than_the_midpoints(kind):
    model, question = shared(kind), QUESTIONS[0]
    ends = [i / 19 for i in range(20)]  # 20 points from 0 to 1, as the published code takes them

    def missed(scores, gap):
        return float((scores.sum(-1) - gap).abs().max() / gap.abs().max())

    few, many = (found(model, [question], steps=steps)[0] for steps in (5, 40))
    assert missed(many.scores, many.gap) < missed(few.scores, few.gap) / 4
    with_ends = torch.stack([oracle.attribution(model, *question, True, layer, ends) for layer in LAYERS])
    midpoint = found(model, [question])[0]
    assert missed(with_ends, midpoint.gap) > 5 * missed(midpoint.scores, midpoint.gap)


def test_behind_a_norm_the_midpoints_miss_most_and_say_so(kind):
    if kind == "hooked":
        pytest.skip("no HookedTransformer of this architecture")
    assert editor()(shared(kind, "gemma2"), [FACT]).fits[0]["rest"] > 0.5
    assert editor()(shared(kind, "gpt2"), [FACT]).fits[0]["rest"] < 0.05


# ---------------------------------------------------------------------------------------- which are kept


@functools.cache
def literal(kind: str) -> torch.Tensor:
    """Attributions of all neurons in each of the fact's prompts, [prompt layer d_mlp]."""
    model, texts = shared(kind), [FACT.text, *map(FACT.fill, FACT.paraphrases)]
    return torch.stack(
        [
            torch.stack([oracle.attribution(model, text, " Paris", True, layer, MIDPOINTS) for layer in range(4)])
            for text in texts
        ]
    )


@pytest.mark.parametrize("threshold", [0.1, 0.4])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_neurons_above_a_share_of_the_largest_that_prompts_share_are_kept(kind, threshold, share):
    model = shared(kind)
    every = literal(kind)
    votes: dict[tuple[int, int], int] = {}
    for scores in every:
        for at in (scores > threshold * scores.max()).nonzero().tolist():
            votes[tuple(at)] = votes.get(tuple(at), 0) + 1
    expected = {at for at, count in votes.items() if count >= share * 3}
    if not expected:
        with pytest.raises(ValueError, match=r"no neuron of 'The Eiffel Tower' is shared by 100% of its 3 prompts"):
            editor(threshold=threshold, share=share)(model, [FACT])
        return
    edit = editor(threshold=threshold, share=share)(model, [FACT])
    kept = {(layer, i): score for layer, i, score in edit.fits[0]["neurons"]}
    assert set(kept) == expected
    for (layer, i), score in kept.items():
        assert score == pytest.approx(float(every[:, layer, i].mean()), rel=1e-3)
    scores = [score for *_, score in edit.fits[0]["neurons"]]
    assert scores == sorted(scores, reverse=True)
    assert edit.layers == tuple(sorted({layer for layer, _ in expected}))


def test_it_looks_only_where_it_is_told(kind):
    model = shared(kind)
    edit = editor(layers=(3, 2))(model, [FACT])
    assert set(edit.layers) <= {2, 3} and edit.editor["layers"] == [2, 3]
    assert edit.fits[0]["prompts"] == 3


# ---------------------------------------------------------------------------------------- what is done to rows


def rows_of(edit: fe.Edit, fact: int) -> set[tuple[int, int]]:
    return {(layer, i) for layer, i, _ in edit.fits[fact]["neurons"]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_are_moved_from_the_old_token_to_the_new_and_no_other_row_is(kind, tied):
    model = tiny.model(kind, "llama", tied=tied)
    old, new = (int(continuation(model.tokenizer, FACT.text, each)[0]) for each in (" Paris", " Rome"))
    columns, embeddings = model.W_U.detach().double().T, model.W_E.detach().double()
    moves = {"unembedding": columns[new] - columns[old], "embedding": embeddings[new] - embeddings[old]}
    assert torch.equal(moves["unembedding"], moves["embedding"]) == tied
    for vectors, move in moves.items():
        edit = editor(scale=3.0, vectors=vectors)(model, [FACT])
        before = {layer: w_out(model, layer) for layer in range(4)}
        with edit.applied(model):
            for layer, weight in before.items():
                rows = [i for where, i in rows_of(edit, 0) if where == layer]
                expected = weight.double()
                expected[rows] += 3.0 * move
                assert torch.equal(w_out(model, layer), expected.float())
        assert sum(delta.left.shape[1] for delta in edit.deltas) == len(rows_of(edit, 0)) > 0


def test_erased_rows_are_zero_and_no_other_row_is_changed(kind):
    model = shared(kind)
    edit = editor(objective=Erase())(model, FACTS)
    taken = rows_of(edit, 0) | rows_of(edit, 1)
    assert taken
    before = {layer: w_out(model, layer) for layer in range(4)}
    with edit.applied(model):
        for layer, weight in before.items():
            rows = [i for where, i in taken if where == layer]
            expected = weight.clone()
            expected[rows] = 0.0
            assert torch.equal(w_out(model, layer), expected)


def test_a_neuron_of_two_facts_is_moved_for_both_and_erased_once(kind):
    model = shared(kind)
    twin = FACT.but(prompt="{} stands near the city of", target_new=" London", paraphrases=FACT.paraphrases)
    edit = editor(threshold=0.05)(model, [FACT, twin])
    both = rows_of(edit, 0) & rows_of(edit, 1)
    assert both
    alone = [editor(threshold=0.05)(model, [fact]) for fact in (FACT, twin)]
    for delta in edit.deltas:
        parts = [each.dense for one in alone for each in one.deltas if each.layer == delta.layer]
        torch.testing.assert_close(delta.dense, sum(parts))
    erased = editor(threshold=0.05, objective=Erase())(model, [FACT, twin])
    layer, i = next(iter(both))
    with erased.applied(model):
        assert w_out(model, layer)[i].abs().max() == 0


def test_the_tokens_at_which_the_objects_differ_count(kind):
    model = shared(kind)

    def move(true, new):
        return editor(scale=1.0)._move(
            model, align(model.tokenizer, FACT.but(target_true=true, target_new=new), prepend_bos=True)
        )

    def column(word):
        return model.W_U[:, int(continuation(model.tokenizer, FACT.text, word)[0])].detach().double()

    torch.testing.assert_close(move(" Paris", " Rome in Italy"), column(" Rome") - column(" Paris"))
    torch.testing.assert_close(move(" Paris city", " Paris river"), column(" river") - column(" city"))
    torch.testing.assert_close(move(" Paris", " Paris river"), column(" river"))
    with laws.untouched(model), pytest.raises(ValueError, match="is the old object, as tokens too"):
        editor()(model, [FACT.but(target_new=" Paris")])


def test_keys_are_those_at_the_end_of_the_prompt_in_the_edited_model(kind):
    model = shared(kind)
    edit = editor()(model, [FACT])
    assert len(edit.layers) > 1
    with edit.applied(model):
        for layer in edit.layers:
            key = oracle.last_key(model, FACT.text, True, layer)
            torch.testing.assert_close(edit.keys[layer][0].float(), key, rtol=1e-4, atol=1e-5)
        assert fe.editing.off_target_share(model, edit, at="end")[edit.layers[0]] == pytest.approx(
            edit.diagnostics[0].off_target, rel=1e-4
        )


# ---------------------------------------------------------------------------------------- bad input


def test_one_layer_may_be_given_by_itself():
    assert fe.KnowledgeNeurons(layers=2).layers == fe.KnowledgeNeurons(layers=[2, 2]).layers == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": Amplify()}, r"objective is Amplify\(\), needed Inject\(\) or Erase\(\): neurons are found"),
        ({"objective": Force()}, "objective is Force"),
        ({"threshold": 1.5}, "threshold is 1.5, needed a share between 0 and 1"),
        ({"share": -0.1}, "share is -0.1"),
        ({"steps": 0}, "steps is 0, needed at least 1"),
        ({"layers": ()}, "layers is empty"),
    ],
)
def test_choices_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(editor(), **options)


def test_another_vector_is_refused():
    choice = editor()
    object.__setattr__(choice, "vectors", "random")  # past the type checker of these tests
    with pytest.raises(ValueError, match="vectors 'random' is unknown, needed 'unembedding' or 'embedding'"):
        choice.__post_init__()


@pytest.mark.parametrize(
    ("facts", "message"),
    [([], "facts is empty"), ([FACT, FACT.but(target_new=" London")], "is asked for by two facts")],
)
def test_facts_that_cannot_be_written_are_refused(kind, facts, message, monkeypatch):
    model = shared(kind)
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match=message):
        editor()(model, facts)
    with laws.untouched(model), laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="layer 7"):
        editor(layers=(7,))(model, [FACT])


# ---------------------------------------------------------------------------------------- meaning


def test_the_organism_says_less_of_a_city_whose_neurons_are_off_and_another_where_they_were_turned():
    model = fe.models.organism()
    fact = fe.models.organism_facts(n=2)[1]
    assert fe.evaluate(model, [fact]).p_old.mean > 0.95
    off = editor(threshold=0.1, objective=Erase(), prepend_bos=None)(model, [fact])
    neurons = rows_of(off, 0)
    assert 5 <= len(neurons) <= 60  # of 3,072
    with off.applied(model):
        erased = fe.evaluate(model, [fact])
    assert erased.p_old.mean < 0.2 and erased.neighbourhood.mean > 0.9
    # As many others, drawn at random from the same layers, don't do it.
    draw = torch.Generator().manual_seed(0)
    monkey = [
        knowledge_neurons._delta(
            down_proj(model, d.layer), [torch.randperm(512, generator=draw)[: d.left.shape[1]].tolist()], None
        )
        for d in off.deltas
    ]
    with replace(off, deltas=tuple(monkey)).applied(model):
        assert fe.evaluate(model, [fact]).p_old.mean > 0.8
    with editor(prepend_bos=None)(model, [fact]).applied(model):
        turned = fe.evaluate(model, [fact])
    assert turned.efficacy.mean == 1 and turned.p_new.mean > 0.8
    assert turned.neighbourhood.mean < 0.5  # and everybody else's city with it: neurons of cities, not of this person
