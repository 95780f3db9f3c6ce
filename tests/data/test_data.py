"""Each published layout is read as it is written down here; what isn't such a layout is refused by name."""

import copy
import inspect
import json

import pytest

from tl_factedit import data
from tl_factedit.core.facts import Fact
from tl_factedit.data.files import read_json
from tl_factedit.data.real_world import RELATIONS, world

COUNTERFACT = [
    {
        "case_id": 0,
        "pararel_idx": 2796,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux",
        },
        "paraphrase_prompts": ["Shayna does this. Danielle Darrieux, a native", "Danielle Darrieux spoke"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Montesquieu is a native"],
        "attribute_prompts": ["J.R.R. Tolkien is a native"],
        "generation_prompts": ["Danielle Darrieux's mother tongue is"],
    },
    {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "{} speaks the language",
            "relation_id": "P103",
            "target_new": {"str": "Dutch", "id": "Q7411"},
            "target_true": {"str": " Russian", "id": "Q7737"},
            "subject": "Léon Blum",
        },
        "paraphrase_prompts": [],
        "neighborhood_prompts": [],
    },
    {
        "case_id": 2,
        "requested_rewrite": {
            "prompt": "{} is in",
            "relation_id": "P17",
            "target_new": {"str": "Sweden", "id": "Q34"},
            "target_true": {"str": "Spain", "id": "Q29"},
            "subject": "Autonomous University of Madrid",
        },
        "paraphrase_prompts": ["Autonomous University of Madrid, in"],
        "neighborhood_prompts": ["Ripollès is in"],
    },
]
BRIEF = [
    {
        "case_id": 7,
        "prompt": "The mother tongue of Danielle Darrieux is",
        "target_new": "English",
        "subject": "Danielle Darrieux",
        "ground_truth": "French",
        "rephrase_prompt": "Where Danielle Darrieux is from, people speak the language of",
        "locality_prompt": "Michel Rocard is a native speaker of",
        "locality_ground_truth": "German",
    }
]
KNOWN = [
    {
        "known_id": 3,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "template": "{} is located in the continent",
        "prediction": " of Antarctica. It is the highest",
        "prompt": "Vinson Massif is located in the continent of",
        "relation_id": "P30",
    }
]
ZSRE = [
    {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College",
        "rephrase": "What university did Watts Humphrey take part in?",
        "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology"],
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
        "cond": "Trinity College >> University of Michigan || What university did Watts Humphrey attend?",
    },
    {
        "subject": "Ramalinaceae",
        "src": "Which family does Ramalinaceae belong to?",
        "rephrase": "What family are Ramalinaceae?",
        "alt": "",
        "answers": ["Lecanorales"],
        "loc": "nq question: types of skiing in the winter olympics 2018",
        "loc_ans": "Downhill",
    },
]
# From MQuAKE: its `requested_rewrite` is a list of rewrites and not one.
MQUAKE = [{"case_id": 1, "requested_rewrite": [COUNTERFACT[0]["requested_rewrite"]], "questions": ["Where?"]}]
LAYOUTS = {"counterfact": COUNTERFACT, "counterfact_brief": BRIEF, "known_facts": KNOWN, "zsre": ZSRE}
READERS = {name: getattr(data, name) for name in LAYOUTS}


@pytest.fixture
def file(tmp_path):
    def write(records) -> str:
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        return path

    return write


# ---------------------------------------------------------------------------------------- layouts


def test_counterfact_is_read_as_written(file):
    first, second, third = data.counterfact(file(COUNTERFACT))
    assert first == Fact(
        "Danielle Darrieux",
        "The mother tongue of {} is",
        " French",
        " English",
        paraphrases=COUNTERFACT[0]["paraphrase_prompts"],
        neighbours=COUNTERFACT[0]["neighborhood_prompts"],
        controls=[" Russian", " Dutch"],
        relation="P103",
        id=0,
    )
    assert second.target_true == " Russian", "a space that is there stays one"
    assert second.controls == (" French", " English")
    assert third.controls == (), "objects of another relation are no controls"
    assert (third.relation, third.id) == ("P17", 2)


