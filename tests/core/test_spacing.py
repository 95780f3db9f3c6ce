"""White space between a prompt and its target: one rule, for files and for facts written by hand."""

import warnings

import pytest

from tl_factedit.core.facts import Fact
from tl_factedit.core.spacing import before_prompts, continued, ending, gap, in_one_word, moved


@pytest.mark.parametrize(
    ("text", "target", "space"),
    [
        ("The capital of France is", "Paris", " "),
        ("Londres est la capitale de l'", "Angleterre", ""),
        ("Il vient d’", "Oslo", ""),
        ("On sait qu'", "il vient", ""),
        ("Il va jusqu'", "à Rome", ""),
        ("He is Peter O'", "Toole", ""),
        ("La capitale dell'", "Inghilterra", ""),
        ("It is the Millers'", "house", " "),
        ("It was 5'", "above", " "),
        ("It is 'Rome'", "again", " "),
        ("Where is it?", "Paris", " "),
        ("A:", "Paris", " "),
        ("In", "1889", " "),
        ("中国的首都是", "北京", ""),
        ("中国的首都是", "New York", ""),
        ("日本の首都は", "東京", ""),
        ("เมืองหลวงคือ", "กรุงเทพ", ""),
        ("한국의 수도는", "서울", " "),
        ("The capital of China is", "北京", " "),
        ("user\n", "Paris", ""),
        ("It is in ", "Paris", ""),
        ("He said (", "Paris", ""),
        ('He said "', "Paris", ""),
        ('He said "Rome"', "Paris", " "),
        ("It is Rome", "'s best", ""),
        ("It is Rome", "’s best", ""),
        ("It is Rome", ", Italy", ""),
        ("It is Rome", ".", ""),
        ("It costs $", "5", ""),
        ("It is Rome", "", ""),
        ("It is in…", "Paris", " "),
        ("The city —", "Paris", " "),
        ("It is - in short -", "Paris", " "),
        ("Paris—", "Rome", ""),
        ("It was at -", "5 degrees", ""),
        ("中国的首都是什么?", "北京", ""),
        ("It opens at 12:", "30", ""),
        ("By J.", "R. R. Tolkien", ""),
        ("He was born in 18", "89", ""),
        ("She lives in district 9", "Paris", " "),
        ("They are non‑", "aligned", ""),
        ("They are non", "‐aligned", ""),
        ("בירת ישראל היא ב־", "ירושלים", ""),
        ("Sie nannten es ‚", "Rom", ""),
        ("It was at −", "5 degrees", ""),
        ("It costs ¥", "5", ""),
        ("See www.", "example.org", ""),
        ("Where is it? [/INST]", "Paris", ""),
        ("<assistant>", "Paris", ""),
        ("", "Paris", ""),
    ],
)
def test_the_gap_hangs_on_script_and_on_what_the_text_ends_with(text, target, space):
    assert gap(text, target) == space


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("English", " English"),
        (" English", " English"),
        ("  English", " English"),
        (" English \n", " English"),
        ("\nEnglish", "\nEnglish"),
        ("'s English", "'s English"),
        ("New  York", " New  York"),
    ],
)
def test_objects_of_files_become_continuations(target, found):
    assert continued("The mother tongue of Danielle Darrieux is", target) == found
    assert continued("The mother tongue of Danielle Darrieux is", found) == found


