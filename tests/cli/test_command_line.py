"""The command line: each command does what its call does, prints one object where one is asked for, and teaches."""

import functools
import json
import sys
from pathlib import Path

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.cli import program
from tl_factedit.cli.editors import NAMES, WITHOUT_STATISTICS, with_settings
from tl_factedit.cli.output import Output, say

(PERSON,) = fe.models.organism_facts("city", "oracle0", 1)
ROME = ("--layer", "1", "--stats", "identity", "--set", "fit.steps=6")


@pytest.fixture
def tiny_model(kind, monkeypatch):
    """What ``--model tiny`` is for the length of a test."""
    model = tiny.model(kind, "gpt2")

    def load(name, asked):
        assert (name, asked) == ("tiny", kind)
        sys.stdout.write("a library that prints while it works\n")
        return model

    monkeypatch.setattr(fe.models, "load", load)
    return model


@pytest.fixture
def tl_factedit(capsys, kind):
    """Run the program; its status, stdout and stderr."""

    def run(command, *words, model="tiny"):
        status = program.main([command, "--quiet", "--model", model, "--kind", kind, *map(str, words)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def facts(tmp_path):
    """A file of two facts."""
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([laws.FACT.to_dict(), laws.OTHER.to_dict()]))
    return file


def words(fact):
    return ("--subject", fact.subject, "--prompt", fact.prompt, "--old", fact.target_true, "--new", fact.target_new)


# ------------------------------------------------------------------------------------------------ each command


def test_trace_prints_and_saves_what_causal_trace_gives(tiny_model, tl_factedit, tmp_path):
    out = tmp_path / "trace.safetensors"
    status, stdout, stderr = tl_factedit("trace", *words(laws.FACT), "--samples", "2", "--json", "--out", out)
    found = json.loads(stdout)
    trace = fe.causal_trace(tiny_model, fe.Fact(*_four(laws.FACT)), corruption=fe.GaussianNoise(samples=2))
    assert status == 0 and found["command"] == "trace" and found["tl_factedit"] == fe.__version__
    assert found["peak_layer"] == trace.peak_layer and found["out"] == str(out)
    assert torch.equal(torch.tensor(found["trace"]["effect"]), trace.effect)
    assert torch.equal(fe.Trace.load(out).effect, trace.effect)
    assert "a library that prints" in stderr  # and not on stdout, where one object stands


def _four(fact):
    return fact.subject, fact.prompt, fact.target_true, fact.target_new


def test_trace_says_the_largest_effects_in_words(tiny_model, tl_factedit, facts):
    assert "'Tower'  largest effect" in tl_factedit("trace", "--facts", facts, "--first", "1", "--samples", "1")[1]
    assert "last subject  largest effect" in tl_factedit("trace", "--fact", facts, "--samples", "1")[1]


def test_from_an_edit_to_a_report_on_a_model_that_knows_the_fact(kind, tl_factedit, tmp_path):
    people, saved = tmp_path / "people.json", tmp_path / "edit.safetensors"
    people.write_text(json.dumps([PERSON.to_dict()]))

    status, stdout, stderr = tl_factedit("edit", "--facts", people, *ROME, "--out", saved, "--json", model="organism")
    made = json.loads(stdout)
    assert status == 0 and made["before"]["p_new"]["mean"] < 0.01 and made["after"]["p_new"]["mean"] > 0.9
    assert made["edit"]["layers"] == [1] and made["edit"]["editor"]["name"] == "Rome"
    assert made["edit"]["digest"] == fe.Edit.load(saved).digest
    assert "The identity stands in place of C" in stderr

    status, stdout, _ = tl_factedit(
        "audit", "--edit", saved, "--json", "--out", tmp_path / "verdict.safetensors", model="organism"
    )
    audited = json.loads(stdout)
    verdict = fe.Verdict.load(tmp_path / "verdict.safetensors")
    assert status == 0 and audited["label"] == verdict.label == audited["verdict"]["label"]
    assert audited["explanation"] == verdict.explain() and verdict.facts == (PERSON,)

    status, stdout, _ = tl_factedit("report", "--edit", saved, "--out", tmp_path / "r.html", model="organism")
    page = (tmp_path / "r.html").read_text()
    assert status == 0 and stdout.rstrip().endswith("(opens in any browser, offline)")
    assert all(heading in page for heading in ("Locate", "What the edit changed", "Where the edit fires", "Audit"))


@pytest.mark.parametrize("name", NAMES)
def test_every_editor_is_had_by_its_name(name, tiny_model, tl_factedit, tmp_path):
    kept = tmp_path / "stats.safetensors"
    fe.key_stats(tiny_model, [1, 2], laws.texts(150), n_tokens=laws.WANTED, path=kept, progress=False)
    stats = () if name in WITHOUT_STATISTICS else ("--stats", kept, "--set", "fit.steps=1")
    layers = ("--layer", "1") if name == "rome" else ("--layer", "1", "2")
    before = [p.detach().clone() for p in tiny_model.parameters()]
    out = tmp_path / "edit.safetensors"
    done = tl_factedit("edit", *words(laws.FACT), "--editor", name, *layers, *stats, "--out", out, "--json")
    assert done[0] == 0, done[2]
    assert set(fe.Edit.load(out).layers) <= {1, 2}
    assert json.loads(done[1])["edit"]["editor"]["name"].lower() == name.replace("-", "")
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))


