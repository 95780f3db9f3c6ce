"""The picture of a redundancy has its own numbers, each once, and says what it can't draw."""

import math
import re

import pytest
import torch
from test_show import FACT, Page, fetched, unchecked

from tl_factedit import show
from tl_factedit.attacks import Cell, Redundancy
from tl_factedit.attacks.cells import in_order, singles_of
from tl_factedit.show.heat_map import Scale
from tl_factedit.show.line_chart import Line, line_chart

LAYERS = 4
SET = (Cell("mlp", 1, "subject"), Cell("attn", 3, "last"))
GREEDY = (Cell("attn", 2, "all"), Cell("mlp", 0, "all"), Cell("mlp", 1, "all"))


def redundancy(*, widths=(1, 2), others=(SET,), support=GREEDY[1:], known=8, lost=None) -> Redundancy:
    """Ten facts, of which some are known; `lost` of the known ones without each set (by its place), else none."""
    silenced = [*singles_of(LAYERS, ("mlp", "attn"), ("subject", "all"), widths), *map(in_order, others)]
    knows = torch.arange(10) < known
    named = torch.full((10, len(silenced)), math.nan)
    named[knows] = 1.0
    for i, count in (lost or {}).items():
        named[:count, i] = 0.0
    facts = tuple(FACT.but(subject=f"Person {i}") for i in range(10))
    shares = (0.9, 0.4, 0.05)
    return Redundancy(facts, knows, tuple(silenced), named, support, tuple(zip(GREEDY, shares, strict=True)))


def told(page: Page) -> dict[str, float]:
    """What each tooltip of a heat map says is lost, by the cells."""
    found = [
        re.match(r"without (.*) ([\d.]+) \[.*\] of the facts", data) for name, data in page.texts if name == "title"
    ]
    return {m[1]: float(m[2]) for m in found if m}


def test_each_cell_has_its_own_number_and_colour_and_the_costliest_is_framed():
    found = redundancy(lost={0: 2, 5: 6, 7: 1})
    page = Page(show.redundancy(found).html)
    assert fetched(page) == []
    numbers = told(page)
    drawn = [cells for cells in found.silenced if cells != SET]
    assert len(numbers) == len(drawn) == len(page.all("rect", class_="cell")) == 4 * (4 + 3)
    assert numbers["MLP of layer 0 at the subject"] == 0.25  # 2 of the 8 that are known
    assert numbers["MLPs of layers 1 to 2 at the subject"] == 0.75
    assert sum(numbers.values()) == pytest.approx(0.25 + 0.75 + 0.12, abs=0.011)
    colours = [rect["fill"] for rect in page.all("rect", class_="cell")]
    scale = Scale(0.0, 1.0, "orange")
    for share, count in ((0.25, 1), (0.75, 1), (0.125, 1), (0.0, 25)):
        assert colours.count(scale.colour(share)) == count
    words = page.words()
    assert "knows 8 of 10 facts" in words
    assert "Framed: without MLP of layer 0 at the subject 25% are lost, which is the most." in words
    assert "Framed: without MLPs of layers 1 to 2 at the subject 75% are lost" in words
    tips = page.words("title")
    assert "0.75" in tips and tips.count("can't be spared") == 1


def test_ties_are_told_and_where_nothing_is_lost_nothing_is_framed():
    page = Page(show.redundancy(redundancy(widths=(1,), lost={0: 4, 3: 4, 9: 4})).html)
    assert "50% are lost, which is the most (as many without 2 others)" in page.words()
    assert "can't be spared" not in page.words("title")  # a half still is
    page = Page(show.redundancy(redundancy(widths=(1,))).html)
    assert "No fact is lost without any of them." in page.words()
    assert not page.all("rect", **{"stroke": "#000", "stroke-width": "1.6"})


def test_the_curve_has_its_cells_in_order_and_says_what_was_pruned():
    page = Page(show.redundancy(redundancy()).html)
    words = page.words()
    assert re.search(r"1 attention of layer 2 from the subject on 0.90 no: pruned .*2 MLP of layer 0", words)
    assert "leave 10% or less: MLPs of layers 0 to 1 from the subject on" in words
    assert "3. MLP of layer 1 from the subject on: 0.05 still named" in page.words("title")
    none = Page(show.redundancy(redundancy(support=None)).html).words()
    assert "3 cells weren't enough: no support was found" in none and "pruned" not in none


def test_other_sets_are_drawn_with_their_intervals():
    last = len(redundancy().silenced) - 1
    page = Page(show.redundancy(redundancy(lost={last: 2})).html)
    (tip,) = (
        data for name, data in page.texts if name == "title" and data.startswith("MLP of layer 1 at the subject and")
    )
    low, high = (float(x) for x in re.search(r"0\.250 \[([\d.]+), ([\d.]+)\]", tip).groups())
    assert low < 0.25 < high <= 1
    assert "Sets that were asked for" not in Page(show.redundancy(redundancy(others=())).html).words()


def test_what_has_no_numbers_is_said():
    page = Page(show.redundancy(redundancy(known=0)).html)
    assert "The model knows none of the 10 facts" in page.words() and not page.all("rect", class_="cell")
    with pytest.raises(TypeError, match=r"facts can't be shown here, needed a Redundancy: found = fe\.attacks\.redund"):
        unchecked(show.redundancy)(FACT)


def test_a_report_holds_it(tmp_path):
    text = show.report(tmp_path / "report.html", redundancy()).read_text()
    assert "What the unedited model can spare" in Page(text).words()


def test_an_axis_that_counts_has_no_marks_between_whole_numbers():
    line = [Line("x", [0.0, 1.0], [1.0, 0.0])]
    given = {"title": "t", "x_label": "cells", "y_label": "share", "y_range": (0.0, 1.0)}
    marks = [Page(line_chart(line, whole=whole, **given)).words("text").count("0.2") for whole in (False, True)]
    assert marks == [2, 1]  # of both axes, and of the vertical one alone
