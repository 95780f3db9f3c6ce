"""HTML and SVG that can't be broken by what is shown in it.

Tokens, prompts and model names can be any text at all. So there are two kinds of string: `str`, which
`tag` escapes wherever it goes, and `Html`, which only `tag` makes. Text that would be invisible or would reorder its
surroundings (control characters, surrogates) is shown as a visible stand-in.
"""

from __future__ import annotations

import html
import json
import math
import unicodedata
from collections.abc import Iterable
from typing import Any

VOID = frozenset({"meta", "br", "rect", "line", "circle", "path", "polyline", "stop"})
"""Elements written without an end tag here: void in HTML, or childless in SVG (see `tag`)."""

_SVG_SHAPES = VOID - {"meta", "br"}


class Html(str):
    """A string that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: Any) -> Html:
    """One element; children and attribute values that are plain strings are escaped.

    Args:
        name: Name of the element.
        children: `Html`, plain text, or None for nothing.
        attributes: Attributes of the element. ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``;
            None is left out; floats are rounded to hundredths.

    Example:
        >>> tag("b", "1 < 2", title='"')
        '<b title="&quot;">1 &lt; 2</b>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(*children)
    if name in VOID and not inside:
        return Html(f"<{name}{written}{'/' if name in _SVG_SHAPES else ''}>")
    return Html(f"<{name}{written}>{inside}</{name}>")


def join(*parts: str | None, between: str = "") -> Html:
    """Parts in a row, plain strings escaped."""
    return Html(text(between).join(part if isinstance(part, Html) else text(part) for part in parts if part))


def text(value: str) -> Html:
    """Plain text as markup."""
    return value if isinstance(value, Html) else Html(html.escape("".join(map(_stand_in, value))))


def token(piece: str) -> str:
    r"""A token with its white space made visible, for labels and tables: "␣Paris", "⏎", "⇥".

    Example:
        >>> token(" Paris"), token("\n\t")
        ('␣Paris', '⏎⇥')
    """
    marks = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\N{NO-BREAK SPACE}": "⍽"}
    body = piece.lstrip(" ")
    body = "␣" * (len(piece) - len(body)) + (body.rstrip(" ") + "␣" * (len(body) - len(body.rstrip(" "))))
    return "".join(marks.get(char, char) for char in body) or "∅"


def columns(label: str) -> int:
    """How many columns of a fixed-width font a label takes."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in label
    )


def clip(label: str, width: int) -> str:
    """A label cut to so many columns, with an ellipsis if it was cut."""
    if columns(label) <= width:
        return label
    while columns(label) > width - 1:
        label = label[:-1]
    return label + "…"


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """A number for people to read: a true minus, "–" for NaN, exponents only where decimals would show zeros.

    Example:
        >>> number(-0.1234), number(float("nan")), number(3e-7)
        ('−0.123', '–', '3e−07')
    """
    if math.isnan(value):
        return "–"
    tiny = 0 < abs(value) < 0.5 * 10**-digits
    spec = ("+" if sign else "") + (".0e" if tiny else f".{digits}f")
    return format(value if value else 0.0, spec).replace("-", "−")


def to_json(value: Any) -> str:
    """JSON that is inert inside HTML and JavaScript: no ``<``, ``>`` or ``&``, null for NaN and infinities."""
    coded = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False)
    return coded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rows(cells: Iterable[Iterable[str | None]], name: str = "td", **attributes: Any) -> Html:
    """Table rows; a cell that is a ``td`` or ``th`` already stays as it is."""

    def cell(value: str | None) -> Html:
        return value if isinstance(value, Html) and value.startswith(("<td", "<th")) else tag(name, value)

    return join(*(tag("tr", *map(cell, row), **attributes) for row in cells))


def _attribute(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return "".join(map(_stand_in, str(value)))


def _stand_in(char: str) -> str:
    code = ord(char)
    if code < 32 and char not in "\n\t":
        return chr(0x2400 + code)
    # Lone surrogates can't be written as UTF-8; bidirectional controls would reorder the page; spaces of no width and
    # soft hyphens can't be seen.
    hidden = any(code in unseen for unseen in _UNSEEN)
    return "\N{REPLACEMENT CHARACTER}" if hidden else char


_UNSEEN = (
    range(0x7F, 0xA0),
    range(0xAD, 0xAE),
    range(0x200B, 0x2010),
    range(0x202A, 0x202F),
    range(0x2060, 0x2070),
    range(0xD800, 0xE000),
    range(0xFEFF, 0xFF00),
)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
