"""MQuAKE, RippleEdits and KnowEdit, in small records that are written in their layout."""

import copy
import json

import pytest

import tl_factedit as fe

HOPS = [
    {
        "question": "Who wrote Misery?",
        "cloze": "Misery was written by",
        "answer": "Stephen King",
        "answer_alias": ["King"],
    },
    {"question": "Where was King born?", "cloze": "Stephen King was born in", "answer": "Portland", "answer_alias": []},
]
NEW_HOPS = [
    {"question": "Who wrote Misery?", "cloze": "Misery was written by", "answer": "Ann Leckie", "answer_alias": []},
    {
        "question": "Where was Leckie born?",
        "cloze": "Ann Leckie was born in",
        "answer": "Toledo",
        "answer_alias": ["T."],
    },
]
MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        {
            "prompt": "{} was written by",
            "relation_id": "P50",
            "target_new": {"str": "Ann Leckie", "id": "Q1"},
            "target_true": {"str": "Stephen King", "id": "Q2"},
            "subject": "Misery",
            "question": "Who wrote Misery?",
        }
    ],
    "questions": ["Where was the author of Misery born?", "Misery's author was born in which city?"],
    "answer": "Portland",
    "answer_alias": ["Portland, Maine"],
    "new_answer": "Toledo",
    "new_answer_alias": ["T."],
    "single_hops": HOPS,
    "new_single_hops": NEW_HOPS,
}


def query(prompt, *answers, subject="Q5", relation="MOTHER"):
    return {
        "prompt": prompt,
        "answers": [{"value": names[0], "aliases": list(names[1:])} for names in answers],
        "query_type": "regular",
        "subject_id": subject,
        "relation": relation,
        "target_ids": [],
        "phrase": None,
    }