def test_several_edits_are_audited_each_alone(tiny_model, tl_factedit, facts, tmp_path):
    saved = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for name, out in zip((laws.FACT.subject, laws.OTHER.subject), saved, strict=True):
        assert tl_factedit("edit", "--facts", facts, "--id", name, *ROME, "--out", out)[0] == 0
    found = json.loads(tl_factedit("audit", "--edit", *saved, "--json")[1])
    assert [fact["subject"] for fact in found["verdict"]["facts"]] == [laws.FACT.subject, laws.OTHER.subject]


def test_statistics_are_collected_once_and_kept(tiny_model, tl_factedit, tmp_path):
    texts, stats, out = tmp_path / "texts.txt", tmp_path / "stats.safetensors", tmp_path / "edit.safetensors"
    texts.write_text("\n\n".join([tiny.TEXT] * 9))
    given = ("edit", *words(laws.FACT), "--layer", "1", "--stats", stats, "--set", "ridge=0.1", "--set", "fit.steps=1")
    assert tl_factedit(*given, "--out", out)[0] == 2  # not there, and nothing to make it of
    done = tl_factedit(*given, "--out", out, "--stats-texts", texts, "--stats-tokens", "900")
    assert done[0] == 0, done[2]
    kept = fe.KeyStats.load(stats)
    assert (kept.layer, kept.n_tokens) == (1, 900)
    first = fe.Edit.load(out)
    assert tl_factedit(*given, "--out", out)[0] == 0
    assert fe.Edit.load(out).digest == first.digest
    identity = (*given[:-6], "--stats", "identity", "--set", "fit.steps=1", "--out", out)
    assert tl_factedit(*identity)[0] == 0
    assert fe.Edit.load(out).digest != first.digest


# ------------------------------------------------------------------------------------------------ what is refused

EDIT = ("edit", "--out", "e.safetensors")


