"""Bars tell of steps and not only of whole facts, come to their end, and say when there is no more to come."""

import laws
import pytest
import tiny

import tl_factedit as fe
from tl_factedit.editing import values
from tl_factedit.stats import collect


class Bar:
    """Records what a bar of tqdm is told."""

    made: list["Bar"]

    def __init__(self, *, total, unit, disable, **_):
        self.total, self.unit, self.disable, self.n, self.ticks, self.said = total, unit, disable, 0, [], ""
        Bar.made.append(self)

    def update(self, count=1):
        self.n += count
        self.ticks.append(count)

    def set_postfix_str(self, text):
        self.said = text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def bars(monkeypatch):
    Bar.made = []
    for module in (values, collect):
        monkeypatch.setattr(module, "tqdm", Bar)
    return Bar.made


@pytest.mark.parametrize("stop_below", [0.0, 1e3], ids=["all steps", "stops at once"])
def test_fitting_a_value_ticks_its_steps(kind, bars, stop_below):
    model = tiny.model(kind, "gpt2")
    fit = fe.ValueFit(steps=6, stop_below=stop_below)
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=fit, contexts=(), progress=True)
    edits = editor.each(model, [laws.FACT, laws.OTHER])
    (bar,) = bars
    assert (bar.unit, bar.total, bar.n) == ("step", 12, 12)
    made = sum(len(edit.fits[0]["losses"]) for edit in edits)
    assert made == (12 if stop_below == 0 else 2)
    # Together where pieces of many facts can be packed, and otherwise one by one.
    together, alone = ([2] * 6 + [0], ([1] * 6 + [0]) * 2) if stop_below == 0 else ([2, 10], [1, 5] * 2)
    assert bar.ticks in (together, alone)


def test_a_collection_whose_texts_run_out_ends_its_bar_and_says_so(kind, bars):
    model = tiny.model(kind, "gpt2")
    with pytest.warns(UserWarning, match=r"the texts ended after \d+ of the 100,000 tokens"):
        stats = fe.key_stats(model, [1], laws.texts(5), n_tokens=100_000)
    (bar,) = bars
    assert bar.n == bar.total == stats[1].n_tokens
    assert bar.said == "the texts ended, 100,000 were asked for"


def test_a_collection_of_enough_texts_says_nothing(kind, bars):
    model = tiny.model(kind, "gpt2")
    fe.key_stats(model, [1], laws.texts(50), n_tokens=100)
    (bar,) = bars
    assert (bar.total, bar.n, bar.said) == (100, 100, "")
