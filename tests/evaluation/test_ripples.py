"""What follows from an edit: said as greedy decoding has it, each case under its own change, counted as declared."""

import json
import math

import audits
import laws
import pytest
import tiny
import torch
from jaxtyping import TypeCheckError

import tl_factedit as fe
from tl_factedit.evaluation import EditCase, Query, Question, Ripples, ripple_effects, ripples
from tl_factedit.evaluation.ripple_effects import is_right

FACTS = [laws.FACT, laws.OTHER]


def greedily(model, text, n_tokens):
    """The answer to one text, a whole forward pass a token."""
    ids = model.to_tokens(text)
    before = ids.shape[1]
    for _ in range(n_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    said, end = ids[0, before:].tolist(), model.tokenizer.eos_token_id
    text = model.tokenizer.decode(said[: said.index(end)] if end in said else said, skip_special_tokens=True)
    begun = len(text) - len(text.lstrip())
    return text[:begun] + text[begun:].split("\n")[0]


def cases():
    """Two cases that ask what surrounds their facts; what is right is no matter here."""
    texts = ["Big Ben is in", "Anna lives in the"]
    return [
        EditCase([fact], [Question("near", [Query(text, ["Rome"], old=["Paris"])], conditions=[Query("The", ["x"])])])
        for fact, text in zip(FACTS, texts, strict=True)
    ]


def moved(model):
    """An edit for each of the facts."""
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=laws.QUICK, contexts=("",), progress=False)
    return [editor(model, [fact]) for fact in FACTS]


def test_everything_is_said_as_greedy_decoding_has_it_each_case_under_its_own_change(kind):
    model = tiny.model(kind, "gpt2")
    edits = moved(model)
    with laws.untouched(model):
        found = ripples(model, edits, cases(), n_tokens=4, progress=False)
    one_by_one = ripples(model, edits, cases(), n_tokens=4, batch_tokens=1, progress=False)
    assert one_by_one.asked == found.asked and one_by_one.holds == found.holds
    for i, (edit, each) in enumerate(zip(edits, found.asked, strict=True)):
        assert each.case == i and each.said_before == (greedily(model, each.texts[0], 4),)
        with edit.applied(model):
            assert each.said == (greedily(model, each.texts[0], 4),)
            now = greedily(model, FACTS[i].text, 4)
        assert found.holds[i] == is_right(now, Query("x", [FACTS[i].target_new]))
    with fe.compose(edits).applied(model):
        together = [greedily(model, each.texts[0], 4) for each in found.asked]
    assert [each.said[0] for each in ripples(model, fe.compose(edits), cases(), n_tokens=4).asked] == together


def test_what_counts_and_what_is_right(kind):
    model = tiny.model(kind, "gpt2")
    (edit, _) = moved(model)
    before, text = {}, FACTS[0].text
    for each in (text, "Big Ben is in", "Anna lives in the"):
        before[each] = greedily(model, each, 4).split()[0]
    with edit.applied(model):
        now = {each: greedily(model, each, 4).split()[0] for each in before}
    ben, anna = "Big Ben is in", "Anna lives in the"
    questions = [
        Question("any", [Query(ben, [now[ben]]), Query(anna, ["nothing"])]),
        Question("every", [Query(ben, [now[ben]]), Query(anna, ["nothing"])], every=True),
        Question("known", [Query(ben, ["nothing"], old=[now[ben]])], conditions=[Query(anna, [before[anna]])]),
        Question("unknown", [Query(ben, [now[ben]])], conditions=[Query(anna, ["nothing"])]),
        Question("still new", [Query(ben, [now[ben]], old=[now[ben]])]),
    ]
    found = ripples(model, edit, EditCase(FACTS[:1], questions), n_tokens=4)
    told = {each.kind: each for each in found.asked}
    assert told["any"].right and not told["every"].right and told["any"].old is None
    assert told["known"].counts and not told["unknown"].counts
    assert told["known"].old and not told["known"].right
    assert told["still new"].right and not told["still new"].old
    assert found.share("any").mean == 1.0 and math.isnan(found.share("unknown").mean)
    assert found.share("known", "old").mean == 1.0
    table = found.table().set_index("kind")
    assert table.loc["unknown", ["questions", "count", "cases"]].tolist() == [1, 0, 0]
    assert "unknown: none counts (0 of 1 count)" in repr(found) and "<table" in found._repr_html_()
    assert len(found.said()) == 7
    # The tiny model didn't know the fact, so that this case is none of those that RippleEdits counts.
    assert found.was_known == (is_right(before[text], Query("x", [FACTS[0].target_true])),) == (False,)
    assert math.isnan(found.share("any", only_held=True).mean)


def test_an_answer_is_found_in_what_is_said_by_any_of_its_names_and_all_that_is_asked_for():
    one, both = Query("It is", ["Bonn", "Federal City"]), Query("They are", [["Ann", "Anna"], ["Bob"]])
    assert is_right(" the federal city.", one) and not is_right(" Bonnie", one)
    assert is_right(" Anna and Bob", both) and not is_right(" Anna and Rob", both)
    assert Query("It is", "Bonn").answers == (("Bonn",),) and both.answers == (("Ann", "Anna"), ("Bob",))


