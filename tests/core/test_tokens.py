"""Positions are those of the tokens that the model runs, for whatever text, on every kind of tokenizer."""

import functools
import re
import warnings

import laws
import pytest
import tiny
import torch
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st
from tokenizers import processors

import tl_factedit as fe
from tl_factedit.core.facts import Fact
from tl_factedit.core.spacing import stripped
from tl_factedit.core.tokens import (
    align,
    align_all,
    check_all,
    check_texts,
    continuation,
    encode,
    find_span,
    pad,
    spell,
)
from tl_factedit.measure.first_tokens import FirstTokens

SUBWORD = ("bytebpe", "spm", "spm-always")  # those that spell every text back
UNKNOWN = "that the tokenizer doesn't know"
MODELS = [(kind, name) for kind in tiny.KINDS for name in tiny.TOKENIZERS]
# A tokenizer adds BOS by itself (Llama), or TransformerLens puts it in front as text (GPT-2, SmolLM2).
ADDS_BOS = pytest.mark.parametrize("adds_bos", [True, False], ids=["own BOS", "BOS as text"])
TOKENIZER = pytest.mark.parametrize("name", tiny.TOKENIZERS)


@functools.cache
def tokenizer(name: str, adds_bos: bool = True):
    tok = tiny.tokenizer(name)
    if not adds_bos:
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    return tok


@functools.cache
def model(kind: str, name: str, adds_bos: bool = True):
    return tiny.model(kind, "llama", tok=tokenizer(name, adds_bos), n_layers=1, d_model=8, n_heads=2)


# Any characters, with those that tokenizers are known to trip over drawn more often than by chance.
HARD = "éßŁЖΑ東京パ리مدينةहि́̈👨‍👩‍👧👍🏽🇫🇷\u200b\u200f\u00a0\u3000\ufeff\ufffd▁Ġ \n\t'.,{}<>"
WORDS = st.sampled_from(["The Eiffel", " Tower", "Paris", "Rome's", "café", "東京タワー", "القاهرة", "👨‍👩‍👧", "isn't"])
CHARS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(HARD), WORDS, st.just(" "))
TEXTS = st.lists(CHARS, max_size=12).map("".join).filter(lambda text: "{}" not in text)
SUBJECTS = st.lists(CHARS, min_size=1, max_size=6).map("".join).map(stripped).filter(bool)


# Some are words cut in two, to see subjects that end inside a token.
CUT_WORDS = st.sampled_from([("", "Eif", "fel"), ("The ", "Par", "is"), ("in ", "Tow", "er"), ("", "Ro", "me")])
PARTS = st.one_of(*3 * [st.tuples(TEXTS, SUBJECTS, TEXTS)], CUT_WORDS)


def fact_of(parts: tuple[str, str, str]) -> Fact:
    """A fact about the second part."""
    # After " is" the targets are continuations for every tokenizer here: no token crosses that space.
    before, subject, after = parts
    return Fact(subject, f"{before}{{}}{after} is", " Paris", " Rome")


# ---------------------------------------------------------------------------------------- what is run


@ADDS_BOS
@pytest.mark.parametrize(("kind", "name"), MODELS)
@given(text=TEXTS, prepend_bos=st.booleans())
def test_ids_are_those_that_the_model_runs(kind, name, adds_bos, text, prepend_bos):
    runs = model(kind, name, adds_bos).to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0].tolist()
    assume(runs)  # a text of white space alone has no word
    ids, offsets = encode(tokenizer(name, adds_bos), text, prepend_bos=prepend_bos)
    assert ids.tolist() == runs
    assert len(offsets) == len(ids)


@ADDS_BOS
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_a_model_given_the_text_runs_the_aligned_ids(kind, name, adds_bos):
    run, fact = model(kind, name, adds_bos), Fact("The Eiffel Tower", "{} is in", " Paris")
    ids = align(run.tokenizer, fact, prepend_bos=True).ids
    assert torch.equal(run(fact.text), run(ids[None]))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_word_after_bos_as_text_is_spelt_as_it_is_run(adds_bos):
    # "▁" goes before the first piece only; where BOS is text, BOS is that piece.
    aligned = align(tokenizer("spm", adds_bos), Fact("The", "{} Tower is", " Paris"), prepend_bos=True)
    assert aligned.subject == ((1, 2) if adds_bos else (1, 3))
    assert aligned.pieces[1] == ("The" if adds_bos else "T")


