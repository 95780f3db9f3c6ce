"""Numbers to SVG: a heat map and a line chart. Nothing here knows a model, a fact or an edit.

Colours are ColorBrewer's single-hue ramps for heat maps (as in Meng et al. 2022: purple for the
residual stream, green for MLPs, red for attention), in pairs that stay apart for colour-blind
readers, and Okabe and Ito's for lines. Zero is white on both sides, and one unit of effect has the
same depth of colour on either side, so a colour never means more than its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from tl_factedit.show.markup import Html, clip, columns, join, number, tag

RAMPS = {
    "purple": (
        "#ffffff",
        "#efedf5",
        "#dadaeb",
        "#bcbddc",
        "#9e9ac8",
        "#807dba",
        "#6a51a3",
        "#54278f",
        "#3f007d",
    ),
    "green": (
        "#ffffff",
        "#e5f5e0",
        "#c7e9c0",
        "#a1d99b",
        "#74c476",
        "#41ab5d",
        "#238b45",
        "#006d2c",
        "#00441b",
    ),
    "red": (
        "#ffffff",
        "#fee0d2",
        "#fcbba1",
        "#fc9272",
        "#fb6a4a",
        "#ef3b2c",
        "#cb181d",
        "#a50f15",
        "#67000d",
    ),
    "orange": (
        "#ffffff",
        "#fee6ce",
        "#fdd0a2",
        "#fdae6b",
        "#fd8d3c",
        "#f16913",
        "#d94801",
        "#a63603",
        "#7f2704",
    ),
    "blue": (
        "#ffffff",
        "#deebf7",
        "#c6dbef",
        "#9ecae1",
        "#6baed6",
        "#4292c6",
        "#2171b5",
        "#08519c",
        "#08306b",
    ),
}
OPPOSITE = {"purple": "orange", "green": "purple", "red": "blue", "blue": "orange"}
OLD, NEW, INK, FAINT, NEUTRAL = "#0072b2", "#d55e00", "#1b1b1f", "#6b6b76", "#e4e4e8"

_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"


@dataclass(frozen=True)
class Scale:
    """Colours for numbers, centred on 0.

    Attributes:
        low: Smallest number, or 0 if none is negative.
        high: Largest number, or 0 if none is positive.
        hue: Of positive numbers, in `RAMPS`; negative ones get its `OPPOSITE`.
    """

    low: float
    high: float
    hue: str = "purple"

    @classmethod
    def of(cls, values: Sequence[float], hue: str = "purple") -> Scale:
        """The scale that just holds these numbers (NaN doesn't count)."""
        known = [value for value in values if math.isfinite(value)]
        low, high = min([0.0, *known]), max([0.0, *known])
        return cls(low, high if high > low else 1.0, hue)

    @cached_property
    def limit(self) -> float:
        """The number of the deepest colour, on either side."""
        return max(-self.low, self.high)

    def colour(self, value: float) -> str:
        """The colour of a number, ``#rrggbb``."""
        ramp = RAMPS[self.hue if value >= 0 else OPPOSITE[self.hue]]
        place = min(abs(value) / self.limit, 1.0) * (len(ramp) - 1)
        i = min(int(place), len(ramp) - 2)
        pair = zip(_rgb(ramp[i]), _rgb(ramp[i + 1]), strict=True)
        return "#" + "".join(f"{round(a + (b - a) * (place - i)):02x}" for a, b in pair)


def heat_map(
    cells: Sequence[Sequence[float]],
    *,
    scale: Scale,
    labels: Sequence[str],
    tooltips: Sequence[Sequence[str]],
    neutral: Sequence[bool],
    strong: Sequence[bool],
    hatched: Sequence[int] = (),
    outlined: tuple[int, int] | None = None,
    x_label: str,
    unit: str,
    name: str,
) -> Html:
    """A grid of coloured cells with its labels and colour bar.

    Args:
        cells: Numbers, [row column]; NaN leaves a gap.
        scale: From numbers to colours.
        labels: Of each row.
        tooltips: Of each cell, [row column].
        neutral: Rows that are 0 by construction: drawn in grey, not on the scale.
        strong: Rows to mark with an asterisk and a bar.
        hatched: Columns to hatch.
        outlined: (row, column) of a cell to outline.
        x_label: Of the columns.
        unit: What the colour bar shows.
        name: For readers who can't see it.
    """
    n_rows, n_columns = len(cells), len(cells[0])
    shown = [clip(label, 24) + ("*" if mark else "") for label, mark in zip(labels, strong, strict=True)]
    left, top, width = 22 + 7.25 * max(map(columns, shown)), 8.0, 720.0
    height = max(14.0, min(24.0, 480 / n_rows))
    step = (width - left - 92) / n_columns
    bottom = top + n_rows * height

    drawn = []
    for r, (row, grey) in enumerate(zip(cells, neutral, strict=True)):
        for c, value in enumerate(row):
            if math.isfinite(value):
                drawn.append(
                    tag(
                        "rect",
                        tag("title", tooltips[r][c]),
                        class_="cell",
                        x=left + c * step,
                        y=top + r * height,
                        width=step,
                        height=height,
                        fill=NEUTRAL if grey else scale.colour(value),
                    )
                )
    lines = [
        *(_segment(left, top + r * height, left + n_columns * step, top + r * height) for r in range(1, n_rows)),
        *(_segment(left + c * step, top, left + c * step, bottom) for c in range(1, n_columns) if step > 7),
    ]
    frame = tag(
        "rect",
        x=left,
        y=top,
        width=n_columns * step,
        height=n_rows * height,
        fill="none",
        stroke=FAINT,
        stroke_width=0.8,
    )
    hatches = [
        _hatch(left + a * step, top, (b - a) * step, bottom - top)
        for a, b in _runs([c in hatched for c in range(n_columns)])
    ]
    marks = []
    if outlined is not None:
        r, c = outlined
        box = {"x": left + c * step, "y": top + r * height, "width": step, "height": height, "fill": "none"}
        marks = [
            tag("rect", **box, stroke="#fff", stroke_width=3.5, pointer_events="none"),
            tag("rect", **box, stroke="#000", stroke_width=1.6, pointer_events="none"),
        ]
    spans = _runs(strong)
    names = [
        tag(
            "text",
            _faint_space(label),
            tag("title", labels[r]),
            x=left - 12,
            y=top + (r + 0.5) * height + 4,
            text_anchor="end",
            font_family=_MONO,
            font_size=12,
            font_weight="bold" if strong[r] else None,
            fill=INK,
        )
        for r, label in enumerate(shown)
    ]
    bars = [
        tag(
            "rect",
            x=left - 8,
            y=top + a * height + 1,
            width=3.0,
            height=(b - a) * height - 2,
            fill=INK,
            class_="subject",
        )
        for a, b in spans
    ]
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100) if k * step >= 22 or k == 100)
    axis = [_label(left + (c + 0.5) * step, bottom + 15, str(c), "middle") for c in range(0, n_columns, every)]
    axis.append(_label(left + n_columns * step / 2, bottom + 34, x_label, "middle", size=12.5))
    bar = _colour_bar(scale, x=left + n_columns * step + 16, top=top, height=bottom - top, unit=unit)
    total = max(bottom + 42, top + 150)
    return _svg(
        width,
        total,
        name,
        tag("g", *drawn, shape_rendering="crispEdges"),
        tag("g", *lines, stroke="#fff", stroke_width=0.7, pointer_events="none"),
        *hatches,
        frame,
        *marks,
        *names,
        *bars,
        *axis,
        bar,
    )