def test_the_neighbours_of_counterfact_share_the_object(file):
    assert data.counterfact(file(COUNTERFACT))[0].neighbour_targets == ()


def test_easyedits_counterfact_is_read_as_written(file):
    assert data.counterfact_brief(file(BRIEF)) == [
        Fact(
            "Danielle Darrieux",
            "The mother tongue of {} is",
            " French",
            " English",
            paraphrases=["Where Danielle Darrieux is from, people speak the language of"],
            neighbours=["Michel Rocard is a native speaker of"],
            neighbour_targets=[" German"],
            id=7,
        )
    ]


def test_known_facts_are_read_as_written(file):
    assert data.known_facts(file(KNOWN)) == [
        Fact("Vinson Massif", "{} is located in the continent of", " Antarctica", relation="P30", id=3)
    ]


def test_zsre_is_read_as_written(file):
    first, second = data.zsre(file(ZSRE))
    assert first == Fact(
        "Watts Humphrey",
        "What university did {} attend?",
        " Illinois Institute of Technology",
        " University of Michigan",
        paraphrases=["What university did Watts Humphrey take part in?"],
        neighbours=["nq question: who played desmond doss father in hacksaw ridge?"],
        neighbour_targets=[" Hugo Weaving"],
        id=0,
    )
    assert second.target_new is None
    assert second.id == 1


def test_zsre_is_read_as_meng_et_al_write_it(file):
    """Their reader writes the first answer, also where there is no ``alt``, and knows no old object."""
    for fact, record in zip(data.zsre(file(ZSRE), written="answer"), ZSRE, strict=True):
        assert (fact.target_true, fact.target_new) == (None, " " + record["answers"][0])
        assert fact.text == record["src"] and fact.paraphrases == (record["rephrase"],)
        assert fact.neighbours == (record["loc"] + "?",) and fact.neighbour_targets == (" " + record["loc_ans"],)
    # Past the type checks of this test suite, which a user doesn't have.
    with pytest.raises(ValueError, match="written is 'both', needed 'alt' or 'answer'"):
        inspect.unwrap(data.zsre)(file(ZSRE), written="both")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_text_of_a_fact_is_that_of_its_record(name, file):
    given = {
        "counterfact": lambda r: r["requested_rewrite"]["prompt"].format(r["requested_rewrite"]["subject"]),
        "zsre": lambda r: r["src"],
    }.get(name, lambda r: r["prompt"])
    facts = READERS[name](file(LAYOUTS[name]))
    assert [fact.text for fact in facts] == [given(record) for record in LAYOUTS[name]]
    assert all(t.startswith(" ") and t[1] != " " for fact in facts for t in (fact.target_true, *fact.controls))


@pytest.mark.parametrize("path_type", [str, lambda path: path])
def test_paths_are_given_as_text_or_as_paths(path_type, file):
    assert len(data.counterfact(path_type(file(COUNTERFACT)))) == 3


def test_the_last_mention_of_a_subject_is_its_place(file):
    twice = [{**KNOWN[0], "subject": "Rome", "prompt": "Rome, yes Rome is in"}]
    assert data.known_facts(file(twice))[0].prompt == "Rome, yes {} is in"


@pytest.mark.parametrize(
    ("subject", "prompt", "template"),
    [
        ("Ann", "Ann was born in Annapolis, and", "{} was born in Annapolis, and"),
        ("Roman", "The Roman and the Romans speak", "The {} and the Romans speak"),
        ("Rome", "The mayor of Rome's twin", "The mayor of {}'s twin"),
        ("中国", "北京是中国的", "北京是{}的"),
        ("C++", "The maker of C++11 and C++ is", "The maker of C++11 and {} is"),
    ],
)
def test_a_mention_inside_a_longer_word_is_none(subject, prompt, template, file):
    records = [{**KNOWN[0], "subject": subject, "prompt": prompt}]
    assert data.known_facts(file(records))[0].prompt == template