@TOKENIZER
def test_bos_shifts_every_position_by_one_and_nothing_else(name):
    fact = Fact("The Eiffel Tower", "In Paris {} is", " Paris", " Rome")
    with_bos, without = (align(tokenizer(name), fact, prepend_bos=bos) for bos in (True, False))
    assert with_bos.ids.tolist() == [tokenizer(name).bos_token_id, *without.ids.tolist()]
    assert with_bos.pieces == ("<bos>", *without.pieces)
    assert with_bos.subject == (without.subject[0] + 1, without.subject[1] + 1)
    assert with_bos.last == without.last + 1 == with_bos.subject[1] - 1
    assert (with_bos.prepend_bos, without.prepend_bos) == (True, False)
    assert torch.equal(with_bos.true_ids, without.true_ids)
    assert torch.equal(with_bos.new_ids, without.new_ids)


def test_bos_from_a_tokenizer_without_one_is_refused():
    tok = tiny.tokenizer()
    tok.bos_token = None
    with pytest.raises(ValueError, match="no BOS token: pass prepend_bos=False"):
        encode(tok, "The Tower", prepend_bos=True)
    assert len(encode(tok, "The Tower", prepend_bos=False)[0]) == 2


def test_a_slow_tokenizer_is_refused():
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ValueError, match=r"SlowTokenizer gives no character offsets.*use_fast=True"):
        encode(slow, "a", prepend_bos=False)
    with pytest.raises(ValueError, match="no character offsets"):
        align(slow, Fact("a", "{} is", " b"), prepend_bos=False)


@pytest.mark.parametrize("text", ["", "  "])
def test_a_text_without_tokens_is_refused(text):
    with pytest.raises(ValueError, match="has no tokens"):
        encode(tokenizer("wordlevel"), text, prepend_bos=False)


# ---------------------------------------------------------------------------------------- the subject


@ADDS_BOS
@TOKENIZER
@given(parts=PARTS, prepend_bos=st.booleans())
def test_the_subjects_tokens_cover_the_subject_and_nothing_else(name, adds_bos, parts, prepend_bos):
    fact = fact_of(parts)
    tok = tokenizer(name, adds_bos)
    try:
        start, stop = align(tok, fact, prepend_bos=prepend_bos).subject
    except ValueError as error:
        assert re.search(rf"(begins|ends) inside token .* \(position \d+\)|{UNKNOWN}", str(error))
        assume(False)
    _, offsets = encode(tok, fact.text, prepend_bos=prepend_bos)
    begin = fact.prompt.index("{}")
    end = begin + len(fact.subject)
    assert fact.text[offsets[start][0] : offsets[stop - 1][1]].strip() == fact.subject
    assert all(b <= begin for _, b in offsets[:start])
    assert all(a >= end for a, _ in offsets[stop:])
    assert prepend_bos <= start < stop <= len(offsets)


@pytest.mark.parametrize("name", SUBWORD)
@given(parts=PARTS)
def test_the_subject_is_refused_just_where_no_run_of_tokens_spells_it(name, parts):
    fact = fact_of(parts)
    # An oracle without offsets: what the tokens up to a position spell.
    tok = tokenizer(name)
    ids = encode(tok, fact.text, prepend_bos=False)[0].tolist()
    spelt = [tok.decode(ids[:i]) for i in range(len(ids) + 1)]
    assume(spelt[-1] == fact.text)  # a literal "▁" is read back as a space, "<0x41>" as "A"
    before = fact.text[: fact.prompt.index("{}")]
    starts = [i for i, text in enumerate(spelt) if text.rstrip() == before.rstrip()]
    stops = [i for i, text in enumerate(spelt) if text.rstrip() == before + fact.subject]
    try:
        start, stop = align(tok, fact, prepend_bos=False).subject
    except ValueError:
        assert not (starts and stops)
    else:
        assert start in starts
        assert stop in stops


@TOKENIZER
def test_subjects_that_end_inside_a_token_do_occur_among_the_generated(name):
    def ends_inside(parts: tuple[str, str, str]) -> bool:
        try:
            align(tokenizer(name), fact_of(parts), prepend_bos=False)
        except ValueError as error:
            return "ends inside token" in str(error)
        return False

    assert ends_inside(find(PARTS, ends_inside, settings=settings(phases=[Phase.generate])))