@dataclass(frozen=True)
class Line:
    """One line of a chart; NaN breaks it.

    Attributes:
        label: For tooltips.
        x: Where.
        y: How much.
        colour: ``#rrggbb``.
        dashed: Whether to draw dashes.
        width: Of the stroke.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = INK
    dashed: bool = False
    width: float = 2.0


@dataclass(frozen=True)
class Rule:
    """A straight line across a chart, with words.

    Attributes:
        at: Where on its axis.
        axis: The axis that it stands on.
        label: What it means.
        colour: ``#rrggbb``.
        high: Whether the words of an upright line stand at its upper end.
    """

    at: float
    axis: Literal["x", "y"]
    label: str = ""
    colour: str = FAINT
    high: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    rules: Sequence[Rule] = (),
    dots: Sequence[tuple[float, float, str]] = (),
    width: float = 350.0,
    height: float = 236.0,
) -> Html:
    """Lines over one pair of axes.

    Args:
        lines: What to draw; each point has a tooltip.
        title: Above the chart.
        x_label: With its unit.
        y_label: With its unit.
        y_range: Ends of the vertical axis; None for those of the data.
        rules: Lines across.
        dots: (x, y, what) to mark.
        width: In px.
        height: In px.
    """
    known = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not known:
        return _svg(width, height, title, _label(width / 2, height / 2, f"{title}: no numbers", "middle"))
    x0, x1 = min(x for x, _ in known), max(x for x, _ in known)
    y0, y1 = y_range or (min(y for _, y in known), max(y for _, y in known))
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    if y_range is None:
        y0, y1 = y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0)
    ticks = nice(y0, y1)
    left, right, top, bottom = (
        34.0 + 6.4 * max(len(tick_text(t, ticks)) for t in ticks),
        width - 10,
        30.0,
        height - 42,
    )

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (right - left)

    def py(y: float) -> float:
        return bottom - (y - y0) / (y1 - y0) * (bottom - top)

    grid = [_segment(left, py(t), right, py(t), stroke="#e3e3e8") for t in ticks]
    names = [_label(left - 6, py(t) + 4, tick_text(t, ticks), "end") for t in ticks]
    x_ticks = nice(x0, x1, 6)
    names += [_label(px(t), bottom + 16, tick_text(t, x_ticks), "middle") for t in x_ticks]
    names += [
        _label(
            12.0,
            (top + bottom) / 2,
            y_label,
            "middle",
            size=11.5,
            transform=f"rotate(-90 12 {(top + bottom) / 2:.1f})",
        ),
        _label((left + right) / 2, height - 8, x_label, "middle", size=11.5),
        _label(left, 16.0, title, "start", size=12.5, font_weight="bold", fill=INK),
    ]
    drawn, words = [], []
    for rule in rules:
        if rule.axis == "x" and x0 <= rule.at <= x1:
            x = px(rule.at)
            end = x > right - 90
            drawn.append(_segment(x, top, x, bottom, stroke=rule.colour, stroke_dasharray="2 3"))
            y = top + 11 if rule.high else bottom - 6
            side = (-5, "end") if end else (5, "start")
            words.append(_label(x + side[0], y, rule.label, side[1], fill=rule.colour, halo=True))
        elif rule.axis == "y" and y0 <= rule.at <= y1:
            drawn.append(_segment(left, py(rule.at), right, py(rule.at), stroke=rule.colour, stroke_width=1.2))
            words.append(_label(left + 5, py(rule.at) - 5, rule.label, "start", fill=rule.colour, halo=True))
    points = []
    for line in lines:
        for run in _runs([math.isfinite(y) for y in line.y]):
            xy = [(px(line.x[i]), py(line.y[i])) for i in range(*run)]
            drawn.append(
                tag(
                    "polyline",
                    points=" ".join(f"{x:.1f},{y:.1f}" for x, y in xy),
                    fill="none",
                    stroke=line.colour,
                    stroke_width=line.width,
                    stroke_dasharray="5 4" if line.dashed else None,
                    stroke_linejoin="round",
                )
            )
            points += [
                tag(
                    "circle",
                    tag(
                        "title",
                        f"{line.label}, {number(line.x[i], 1).removesuffix('.0')}: {number(line.y[i], 2)}",
                    ),
                    cx=x,
                    cy=y,
                    r=5,
                    fill="transparent",
                )
                for i, (x, y) in zip(range(*run), xy, strict=True)
            ]
    for x, y, what in dots:
        drawn.append(
            tag(
                "circle",
                tag("title", what),
                cx=px(x),
                cy=py(y),
                r=4.5,
                fill="#fff",
                stroke=INK,
                stroke_width=1.8,
            )
        )
    frame = tag("path", d=f"M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}", stroke=FAINT, fill="none")
    return _svg(width, height, title, *grid, frame, *names, *drawn, *words, *points)


def swatch(*shapes: Html, width: float = 22.0) -> Html:
    """A small drawing for a legend."""
    return tag("svg", *shapes, width=width, height=12, viewBox=f"0 0 {width:g} 12", aria_hidden="true")


def line_swatch(colour: str, *, dashed: bool = False) -> Html:
    """How a line looks."""
    return swatch(
        _segment(1.0, 6.0, 21.0, 6.0, stroke=colour, stroke_width=2.2, stroke_dasharray="5 4" if dashed else None)
    )


def box_swatch(fill: str, *, hatched: bool = False, outlined: bool = False) -> Html:
    """How a cell looks."""
    edge = {"stroke": "#000", "stroke_width": 1.6} if outlined else {"stroke": "#b9b9c2", "stroke_width": 0.8}
    box = tag("rect", x=1, y=1, width=16, height=10, fill=fill, **edge)
    return swatch(box, *([_hatch(1.0, 1.0, 16.0, 10.0)] if hatched else []), width=18.0)


def nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two ends, both included if they are round.

    Example:
        >>> nice(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as its neighbours need."""
    gap = min((abs(b - a) for a, b in pairwise(ticks)), default=1.0)
    if gap < 1e-4 or max(map(abs, ticks)) >= 1e5:
        return f"{tick:.3g}".replace("-", "−")
    return number(tick, max(0, -math.floor(math.log10(gap) + 1e-9)))