def test_a_subject_that_stands_only_inside_a_word_is_refused_with_the_word(file):
    records = [{**KNOWN[0], "subject": "Roman", "prompt": "The Romans speak"}]
    with pytest.raises(ValueError, match=r"record 3 of .*only inside the longer word 'Romans'"):
        data.known_facts(file(records))


@pytest.mark.parametrize(
    ("prompt", "attribute", "target"),
    [
        ("中国 is 中国的首都是", "纽约", "纽约"),
        ("中国 is", "'s English", "'s English"),
        ("中国 is", "English", " English"),
    ],
)
def test_objects_continue_their_prompts_as_the_script_wants_it(prompt, attribute, target, file):
    fact = data.known_facts(file([{**KNOWN[0], "subject": "中国", "prompt": prompt, "attribute": attribute}]))[0]
    assert fact.target_true == target


@pytest.mark.parametrize(
    ("changed", "message", "read"),
    [
        ({"attribute": " English \n"}, "white space around an object", ("Rome", "{} is in", " English")),
        ({"attribute": "\u00a0English"}, "white space around an object", ("Rome", "{} is in", " English")),
        ({"subject": "Rome "}, "white space around a subject", ("Rome", "{} is in", " Antarctica")),
        ({"prompt": "Rome is in\u00a0"}, "space at the end of a prompt", ("Rome", "{} is in", " Antarctica")),
        ({"prompt": 'Rome is in "\u200b'}, "space at the end of a prompt", ("Rome", '{} is in "', "Antarctica")),
        ({"attribute": "\nEnglish"}, r"begins with '\\n'", ("Rome", "{} is in", "\nEnglish")),
    ],
)
def test_white_space_that_a_file_holds_beside_its_texts_is_said(changed, message, read, file):
    with pytest.warns(UserWarning, match=message) as said:
        fact = data.known_facts(file([{**KNOWN[0], "subject": "Rome", "prompt": "Rome is in", **changed}]))[0]
    assert len(said) == 1 and (fact.subject, fact.prompt, fact.target_true) == read


def test_the_subjects_of_counterfact_have_no_white_space_around_them(file):
    records = copy.deepcopy(COUNTERFACT[2:])
    records[0]["requested_rewrite"]["subject"] = " Madrid\u00a0"
    with pytest.warns(UserWarning, match="around a subject") as said:
        fact = data.counterfact(file(records))[0]
    assert len(said) == 1 and fact.text == "Madrid is in"


@pytest.mark.parametrize(
    ("field", "given", "named"),
    [("loc", "", "loc"), ("loc_ans", " ", "loc_ans"), ("answers", [""], r"answers\[0\]"), ("loc", "\u200b", "loc")],
)
@pytest.mark.parametrize("written", ["alt", "answer"])
def test_a_record_of_zsre_without_some_text_is_refused_by_field(field, given, named, written, file):
    with pytest.raises(ValueError, match=rf"record 0 of .*: {named} is .*needed some text"):
        data.zsre(file([{**ZSRE[0], field: given}]), written=written)


def test_spaces_at_the_end_of_prompts_and_other_code_points_are_mended_and_said_once_a_file(file):
    records = [
        {**KNOWN[0], "subject": "Besançon", "prompt": "Besanc\u0327on is in "},
        {**KNOWN[0], "subject": "Vinson", "prompt": "Vinson is in "},
    ]
    with pytest.warns(UserWarning, match=r"records\.json were changed: .*\(1 times\); .*left out \(2 times\)") as said:
        first, second = data.known_facts(file(records))
    assert len(said) == 1
    assert (first.subject, first.text) == ("Besançon", "Besançon is in")
    assert (second.prompt, second.target_true) == ("{} is in", " Antarctica")