@pytest.mark.parametrize(
    ("text", "target", "found"),
    [
        ("The capital is ", "Paris", " Paris"),
        ("The capital is\u00a0", "Paris", " Paris"),
        ("The capital is", "\u00a0Paris", " Paris"),
        ("The capital is\u200b", "Paris", " Paris"),
        ("中国的首都是 ", "北京", "北京"),
        ("中国的首都是\u3000", "北京", "北京"),
        ("中国的首都是", " 北京", "北京"),
        ("中国的首都是", " New York", " New York"),
        ("It is called (", " Paris", "Paris"),
        ('It is called " ', "Paris", "Paris"),
        ("est la capitale de l'", "Angleterre", "Angleterre"),
        ("est la capitale de l' ", "Angleterre", "Angleterre"),
        ("est la capitale de l'", " Angleterre", "Angleterre"),
        ("Rome / ", "Paris", " Paris"),
        ("Where is it?", "Paris", " Paris"),
        ("It is in…", "Paris", " Paris"),
        ("The city —", "Paris", " Paris"),
        ("was born in 18", "89", "89"),
        ("was born in 18", " 89", " 89"),
    ],
)
def test_files_and_facts_treat_white_space_alike(text, target, found):
    assert continued(text, target) == found
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fact = Fact("X", "{} " + text, target)
    assert fact.target_true == found
    assert fact.text + found == f"X {text}{target}" or len(said) == 1, "what changes the text is said"


@pytest.mark.parametrize(
    ("subject", "prompt", "subject_now", "prompt_now"),
    [
        (" Anna ", "{} is", "Anna", "{} is"),
        ("Anna ", "{}is", "Anna", "{} is"),
        (" Anna", "Here is{}, who is", "Anna", "Here is {}, who is"),
        ("中国\u3000", "{}的首都是", "中国", "{}的首都是"),
        ("Anna\u200b\n", "{} is", "Anna", "{} is"),
    ],
)
def test_a_subject_has_no_white_space_around_it(subject, prompt, subject_now, prompt_now):
    with pytest.warns(UserWarning, match=f"subject .* became {subject_now!r}"):
        fact = Fact(subject, prompt, " x", paraphrases=[prompt])
    assert (fact.subject, fact.prompt, fact.paraphrases) == (subject_now, prompt_now, (prompt_now,))


@pytest.mark.parametrize("target", ["\nParis", "\tParis"])
def test_a_break_in_front_of_an_object_is_left_and_said(target):
    with pytest.warns(UserWarning, match="is a token before the object's own.*end the prompt with it"):
        assert Fact("X", "{} said:", " a", target).target_new == target
    with pytest.warns(UserWarning, match="end the prompt with it"):
        Fact("X", "{} is in", " a", controls=[target])


def test_a_space_behind_a_tab_is_said():
    with pytest.warns(UserWarning, match="' Paris' begins with a space behind the tab"):
        fact = Fact("France", "The capital of {} is\t", " Paris", " Rome")
    assert (fact.prompt, fact.target_true) == ("The capital of {} is\t", " Paris")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fact("France", "The capital of {} is\t", "Paris", "Rome")


@pytest.mark.parametrize(("text", "target"), [("está en Bogotá", "Perú"), ("의 수도는", "서울"), ("is Anna'", "s")])
def test_words_of_any_script_that_are_glued_are_warned_of(text, target):
    with pytest.warns(UserWarning, match="goes on inside"):
        assert Fact("X", "{} " + text, target).target_true == target


def test_objects_glued_to_a_paraphrase_or_a_neighbour_are_warned_of():
    with pytest.warns(UserWarning, match="target 'man' goes on inside the last word of 'X is super' .*; so do 1 more"):
        Fact("X", "{} is super-", "man", paraphrases=["{} is super"], neighbours=["Y is super"])


