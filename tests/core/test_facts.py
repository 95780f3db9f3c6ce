"""A Fact says what is wrong with its text at once, and never changes afterwards."""

import dataclasses
import inspect
import warnings

import pytest

from tl_factedit import data
from tl_factedit.core.facts import Fact, as_facts, check_distinct, need_old_object

EIFFEL = ("The Eiffel Tower", "{} is located in the city of", " Paris", " Rome")


@pytest.fixture
def fact() -> Fact:
    return Fact(*EIFFEL, paraphrases=["Where is {}? In"], neighbours=["The Louvre is in"], id=7)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "slots"), [("It is in", 0), ("{} and {} are in", 2), ("", 0), ("{0} is in", 0), ("{ } is in", 0)]
)
def test_a_prompt_without_exactly_one_slot_is_refused_with_its_number_of_slots(prompt, slots):
    with pytest.raises(ValueError, match=f'holds {slots} "{{}}", needed exactly one') as error:
        Fact("Rome", prompt, " Italy")
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u3000", "\u200b"])
def test_an_empty_subject_is_refused(empty):
    with pytest.raises(ValueError, match=r"^subject is .*give the subject's name"):
        Fact(empty, "{} is in", " Italy")


@pytest.mark.parametrize("empty", ["", " ", "\n"])
@pytest.mark.parametrize("name", ["target_true", "target_new"])
def test_an_empty_target_is_refused_by_name(name, empty):
    targets = {"target_true": " Italy", "target_new": " Spain"} | {name: empty}
    with pytest.raises(ValueError, match=f"^{name} is "):
        Fact("Rome", "{} is in", **targets)


def test_a_missing_new_target_is_no_empty_one():
    assert Fact("Rome", "{} is in", " Italy").target_new is None


@pytest.mark.parametrize("name", ["paraphrases", "neighbours", "neighbour_targets", "controls"])
def test_one_string_where_several_are_meant_is_refused_and_not_split_into_letters(name):
    with pytest.raises(ValueError, match=rf"^{name} is the string 'Rome'.*write \['Rome'\]"):
        Fact("Rome", "{} is in", " Italy", **{name: "Rome"})


def test_a_paraphrase_with_two_slots_is_refused_and_one_with_none_is_a_whole_text():
    with pytest.raises(ValueError, match=r'paraphrase .* holds 2 "{}"'):
        Fact(*EIFFEL, paraphrases=["{} and {} are in"])
    assert Fact(*EIFFEL, paraphrases=["Where is the  EIFFEL Tower? In"]).paraphrases[0].startswith("Where is the")


@pytest.mark.parametrize("text", ["The Colosseum is in", "In which city is it?", "The tower of Eiffel is in"])
def test_a_paraphrase_that_names_another_subject_is_told(text):
    with pytest.warns(UserWarning, match=r"of fact 'The Eiffel Tower' doesn't name its subject .* make it a neighbour"):
        assert Fact(*EIFFEL, paraphrases=[text]).paraphrases == (text,)
    with pytest.warns(UserWarning, match=r"is in' \(and 1 more\) of fact"):
        Fact(*EIFFEL, paraphrases=["{} is in", "Big Ben is in", "The Eiffel Tower is in", "It is in"])


def test_a_file_tells_once_of_paraphrases_about_others():
    rows = [{"subject": who, "prompt": "{} is in", "answer": "Rome", "rephrase": "Nero lived in"} for who in "XY"]
    with pytest.warns(UserWarning, match="doesn't name its subject 'X'") as said:
        assert len(data.facts(rows)) == 2
    assert len(said) == 1


@pytest.mark.parametrize("text", ["The Eiffel Tower is in", "People who saw the  Eiffel tower's top said: it is in"])
def test_a_neighbour_that_names_the_facts_own_subject_is_told(text):
    fact = Fact(*EIFFEL, neighbours=["The Louvre is in"])
    with pytest.warns(UserWarning, match=r"of fact 'The Eiffel Tower' names its subject .* a paraphrase") as said:
        assert fact.but(neighbours=[text]).neighbours == (text,)
    assert said[0].filename == __file__, "at the line that made the fact"
    with pytest.warns(UserWarning, match=r"\(and 1 more\) of fact"):
        fact.but(neighbours=[text, "Big Ben is in", fact.text])


def test_a_name_inside_a_longer_word_is_another_and_a_file_tells_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fact("Ann", "{} lives in", " Rome", neighbours=["Annapolis lies in", "JoAnn lives in", "McAnn lives in"])
    rows = [{"subject": who, "prompt": "{} is in", "answer": "Rome", "neighbours": [f"{who} lies in"]} for who in "XY"]
    with pytest.warns(UserWarning, match="names its subject 'X'") as said:
        assert len(data.facts(rows)) == 2
    assert len(said) == 1