# --------------------------------------------------------------------------------------- pieces


def _svg(width: float, height: float, name: str, *children: Html) -> Html:
    return tag(
        "svg",
        tag("title", name),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=name,
        font_family=_FONT,
        style=f"width:100%;max-width:{width:g}px;height:auto",
    )


def _label(
    x: float, y: float, words: str, anchor: str, *, size: float = 11.0, halo: bool = False, **attributes: str
) -> Html:
    # A halo keeps words readable where they cross a line.
    edge = {"paint_order": "stroke", "stroke": "#fff", "stroke_width": 3} if halo else {}
    fill = {"fill": FAINT, **attributes}
    return tag("text", words, x=x, y=y, text_anchor=anchor, font_size=size, **edge, **fill)


def _segment(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Html:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **attributes)


def _hatch(x: float, y: float, width: float, height: float) -> Html:
    """Diagonal strokes over a box; drawn one by one, as a pattern would need an id unique to the page."""
    gap, path = 7.0, []
    start = -height
    while start < width:
        a, b = max(0.0, start), min(width, start + height)
        path.append(f"M{x + a:.1f} {y + height - (a - start):.1f}L{x + b:.1f} {y + height - (b - start):.1f}")
        start += gap
    return tag(
        "path",
        d="".join(path),
        stroke="#2b2b33",
        stroke_opacity=0.45,
        stroke_width=0.8,
        fill="none",
        pointer_events="none",
    )


