"""The page on the command line: its examples run on the organism as they stand, and the others can be read."""

import re
import shlex
from pathlib import Path

import pytest

from tl_factedit.cli import program

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


COMMANDS = [shlex.split(line)[1:] for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]


def test_the_page_shows_every_command():
    assert {words[0] for words in COMMANDS} == {"trace", "edit", "audit", "report"}


def test_the_examples_run_in_the_order_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (facts,) = blocks("json")
    Path("facts.json").write_text(facts)
    here = [words for words in COMMANDS if "organism" in words]
    assert len(here) > len(COMMANDS) / 2
    for words in here:
        status = program.main(words)
        assert status == 0, (words, capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("facts.json", "edit.safetensors", "verdict.safetensors", "report.html")
    }


@pytest.mark.parametrize("words", [words for words in COMMANDS if "organism" not in words], ids=" ".join)
def test_the_other_examples_have_options_that_there_are(words, monkeypatch):
    def load(*_):
        raise KeyboardInterrupt  # all that needs no model was checked by then

    monkeypatch.setattr("tl_factedit.models.load", load)
    assert program.main(words) == 130
