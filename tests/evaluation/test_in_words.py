"""What a model says in words: the literal greedy decoding, what counts as saying an object, and how it is summed up."""

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import audits
import laws
import pytest
import tiny
import torch
from jaxtyping import TypeCheckError

import tl_factedit as fe
from tl_factedit.evaluation.in_words import begins_with, names_it, up_to_the_end

FORMS = [("bridge", arch) for arch in ("gpt2", "llama", "gemma2")]
FORMS += [("hooked", arch) for arch in ("gpt2", "llama") if arch in tiny.HOOKED]
FACTS = [
    laws.FACT.but(
        paraphrases=["{} stands in", "People say that {} is in"], neighbours=["Big Ben is in", "Anna lives in"]
    ),
    laws.OTHER,
]


def greedily(model, text, n_tokens):
    """The answer to one text, a whole forward pass a token."""
    ids = model.tokenizer(text)["input_ids"]
    bos = model.tokenizer.bos_token_id
    ids = ids if not model.cfg.default_prepend_bos or ids[:1] == [bos] else [bos, *ids]
    before = len(ids)
    for _ in range(n_tokens):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    end = model.tokenizer.eos_token_id
    said = ids[before:]
    text = model.tokenizer.decode(said[: said.index(end)] if end in said else said, skip_special_tokens=True)
    begun = len(text) - len(text.lstrip())
    return text[:begun] + text[begun:].split("\n")[0]


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_an_answer_is_what_greedy_decoding_says_token_by_token(form):
    model = tiny.model(*form)
    with laws.untouched(model):
        found = fe.answers(model, FACTS, n_tokens=6, progress=False)
    assert [(a.fact, a.kind) for a in found.each] == [
        (0, "prompt"),
        *[(0, "paraphrase")] * 2,
        *[(0, "neighbour")] * 2,
        (1, "prompt"),
    ]
    assert [a.said for a in found.each] == [greedily(model, a.asked, 6) for a in found.each]
    alone = [fe.answers(model, fact, n_tokens=6, batch_tokens=1, progress=False) for fact in FACTS]
    assert [a.said for one in alone for a in one.each] == [a.said for a in found.each]
    forced = fe.evaluation.token_accuracy(model, FACTS)
    assert found.teacher_forced == forced.rewrite
    assert found.share("paraphrase", lambda a: a.tokens_right).mean == pytest.approx(forced.paraphrase.mean)


@pytest.mark.parametrize(
    ("said", "obj", "begins", "names"),
    [
        (" Rome, Italy", "Rome", True, True),
        ("\n\n**Rome** is", "rome", True, True),
        (" Romeo and", "Rome", False, False),
        (" the city of Rome.", "Rome", False, True),
        (" in Romeo's Rome", "Rome", False, True),
        ("Jerome", "Rome", False, False),
        ("北京市", "北京", True, True),
        (" 파리입니다.", "파리", True, True),
        (" New York City", "New York", True, True),
        ("", "Rome", False, False),
    ],
)
def test_an_object_is_said_as_a_word_of_its_own(said, obj, begins, names):
    assert (begins_with(said, obj), names_it(said, obj)) == (begins, names)


def test_before_and_after_stand_side_by_side_and_the_numbers_are_of_facts():
    """The organism says the old cities and its oracle the new ones."""
    kind = tiny.KINDS[-1]
    facts = audits.ASKED[:8]
    said = fe.answers(audits.organism(kind), facts, n_tokens=2, progress=False)
    now = fe.answers(audits.organism(kind, "oracle0"), facts, n_tokens=2, before=said, progress=False)
    assert said.autoregressive.mean == 0.0 and now.autoregressive.mean == 1.0 == now.teacher_forced.mean
    assert said.share("prompt", lambda a: float(bool(a.names_old))).mean == 1.0
    table = now.table()
    prompts = table[table.kind == "prompt"]
    assert list(prompts.said_before.str.strip().str.split().str[0]) == [str(f.target_true).strip() for f in facts]
    assert list(prompts.said.str.strip().str.split().str[0]) == [str(f.target_new).strip() for f in facts]
    assert "autoregressive 1.00" in repr(now) and "<table" in now._repr_html_()
    assert now.before is not None and now.before.before is None
    with pytest.raises(ValueError, match="answers to other prompts"):
        fe.answers(audits.organism(kind), facts[:3], n_tokens=2, before=said, progress=False)


def test_teacher_forcing_gives_away_what_greedy_decoding_never_says(kind):
    """An object whose second token follows from its first, which the model would never say."""
    model = tiny.model(kind, "gpt2")
    first = " Vienna"
    follows = model.tokenizer.decode([int(laws.logits(model, laws.FACT.text + first)[0, -1].argmax())])
    fact = laws.FACT.but(target_new=f"{first} {follows}")
    found = fe.answers(model, fact, n_tokens=4, progress=False)
    assert found.autoregressive.mean == 0.0 and 0 < found.teacher_forced.mean < 1
    assert found.gap.mean == pytest.approx(found.teacher_forced.mean)


def test_other_names_of_an_object_count_as_it(kind):
    model = tiny.model(kind, "gpt2")
    said = fe.answers(model, laws.FACT, n_tokens=3, progress=False).each[0]
    name = said.said.split()[0]
    found = fe.answers(model, laws.FACT, n_tokens=3, aliases={str(laws.FACT.target_new): [name]}, progress=False)
    assert not said.begins and found.each[0].begins and found.autoregressive.mean == 1.0