@pytest.mark.parametrize(
    ("name", "subject", "after", "piece", "position"),
    [
        ("wordlevel", "The Eif", "fel", "Eiffel", 1),
        ("bytebpe", "The Eif", "fel", " Eiffel", 1),
        ("spm", "The Eif", "fel", "Eiffel", 1),  # the decoder drops the first space of a lone token
        ("spm-always", "The Eif", "fel", "Eiffel", 1),
    ],
)
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_a_subject_that_ends_inside_a_token_is_refused_with_token_and_position(
    name, subject, after, piece, position, prepend_bos
):
    fact = Fact(subject, "{}" + after + " is in", " Paris")
    with pytest.raises(ValueError, match=f"subject {subject!r} ends inside token {piece!r}") as error:
        align(tokenizer(name), fact, prepend_bos=prepend_bos)
    assert f"(position {position + prepend_bos}) of 'The Eiffel is in'" in str(error.value)


@TOKENIZER
def test_a_subject_that_begins_inside_a_token_is_refused_with_token_and_position(name):
    with pytest.raises(ValueError, match=r"'fel' begins inside token ' ?Eiffel' \(position 2\)"):
        align(tokenizer(name), Fact("fel", "The Eif{} is in", " Paris"), prepend_bos=True)


@pytest.mark.parametrize("name", SUBWORD)
def test_a_subject_with_a_space_behind_it_ends_before_the_space_that_belongs_to_the_next_word(name):
    with pytest.warns(UserWarning, match="white space"):
        fact = Fact("Paris ", "{}is in", " France")
    row = align(tokenizer(name), fact, prepend_bos=True)
    assert torch.equal(row.ids, align(tokenizer(name), Fact("Paris", "{} is in", " France"), prepend_bos=True).ids)


@TOKENIZER
@pytest.mark.parametrize(
    ("prompt", "begin"),
    [("Rome and {} and Rome", 9), ("Rome Rome {}", 10), ("{} Rome Rome", 0), ("Rome, {} or Rome", 6)],
)
def test_the_subjects_own_place_is_found_and_not_the_same_word_elsewhere(name, prompt, begin):
    tok = tokenizer(name)
    aligned = align(tok, Fact("Rome", prompt, " Italy"), prepend_bos=True)
    _, offsets = encode(tok, aligned.text, prepend_bos=True)
    start, stop = aligned.subject
    assert offsets[stop - 1][1] == begin + len("Rome")
    assert aligned.text[offsets[start][0] : offsets[stop - 1][1]].strip() == "Rome"


@TOKENIZER
@given(parts=PARTS, prefix=TEXTS.map(lambda text: text + " and {} and "))
def test_a_prefix_moves_the_subject_and_its_own_slot_is_text(name, parts, prefix):
    fact = fact_of(parts)
    tok = tokenizer(name)
    try:
        aligned = align(tok, fact, prepend_bos=True, prefix=prefix)
    except ValueError as error:
        assume("inside token" not in str(error) and UNKNOWN not in str(error))
        raise
    assert aligned.text == prefix + fact.text
    _, offsets = encode(tok, aligned.text, prepend_bos=True)
    start, stop = aligned.subject
    end = len(prefix) + fact.prompt.index("{}") + len(fact.subject)
    assert aligned.text[:end].rstrip() == aligned.text[: offsets[stop - 1][1]].rstrip()
    assert aligned.text[offsets[start][0] : offsets[stop - 1][1]].strip() == fact.subject


@TOKENIZER
def test_a_template_takes_the_prompts_place_and_its_answer_is_spelt_after_it(name):
    fact = Fact("The Eiffel Tower", "{} is in", " Paris", " Rome")
    other = align(tokenizer(name), fact, prepend_bos=True, template="Where is {}? In the city of")
    assert other.text == "Where is The Eiffel Tower? In the city of"
    moved = fact.but(prompt="Where is {}? In the city of")
    assert torch.equal(other.ids, align(tokenizer(name), moved, prepend_bos=True).ids)
    assert other.subject == align(tokenizer(name), moved, prepend_bos=True).subject