def test_a_record_a_line_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in [KNOWN[0], KNOWN[0]]), encoding="utf-8-sig")
    assert len(data.known_facts(path)) == 2
    path.write_text(json.dumps(KNOWN), encoding="utf-8-sig")
    assert len(data.known_facts(path)) == len(KNOWN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
        ('{"a": 1}\n{"b": ', "isn't JSON"),
        ('{"a": 1}\nx', "isn't JSON"),
    ],
    ids=["deep", "lfs", "cut JSONL", "text"],
)
def test_what_is_no_json_of_records_is_said(content, message, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"records\.json .*{message}"):
        data.counterfact(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, needed a file"):
        data.counterfact(tmp_path)


@pytest.mark.parametrize("given", [None, 3, float("nan"), ["Rome"], {"str": "Rome"}], ids=repr)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("known_facts", field) for field in ("subject", "prompt", "attribute")),
        *(("zsre", field) for field in ("src", "loc", "rephrase")),
        *(("counterfact_brief", field) for field in ("ground_truth", "locality_ground_truth")),
    ],
)
def test_what_is_no_text_is_refused_by_record_and_field(name, field, given, file):
    records = copy.deepcopy(LAYOUTS[name])
    records[0][field] = given
    with pytest.raises(ValueError, match=r"record \S+ of .*records\.json: .*needed text") as error:
        READERS[name](file(records))
    assert field in str(error.value) or field == "rephrase"


def test_answers_are_a_list_and_a_string_is_not_its_first_letter(file):
    records = copy.deepcopy(LAYOUTS["zsre"])
    records[0]["answers"] = "Illinois"
    with pytest.raises(ValueError, match="answers is 'Illinois', a str: needed a list"):
        data.zsre(file(records))


def test_no_records_are_no_facts(file):
    assert data.counterfact(file([])) == []


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_layout_is_refused_by_name_and_one_of_its_own_is_read(name, layout, file):
    path = file(LAYOUTS[layout])
    if name == layout:
        assert len(READERS[name](path)) == len(LAYOUTS[name])
        return
    with pytest.raises(ValueError, match=r"records\.json holds no list of records with .*is it of another layout\?"):
        READERS[name](path)


@pytest.mark.parametrize("content", [{"data": []}, "text", 3, [1, 2], [None], [{}], MQUAKE])
@pytest.mark.parametrize("name", READERS)
def test_json_that_is_no_list_of_such_records_is_refused_by_name(name, content, file):
    with pytest.raises(ValueError, match=r"records\.json"):
        READERS[name](file(content))


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("counterfact", "paraphrase_prompts"),
        ("counterfact", "neighborhood_prompts"),
        ("counterfact_brief", "ground_truth"),
        ("counterfact_brief", "locality_prompt"),
        ("known_facts", "prompt"),
        ("zsre", "rephrase"),
        ("zsre", "alt"),
    ],
)
def test_a_record_without_a_field_is_refused_by_file_and_field(name, lost, file):
    records = copy.deepcopy(LAYOUTS[name])
    del records[0][lost]
    with pytest.raises(ValueError, match=rf"records\.json .*'{lost}'"):
        READERS[name](file(records))


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path):
    path = tmp_path / "records.json"
    path.write_text('[{"case_id": 0, "requested', encoding="utf-8")
    with pytest.raises(ValueError, match=r"records\.json isn't JSON"):
        data.counterfact(path)


def test_a_file_that_is_not_there_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        data.counterfact(tmp_path / "records.json")