def test_an_edit_that_is_applied_is_what_is_heard(kind):
    """A router acts through a hook, and its answer is the unedited model's again behind the block."""
    model = audits.organism(kind)
    facts = audits.ASKED[:3]
    router = fe.Router(layer=1, fit=audits.FIT, contexts=("",), progress=False)(model, facts)
    before = fe.answers(model, facts, n_tokens=1, progress=False)
    with router.applied(model) as changed:
        assert fe.answers(changed, facts, n_tokens=1, progress=False).autoregressive.mean == 1.0
    assert [a.said for a in fe.answers(model, facts, n_tokens=1, progress=False).each] == [a.said for a in before.each]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"n_tokens": 4000}, "take a smaller n_tokens"),
        ({"system": "Be brief."}, "chat=False"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_cannot_be_asked_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        fe.answers(tiny.model("bridge", "gpt2"), FACTS, progress=False, **given)


def test_kinds_and_facts_are_checked(kind):
    model = tiny.model(kind, "gpt2")
    with pytest.raises(ValueError, match="facts is empty"):
        fe.answers(model, [], progress=False)
    with pytest.raises(ValueError, match="kind is 'rewrite'"):
        fe.answers(model, laws.FACT, n_tokens=1, progress=False).share("rewrite", lambda a: 1.0)


def test_an_answer_is_as_long_as_what_is_wanted_and_a_line_break_of_the_object_ends_nothing(kind):
    model = tiny.model(kind, "gpt2")
    said = fe.answers(model, laws.FACT, n_tokens=5, progress=False).each[0].said
    fact = laws.FACT.but(target_new=" " + said.lstrip())
    found = fe.answers(model, fact, n_tokens=1, progress=False)
    assert found.each[0].said == said and found.autoregressive.mean == 1.0 == found.teacher_forced.mean
    ids = model.tokenizer("Rome is Paris", add_special_tokens=False)["input_ids"]
    text = model.tokenizer.decode(ids)
    assert up_to_the_end(model.tokenizer, ids, "Rome") == text
    broken = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " Rome\nor so\nmore")
    assert up_to_the_end(broken, ids, "Rome") == " Rome"
    assert up_to_the_end(broken, ids, "Rome\nor so") == " Rome\nor so"


@pytest.mark.parametrize(
    ("aliases", "says"),
    [
        ({"nobody": ["x"]}, "no object of these facts"),
        ({" Rome": "Roma"}, "a list of other names"),
        ({" Rome": [5]}, "list"),
    ],
)
def test_other_names_of_nothing_are_refused(aliases, says):
    with pytest.raises(ValueError, match=says):
        inspect.unwrap(fe.answers)(tiny.model("bridge", "gpt2"), laws.FACT, aliases=aliases, progress=False)


def test_answers_come_back_whole_with_where_they_came_from(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    edit = laws.rome(model)(model, [laws.FACT])
    then = fe.answers(model, FACTS, n_tokens=3, progress=False)
    with edit.applied(model):
        now = fe.answers(model, FACTS, n_tokens=3, before=then, progress=False)
    assert now.provenance.edits == (edit.digest,) and now.provenance.weights != then.provenance.weights
    for answers in (then, now):
        answers.save(tmp_path / "answers")
        found = fe.evaluation.Answers.load(tmp_path / "answers")
        assert found.facts == answers.facts and found.each == answers.each and found.provenance == answers.provenance
        assert json.dumps(found.to_dict()) == json.dumps(answers.to_dict())
        assert repr(found) == repr(answers) and found.table().equals(answers.table())
    before = fe.evaluation.Answers.load(tmp_path / "answers").before
    assert before is not None and before.each == then.each and before.provenance == then.provenance
    assert fe.answers(model, FACTS, n_tokens=3, before=before, progress=False).before is not None


def test_files_of_answers_are_told_from_others_and_from_damaged_ones(kind, tmp_path):
    found = fe.answers(tiny.model(kind, "gpt2"), FACTS, n_tokens=1, progress=False)
    path = tmp_path / "answers.safetensors"
    found.save(path)
    with pytest.raises(ValueError, match=r"answers\.safetensors holds 'answers', needed 'scores'"):
        fe.Scores.load(path)
    for wrong, said in (
        (replace(found.each[0], fact=2), r"each\[0\]\.fact is 2, needed one of 2 facts"),
        (replace(found.each[0], kind="rewrite"), r"each\[0\]\.kind is 'rewrite'"),
        (replace(found.each[0], tokens_right=1.5), r"each\[0\]\.tokens_right is 1.5"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(found, each=(wrong, *found.each[1:]))
    with pytest.raises(ValueError, match="before holds answers to other prompts"):
        replace(found, before=replace(found, each=found.each[1:]))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"answers\.safetensors is cut short"):
        fe.evaluation.Answers.load(path)
    with pytest.raises(FileNotFoundError):
        fe.evaluation.Answers.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"aliases": ["x"]}, "aliases"),
        ({"before": "x"}, "before is 'x'"),
        ({"n_tokens": "5"}, "n_tokens is '5'"),
        ({"chat": "no"}, "chat is 'no'"),
    ],
)
def test_what_is_of_another_kind_is_told_before_anything_is_said(more, why, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("tl_factedit.evaluation.in_words.say", never)
    with pytest.raises((ValueError, TypeCheckError), match=why):
        inspect.unwrap(fe.answers)(tiny.model("bridge", "gpt2"), laws.FACT, progress=False, **more)


def test_a_share_is_of_what_makes_a_number():
    found = fe.answers(tiny.model("bridge", "gpt2"), laws.FACT, n_tokens=2, progress=False)
    with pytest.raises((ValueError, TypeCheckError), match="names_old"):
        found.share("prompt", "names_old")