@pytest.mark.parametrize("template", ["It is in", "{} and {} are in"])
def test_a_template_without_exactly_one_slot_is_refused(template):
    with pytest.raises(ValueError, match="needed exactly one"):
        align(tokenizer("wordlevel"), Fact("Rome", "{} is in", " Italy"), prepend_bos=True, template=template)


def test_a_span_that_no_token_covers_is_refused():
    with pytest.raises(ValueError, match="no token covers 'x' in 'a  b'"):
        find_span("a  b", [(0, 1), (3, 4)], 1, 2, ("a", "b"), "x")


# ---------------------------------------------------------------------------------------- the objects


@ADDS_BOS
@TOKENIZER
@given(parts=PARTS, target=TEXTS.filter(str.strip), prepend_bos=st.booleans())
def test_prompt_and_target_ids_are_those_of_the_whole_text(name, adds_bos, parts, target, prepend_bos):
    fact = fact_of(parts)
    tok = tokenizer(name, adds_bos)
    ids, _ = encode(tok, fact.text, prepend_bos=prepend_bos)
    whole, _ = encode(tok, fact.text + " " + target, prepend_bos=prepend_bos)
    try:
        added = continuation(tok, fact.text, " " + target, prepend_bos=prepend_bos)
    except ValueError as error:
        assert UNKNOWN in str(error)
        assert tok.unk_token_id in whole.tolist()[len(ids) :]
        assume(False)
    assert [*ids.tolist(), *added.tolist()] == whole.tolist()
    assert len(added) > 0


@TOKENIZER
def test_an_object_of_several_tokens_keeps_them_all(name):
    fact = Fact("John", "{} lives in", " the city of Berlin", " the city of Vienna, near the river")
    aligned = align(tokenizer(name), fact, prepend_bos=True)
    assert len(aligned.true_ids) > 3
    for ids, target in ((aligned.true_ids, fact.target_true), (aligned.new_ids, fact.target_new)):
        assert (
            tokenizer(name)
            .decode([*aligned.ids.tolist(), *ids.tolist()], skip_special_tokens=True)
            .endswith(target.replace(",", " ,") if name == "wordlevel" else target)
        )


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_a_target_that_merges_with_the_prompts_last_token_is_refused(name):
    with pytest.raises(ValueError, match="'The Tower is th'") as error:
        continuation(tokenizer(name), "The Tower is th", "e")
    assert "target 'e' merges with the last token" in str(error.value)
    assert "begin the target where a new token begins" in str(error.value)


@pytest.mark.parametrize("name", SUBWORD)
def test_a_prompt_that_ends_with_a_space_gives_it_to_the_target_and_a_template_is_told_to(name):
    fact = Fact("The Tower", "{} is in ", "Paris")
    assert torch.equal(
        align(tokenizer(name), fact, prepend_bos=True).true_ids,
        align(tokenizer(name), Fact("The Tower", "{} is in", " Paris"), prepend_bos=True).true_ids,
    )
    with pytest.raises(ValueError, match="ends with a space: move it to the front of the target"):
        continuation(tokenizer(name), "The Tower is in ", "Paris")
    with pytest.raises(ValueError, match=r"ends with a space and target ' Paris' begins with one"):
        align(tokenizer(name), fact, prepend_bos=True, template="{} lies in ")


def test_a_merging_new_target_is_refused_too():
    fact = Fact("The Tower", "{} is in th", " Paris")
    align(tokenizer("bytebpe"), fact, prepend_bos=True)
    with pytest.warns(UserWarning, match="last word"), pytest.raises(ValueError, match="target 'e' merges"):
        align(tokenizer("bytebpe"), fact.but(target_new="e"), prepend_bos=True)


@TOKENIZER
@pytest.mark.parametrize(
    ("new", "same"), [(" the capital of Italy", True), (" Rome", False), (None, False)], ids=["same", "other", "none"]
)
def test_objects_that_begin_alike_are_flagged(name, new, same):
    fact = Fact("Paris", "{} is", " the capital of France", new)
    assert align(tokenizer(name), fact, prepend_bos=True).same_first_token is same


@pytest.mark.parametrize("name", SUBWORD)
def test_pieces_spell_the_text(name):
    ids, _ = encode(tokenizer(name), "The Eiffel Tower is", prepend_bos=True)
    pieces = spell(tokenizer(name), ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).replace(" ", "") == "<bos>TheEiffelToweris"


