"""Interval charts in SVG: a number and its interval a row, over a common axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tl_factedit.show.markup import Html, number, tag
from tl_factedit.show.svg import FAINT, INK, NEUTRAL, line_segment, nice, svg_document, text_label, tick_text

ROW = 22.0
"""Height of a row, px."""


@dataclass(frozen=True)
class Interval:
    """One row.

    Attributes:
        label: What it is of.
        mean: The number; NaN draws nothing but the label.
        low: Lower end; NaN for none.
        high: Upper end.
        colour: ``#rrggbb``.
        note: Said instead of a number, and in the tooltip.
        strong: Whether the label is set in bold.
    """

    label: str
    mean: float
    low: float = math.nan
    high: float = math.nan
    colour: str = INK
    note: str = ""
    strong: bool = False


def interval_chart(
    rows: Sequence[Interval],
    *,
    title: str,
    x_label: str,
    rule: float | None = None,
    rule_label: str = "",
    width: float = 560.0,
) -> Html:
    """Rows of intervals, 0 marked.

    Args:
        rows: From top to bottom.
        title: For readers who don't see the picture.
        x_label: The axis' label, with its unit.
        rule: A further mark on the axis, such as what counts.
        rule_label: What it means.
        width: In px.
    """
    left, right, top = 12.0 + 6.4 * max((len(row.label) for row in rows), default=0), 18.0, 24.0
    left = min(left, width * 0.55)
    bottom = top + ROW * len(rows)
    ends = [v for row in rows for v in (row.mean, row.low, row.high) if math.isfinite(v)]
    low, high = min([0.0, *ends]), max([0.0, rule or 0.0, *ends])
    high = high if high > low else low + 1.0
    pad = 0.04 * (high - low)
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    ticks = nice(low, high)
    parts: list[Html] = []
    for tick in ticks:
        parts.append(line_segment(x(tick), top, x(tick), bottom, stroke=NEUTRAL, stroke_width=1.0))
        parts.append(text_label(x(tick), bottom + 15.0, tick_text(tick, ticks), "middle"))
    parts.append(line_segment(x(0.0), top, x(0.0), bottom, stroke=FAINT, stroke_width=1.2))
    if rule is not None:
        parts.append(
            line_segment(x(rule), top, x(rule), bottom, stroke=FAINT, stroke_width=1.2, stroke_dasharray="4 3")
        )
        parts.append(text_label(x(rule) + 4.0, top - 8.0, rule_label, "start"))
    for i, row in enumerate(rows):
        y = top + ROW * (i + 0.5)
        weight = "600" if row.strong else "400"
        parts.append(text_label(left - 8.0, y + 4.0, _short(row.label, left), "end", fill=INK, font_weight=weight))
        if not math.isfinite(row.mean):
            parts.append(text_label(x(0.0) + 6.0, y + 4.0, row.note or "not measured", "start"))
            continue
        marks: list[Html] = []
        if math.isfinite(row.low) and math.isfinite(row.high):
            marks.append(line_segment(x(row.low), y, x(row.high), y, stroke=row.colour, stroke_width=2.2))
        marks.append(tag("circle", cx=x(row.mean), cy=y, r=4.0, fill=row.colour))
        told = f"{row.label}: {number(row.mean, 3)} [{number(row.low, 3)}, {number(row.high, 3)}]"
        parts.append(tag("g", tag("title", told + (f"; {row.note}" if row.note else "")), *marks))
    parts.append(text_label((left + width - right) / 2, bottom + 32.0, x_label, "middle"))
    return svg_document(width, bottom + 40.0, title, *parts)


def _short(label: str, room: float) -> str:
    most = int((room - 12.0) / 6.0)
    return label if len(label) <= most else label[: most - 1] + "…"
