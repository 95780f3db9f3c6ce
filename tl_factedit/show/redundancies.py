"""A picture of what the unedited model can spare, and of the cells that some facts rest on."""

from __future__ import annotations

from collections.abc import Mapping

from tl_factedit.attacks.attack import SURVIVES
from tl_factedit.attacks.cells import COMPONENTS, PLACES, Cell, Cells, describe
from tl_factedit.attacks.redundancies import KILLED, Redundancy
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.words import counted
from tl_factedit.show.charts import NAMES, WHERE
from tl_factedit.show.heat_map import Scale, heat_map
from tl_factedit.show.interval_chart import Interval, interval_chart
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.line_chart import Line, Rule, line_chart
from tl_factedit.show.markup import Html, join, number, rows, tag
from tl_factedit.show.page import Picture

HUE = "orange"
Window = tuple[str, str, int, int]
"""Component, place, first layer, number of layers."""


@plain_torch()
def redundancy(found: Redundancy) -> Picture:
    """What a model can spare: the share of facts lost without each component at each place, and the support's curve.

    Args:
        found: From ``fe.attacks.redundancy``.

    Raises:
        TypeError: What is given isn't a `Redundancy`.

    Example:
        >>> found = fe.attacks.redundancy(model, facts, reference)      # doctest: +SKIP
        >>> fe.show.redundancy(found)                                   # doctest: +SKIP
    """
    check_kind(found, Redundancy, "found = fe.attacks.redundancy(model, facts, reference)")
    return Picture("What the unedited model can spare", redundancy_chart(found), ())


def redundancy_chart(found: Redundancy) -> Html:
    """The same as figures: a heat map for each width of windows, the other sets, and the support's curve."""
    known = int(found.known.sum())
    if not known:
        return tag("p", f"The model knows none of the {counted(len(found.facts), 'fact')}: nothing can be lost.")
    windows = {window: cells for cells in found.silenced if (window := _window(cells)) is not None}
    widths = sorted({width for *_, width in windows})
    parts = [_map(found, windows, width) for width in widths]
    others = [cells for cells in found.silenced if _window(cells) is None]
    if others:
        parts.append(_sets(found, others))
    if found.curve:
        parts.append(_curve(found))
    return join(
        tag(
            "p",
            f"What a component says is replaced by what it says of other subjects, in the unedited model, which knows "
            f"{known} of {counted(len(found.facts), 'fact')}; lost are those it no longer names. A change that writes "
            f"nowhere but in cells without which {1 - SURVIVES:.0%} or less are lost can at best be INSERTED "
            "(elsewhere), whatever it writes.",
        ),
        *parts,
    )


def _map(found: Redundancy, windows: Mapping[Window, Cells], width: int) -> Html:
    """The share of facts that is lost, by component, place and first layer."""
    asked = [(c, p) for c in COMPONENTS for p in PLACES if any(w[:2] == (c, p) and w[3] == width for w in windows)]
    layers = list(range(1 + max(first for *_, first, wide in windows if wide == width)))
    table: list[list[float]] = []
    told: list[list[str]] = []
    for component, place in asked:
        of_row = [windows.get((component, place, first, width)) for first in layers]
        spared = [None if cells is None else found.spared(cells) for cells in of_row]
        table.append([float("nan") if each is None else 1 - each.mean for each in spared])
        told.append([_told(cells, each) for cells, each in zip(of_row, spared, strict=True)])
    costs = [(value, i, j) for i, row in enumerate(table) for j, value in enumerate(row) if value == value]
    worst, i, j = max(costs, key=lambda cost: cost[0])
    alike = sum(cost == worst for cost, *_ in costs) - 1
    ties = f" (as many without {counted(alike, 'other')})" if alike else ""
    drawing = heat_map(
        table,
        scale=Scale(0.0, 1.0, HUE),
        labels=[f"{NAMES[component]}, {WHERE[place]}" for component, place in asked],
        tooltips=told,
        neutral=[False] * len(asked),
        strong=[False] * len(asked),
        outlined=(i, j) if worst > 0 else None,
        x_label="layer silenced" if width == 1 else f"first of the {width} layers silenced",
        unit="share of facts lost",
        name=f"Facts lost with {'one layer' if width == 1 else f'{width} neighbouring layers'} silenced",
    )
    heading = "One component silenced" if width == 1 else f"One component of {width} neighbouring layers silenced"
    caption = (
        f"White: no fact is lost. Framed: without {describe(windows[(*asked[i], layers[j], width)])} {worst:.0%} are "
        f"lost, which is the most{ties}. A pointer shows each number."
        if worst > 0
        else "No fact is lost without any of them."
    )
    return join(tag("h4", heading), tag("figure", drawing, tag("figcaption", caption)))