def test_pad_fills_on_the_right():
    rows = [torch.tensor([3, 4, 5]), torch.tensor([6])]
    assert pad(rows, 9).tolist() == [[3, 4, 5], [6, 9, 9]]


# ---------------------------------------------------------------------------------------- control tokens

CHAT = "<bos>user\nWhere is {}?<eos>assistant\n"


@ADDS_BOS
@TOKENIZER
def test_a_prompt_that_begins_with_bos_gets_no_second_one_and_that_is_said(name, adds_bos):
    tok, fact = tokenizer(name, adds_bos), Fact("The Tower", "<bos> {} is", " Paris", " Rome")
    with pytest.warns(UserWarning, match="begins with the BOS token '<bos>' itself"):
        row = align(tok, fact, prepend_bos=True)
    assert row.ids.tolist().count(tok.bos_token_id) == 1
    assert row.ids[0] == tok.bos_token_id
    assert torch.equal(row.ids, align(tok, fact, prepend_bos=False).ids)
    assert encode(tok, "The Tower is", prepend_bos=True)[0].tolist().count(tok.bos_token_id) == 1


@TOKENIZER
def test_a_control_token_inside_a_subject_is_told(name):
    with pytest.raises(ValueError, match=r"subject 'The <eos> Tower' holds '<eos>'.*control token"):
        align(tokenizer(name), Fact("The <eos> Tower", "{} is", " Paris"), prepend_bos=True)


@pytest.mark.parametrize("name", SUBWORD)
def test_a_context_goes_behind_the_chat_header_that_the_subject_stands_under(name):
    fact = Fact("The Tower", CHAT, "Paris")
    row = align(tokenizer(name), fact, prepend_bos=False, prefix="Rome is old. ")
    assert row.text == "<bos>user\nRome is old. Where is The Tower?<eos>assistant\n"
    start, stop = row.subject
    assert "".join(row.pieces[start:stop]).replace(" ", "") == "TheTower"
    plain = align(
        tokenizer(name), fact.but(prompt="Where is {}?", target_true=" Paris"), prepend_bos=False, prefix="Rome. "
    )
    assert plain.text == "Rome. Where is The Tower?"


# ---------------------------------------------------------------------------------------- tokens that spell the text


def without_bytes(*lost: str):
    """A byte-level tokenizer that lacks some bytes, as SmolLM2's does, and drops them without a word."""
    import json

    from tokenizers import Tokenizer

    tok = tiny.tokenizer("bytebpe")
    state = json.loads(tok.backend_tokenizer.to_str())
    table = {token: i for token, i in state["model"]["vocab"].items() if token not in lost}
    state["model"]["vocab"] = {token: i for i, token in enumerate(table)}
    state["model"]["unk_token"] = None
    merges = [m if isinstance(m, list) else m.split(" ") for m in state["model"]["merges"]]
    state["model"]["merges"] = [m for m in merges if not set("".join(m)) & set(lost)]
    state["added_tokens"] = [{**t, "id": state["model"]["vocab"][t["content"]]} for t in state["added_tokens"]]
    tok._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tok


def test_a_text_that_its_tokens_do_not_spell_is_refused_and_its_neighbour_is_not():
    tok = without_bytes("ñ")  # stands for byte 0xF1, the first of code points from U+40000 on
    align(tok, Fact("A\U000e0fff", "{} is", " Paris"), prepend_bos=True)
    with pytest.raises(ValueError, match=r"the tokens of .* spell .*no token for some byte"):
        align(tok, Fact("A\U00040fff", "{} is", " Paris"), prepend_bos=True)
    align(tiny.tokenizer("bytebpe"), Fact("A\U00040fff", "{} is", " Paris"), prepend_bos=True)


def test_objects_that_their_tokens_do_not_spell_are_refused_too():
    tok, lost = without_bytes("ñ"), " \U00050000"
    assert continuation(tok, "It is in", " Paris").tolist()
    with pytest.raises(ValueError, match="no token for some byte"):
        continuation(tok, "It is in", lost)
    fact = Fact("The Tower", "{} is in", " Paris", " Rome", controls=[" Oslo"])
    check_texts(tok, fact, prepend_bos=True)
    for name, text in (("target_true", lost), ("target_new", lost), ("controls", [lost])):
        with pytest.raises(ValueError, match="no token for some byte"):
            check_texts(tok, fact.but(**{name: text}), prepend_bos=True)


