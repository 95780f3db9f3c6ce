"""Heat maps in SVG.

Colours are ColorBrewer's single-hue ramps (as in Meng et al. 2022: purple for the residual stream, green for MLPs, red
for attention), in pairs that colour-blind readers can tell apart. Zero is white on both sides, and one unit of effect
has the same depth of colour on either side, so a colour never means more than its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tl_factedit.show.markup import Html, clip, columns, join, tag
from tl_factedit.show.svg import (
    FAINT,
    INK,
    MONO,
    NEUTRAL,
    hatch_pattern,
    line_segment,
    nice,
    runs_of,
    svg_document,
    text_label,
    tick_text,
)

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


@dataclass(frozen=True)
class Scale:
    """Colours for numbers, centred on 0.

    Attributes:
        low: The smallest number, or 0 if none is negative.
        high: The largest number, or 0 if none is positive.
        hue: Hue of positive numbers, in `RAMPS`; negative ones get its `OPPOSITE`.
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
        labels: Label of each row.
        tooltips: Tooltip of each cell, [row column].
        neutral: Rows that are 0 by construction: drawn in grey, not on the scale.
        strong: Rows to mark with an asterisk and a bar.
        hatched: Columns to hatch.
        outlined: (row, column) of a cell to outline.
        x_label: Label of the horizontal axis.
        unit: What the colour bar shows.
        name: A description for readers who can't see the drawing.
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
        *(line_segment(left, top + r * height, left + n_columns * step, top + r * height) for r in range(1, n_rows)),
        *(line_segment(left + c * step, top, left + c * step, bottom) for c in range(1, n_columns) if step > 7),
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
        hatch_pattern(left + a * step, top, (b - a) * step, bottom - top)
        for a, b in runs_of([c in hatched for c in range(n_columns)])
    ]
    marks = []
    if outlined is not None:
        r, c = outlined
        box = {"x": left + c * step, "y": top + r * height, "width": step, "height": height, "fill": "none"}
        marks = [
            tag("rect", **box, stroke="#fff", stroke_width=3.5, pointer_events="none"),
            tag("rect", **box, stroke="#000", stroke_width=1.6, pointer_events="none"),
        ]
    spans = runs_of(strong)
    names = [
        tag(
            "text",
            _faint_space(label),
            tag("title", labels[r]),
            x=left - 12,
            y=top + (r + 0.5) * height + 4,
            text_anchor="end",
            font_family=MONO,
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
    axis = [text_label(left + (c + 0.5) * step, bottom + 15, str(c), "middle") for c in range(0, n_columns, every)]
    axis.append(text_label(left + n_columns * step / 2, bottom + 34, x_label, "middle", size=12.5))
    bar = _colour_bar(scale, x=left + n_columns * step + 16, top=top, height=bottom - top, unit=unit)
    total = max(bottom + 42, top + 150)
    return svg_document(
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
            line_segment(x + 13, y, x + 16, y, stroke=FAINT, stroke_width=0.8),
            text_label(x + 19, y + 4, tick_text(tick, ticks), "start"),
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
        text_label(x + 68, middle, unit, "middle", size=11.5, transform=f"rotate(-90 {x + 68:.1f} {middle:.1f})"),
    )


def _faint_space(label: str) -> Html:
    """A label whose leading marks of spaces are pale."""
    body = label.lstrip("␣")
    spaces = label[: len(label) - len(body)]
    return join(tag("tspan", spaces, fill="#b5b5bf") if spaces and body else Html(), body or label)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