@pytest.fixture
def no_model(monkeypatch):
    """No model can be loaded for the length of a test."""

    def load(name, kind):
        raise AssertionError(f"{name} ({kind}) was loaded")

    monkeypatch.setattr(fe.models, "load", load)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("audit", "--edit", "EDIT", "--texts", "nowhere"), "no such file of texts: nowhere"),
        (("audit", "--edit", "EDIT", "--reference", "nowhere.json"), "nowhere.json"),
        (("report", *words(laws.FACT), *ROME, "--texts", "nowhere"), "no such file of texts: nowhere"),
        (("trace", *words(laws.FACT), "--samples", "0"), "samples"),
        (("trace", "--facts", "UNNAMED"), "among 'who', 'prompt', 'answer': rename one of them in the file"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_cant_be_done_is_told_before_a_model_is_loaded(given, told, no_model, tl_factedit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "UNNAMED").write_text('[{"who": "Rome", "prompt": "Rome is in", "answer": "Italy"}]')
    model = tiny.model(tiny.ONE_KIND[0], "gpt2")
    laws.rome(model, ridge=1e-2)(model, [laws.FACT]).save(tmp_path / "EDIT")
    status, stdout, stderr = tl_factedit(*given)
    assert (status, stdout) == (2, "") and told in stderr


def test_a_fact_in_words_is_called_by_its_subject_and_its_objects_by_their_options(tiny_model, tl_factedit, tmp_path):
    one = laws.FACT
    status, _, stderr = tl_factedit("trace", "--subject", one.subject, "--prompt", one.prompt, "--new", "Rome")
    assert status == 2 and "fact 'The Eiffel Tower' has no target_true" in stderr
    assert "give --old, or the column target_true of the file" in stderr and "fact.but" not in stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("trace",), "no facts are given, needed --facts FILE, or one fact in words: --subject"),
        (("trace", "--subject", "Rome"), "a fact in words has no --prompt"),
        (("trace", "--facts", "nowhere.json"), "nowhere.json"),
        (("trace", "--facts", "FACTS", "--subject", "Rome"), "--facts and --subject are both given"),
        (
            ("trace", "--facts", "FACTS", "--id", "Nobody"),
            "no fact has the id or subject 'Nobody'; there are 'The Eiffel",
        ),
        (("trace", "--facts", "FACTS", "--first", "0"), "--first is 0, needed 1 or more"),
        (("trace", *words(laws.FACT), "--first", "1"), "--id and --first choose from a file"),
        (("trace", *words(laws.FACT), "--out", "."), "--out . is a folder, needed the name of a file"),
        (("trace", *words(laws.FACT), "--out", "FACTS/trace"), "is a file, needed a folder"),
        ((*EDIT, "--facts", "FACTS", *ROME), "rome writes one fact, and 2 are given"),
        ((*EDIT, *words(laws.FACT), "--stats", "identity"), "rome needs --layer"),
        ((*EDIT, *words(laws.FACT), "--layer", "1"), "no statistics are given, needed one of: --stats FILE"),
        ((*EDIT, *words(laws.FACT), "--layer", "1", "2"), "rome writes one layer, and --layer names 2"),
        ((*EDIT, *words(laws.FACT), *ROME, "--stats-texts", "t"), "--stats identity takes no --stats-texts"),
        ((*EDIT, *words(laws.FACT), *ROME, "--stats-tokens", "9"), "which isn't given"),
        ((*EDIT, *words(laws.FACT), "--layer", "1", "--stats", "nowhere"), "no such file of statistics: nowhere"),
        ((*EDIT, *words(laws.FACT), "--layer", "1", "--stats-texts", "nowhere"), "no such file of texts: nowhere"),
        ((*EDIT, *words(laws.FACT), "--editor", "finetune", *ROME), "finetune takes no statistics: leave --stats out"),
        ((*EDIT, *words(laws.FACT), *ROME, "--set", "depth=3"), "Rome has no setting 'depth'"),
        ((*EDIT, *words(laws.FACT), *ROME, "--set", "ridge"), "has no '=', needed NAME=VALUE"),
        ((*EDIT, *words(laws.FACT), "--layer", "9", "--stats", "identity"), "layer 9"),
        (("audit", "--edit", "nowhere.safetensors"), "nowhere.safetensors doesn't exist"),
        (("audit", "--edit", "FACTS"), "is cut short or no safetensors file"),
        (("report", *words(laws.FACT), "--layer", "1"), "no statistics are given"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_cant_be_done_is_told_without_a_traceback(
    given, told, tiny_model, tl_factedit, facts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = tl_factedit(*(each.replace("FACTS", str(facts)) for each in given))
    assert (status, stdout) == (2, "")
    assert told in stderr and "Traceback" not in stderr
    assert f"tl-factedit {given[0]}: error: " in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_debug_lets_the_error_through(tl_factedit):
    with pytest.raises(ValueError, match="no facts are given"):
        tl_factedit("trace", "--debug")


@pytest.mark.parametrize("given", [[], ["nothing"], ["trace"], ["edit", "--model", "x"], ["trace", "--sub", "x"]])
def test_options_that_cant_be_read_are_said_with_the_usage(given, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: tl-factedit")


@pytest.mark.parametrize("command", ["trace", "edit", "audit", "report"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main([command, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_an_interrupt_ends_it_without_a_traceback(tl_factedit, monkeypatch):
    def load(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fe.models, "load", load)
    assert tl_factedit("trace", *words(laws.FACT)) == (130, "", "interrupted\n")


def test_a_hub_model_that_cant_be_had_is_told(capsys):
    assert program.main(["trace", "--model", "no-such-model-anywhere", *words(laws.FACT)]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and "'no-such-model-anywhere' could not be had from the model hub" in stderr


# ------------------------------------------------------------------------------------------------ small parts


def test_json_says_null_where_a_number_isnt_finite():
    data = {"a": float("nan"), "b": [1.5, float("inf"), (float("-inf"),)], "c": {"d": True}}
    found = json.loads(Output("", data).as_json("trace"))
    assert (found["a"], found["b"], found["c"]) == (None, [1.5, None, [None]], {"d": True})


def test_settings_are_those_of_the_editor_and_of_its_fit():
    editor = with_settings(functools.partial(fe.FineTune, 1), ["epsilon=0.5", "steps=3"])
    assert editor == fe.FineTune(1, epsilon=0.5, steps=3)
    router = with_settings(functools.partial(fe.Router, 1), ["fit.steps=4", "fit.lr=0.25"])
    assert router.fit == fe.ValueFit(steps=4, lr=0.25)


def test_a_setting_takes_the_place_of_what_the_editor_would_choose_without_it():
    stats = {1: fe.KeyStats(1, torch.eye(4).double(), 0, "identity", None)}
    editor = with_settings(functools.partial(fe.Memit, stats), ["unmet=0.1"])
    assert (editor.weight, editor.unmet) == (None, 0.1)


def test_a_text_is_printed_whatever_the_terminal_can_show(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        say("Paris → Rome", result=True)
    assert (tmp_path / "out").read_text() == "Paris ? Rome\n"


def test_python_m_runs_the_same_program():
    from tl_factedit import __main__ as module

    assert module.main is program.main
    assert Path(module.__file__).name == "__main__.py" and "tl_factedit.__main__" in sys.modules