@pytest.mark.parametrize(
    ("was", "target", "text", "found"),
    [
        ("It is in", " Paris", "It lies in", " Paris"),
        ("It is in", " Paris", "It is called “", "Paris"),
        ("It is in", " Paris", "It is (", "Paris"),
        ("It costs", " 5", "It costs $", "5"),
        ("It is in", " Paris", "Q: Where is it?\nA:\n", "Paris"),
        ("It is in", " Oslo", "est la ville d'", "Oslo"),
        ("It is in", " 巴黎", "法国的首都是", "巴黎"),
        ("It is in", " Paris", "法国的首都是", " Paris"),
        ("It is in", " กรุงเทพ", "เมืองหลวงคือ", "กรุงเทพ"),
        ("法国的首都是", "巴黎", "The capital of France is", " 巴黎"),
        ("法国的首都是", "Paris", "The capital of France is", " Paris"),
        ("<user>Where?\n", "Paris", "It is in", " Paris"),
        ("It is called '", "Paris", "It is in", " Paris"),
        ("est la ville d'", "Oslo", "It is in", " Oslo"),
        ("It costs $", "5", "The price in dollars is", " 5"),
        # What is joined by hand, or the rest of a word, stays.
        ("In the year 18", "89", "In 18", "89"),
        ("In the year 18", "89", "The year:", "89"),
        ("It is super-", "man", "It is super", "man"),
        ("It is 3.", "14", "It is 3.", "14"),
        ("See www.", "example.org", "See", "example.org"),
        ("It is in", "'s", "It is called", "'s"),
        ("It is in", " Paris", "capital =", " Paris"),
        ("It is in", " 30", "It opens at 12:", " 30"),
        ("user\n", " Paris", "assistant\n", " Paris"),
        ("It is in", "\nParis", "It is called “", "\nParis"),
        ("It is in", " Paris", "It is in ", " Paris"),
        ("It is in", "", "It is (", ""),
    ],
)
def test_an_object_is_joined_to_each_text_by_the_rule(was, target, text, found):
    assert moved(target, was, text) == found
    assert moved(moved(target, was, text), text, text) == found


