"""Facts from anything that has rows: the same from every kind of table, said from what, nothing dropped in silence."""

import csv
import gzip
import inspect
import json
import warnings

import datasets
import pandas as pd
import pytest

from tl_factedit import data
from tl_factedit.core.facts import Fact

ROWS = [
    {
        "entity": "France",
        "question": "What is the capital of France?",
        "answer": "Paris",
        "new": "Rome",
        "rephrase": ["France's capital is", "The seat of government of France is"],
        "rel": "capital",
        "note": "x",
    },
    {
        "entity": "Namibia",
        "question": "What is the capital of Namibia?",
        "answer": "Windhoek",
        "new": "Paris",
        "rephrase": [],
        "rel": "capital",
        "note": "y",
    },
]
FACTS = [
    Fact(
        "France",
        "What is the capital of {}?",
        " Paris",
        " Rome",
        paraphrases=["France's capital is", "The seat of government of France is"],
        controls=[" Windhoek"],
        relation="capital",
    ),
    Fact("Namibia", "What is the capital of {}?", " Windhoek", " Paris", controls=[" Rome"], relation="capital"),
]


def as_text(rows):
    return [{name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]


def csv_file(path, rows, separator=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(as_text(rows))
    return path


def test_every_kind_of_table_gives_the_same_facts_and_says_from_what(tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "facts.parquet")
    (tmp_path / "facts.json").write_text(json.dumps(ROWS))
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "facts.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    csv_file(tmp_path / "facts.csv", ROWS)
    csv_file(tmp_path / "facts.tsv", ROWS, "\t")
    (tmp_path / "facts.csv.gz").write_bytes(gzip.compress((tmp_path / "facts.csv").read_bytes()))
    kinds = [ROWS, tuple(ROWS), frame, datasets.Dataset.from_list(ROWS), *sorted(tmp_path.iterdir())]
    assert len(kinds) == 11
    for given in kinds:
        found = data.facts(given)
        assert list(found) == FACTS, given
        assert found.columns == {
            "subject": "entity",
            "prompt": "question",
            "target_true": "answer",
            "target_new": "new",
            "paraphrases": "rephrase",
            "relation": "rel",
        }
        assert found.unused == ("note",) and found.left_out == ()
        assert repr(found).startswith("2 facts: subject from 'entity'") and "not used: 'note'" in repr(found)


def test_columns_may_be_named_and_the_usual_names_give_way():
    rows = [{"subject": "no", "who": "France", "prompt": "{} has the capital", "target_true": "Rome", "is": "Paris"}]
    found = data.facts(rows, {"subject": "who", "target_true": "is"})
    assert list(found) == [Fact("France", "{} has the capital", " Paris")]
    assert found.unused == ("subject", "target_true")


@pytest.mark.parametrize(
    "template", ["The capital of [X] is [Y] .", "The capital of {subject} is", "The capital of {} is"]
)
def test_slots_of_other_layouts_are_taken(template):
    rows = [{"sub_label": "France", "template": template, "obj_label": "Paris", "paraphrase": "[X] is ruled from [Y]."}]
    (found,) = data.facts(rows)
    assert found.text == "The capital of France is" and found.paraphrases == ("{} is ruled from",)


def test_nested_objects_and_neighbours_lists_of_answers_and_numbers_are_read():
    rows = [
        {
            "subject": "Ann",
            "prompt": "Ann was born in",
            "target_true": {"str": "1912", "id": "Q1"},
            "target_new": ["Rome", "Roma"],
            "locality": [{"loc": "Bob was born in", "loc_ans": "Oslo"}],
        },
        {
            "subject": "Eve",
            "prompt": "Eve was born in",
            "target_true": 1930,
            "target_new": float("nan"),
            "locality": None,
        },
    ]
    ann, eve = data.facts(rows)
    assert (ann.target_true, ann.target_new) == (" 1912", " Rome") and eve.target_true == " 1930"
    assert ann.neighbours == ("Bob was born in",) and ann.neighbour_targets == (" Oslo",)
    assert eve.target_new is None and eve.neighbours == ()


def test_elisions_and_accents_in_objects_are_mended():
    prompt = "{} est la capitale de l'"
    (fact,) = data.facts([{"subject": "Londres", "prompt": prompt, "answer": "Angleterre", "new": "Italie"}])
    assert (fact.text + fact.target_true, fact.target_new) == ("Londres est la capitale de l'Angleterre", "Italie")
    records = [{"subject": who, "prompt": "{} is in", "answer": "Sa\u0303o Paulo", "new": "Rome"} for who in "XY"]
    with pytest.warns(UserWarning, match=r"accents stood apart .*composed \(NFC\) now \(2 times\)") as said:
        found = data.facts(records)
    assert [fact.target_true for fact in found] == [" São Paulo"] * 2 and len(said) == 1


def test_a_country_called_na_is_no_missing_value(tmp_path):
    path = csv_file(
        tmp_path / "x.csv", [{"subject": "NA", "prompt": "NA is short for", "answer": "Namibia", "new": ""}]
    )
    (fact,) = data.facts(path)
    assert (fact.subject, fact.target_new) == ("NA", None)


def test_published_layouts_are_known_by_what_they_hold(tmp_path):
    rewrite = {
        "prompt": "{} speaks",
        "subject": "Ann",
        "relation_id": "P1",
        "target_true": {"str": "Dutch"},
        "target_new": {"str": "Thai"},
    }
    rows = [{"requested_rewrite": rewrite, "paraphrase_prompts": [], "neighborhood_prompts": []}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for given in (rows, tmp_path / "x.json"):
        found = data.facts(given)
        assert list(found) == data.counterfact(given) and found.layout == "counterfact"
    assert repr(found) == "1 fact in the layout of fe.data.counterfact"
    with pytest.raises(ValueError, match="MQuAKE"):
        data.facts([{"requested_rewrite": [rewrite]}])


def test_records_that_make_no_fact_are_all_named_or_left_out_and_kept():
    rows = [
        *ROWS,
        {"entity": "Italy", "question": "Which capital?", "answer": "Rome"},
        {"entity": "X", "question": None},
    ]
    with pytest.raises(
        ValueError, match=r"2 of 4 records make no fact: record 2: .*'Italy'.*; record 3: prompt is None"
    ):
        data.facts(rows)
    with pytest.warns(UserWarning, match="2 of 4 records .* left out"):
        found = data.facts(rows, wrong="leave out")
    assert [fact.subject for fact in found] == ["France", "Namibia"] and [i for i, _ in found.left_out] == [2, 3]
    assert "2 records left out" in repr(found)


@pytest.mark.parametrize(
    ("given", "columns", "says"),
    [
        ([], None, "no records"),
        ({"train": ROWS}, None, "a mapping of 'train'"),
        ([3], None, "record 0 is a int"),
        ([{"a": 1}], None, "no column for the subject among 'a'"),
        ([{"subject": "x", "prompt": "y"}], None, "no column for an object"),
        (ROWS, {"subjekt": "entity"}, "columns names 'subjekt'"),
        (ROWS, {"subject": "nobody"}, "subject from 'nobody', which isn't there"),
        ([{"subject": "x", "prompt": "[Y] is x's", "answer": "y"}], None, "stands inside the prompt"),
        ([{"subject": "x", "prompt": "x is", "answer": "y", "rephrase": 3}], None, "paraphrases is 3"),
    ],
)
def test_what_is_no_table_of_facts_is_refused(given, columns, says):
    with pytest.raises(ValueError, match=says):
        data.facts(given, columns)


HEADLESS = "France,The capital of {} is,Paris,Rome\nItaly,The capital of {} is,Rome,Oslo\n"


@pytest.mark.parametrize("columns", [None, {"subject": "who"}])
def test_a_table_without_a_line_of_names_says_what_its_first_line_was_taken_for(columns, tmp_path):
    (tmp_path / "x.csv").write_text(HEADLESS)
    (tmp_path / "x.tsv").write_text(HEADLESS.replace(",", "\t"))
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(HEADLESS.encode()))
    frame = pd.read_csv(tmp_path / "x.csv")
    for given in (tmp_path / "x.csv", str(tmp_path / "x.tsv"), tmp_path / "x.csv.gz", frame):
        with pytest.raises(ValueError, match=r"'France', .*the first row is taken as the names of columns: if it is a"):
            data.facts(given, columns)
    with pytest.raises(ValueError, match="among 'France'") as said:
        data.facts(frame.to_dict("records"))  # where each record has the names
    assert "first row" not in str(said.value)
    (tmp_path / "x.csv").write_text("France,Rome,Rome\nItaly,Rome,Oslo\n")
    with pytest.raises(ValueError, match="first line, which is taken as the names of columns, names 'Rome' twice"):
        data.facts(tmp_path / "x.csv")


def test_a_reader_of_json_sends_tables_to_the_one_that_reads_them(tmp_path):
    rows = [{"known_id": 1, "subject": "France", "prompt": "The capital of France is", "attribute": "Paris"}]
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    for path in (csv_file(tmp_path / "x.csv", rows), tmp_path / "x.parquet"):
        assert data.facts(path)[0].but(id=1) == data.known_facts(rows)[0]
        with pytest.raises(ValueError, match=r"x\..* is a table, needed JSON of this layout: fe.data.facts"):
            data.known_facts(path)


@pytest.mark.parametrize("end", ["jsonl", "ndjson", "jsonl.gz"])
def test_a_file_of_one_line_of_json_is_a_list_of_one_record(end, tmp_path):
    row = {"known_id": 1, "subject": "France", "prompt": "The capital of France is", "attribute": "Paris"}
    raw = json.dumps(row).encode()
    (tmp_path / f"x.{end}").write_bytes(gzip.compress(raw) if end.endswith("gz") else raw)
    assert list(data.facts(tmp_path / f"x.{end}")) == data.known_facts(tmp_path / f"x.{end}") == data.known_facts([row])


def test_other_kinds_are_refused(tmp_path):
    for given in (3, None, {1, 2}):
        with pytest.raises(TypeError, match="needed a list of dicts"):
            data.facts(given)
    with pytest.raises(ValueError, match="wrong is 'skip'"):
        inspect.unwrap(data.facts)(ROWS, wrong="skip")  # past the type checks of this suite
    for name in ("none.csv", "none.json", "none.parquet"):
        with pytest.raises(FileNotFoundError):
            data.facts(tmp_path / name)
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="can't be read as Parquet"):
        data.facts(tmp_path / "x.parquet")
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"[]")[:-9])
    with pytest.raises(ValueError, match="isn't JSON"):
        data.facts(tmp_path / "x.json.gz")