def test_no_model_is_asked_what_its_tokens_do_not_spell(kind, monkeypatch):
    model, lost = tiny.model(kind, "gpt2", tok=without_bytes("ñ")), " \U00050000"
    edit = laws.rome(model, contexts=("",))(model, [laws.FACT])
    asked = laws.FACT.but(prompt=f"{lost} {{}} is in", neighbours=(), neighbour_targets=())
    calls = (
        lambda: fe.known(model, asked),
        lambda: fe.known(model, laws.FACT.but(target_true=lost)),
        lambda: fe.evaluate(model, asked),
        lambda: fe.evaluate(model, laws.FACT.but(target_new=lost)),
        lambda: fe.evaluation.token_accuracy(model, asked),
        lambda: fe.evaluation.gains(model, edit, lost),
    )
    for call in calls:
        with laws.no_forward(monkeypatch, model), pytest.raises(ValueError, match="no token for some byte"):
            call()
    (_, why), *_ = fe.alignable(model, laws.FACT.but(controls=[lost]))[1]
    assert "no token for some byte" in why


# ---------------------------------------------------------------------------------------- many facts at once


def test_a_batch_names_all_facts_that_cannot_be_aligned_and_one_alone_keeps_its_reason():
    tok = tokenizer("bytebpe")
    good = Fact("The Tower", "{} is in", " Paris")
    bad = [Fact("The Eif", "{}fel is in", " Paris", id=7), Fact("fel", "The Eif{} is in", " Paris", id=8)]
    assert [row.text for row in align_all(tok, [good, good], prepend_bos=True)] == [good.text] * 2
    with pytest.raises(ValueError, match="2 of 3 facts can't be asked") as error:
        align_all(tok, [bad[0], good, bad[1]], prepend_bos=True)
    assert all(said in str(error.value) for said in ("'7': subject", "ends inside", "'8': subject", "begins inside"))
    with pytest.raises(ValueError, match=r"^subject 'The Eif' ends inside token .*fact '7'"):
        align_all(tok, [good, bad[0]], prepend_bos=True)


def test_a_text_that_is_too_long_is_named_before_anything_is_run():
    tok, fact = tokenizer("bytebpe"), Fact("The Tower", "{} is in", " Paris", " Rome", id=9)
    n = len(align(tok, fact, prepend_bos=True).ids)
    align_all(tok, [fact], prepend_bos=True, room=n)
    with pytest.raises(ValueError, match=rf"has {n} tokens .*room for {n - 1} .*fact '9'"):
        align_all(tok, [fact], prepend_bos=True, room=n - 1)
    long = fact.but(neighbours=["Rome " * 30 + "is in"])
    check_all(tok, [fact, long], prepend_bos=True, room=100)
    with pytest.raises(ValueError, match=r"^'Rome Rome .*fact '9'"):
        check_all(tok, [fact, long], prepend_bos=True, room=n + 5)


def test_a_fact_without_an_old_object_is_aligned_and_what_needs_one_says_so():
    row = align(tokenizer("bytebpe"), Fact("The Tower", "{} is in", None, " Rome"), prepend_bos=True)
    assert row.old_ids is None and row.new_ids is not None and not row.same_first_token
    with pytest.raises(ValueError, match="has no target_true, and this call needs the old object"):
        _ = row.true_ids


@pytest.mark.parametrize(("kind", "count"), [("bytebpe", 3), ("spm", 4)])
def test_an_object_is_said_where_a_whole_character_is(kind, count):
    tok = tiny.tokenizer(kind)
    fact = Fact("Eiffel", "{} is in", " 東京", " Paris")
    row = align(tok, fact, prepend_bos=True)
    assert (row.old_word, row.new_word) == (count, 1)
    with pytest.warns(UserWarning, match="object ' 東京' of fact 'Eiffel' begins with a token of white space alone"):
        assert not FirstTokens.of(tok, fact, True).apart, "a space is no object"
    assert FirstTokens.of(tok, fact.but(target_true=" Rome"), True).apart
    said = tok.decode(row.old_ids[:count].tolist()).strip()
    assert said.startswith("東") and "\ufffd" in tok.decode(row.old_ids[: count - 1].tolist())