def test_a_subject_is_found_however_its_accents_are_spelt():
    Fact("Sa\u0303o Paulo", "{} is in", " Brazil", paraphrases=["In which country is São Paulo? It is in"])


def test_neighbour_targets_are_as_many_as_neighbours_or_none():
    neighbours = ["The Louvre is in", "The Colosseum is in"]
    assert Fact(*EIFFEL, neighbours=neighbours).neighbour_targets == ()
    one_each = Fact(*EIFFEL, neighbours=neighbours, neighbour_targets=[" Paris", " Rome"])
    assert one_each.neighbour_targets == (" Paris", " Rome")
    with pytest.raises(ValueError, match="1 neighbour_targets for 2 neighbours"):
        Fact(*EIFFEL, neighbours=neighbours, neighbour_targets=[" Paris"])
    with pytest.raises(ValueError, match="1 neighbour_targets for 0 neighbours"):
        Fact(*EIFFEL, neighbour_targets=[" Paris"])


def made(*given, **fields) -> Fact:
    """A fact as a user makes it: past the type checks of this test suite."""
    names = [field.name for field in dataclasses.fields(Fact)]
    values = {f.name: f.default for f in dataclasses.fields(Fact)} | dict(zip(names, given, strict=False)) | fields
    fact = object.__new__(Fact)
    for name, value in values.items():
        object.__setattr__(fact, name, value)
    fact.__post_init__()
    return fact


NO_TEXT = [None, float("nan"), 3, True, ["Rome"], {"a": "Rome"}, b"Rome"]


@pytest.mark.parametrize("given", NO_TEXT, ids=repr)
@pytest.mark.parametrize("name", ["subject", "prompt", "target_true", "target_new", "relation"])
def test_what_is_not_text_is_refused_by_field(name, given):
    fields = {"subject": "Rome", "prompt": "{} is in", "target_true": " Italy", "target_new": " Spain"} | {name: given}
    if given is None and name not in ("subject", "prompt"):
        assert getattr(made(**fields), name) is None
        return
    with pytest.raises(ValueError, match=rf"^{name} is .*needed text"):
        made(**fields)


@pytest.mark.parametrize("given", NO_TEXT, ids=repr)
@pytest.mark.parametrize("name", ["paraphrases", "neighbours", "neighbour_targets", "controls"])
def test_lists_hold_text_alone(name, given):
    others = {"neighbours": ["Nice is in"]} if name == "neighbour_targets" else {}
    with pytest.raises(ValueError, match=rf"^{name}\[0\] is .*needed text"):
        made("Rome", "{} is in", " Italy", **others | {name: [given]})
    if not isinstance(given, list):
        with pytest.raises(ValueError, match=rf"^{name} is .*needed a list of strings"):
            made("Rome", "{} is in", " Italy", **others | {name: given})
    with pytest.raises(ValueError, match=rf"^{name}\[1\] is '\s*', needed some text"):
        made("Rome", "{} is in", " Italy", **others | {name: ["Nice", " "]})


@pytest.mark.parametrize("name", ["subject", "prompt", "target_true", "target_new", "paraphrases", "controls"])
def test_half_a_character_is_refused_by_name(name):
    text = "{} is\ud83d in" if name == "prompt" else " a\udc00"
    fields = {"subject": "Rome", "prompt": "{} is in", "target_true": " Italy"}
    with pytest.raises(ValueError, match=rf"^{name}.*\\ud.*lone surrogate"):
        made(**fields | {name: [text] if name in ("paraphrases", "controls") else text})


def test_a_set_has_no_order_and_is_no_list():
    with pytest.raises(ValueError, match=r"^paraphrases is .*a set: needed a list"):
        made("Rome", "{} is in", " Italy", paraphrases={"{} lies in"})


def test_a_neighbour_is_a_whole_prompt():
    with pytest.raises(ValueError, match=r'neighbour .* holds "{}", needed a whole prompt'):
        made("Rome", "{} is in", " Italy", neighbours=["{} lies in"])


@pytest.mark.parametrize("given", [1.5, float("nan"), True, ["a"]], ids=repr)
def test_an_id_is_text_or_a_whole_number(given):
    import numpy as np

    assert made("Rome", "{} is in", " Italy", id=np.int64(3)).id == 3
    with pytest.raises(ValueError, match=r"^id is "):
        made("Rome", "{} is in", " Italy", id=given)


