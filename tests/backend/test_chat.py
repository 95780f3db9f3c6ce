"""Chat prompts, and the facts that a model can be asked."""

import copy
import inspect
import warnings

import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.attacks.routes import Route
from tl_factedit.core.tokens import align

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.fixture
def chatty(kind):
    model = tiny.model(kind, "llama", n_layers=1, tok=tiny.tokenizer("bytebpe"))
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_a_chat_prompt_keeps_its_slot_and_ends_where_the_answer_begins(chatty):
    asked = fe.chat_prompt(chatty, "What is the capital of {}?")
    assert asked == "<bos>user\nWhat is the capital of {}?<eos>assistant\n"
    told = fe.chat_prompt(chatty, "Where is {}?", system="Answer in one word.")
    assert told == "<bos>system\nAnswer in one word.<eos>user\nWhere is {}?<eos>assistant\n"


def test_a_fact_of_a_chat_prompt_runs_with_one_bos(chatty):
    fact = fe.Fact("France", fe.chat_prompt(chatty, "What is the capital of {}?"), "Paris", "Rome")
    with pytest.warns(UserWarning, match="BOS token"):
        row = align(chatty.tokenizer, fact, prepend_bos=True)
    assert row.ids.tolist().count(chatty.tokenizer.bos_token_id) == 1
    plain = chatty.tokenizer(row.text, add_special_tokens=False)["input_ids"]
    assert torch.equal(row.ids, torch.tensor(plain))


@pytest.mark.parametrize("text", ["", "  ", None, 3, ["What?"]], ids=repr)
def test_what_a_user_says_is_text(chatty, text):
    # Past the type checks of this test suite, which a user doesn't have.
    with pytest.raises(ValueError, match=r"text is .*needed what the user says"):
        inspect.unwrap(fe.chat_prompt)(chatty, text)


def test_a_tokenizer_without_a_template_is_refused(kind):
    with pytest.raises(ValueError, match="has no chat template"):
        fe.chat_prompt(tiny.model(kind, "llama", n_layers=1), "Where is {}?")


def test_a_template_that_drops_or_adds_something_is_refused(chatty):
    chatty.tokenizer.chat_template = "{{ messages[-1]['content'] }}!"
    with pytest.raises(ValueError, match="doesn't keep what the system says"):
        fe.chat_prompt(chatty, "Where is {}?", system="Be kind.")
    with pytest.raises(ValueError, match=r'holds 2 "{}" and the text 1'):
        chatty.tokenizer.chat_template = "{} {{ messages[-1]['content'] }}"
        fe.chat_prompt(chatty, "Where is {}?")


def test_facts_are_sorted_into_those_that_can_be_asked_and_those_that_cannot(kind):
    model = tiny.model(kind, "llama", n_layers=1, tok=tiny.tokenizer("bytebpe"))
    good = fe.Fact("The Eiffel Tower", "{} is in", " Paris", " Rome", paraphrases=["Where is {}? In"])
    inside = fe.Fact("The Eif", "{}fel is in", " Paris")
    long = good.but(neighbours=["Rome " * tiny.N_CTX + "is in"])
    with pytest.warns(UserWarning, match="last word"):
        merges = good.but(paraphrases=["Where is {}? It is in th"], target_true="e")
    found, bad = fe.alignable(model, [good, inside, long, merges])
    assert found == [good]
    assert [fact for fact, _ in bad] == [inside, long, merges]
    assert [word in why for (_, why), word in zip(bad, ("inside token", "room for", "merges"), strict=True)] == [
        True
    ] * 3
    assert fe.alignable(model, good) == ([good], [])
    with pytest.raises(ValueError, match="2 of 3 facts can't be asked"):
        fe.causal_trace(model, [good, inside, inside.but(target_new=" Bonn", id=2)])


@pytest.mark.filterwarnings("ignore:a prompt begins with the BOS token")
@pytest.mark.filterwarnings("ignore:the model doesn't know")
def test_that_a_prompt_brought_its_bos_is_in_the_provenance_of_every_result(chatty):
    facts = {
        True: fe.Fact("France", fe.chat_prompt(chatty, "What is the capital of {}?"), "Paris", "Rome"),
        False: fe.Fact("France", "The capital of {} is", " Paris", " Rome"),
    }
    editor = fe.Rome(
        fe.KeyStats.identity(chatty, 0), fit=fe.ValueFit(steps=1, kl_weight=0.0), contexts=(), progress=False
    )
    for brought, fact in facts.items():
        edit = editor(chatty, [fact])
        results = [
            edit,
            fe.editors.RoutedEdit.of(edit),
            fe.causal_trace(chatty, fact, corruption=fe.GaussianNoise(samples=1), progress=False),
            fe.evaluate(chatty, [fact]),
        ]
        assert [result.provenance.bos_in_prompt for result in results] == [brought] * 4
        assert fe.audit(chatty, copy.deepcopy(chatty), [fact], progress=False).provenance.model.bos_in_prompt is brought
        again = fe.editing.Provenance.from_json(edit.provenance.to_json())
        assert again == edit.provenance
        assert not fe.editing.Provenance.of(chatty, False, prompts=[fact.text]).bos_in_prompt


@pytest.mark.filterwarnings("ignore:a prompt begins with the BOS token")
@pytest.mark.filterwarnings("ignore:the texts ended")
@pytest.mark.parametrize("brought", [True, False])
def test_so_is_that_a_text_or_a_route_or_a_context_brought_it(chatty, brought, tmp_path):
    bos = "<bos>" if brought else ""
    fact = fe.Fact("France", "The capital of {} is", " Paris", " Rome")
    texts = ["The Tower is in Paris", f"{bos}user\nWhere is the Tower?", *["Rome is the capital of Italy"] * 3]
    stats = [fe.key_stats(chatty, 0, texts, path=tmp_path / "stats", progress=False)[0] for _ in range(2)]
    report = fe.stats.stats_convergence(chatty, 0, texts, [fact], n_tokens=8, context=8, ridge=1.0, progress=False)
    lens = fe.probes.train_tuned_lens(chatty, texts, n_tokens=20, steps=1, batch=2, context=8, progress=False)
    route = Route(fact, f"{bos}Paris is the capital of", " France", " Italy")
    editor = fe.Rome(
        fe.KeyStats.identity(chatty, 0),
        fit=fe.ValueFit(steps=1, kl_weight=0.0),
        contexts=[f"{bos}I know: "],
        progress=False,
    )
    edit = editor(chatty, [fact])
    found = [each.provenance for each in (*stats, report, lens, edit)]
    found.append(fe.audit(chatty, edit, [fact], routes=[route], progress=False).provenance.model)
    assert [each.bos_in_prompt for each in found] == [brought] * len(found)


def test_that_a_prompt_brings_its_bos_is_told_once_a_call_at_the_callers_line(chatty):
    prompt = fe.chat_prompt(chatty, "What is the capital of {}?")
    facts = [fe.Fact(name, prompt, "Paris", "Rome", paraphrases=[prompt]) for name in ("France", "Italy")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fe.known(chatty, facts)
        fe.known(chatty, facts)
        fe.evaluate(chatty, facts)
        fe.alignable(chatty, facts)
    told = [each for each in said if "BOS token" in str(each.message)]
    assert len(told) == 4 and {each.filename for each in told} == {__file__}