def test_facts_are_written_as_tables_and_read_back_as_they_were(tmp_path):
    full = FACTS[0].but(
        neighbours=["Rome is the capital of"], neighbour_targets=[" Italy"], paraphrases=["[France] {} is", "it's {}'s"]
    )
    injected = Fact("France", "{} is", None, " [old] and", controls=[" a, b"])
    facts = [full, FACTS[1], injected.but(id=7)]
    frame = data.to_frame(facts)
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps([fact.to_dict() for fact in facts]))
    for given in (frame, *sorted(tmp_path.iterdir())):
        found = [fact.but(id=None) for fact in data.facts(given)]
        assert found == [fact.but(id=None) for fact in facts], given
    assert list(data.facts([fact.to_dict() for fact in facts])) == facts


def test_a_table_tells_of_objects_that_it_reads_as_words():
    inside = pytest.warns(UserWarning, match="goes on inside")
    with inside:
        year = Fact("X", "{} was born in 18", "89")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = data.to_frame(year)
    with inside:
        assert list(data.facts(frame)) == [year], "a digit goes on inside a number"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        glued = year.but(neighbours=["Y was Peter"], neighbour_targets=["Z"])
    with pytest.warns(UserWarning, match=r"'Z' goes on inside the last word of 'Y was Peter' .* reads it as ' Z'"):
        data.to_frame([year, glued])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Fact(**glued.to_dict()) == glued


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "subject,prompt,answer\nFrance,In short, the capital of {} is,Paris\n",
            "line 2 has 4 fields, and the first line 3",
        ),
        ("subject,prompt,answer\nFrance,The capital of {} is\n", "line 2 has 2 fields"),
        ("subject;prompt;answer\nFrance;The capital of {} is;Paris\n", "is ';' what stands between them"),
        ("subject,prompt,answer,answer\nFrance,The capital of {} is,Paris,x\n", "names 'answer' twice"),
        ('subject,prompt,answer\n"France,The capital of {} is,Paris\n', "can't be read as a table"),
    ],
)
def test_a_row_of_other_length_is_named_and_never_shifted(tmp_path, text, says):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        data.facts(tmp_path / "x.csv")