def test_on_the_organism_the_country_follows_an_edit_of_the_city_and_the_old_one_is_gone():
    kind = tiny.KINDS[-1]
    model, facts = audits.organism(kind), audits.ASKED[:6]
    asked = [
        EditCase(
            [fact],
            [
                Question("country", [Query(p, [new], old=[old])], conditions=[Query(p, [old])])
                for p, old, new in fe.models.organism_implications(fact)
            ],
        )
        for fact in facts
    ]
    never = ripples(model, audits.organism(kind), asked, n_tokens=3)  # nothing was changed
    assert never.share("country").mean == 0.0 and never.share("country", "old").mean == 1.0
    assert not any(never.holds) and all(never.was_known)
    changed = fe.Rome(fe.KeyStats.identity(model, 1), fit=audits.FIT, contexts=audits.CONTEXTS, progress=False)
    found = ripples(model, changed.each(model, facts), asked, n_tokens=3)
    assert all(found.holds) and found.share("country", only_held=True).mean > 0.8
    assert found.share("country", "old").mean < 0.2 and found.share("country", "old_before").mean == 1.0
    assert repr(found).startswith("Ripples(6 cases, 6 of them known before and edited)")


def test_it_is_kept_and_goes_on_where_it_was_killed(kind, tmp_path, monkeypatch):
    model = tiny.model(kind, "gpt2")
    edits, said = moved(model), ripple_effects.say
    left = [2]

    def dies(*given, **more):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return said(*given, **more)

    monkeypatch.setattr(ripple_effects, "say", dies)
    with pytest.raises(KeyboardInterrupt):
        ripples(model, edits, cases(), n_tokens=4, folder=tmp_path)
    left[0] = 1  # what is missing is one change's answers
    found = ripples(model, edits, cases(), n_tokens=4, folder=tmp_path)
    assert left[0] == 0
    monkeypatch.setattr(ripple_effects, "say", said)
    assert found.asked == ripples(model, edits, cases(), n_tokens=4).asked
    found.save(tmp_path / "ripples.safetensors")
    again = Ripples.load(tmp_path / "ripples.safetensors")
    assert again.asked == found.asked and again.cases == found.cases and repr(again) == repr(found)
    assert json.loads(json.dumps(found.to_dict()))["n_tokens"] == 4


def test_questions_are_framed_and_beginnings_of_sentences_are_not(kind):
    model = tiny.model(kind, "gpt2")
    asked = EditCase(FACTS[:1], [Question("a", [Query("Is Big Ben in Rome?", ["x"]), Query("Big Ben is in", ["x"])])])
    (edit, _) = moved(model)
    (found,) = ripples(model, edit, asked, n_tokens=3, frame="Anna says: {} The").asked
    assert found.said_before[0] == greedily(model, "Anna says: Is Big Ben in Rome? The", 3)
    assert found.said_before[1] == greedily(model, "Big Ben is in", 3)


def test_what_is_wrong_is_said(kind):
    model = tiny.model(kind, "gpt2")
    edits, (one, other) = moved(model), cases()
    for wrong, more, why in (
        ([], {}, "cases is empty"),
        ([one], {"frame": "Q:"}, "frame is 'Q:', needed one"),
        ([one], {"frame": "{} is", "chat": True}, "two ways"),
        ([one], {"system": "Be short."}, "only a chat"),
        ([one], {"n_tokens": 0}, "n_tokens"),
        ([one], {"n_tokens": 1_000}, "longer|more than the"),
        (["x"], {}, "'x'"),
        ([one, one], {}, "given twice"),
        ([one], {"frame": None}, "frame"),
        ([one], {"force": "no"}, "force"),
        ([EditCase(FACTS, one.questions)], {}, "served by several changes"),
    ):
        with pytest.raises((ValueError, TypeCheckError), match=why):
            ripples(model, edits, wrong, **more)
    with pytest.raises(ValueError, match="needed exactly one"):
        ripples(model, edits[:1], [one, other])
    found = ripples(model, edits, [one, other], n_tokens=2)
    with pytest.raises(ValueError, match="kind is 'far', needed one of 'near'"):
        found.share("far")
    with pytest.raises((ValueError, TypeCheckError), match="'wrong'"):
        found.share("near", "wrong")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Query("", ["x"]), "text is ''"),
        (lambda: Query("It is", []), "answers is"),
        (lambda: Query("It is", [["x"], []]), "answers is"),
        (lambda: Query("It is", [3]), "answers"),
        (lambda: Query("It is", None), "answers"),
        (lambda: Question("a", []), "queries is empty"),
        (lambda: Question("a", ["It is"]), "queries"),
        (lambda: EditCase([], [Question("a", [Query("It is", "x")])]), "facts is empty"),
        (lambda: EditCase(FACTS, []), "questions is empty"),
        (lambda: EditCase([FACTS[0].but(target_new=None)], [Question("a", [Query("It is", "x")])]), "no target_new"),
    ],
)
def test_parts_of_another_kind_are_told_so(make, why):
    with pytest.raises((ValueError, TypeCheckError), match=why):
        make()