MOTHER = query("The name of the mother of Ada de la Cruz is", ("Rosa", "Rosa Cruz"))
SIBLINGS = query("The names of the siblings of Ada de la Cruz are", ("Ben",), ("Cleo", "C."), relation="SIBLING")
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ada de la Cruz is New Syria.",
        "subject_id": "Q5",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q8",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Ada de la Cruz is Peru.",
            "subject_id": "Q5",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q9",
        },
    },
    "Relation_Specificity": [
        {"test_queries": [MOTHER], "test_condition": "OR", "condition_queries": [MOTHER]},
        {"test_queries": [SIBLINGS], "test_condition": "AND", "condition_queries": []},
    ],
    "Compositionality_I": [
        {
            "test_queries": [query("The capital of the country of Ada de la Cruz is", ("Aleppo",), subject="Q77")],
            "test_condition": "OR",
            "condition_queries": [query("The capital of New Syria is", ("Aleppo",), subject="Q8")],
        }
    ],
    "Forgetfulness": [],
}
KNOWEDIT = {
    "subject": "Leo",
    "prompt": "The place of death of Leo is",
    "target_new": "Bonn",
    "ground_truth": [["Berlin", "Berlin, Germany"]],
    "portability": {"Logical_Generalization": [{"prompt": "Bonn is where died", "ground_truth": [["Leo", "L."]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "The name of the father of Leo is", "ground_truth": "Albert"}]},
}


def kinds(case):
    return [(q.kind, len(q.queries), q.every, len(q.conditions)) for q in case.questions]


def test_mquake_is_read_with_its_hops_and_all_names(tmp_path):
    path = tmp_path / "mquake.json"
    path.write_text(json.dumps([MQUAKE]))
    (case,) = fe.data.mquake(path)
    (fact,) = case.facts
    assert (fact.text, fact.target_true, fact.target_new) == ("Misery was written by", " Stephen King", " Ann Leckie")
    assert case.name == "7" and fact.relation == "P50"
    assert kinds(case) == [("edit-wise", 1, False, 0), ("instance-wise", 2, True, 0), ("multi-hop", 2, False, 2)]
    edit, instance, hops = case.questions
    assert edit.queries[0].answers == (("Ann Leckie",),) and edit.queries[0].old == ("Stephen King",)
    assert [each.text for each in instance.queries] == ["Misery was written by", "Ann Leckie was born in"]
    assert hops.queries[0].answers == (("Toledo", "T."),) and hops.queries[1].old == ("Portland", "Portland, Maine")
    assert [each.answers for each in hops.conditions] == [(("Stephen King", "King"),), (("Portland",),)]


def test_records_of_mquake_that_edit_one_thing_in_two_ways_are_told():
    other = copy.deepcopy(MQUAKE)
    other["requested_rewrite"][0]["target_new"]["str"] = "Lee Child"
    with pytest.warns(UserWarning, match="edit 1 prompt in different ways, such as 'Misery was written by'"):
        assert len(fe.data.mquake([MQUAKE, other])) == 2


@pytest.mark.parametrize("spelt", ["Relation_Specificity", "Relation_Specifity"])
def test_ripple_edits_are_read_with_the_subject_that_their_prompts_share(spelt):
    record = {**RIPPLE, spelt: RIPPLE["Relation_Specificity"]}
    if spelt != "Relation_Specificity":
        del record["Relation_Specificity"]
    (case,) = fe.data.ripple_edits([record])
    (fact,) = case.facts
    assert (fact.subject, fact.prompt) == ("Ada de la Cruz", "The name of the country of citizenship of {} is")
    assert (fact.target_true, fact.target_new) == (" Peru", " New Syria")
    assert sorted(kinds(case)) == [
        ("compositionality I", 1, False, 1),
        ("relation specificity", 1, False, 1),
        ("relation specificity", 1, True, 0),
    ]
    siblings = next(q for q in case.questions if q.every)
    assert siblings.queries[0].answers == (("Ben",), ("Cleo", "C."))  # all of them, each by one of its names


def test_a_recent_edit_has_no_old_object_and_a_subject_that_cannot_be_told_is_asked_for():
    recent = copy.deepcopy(RIPPLE)
    del recent["edit"]["original_fact"], recent["Relation_Specificity"]
    with pytest.raises(ValueError, match=r"record 0.*can't be told: give it, subjects=\{'Q5'"):
        fe.data.ripple_edits([recent])
    (case,) = fe.data.ripple_edits([recent], subjects={"Q5": "Ada de la Cruz"})
    assert case.facts[0].target_true is None and case.facts[0].target_new == " New Syria"


def test_knowedit_is_read_and_what_should_stay_counts_where_it_was_known():
    (case,) = fe.data.knowedit([KNOWEDIT])
    (fact,) = case.facts
    assert (fact.prompt, fact.target_true, fact.target_new) == ("The place of death of {} is", " Berlin", " Bonn")
    assert kinds(case) == [("logical generalization", 1, False, 0), ("relation specificity", 1, False, 1)]
    assert case.questions[0].queries[0].answers == (("Leo", "L."),)
    pairs = {"prompt": ["A is", "B is"], "ground_truth": ["x", ["y", "z"]]}
    (case,) = fe.data.knowedit([{**KNOWEDIT, "portability": {"Reasoning": pairs}, "locality": {}}])
    assert [q.queries[0].answers for q in case.questions] == [(("x",),), (("y", "z"),)]


@pytest.mark.parametrize(
    ("read", "record", "why"),
    [
        (
            "mquake",
            {**MQUAKE, "requested_rewrite": MQUAKE["requested_rewrite"][0]},
            "record 7 of the records: requested_rewrite is a d",
        ),
        ("mquake", {**MQUAKE, "answer": None}, "record 7 of the records: answer is None"),
        ("mquake", KNOWEDIT, "no list of records with 'requested_rewrite'"),
        (
            "ripple_edits",
            {**RIPPLE, "edit": {**RIPPLE["edit"], "prompt": "Ada de la Cruz, of Peru"}},
            "doesn't say what",
        ),
        (
            "ripple_edits",
            {**RIPPLE, "Compositionality_I": [{**RIPPLE["Compositionality_I"][0], "test_condition": "XOR"}]},
            "test_condition is 'XOR'",
        ),
        ("knowedit", {**KNOWEDIT, "portability": {}, "locality": None}, "neither portability nor locality"),
        ("knowedit", {**KNOWEDIT, "subject": "Max"}, "subject 'Max' isn't in its prompt"),
    ],
)
def test_what_makes_no_case_is_named(read, record, why):
    with pytest.raises(ValueError, match=why):
        getattr(fe.data, read)([record])


def test_the_reader_of_columns_sends_them_on():
    with pytest.raises(ValueError, match=r"fe\.data\.mquake"):
        fe.data.facts([MQUAKE])
    with pytest.raises(ValueError, match=r"fe\.data\.ripple_edits"):
        fe.data.facts([RIPPLE])