@pytest.mark.parametrize(("text", "held"), [("null", "null"), ("5", "5, a int"), ('"x"', "'x', a str")])
def test_a_file_that_holds_no_records_says_what_it_holds(tmp_path, text, held):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json holds {held}: needed a list of records"):
        data.facts(tmp_path / "x.json")


def test_spaces_after_the_commas_of_a_table_are_left_out_and_that_is_told(tmp_path):
    text = 'subject, prompt , target_true\nFrance, "In short, the capital of {} is", Paris\nSpain, {} has, Madrid\n'
    (tmp_path / "x.csv").write_text(text)
    with pytest.warns(
        UserWarning, match=r"x\.csv has spaces around the names of its columns: they are left out"
    ) as said:
        found = data.facts(tmp_path / "x.csv")
    assert len(said) == 1
    assert list(found) == [
        Fact("France", "In short, the capital of {} is", " Paris"),
        Fact("Spain", "{} has", " Madrid"),
    ]


@pytest.mark.parametrize("nothing", ["None", "nan", " NaN"])
def test_objects_that_are_what_programs_print_for_nothing_are_told(tmp_path, nothing):
    lines = [f"France,The capital of {{}} is,Paris,{nothing}", f"Spain,The capital of {{}} is,{nothing},Rome"]
    (tmp_path / "x.csv").write_text("\n".join(["subject,prompt,target_true,target_new", *lines]))
    with pytest.warns(
        UserWarning, match=rf"the 'target_new' of record 0 of .* '{nothing}' \(and 1 more\).*empty"
    ) as said:
        assert data.facts(tmp_path / "x.csv")[0].target_new == f" {nothing.strip()}"
    assert len(said) == 1


def test_a_spreadsheet_is_told_what_it_is(tmp_path):
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match="save it as CSV"):
        data.facts(tmp_path / "x.xlsx")


@pytest.mark.parametrize("gap", ["[MASK].", "____.", "<mask>", "{answer}", "[Y] ."])
def test_a_gap_for_the_object_is_no_text(gap):
    (fact,) = data.facts([{"subject": "France", "prompt": f"The capital of {{subject}} is {gap}", "answer": "Paris"}])
    assert fact.text == "The capital of France is"
    with pytest.raises(ValueError, match="stands inside the prompt"):
        data.facts([{"subject": "France", "prompt": f"{gap.strip(' .')} is the capital of France", "answer": "Paris"}])


def test_a_prompt_that_holds_its_answer_already_is_refused():
    with pytest.raises(ValueError, match="already ends with its object"):
        data.facts([{"subject": "France", "prompt": "The capital of France is Paris.", "answer": "Paris"}])