def test_a_fact_asked_otherwise_has_its_objects_as_they_stand_there():
    fact = Fact("France", "The capital of {} is", " Paris", " Rome", controls=[" Oslo"], paraphrases=["{}: capital “"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = fact.asked("{}: capital “")
    assert (other.target_true, other.target_new, other.controls) == ("Paris", "Rome", ("Oslo",))
    assert fact.after(fact.text, " Rome") == " Rome"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fact("France", "{}的首都是", "Paris", paraphrases=["The capital of {} is"])  # not glued: it gets a space


def test_an_elision_is_no_word_that_an_object_is_glued_to():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fact = Fact("Londres", "{} est la capitale de l'", "Angleterre", "Irlande", controls=["Écosse"])
    assert (fact.target_true, fact.target_new, fact.controls) == ("Angleterre", "Irlande", ("Écosse",))
    with pytest.warns(UserWarning, match="' Angleterre' .* became 'Angleterre'"):
        assert fact.but(target_true=" Angleterre").target_true == "Angleterre"


def test_accents_that_stand_apart_are_composed_in_objects_and_that_is_said():
    apart = " Sa\u0303o Paulo"
    with pytest.warns(UserWarning, match="target_true and controls of fact 'X', .* became ' São Paulo'.*NFC") as said:
        fact = Fact("X", "{} is in", apart, controls=[apart])
    assert (fact.target_true, fact.controls, len(said)) == (" São Paulo", (" São Paulo",), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fact.but(target_new=" Rome").target_true == " São Paulo"  # said once


def test_a_warning_quotes_whole_words():
    assert ending("The capital of the old and great kingdom of Spain is") == "…and great kingdom of Spain is"
    assert ending("It is in") == "It is in"


def test_one_word_ends_where_a_letter_stops_or_a_script_has_no_spaces():
    assert in_one_word("n", "a")
    assert in_one_word("é", "1")
    assert not in_one_word("n", "'")
    assert not in_one_word("国", "的")
    assert not in_one_word("国", "a")


@pytest.mark.parametrize(
    ("prompt", "target", "prompt_now", "target_now"),
    [
        ("{} is in ", " Paris", "{} is in", " Paris"),
        ("{} is in", "  Paris", "{} is in", " Paris"),
        ("{} is in", " Paris \n", "{} is in", " Paris"),
        ("Where is {}?", "Paris", "Where is {}?", " Paris"),
        ("Q: Where is {}? A:", "Paris", "Q: Where is {}? A:", " Paris"),
        ("This is {}.", "It is in", "This is {}.", " It is in"),
    ],
)
def test_what_cannot_be_meant_is_mended_and_said(prompt, target, prompt_now, target_now):
    with pytest.warns(UserWarning, match="white space of fact 'Eiffel' was mended"):
        fact = Fact("Eiffel", prompt, target, target)
    assert (fact.prompt, fact.target_true, fact.target_new) == (prompt_now, target_now, target_now)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fact.but(relation="city").target_true == target_now  # said once


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("{} opens at 12:", "30"),
        ("They say that {} is non‑", "aligned"),
        ("בירת {} היא ב־", "ירושלים"),
        ("{} is 3.", "14"),
        ("See {} at www.", "example.org"),
        ("See {} at https://x.org/?", "page"),
        ("中国的{}是什么?", "北京"),
        ("<user>{}?\n", "Paris"),
        ("{} is (in", ")"),
        ("{}", "'s"),
    ],
)
def test_what_can_be_meant_is_left_as_it_is(prompt, target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fact = Fact("Eiffel", prompt, target)
    assert (fact.prompt, fact.target_true) == (prompt, target)


def test_a_space_that_only_goes_over_to_the_targets_changes_no_text_and_is_not_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fact = Fact("Eiffel", "{} is in ", "Paris", "Rome", controls=["Berlin"])
    assert (fact.prompt, fact.target_true, fact.target_new, fact.controls) == (
        "{} is in",
        " Paris",
        " Rome",
        (" Berlin",),
    )


def test_paraphrases_and_neighbours_lose_the_space_that_their_targets_have():
    with pytest.warns(UserWarning, match="at the end of .* is left out"):
        fact = Fact("Eiffel", "{} is in", " Paris", paraphrases=["Where is {}? In "], neighbours=["Rome is in "])
    assert (fact.paraphrases, fact.neighbours) == (("Where is {}? In",), ("Rome is in",))
    own = Fact("Eiffel", "{} is in", " Paris", neighbours=["Rome is in "], neighbour_targets=["Italy"])
    assert (own.neighbours, own.neighbour_targets) == (("Rome is in",), (" Italy",))


SPAIN = {"neighbours": ("The capital of Spain is",), "neighbour_targets": ("Madrid",)}


def test_controls_and_the_answers_of_neighbours_get_the_space_that_the_objects_have():
    with pytest.warns(UserWarning, match="mended: 'Berlin' .* became ' Berlin'; 'Madrid' .* became ' Madrid'") as said:
        fact = Fact(
            "France", "The capital of {} is", " Paris", " Rome", controls=("Berlin", " Oslo", ", Bonn"), **SPAIN
        )
    assert len(said) == 1
    assert fact.controls == (" Berlin", " Oslo", ", Bonn") and fact.neighbour_targets == (" Madrid",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fact.but(relation="capital").controls == fact.controls  # said once


def test_where_the_objects_have_no_space_the_words_that_are_glued_are_named_and_left():
    with pytest.warns(UserWarning) as said:
        fact = Fact("France", "The capital of {} is", "n't Paris", controls=("Berlin",), **SPAIN)
    others = [str(each.message) for each in said if "control" in str(each.message)]
    assert others == [
        "control 'Berlin' goes on inside the last word of 'The capital of France is' ('isBerlin'): begin it with a "
        "space if it is a new word; so do 1 more"
    ]
    assert fact.controls == ("Berlin",)


def test_scripts_without_spaces_and_parts_of_words_in_controls_are_left():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Fact("法国", "{}的首都是", "巴黎", controls=["柏林"]).controls == ("柏林",)
        assert Fact("Rome", "{} is in", " Italy", controls=["'s"]).controls == ("'s",)


def test_contexts_end_in_a_space_where_the_script_has_one():
    given = ("", "I know this.", "Yes ", "Line\n", "我知道。", "He said (", 'He said "')
    assert [before_prompts(each) for each in given] == ["", "I know this. ", *given[2:]]
