"""Relations with templates and pairs: what is made of them, and what isn't such a file."""

import json

import pytest

from tl_factedit import data

CAPITALS = {
    "name": "country capital city",
    "prompt_templates": ["The capital of {} is ", "The capital city of {} is"],
    "prompt_templates_zs": ["What is the capital of {}? It is the city of"],
    "properties": {"relation_type": "factual"},
    "samples": [
        {"subject": "France", "object": "Paris"},
        {"subject": "South Africa", "object": "Pretoria"},
        {"subject": "South Africa", "object": "Cape Town"},
        {"subject": "Italy", "object": "Rome"},
    ],
}
CHINESE = {"name": "首都", "prompt_templates": ["{}的首都是"], "samples": [{"subject": "中国", "object": "北京"}]}


def written(path, held):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(held), encoding="utf-8")
    return path


def test_a_sample_is_a_fact_with_the_other_templates_and_the_other_objects(tmp_path):
    facts = data.relations(written(tmp_path / "all.json", [CAPITALS, CHINESE]))
    assert [fact.text + str(fact.target_true) for fact in facts] == [
        "The capital of France is Paris",
        "The capital of South Africa is Pretoria",
        "The capital of South Africa is Cape Town",
        "The capital of Italy is Rome",
        "中国的首都是北京",
    ]
    france, pretoria, *_ = facts
    assert france.paraphrases == ("The capital city of {} is", "What is the capital of {}? It is the city of")
    assert france.controls == (" Pretoria", " Cape Town", " Rome") and france.target_new is None
    assert pretoria.controls == (" Paris", " Rome"), "Cape Town is right, too"
    assert {fact.relation for fact in facts} == {"country capital city", "首都"}


def test_a_folder_holds_a_relation_a_file(tmp_path):
    written(tmp_path / "factual" / "capitals.json", CAPITALS)
    written(tmp_path / "other" / "chinese.json", CHINESE)
    assert len(data.relations(tmp_path)) == 5 and len(data.relations(tmp_path / "other")) == 1


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"name": "x"}, "relation 0 of .* isn't one"),
        ([CAPITALS, 3], "relation 1 of .* isn't one"),
        (CAPITALS | {"samples": [{"subject": "France"}]}, "sample 0 of 'country capital city'"),
        (CAPITALS | {"samples": [{"subject": " ", "object": "Paris"}]}, "sample 0"),
        (CAPITALS | {"samples": []}, "no templates or no samples"),
        (CAPITALS | {"prompt_templates": ["The capital is"]}, "prompt_templates .* needed a list of texts"),
        (CAPITALS | {"prompt_templates": "{} is"}, "prompt_templates .* needed a list of texts"),
    ],
)
def test_what_is_none_is_refused_by_name(tmp_path, held, says):
    with pytest.raises(ValueError, match=says):
        data.relations(written(tmp_path / "x.json", held))
    assert (tmp_path / "x.json").exists()


def test_an_empty_folder_is_no_relation(tmp_path):
    with pytest.raises(ValueError, match=r"without \.json files"):
        data.relations(tmp_path)
    with pytest.raises(FileNotFoundError):
        data.relations(tmp_path / "none.json")
