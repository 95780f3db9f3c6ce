"""The parts of SVG drawings: labels, lines, swatches and ticks. Nothing here knows a model, a fact or an edit.

The colours of lines are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from tl_factedit.show.markup import Html, number, tag

OLD, NEW, INK, FAINT, NEUTRAL = "#0072b2", "#d55e00", "#1b1b1f", "#6b6b76", "#e4e4e8"

_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"

MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"


def swatch(*shapes: Html, width: float = 22.0) -> Html:
    """A small drawing for a legend."""
    return tag("svg", *shapes, width=width, height=12, viewBox=f"0 0 {width:g} 12", aria_hidden="true")


def line_swatch(colour: str, *, dashed: bool = False) -> Html:
    """How a line looks."""
    return swatch(
        line_segment(1.0, 6.0, 21.0, 6.0, stroke=colour, stroke_width=2.2, stroke_dasharray="5 4" if dashed else None)
    )


def box_swatch(fill: str, *, hatched: bool = False, outlined: bool = False) -> Html:
    """How a cell looks."""
    edge = {"stroke": "#000", "stroke_width": 1.6} if outlined else {"stroke": "#b9b9c2", "stroke_width": 0.8}
    box = tag("rect", x=1, y=1, width=16, height=10, fill=fill, **edge)
    return swatch(box, *([hatch_pattern(1.0, 1.0, 16.0, 10.0)] if hatched else []), width=18.0)


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


def svg_document(width: float, height: float, name: str, *children: Html) -> Html:
    """A drawing that scales with its page, with a name for readers who can't see it."""
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


def text_label(
    x: float, y: float, words: str, anchor: str, *, size: float = 11.0, halo: bool = False, **attributes: str
) -> Html:
    """Words at a point; a halo keeps them readable where they cross a line."""
    edge = {"paint_order": "stroke", "stroke": "#fff", "stroke_width": 3} if halo else {}
    fill = {"fill": FAINT, **attributes}
    return tag("text", words, x=x, y=y, text_anchor=anchor, font_size=size, **edge, **fill)


def line_segment(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Html:
    """A straight line from one point to another."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **attributes)


def hatch_pattern(x: float, y: float, width: float, height: float) -> Html:
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


def runs_of(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, stop) of each unbroken run of true flags."""
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