@TOKENIZER
@pytest.mark.parametrize("field", ["target_true", "target_new", "controls", "neighbour_targets"])
def test_a_control_token_in_an_object_is_refused(name, field):
    fact = Fact("The Tower", "{} is in", " Paris", " Rome", neighbours=["It is in"], neighbour_targets=[" Berlin"])
    with_end = " Paris<eos>" if field.startswith("target") else [" Paris<eos>"]
    with pytest.raises(ValueError, match=r"target ' Paris<eos>' holds '<eos>'.*control token"):
        check_texts(tokenizer(name), fact.but(**{field: with_end}), prepend_bos=True)


def test_an_object_is_spelt_after_another_template_as_it_stands_there():
    fact, tok = Fact("The Tower", "{} is in", " Paris", " Rome"), tokenizer("bytebpe")
    row = align(tok, fact, prepend_bos=True, template="{} is called “")
    assert torch.equal(row.true_ids, continuation(tok, "The Tower is called “", "Paris", prepend_bos=True))
    assert not torch.equal(row.true_ids, continuation(tok, "The Tower is called “", " Paris", prepend_bos=True))


def test_an_object_that_merges_with_an_elision_is_not_told_to_take_a_space():
    class Merging:  # "'m" is one token to many tokenizers
        is_fast, bos_token_id, bos_token, all_special_tokens = True, None, None, ()

        def __call__(self, text, **_):
            ids = [1, 2] if len(text) < 6 else [1, 3]
            return {"input_ids": ids, "offset_mapping": [(0, 1), (1, len(text))]}

    with pytest.raises(ValueError, match=r"merges.*begin the target with the word before it, \"d'\""):
        continuation(Merging(), "by d'", "mitri")


# ---------------------------------------------------------------------------------------- unknown words, BOS, once


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subject", "The Zugspitze"),
        ("target_true", " Zugspitze"),
        ("target_new", " Zugspitze"),
        ("controls", [" Berlin", " Zugspitze"]),
        ("neighbour_targets", [" Zugspitze"]),
    ],
)
def test_a_word_that_the_tokenizer_does_not_know_is_refused(field, value):
    fact = Fact(
        "The Tower", "{} is in", " Paris", " Rome", neighbours=["The Gate is in"], neighbour_targets=[" Berlin"]
    )
    check_texts(tokenizer("wordlevel"), fact, prepend_bos=True)
    with pytest.raises(ValueError, match=r"Zugspitze' holds a word that the tokenizer doesn't know .*'<unk>'"):
        check_texts(tokenizer("wordlevel"), fact.but(**{field: value}), prepend_bos=True)
    for name in SUBWORD:
        check_texts(tokenizer(name), fact.but(**{field: value}), prepend_bos=True)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("prompt", "{} and Zugspitze are in", "The Tower and Zugspitze are in"),
        ("paraphrases", ["Zugspitze and {} are in"], "Zugspitze and The Tower are in"),
        ("neighbours", ["The Zugspitze is in"], "The Zugspitze is in"),
    ],
)
def test_a_word_that_the_tokenizer_does_not_know_elsewhere_is_told(field, value, text):
    fact = Fact("The Tower", "{} is in", " Paris", " Rome").but(**{field: value})
    with pytest.warns(UserWarning, match=f"'{text}' holds a word that the tokenizer doesn't know"):
        check_texts(tokenizer("wordlevel"), fact, prepend_bos=True)
    for name in SUBWORD:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_texts(tokenizer(name), fact, prepend_bos=True)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_unknown_words_are_told_once_a_call(kind):
    facts = [Fact("The Tower", f"{{}} and {word} are in", " Paris", " Rome") for word in ("Zugspitze", "Matterhorn")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fe.evaluate(model(kind, "wordlevel"), facts)
    told = [each for each in said if "Zugspitze" in str(each.message)]
    assert len(told) == 1 and told[0].filename == __file__
    assert not [each for each in said if "Matterhorn" in str(each.message)]


@ADDS_BOS
@TOKENIZER
@pytest.mark.parametrize("space", [" ", "\n", " \n "])
@pytest.mark.filterwarnings("ignore:a prompt begins with the BOS token")
def test_bos_behind_white_space_comes_once(name, adds_bos, space):
    tok = tokenizer(name, adds_bos)
    ids = encode(tok, f"{space}<bos>The Tower is", prepend_bos=True)[0].tolist()
    assert ids.count(tok.bos_token_id) == 1
