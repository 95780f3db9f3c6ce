"""Line charts in SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tl_factedit.show.markup import Html, number, tag
from tl_factedit.show.svg import FAINT, INK, line_segment, nice, runs_of, svg_document, text_label, tick_text


@dataclass(frozen=True)
class Line:
    """One line of a chart; NaN breaks it.

    Attributes:
        label: Name of the line, in tooltips.
        x: Horizontal places.
        y: Values.
        colour: ``#rrggbb``.
        dashed: Whether to draw dashes.
        width: Width of the stroke, px.
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
        at: Its place on the axis.
        axis: The axis that it is perpendicular to.
        label: What it means.
        colour: ``#rrggbb``.
        high: Whether the words of a vertical line stand at its upper end.
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
    whole: bool = False,
    width: float = 350.0,
    height: float = 236.0,
) -> Html:
    """Lines over one pair of axes.

    Args:
        lines: The lines to draw; each point has a tooltip.
        title: Title above the chart.
        x_label: Label of the horizontal axis, with its unit.
        y_label: Label of the vertical axis, with its unit.
        y_range: Ends of the vertical axis; None for those of the data.
        rules: Straight lines across the chart.
        dots: Points to mark, as (x, y, tooltip).
        whole: Whether the horizontal axis counts things: it has no mark between whole numbers then.
        width: Width in px.
        height: Height in px.
    """
    known = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not known:
        return svg_document(width, height, title, text_label(width / 2, height / 2, f"{title}: no numbers", "middle"))
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

    grid = [line_segment(left, py(t), right, py(t), stroke="#e3e3e8") for t in ticks]
    names = [text_label(left - 6, py(t) + 4, tick_text(t, ticks), "end") for t in ticks]
    x_ticks = [t for t in nice(x0, x1, 6) if not whole or t == round(t)]
    names += [text_label(px(t), bottom + 16, tick_text(t, x_ticks), "middle") for t in x_ticks]
    names += [
        text_label(
            12.0,
            (top + bottom) / 2,
            y_label,
            "middle",
            size=11.5,
            transform=f"rotate(-90 12 {(top + bottom) / 2:.1f})",
        ),
        text_label((left + right) / 2, height - 8, x_label, "middle", size=11.5),
        text_label(left, 16.0, title, "start", size=12.5, font_weight="bold", fill=INK),
    ]
    drawn, words = [], []
    for rule in rules:
        if rule.axis == "x" and x0 <= rule.at <= x1:
            x = px(rule.at)
            end = x > right - 90
            drawn.append(line_segment(x, top, x, bottom, stroke=rule.colour, stroke_dasharray="2 3"))
            y = top + 11 if rule.high else bottom - 6
            side = (-5, "end") if end else (5, "start")
            words.append(text_label(x + side[0], y, rule.label, side[1], fill=rule.colour, halo=True))
        elif rule.axis == "y" and y0 <= rule.at <= y1:
            drawn.append(line_segment(left, py(rule.at), right, py(rule.at), stroke=rule.colour, stroke_width=1.2))
            words.append(text_label(left + 5, py(rule.at) - 5, rule.label, "start", fill=rule.colour, halo=True))
    points = []
    for line in lines:
        for run in runs_of([math.isfinite(y) for y in line.y]):
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
    return svg_document(width, height, title, *grid, frame, *names, *drawn, *words, *points)