def _colour_bar(scale: Scale, *, x: float, top: float, height: float, unit: str) -> Html:
    steps, span = 64, scale.high - scale.low
    h = height / steps
    boxes = [
        tag(
            "rect",
            x=x,
            y=top + i * h,
            width=13.0,
            height=h + 0.3,
            fill=scale.colour(scale.high - (i + 0.5) / steps * span),
        )
        for i in range(steps)
    ]
    ticks = nice(scale.low, scale.high, max(2, min(6, int(height / 28))))
    marks = [
        join(
            _segment(x + 13, y, x + 16, y, stroke=FAINT, stroke_width=0.8),
            _label(x + 19, y + 4, tick_text(tick, ticks), "start"),
        )
        for tick in ticks
        for y in [top + (scale.high - tick) / span * height]
    ]
    middle = top + max(height, 142) / 2
    return tag(
        "g",
        tag("g", *boxes, shape_rendering="crispEdges"),
        tag("rect", x=x, y=top, width=13.0, height=height, fill="none", stroke=FAINT, stroke_width=0.8),
        *marks,
        _label(x + 68, middle, unit, "middle", size=11.5, transform=f"rotate(-90 {x + 68:.1f} {middle:.1f})"),
    )


def _faint_space(label: str) -> Html:
    """A label whose leading marks of spaces are pale."""
    body = label.lstrip("␣")
    spaces = label[: len(label) - len(body)]
    return join(tag("tspan", spaces, fill="#b5b5bf") if spaces and body else Html(), body or label)


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, stop) of each unbroken run of true flags."""
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