def _sets(found: Redundancy, sets: list[Cells]) -> Html:
    """The sets that were asked for, with their intervals."""
    shares = [(describe(cells), found.spared(cells)) for cells in sets]
    chart = interval_chart(
        [Interval(label, 1 - each.mean, 1 - each.high, 1 - each.low) for label, each in shares],
        title="Facts lost without the sets that were asked for",
        x_label="share of facts lost (95 % intervals)",
        rule=1 - SURVIVES,
        rule_label="up to here it can be spared",
        width=720.0,
    )
    return join(tag("h4", "Sets that were asked for"), tag("figure", chart))


def _curve(found: Redundancy) -> Html:
    """The share of facts that is still named as cells are silenced one after the other, and their order."""
    shares = [1.0, *(share for _, share in found.curve)]
    steps = [float(i) for i in range(len(shares))]
    chart = line_chart(
        [Line("cells silenced", steps, shares, width=2.2)],
        title="Facts still named as cells are silenced, one after the other",
        x_label="cells silenced from the subject on",
        y_label="share of facts still named",
        y_range=(-0.03, 1.03),
        rules=[Rule(KILLED, "y", "where the facts count as gone")],
        dots=[
            (float(i), share, f"{i}. {describe([cell])}: {number(share, 2)} still named")
            for i, (cell, share) in enumerate(found.curve, 1)
        ],
        whole=True,
        width=480.0,
        height=250.0,
    )
    needed = found.support or ()
    order = [
        [
            tag("td", str(i), class_="n"),
            tag("td", describe([cell])),
            tag("td", number(share, 2), class_="n"),
            tag("td", "" if found.support is None else "yes" if cell in needed else "no: pruned"),
        ]
        for i, (cell, share) in enumerate(found.curve, 1)
    ]
    heads = ["", "silenced as well", "still named", "" if found.support is None else "in the support"]
    caption = (
        f"Each step silences the cell that costs most. {counted(len(found.curve), 'cell')} weren't enough: no support "
        f"was found that leaves {KILLED:.0%} of the facts or less."
        if found.support is None
        else f"Each step silences the cell that costs most. Support, the fewest found that leave {KILLED:.0%} or less: "
        f"{describe(found.support)}. To change what the facts rest on, a change has to reach these."
    )
    return join(
        tag("h4", "What the facts rest on"),
        tag("figure", chart, tag("figcaption", caption)),
        tag("table", tag("thead", rows([heads], "th")), tag("tbody", rows(order))),
    )


def _window(cells: Cells) -> Window | None:
    """What a set is, if it is one component at one place in neighbouring layers."""
    first = cells[0]
    run = tuple(Cell(first.component, first.layer + i, first.place) for i in range(len(cells)))
    return (first.component, first.place, first.layer, len(cells)) if cells == run else None


def _told(cells: Cells | None, spared: Estimate | None) -> str:
    if cells is None or spared is None:
        return "not asked"
    ends = f" [{number(1 - spared.high, 2)}, {number(1 - spared.low, 2)}]" if spared.n > 1 else ""
    at_best = "can be spared" if spared.mean >= SURVIVES else "can't be spared"
    return f"without {describe(cells)} {number(1 - spared.mean, 2)}{ends} of the facts are lost: {at_best}"