@pytest.mark.parametrize(
    ("name", "field", "record"),
    [("counterfact_brief", "prompt", 7), ("known_facts", "prompt", 3), ("zsre", "src", 0)],
)
def test_a_subject_that_is_not_in_its_prompt_is_refused_by_record(name, field, record, file):
    records = copy.deepcopy(LAYOUTS[name])
    records[0][field] = "Somebody else's mother tongue is"
    with pytest.raises(ValueError, match=rf"record {record} of .*records\.json: subject .* isn't in its prompt"):
        READERS[name](file(records))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("counterfact", lambda r: r["requested_rewrite"].pop("subject"), "it has no 'subject'"),
        ("counterfact", lambda r: r["requested_rewrite"].update(target_new=" Rome"), "string indices"),
        ("counterfact", lambda r: r["requested_rewrite"].update(prompt="no slot"), 'holds 0 "{}"'),
        ("counterfact_brief", lambda r: r.pop("subject"), "it has no 'subject'"),
        ("known_facts", lambda r: r.pop("subject"), "it has no 'subject'"),
        ("zsre", lambda r: r.update(answers=[]), "answers is empty"),
    ],
)
def test_a_record_that_makes_no_fact_is_named(name, spoil, message, file):
    records = copy.deepcopy(LAYOUTS[name])
    which = records[-1].get("case_id", records[-1].get("known_id", len(records) - 1))
    spoil(records[-1])
    with pytest.raises(ValueError, match=rf"record {which} of .*records\.json: .*") as error:
        READERS[name](file(records))
    assert message in str(error.value)


def test_what_a_record_has_nothing_of_is_left_out(file):
    records = copy.deepcopy(COUNTERFACT)
    records[0]["paraphrase_prompts"] = None
    assert data.counterfact(file(records))[0].paraphrases == ()
    records = copy.deepcopy(LAYOUTS["zsre"])
    records[0]["alt"] = None
    assert data.zsre(file(records))[0].target_new is None


def test_a_counterfact_prompt_without_its_slot_is_refused(file):
    records = copy.deepcopy(COUNTERFACT)
    records[1]["requested_rewrite"]["prompt"] = "Léon Blum speaks the language"
    with pytest.raises(ValueError, match=r'holds 0 "\{\}", needed exactly one'):
        data.counterfact(file(records))


# ---------------------------------------------------------------------------------------- shipped


WORLD = world()


def test_the_shipped_facts_have_names_of_their_own():
    assert len({fact.id for fact in WORLD}) == len(WORLD) == sum(len(r.objects) for r in RELATIONS)
    assert len(WORLD) >= 60
    assert data.world() == WORLD


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_every_relation_has_objects_enough_for_a_null(relation):
    assert len(set(relation.objects.values())) >= 8
    assert len(relation.paraphrases) >= 2
    assert all(text.count("{}") == 1 for text in (relation.prompt, *relation.paraphrases))


def true_of(fact: Fact) -> dict[str, str]:
    """Prompt -> object, of all subjects of a fact's relation."""
    relation = next(r for r in RELATIONS if r.name == fact.relation)
    return {relation.prompt.replace("{}", s): f" {o}" for s, o in relation.objects.items()}


@pytest.mark.parametrize("fact", WORLD, ids=lambda fact: fact.id)
def test_a_shipped_fact_is_valid(fact):
    answers = true_of(fact)
    assert fact.target_true == answers[fact.text]
    assert fact.target_new in answers.values()
    assert fact.target_new != fact.target_true
    assert len(fact.neighbours) >= 5
    assert fact.text not in fact.neighbours
    assert [answers[text] for text in fact.neighbours] == list(fact.neighbour_targets)
    assert fact.target_new not in fact.neighbour_targets, "a neighbour that answers so shows no spill"
    assert not {fact.target_true, fact.target_new} & set(fact.controls)
    assert len(set(fact.controls)) == len(fact.controls) >= 6
    assert all(text.startswith(" ") and text.strip() for text in (fact.target_true, fact.target_new, *fact.controls))
    assert len(set(fact.paraphrases)) == len(fact.paraphrases) >= 2


def test_new_objects_vary_within_a_relation():
    for relation in RELATIONS:
        new = {fact.target_new for fact in WORLD if fact.relation == relation.name}
        assert len(new) >= 5, relation.name


def test_a_cut_line_of_jsonl_is_said_by_its_number(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    with pytest.raises(ValueError, match=r"cut\.jsonl isn't JSON: line 4, column 7"):
        read_json(path)