def test_a_fact_to_inject_needs_no_old_object():
    fact = Fact("Rome", "{} is in", None, " Spain")
    assert fact.target_true is None
    with pytest.raises(ValueError, match=r"fact 'Rome' has no target_true, and an audit needs the old object"):
        need_old_object([Fact("Nice", "{} is in", " France"), fact], "an audit")
    with pytest.raises(ValueError, match="needs the old object"):
        _ = fact.old
    assert need_old_object([Fact("Nice", "{} is in", " France")], "an audit") == (" France",)
    with pytest.raises(ValueError, match="both None"):
        Fact("Rome", "{} is in", None)


@pytest.mark.parametrize(
    "given",
    ["The Eiffel Tower is in", b"x", {"subject": "Rome"}, 3, None, object()],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_fact_is_refused_at_the_door(given):
    door = inspect.unwrap(as_facts)  # past the type checks of this test suite, which a user doesn't have
    with pytest.raises(ValueError, match=r"needed Facts, such as fe\.Fact"):
        door(given)
    with pytest.raises(ValueError, match=r"facts\[1\] is .*needed a Fact"):
        door([Fact(*EIFFEL), given])


def test_one_fact_and_many_come_through_the_door():
    fact = Fact(*EIFFEL)
    assert as_facts(fact) == as_facts([fact]) == as_facts(iter([fact])) == (fact,)
    check_distinct([fact, fact.but(target_new=" Bonn")])
    with pytest.raises(ValueError, match=r"given twice \(as"):
        check_distinct([fact, fact.but(id=8)])
    with pytest.raises(ValueError, match="given twice"):
        check_distinct([fact, fact])


# ---------------------------------------------------------------------------------------- glued words


@pytest.mark.parametrize(
    ("prompt", "target"),
    [("{} is in the city of", "Paris"), ("{} was built in 18", "89"), ("He likes {}", "s")],
    ids=["word", "number", "subject at the end"],
)
def test_a_target_glued_to_the_prompts_last_word_is_warned_of(prompt, target):
    with pytest.warns(UserWarning, match=f"target {target!r} goes on inside .*begin it with a space"):
        Fact("Eiffel", prompt, target)
    with pytest.warns(UserWarning, match=f"target {target!r} goes on inside .*begin it with a space"):
        Fact("Eiffel", prompt, " a", target)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [("{} is in the city of", " Paris"), ("{} is (in", ")"), ("{} is in ", "Paris"), ("{}位于", "巴黎"), ("{}", "'s")],
)
def test_targets_that_begin_a_word_of_their_own_are_not_warned_of(prompt, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fact("Eiffel", prompt, target)


# ---------------------------------------------------------------------------------------- a value


def test_a_fact_is_frozen_and_so_are_its_lists(fact):
    with pytest.raises(dataclasses.FrozenInstanceError):
        fact.subject = "Rome"
    given = ["Where is {}? In"]
    kept = Fact(*EIFFEL, paraphrases=given)
    given.append("{} is in")
    assert kept.paraphrases == ("Where is {}? In",)


def test_equal_facts_are_equal_keys(fact):
    assert {fact: 1}[Fact(*EIFFEL, paraphrases=("Where is {}? In",), neighbours=("The Louvre is in",), id=7)]
    assert fact != fact.but(id=8)


def test_text_and_fill_put_the_subject_into_the_slot(fact):
    assert fact.text == "The Eiffel Tower is located in the city of"
    assert fact.fill("Where is {}? In") == "Where is The Eiffel Tower? In"
    assert fact.fill("No slot") == "No slot"


@pytest.mark.parametrize(
    ("subject", "prompt", "text"),
    [
        ("a{}b", "{} is in", "a{}b is in"),
        ("{}", "The set {} is", "The set {} is"),
        ("{0} %s {name}", "see {} in", "see {0} %s {name} in"),
        ("Rome", "{ {} } is in", "{ Rome } is in"),
        ("Rome", "{{}", "{Rome"),
        ("Rome", "{}} is in", "Rome} is in"),
        ("Rome\\1", r"\1 {} is in", r"\1 Rome\1 is in"),
    ],
)
def test_braces_and_escapes_are_text(subject, prompt, text):
    assert Fact(subject, prompt, " Italy").text == text


def test_but_changes_only_what_is_named_and_checks_it(fact):
    other = fact.but(target_new=" Berlin")
    assert other.target_new == " Berlin"
    assert other.but(target_new=fact.target_new) == fact
    with pytest.raises(ValueError, match=r"^target_new is"):
        fact.but(target_new="")
    with pytest.raises(TypeError, match="object"):
        fact.but(object=" Berlin")


@pytest.mark.parametrize(("given", "name"), [(7, "7"), ("x1", "x1"), (0, "0"), (None, "The Eiffel Tower")])
def test_tables_call_a_fact_by_its_id_or_else_its_subject(given, name):
    assert Fact(*EIFFEL, id=given).name == name
