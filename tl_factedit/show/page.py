"""Pictures and the pages that hold them: one file, which opens offline and fetches nothing.

Coloured tokens are circuitsvis' own component, run from the JavaScript in its wheel. They are drawn twice: as plain
HTML, and again by circuitsvis in its place when the script runs. So nothing is ever blank: not offline, not in an
untrusted notebook, not where a viewer (GitHub) drops scripts. What is shown travels as an escaped attribute, never as
code, and the page's policy admits no other script.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tl_factedit.backend.provenance import Provenance
from tl_factedit.core import files
from tl_factedit.show.markup import Html, join, number, rows, tag, text, to_json

POSITIVE, NEGATIVE = "#0072b2", "#d55e00"
"""Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart."""


def check_page(path: Path) -> None:
    """Check that what is at a path is a page or nothing.

    Raises:
        FileExistsError: Something else is there, such as a saved edit.
    """
    files.check_replaceable(
        path, "a page", lambda head: head.lstrip().lower().startswith(b"<!doctype html"), "give another path"
    )


@dataclass(frozen=True, repr=False)
class Picture:
    """Something to look at: displayed by a notebook, saved as a file with `save`, put on a page by `report`.

    In a notebook it is HTML in the cell, not a frame: circuitsvis draws over the plain drawing where scripts may run,
    and where they may not (an untrusted notebook, GitHub), the plain one stays.

    Attributes:
        title: What it shows.
        body: The drawing, without its title.
        provenance: Where its numbers come from.
        live: Whether circuitsvis should draw its tokens.
    """

    title: str
    body: Html
    provenance: tuple[Provenance, ...] = ()
    live: bool = False

    @property
    def html(self) -> str:
        """A complete page that needs nothing else."""
        return document(self.title, tag("section", self.body), self.provenance, live=self.live)

    def save(self, path: str | Path) -> Path:
        """Write `html` to a file; returns its path."""
        path = files.pinned(path)
        check_page(path)
        with files.replacing(path) as draft:
            draft.write_text(self.html, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        # MathJax would otherwise typeset what stands between two dollar signs in a token.
        return tag(
            "div",
            tag("style", Html(_STYLE)),
            tag("h3", self.title),
            self.body,
            tag("script", Html(_script())) if self.live else None,
            class_="tlf tex2jax_ignore mathjax_ignore",
        )

    def __repr__(self) -> str:
        """Title and size."""
        return f"Picture({self.title!r}, {len(self.body) / 1000:.0f} kB{', live' if self.live else ''})"


def document(title: str, body: Html, provenance: Iterable[Provenance] = (), *, live: bool = False) -> str:
    """A complete HTML page.

    Args:
        title: Title of the page.
        body: Its sections.
        provenance: Provenance of everything in it; each is shown once.
        live: Whether to include circuitsvis' JavaScript.
    """
    script = _script() if live else ""
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if live else "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light"),
        tag("title", title),
        tag("style", Html(_STYLE + _PAGE_STYLE)),
        between="\n",
    )
    content = tag("main", tag("h1", title), body, _origin(provenance), class_="tlf", translate="no")
    page = tag("html", Html("\n"), tag("head", head), Html("\n"), tag("body", content, _run(script)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def coloured_tokens(pieces: Sequence[str], values: Sequence[float], *, limit: float, live: bool = True) -> Html:
    """The tokens of a text, each on a background that shows its number, from vermilion through white to blue.

    Args:
        pieces: The tokens.
        values: A number for each; NaN is left white.
        limit: The number of the deepest colour, on either side of 0.
        live: Whether circuitsvis should draw them again.
    """
    props = {
        # circuitsvis writes a token into the page as HTML: it must be escaped for that, beside the JSON.
        "tokens": [str(text(_breaking(piece))) for piece in pieces],
        "values": [round(value, 4) if math.isfinite(value) else None for value in values],
        "minValue": -limit,
        "maxValue": limit,
        "negativeColor": NEGATIVE,
        "positiveColor": POSITIVE,
    }
    spans = [
        join(
            tag(
                "span",
                _breaking(piece).replace("\n", "").replace(" ", "\N{NO-BREAK SPACE}"),
                title=f"{piece!r}: {number(value)}",
                style=_background(value, limit),
            ),
            *([Html("<br>")] * piece.count("\n")),
        )
        for piece, value in zip(pieces, values, strict=True)
    ]
    return tag("div", *spans, class_="tlf-tokens", data_props=to_json(props) if live else None)


def _breaking(piece: str) -> str:
    """A token that shows its line breaks, and makes them too (circuitsvis breaks after a newline)."""
    return piece.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥")


def _background(value: float, limit: float) -> str:
    if not math.isfinite(value):
        return "background:#fff"
    colour, share = (POSITIVE if value >= 0 else NEGATIVE), min(abs(value) / limit, 1.0)
    mixed = [round(255 + (int(colour[i : i + 2], 16) - 255) * share) for i in (1, 3, 5)]
    dark = mixed[0] * 0.299 + mixed[1] * 0.587 + mixed[2] * 0.114 < 153
    return f"background:rgb({mixed[0]},{mixed[1]},{mixed[2]});color:{'#fff' if dark else '#000'}"


def _origin(provenance: Iterable[Provenance]) -> Html | None:
    seen: list[Provenance] = []
    for one in provenance:
        if one not in seen:
            seen.append(one)
    if not seen:
        return None
    found = [
        (
            one.model,
            tag("td", tag("code", str(one.weights))),
            f"{one.dtype} on {', '.join(one.devices)}" if one.devices else one.dtype,
            "with BOS" if one.prepend_bos else "without BOS",
            ", ".join(f"{name} {version}" for name, version in one.versions.items()),
        )
        for one in seen
    ]
    heads = tag("tr", *(tag("th", name) for name in ("model", "weights", "type", "prompts", "versions")))
    return tag(
        "footer",
        tag("h2", "Where these numbers come from"),
        tag("div", tag("table", tag("thead", heads), tag("tbody", rows(found))), class_="tlf-wide"),
    )


def _run(script: str) -> Html | None:
    return tag("script", Html(script)) if script else None


def _script() -> str:
    """The bundle of circuitsvis, and what starts it wherever tokens aren't drawn yet."""
    bundle = importlib.resources.files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
    # The bundle holds "</script>" in a string; a source map would be fetched by a browser's tools.
    bundle = bundle.replace("</script", "<\\/script").replace("//# sourceMappingURL=iife.js.map", "")
    return f"(() => {{\n{bundle}\n{_START}}})();"


_START = """
for (const place of document.querySelectorAll(".tlf-tokens[data-props]:not([id])")) {
  place.id = "tlf-" + Math.random().toString(36).slice(2);
  CircuitsVis.render(place.id, CircuitsVis.ColoredTokens, JSON.parse(place.dataset.props));
}
"""

_STYLE = """
.tlf{background:#fff;color:#1b1b1f;color-scheme:light;max-width:760px;padding:12px 16px;box-sizing:border-box;
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
.tlf h3{font-size:1.05em;margin:.2em 0 .5em;color:#1b1b1f}
.tlf h4{font-size:.95em;margin:1.4em 0 .4em;color:#1b1b1f}
.tlf p{margin:.4em 0 .7em}
.tlf figure{margin:0 0 .8em}
.tlf figcaption,.tlf small{font-size:.86em;color:#4a4a55;line-height:1.45}
.tlf svg{display:block}
.tlf ul{margin:.3em 0 .8em;padding-left:1.3em}
.tlf code,.tlf-tokens{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
.tlf code{font-size:.88em;background:#f3f3f6;color:#1b1b1f;padding:0 .2em;border-radius:3px;white-space:pre-wrap}
.tlf table{border-collapse:collapse;font-size:.86em;margin:.3em 0 .9em;border:0;color:#1b1b1f}
.tlf th,.tlf td{padding:.22em .7em .22em 0;text-align:left;vertical-align:top;border:0;border-bottom:1px solid #e3e3e8;
 white-space:normal;max-width:24em}
.tlf thead th{border-bottom:1.5px solid #6b6b76;vertical-align:bottom;font-weight:600}
.tlf th.n{white-space:normal}
.tlf td.t{overflow-wrap:anywhere;min-width:5em}
.tlf tr,.tlf th,.tlf td{background-color:#fff!important;color:#1b1b1f!important}
.tlf .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-left:.5em}
.tlf td.p{background:linear-gradient(var(--c),var(--c)) left bottom/var(--p) 4px no-repeat;padding-bottom:6px}
.tlf i{font-style:normal;color:#a5a5b0}
.tlf-wide{overflow-x:auto}
.tlf-legend{display:flex;flex-wrap:wrap;gap:.2em 1.3em;font-size:.84em;color:#4a4a55;margin:.2em 0 .5em}
.tlf-legend span{display:inline-flex;align-items:center;gap:.4em}
.tlf-charts{display:flex;flex-wrap:wrap;gap:10px 14px}
.tlf-charts svg{flex:1 1 300px;max-width:357px!important}
.tlf-tokens{font-size:14px;line-height:1.75;margin:.5em 0 .7em}
.tlf-tokens span span,.tlf-tokens>span{max-width:100%;box-sizing:border-box;white-space:normal;overflow-wrap:anywhere}
.tlf-tokens:not([id])>span{display:inline-block;line-height:1em;padding:3px 0;border:1px solid #eee;margin:0 0 1px -1px}
.tlf-columns{column-gap:24px}
.tlf-columns table{width:100%;margin:0;table-layout:fixed}
.tlf-columns td{overflow-wrap:anywhere}
.tlf-columns tr{break-inside:avoid}
.tlf-badge{display:inline-block;padding:.18em .75em;border-radius:4px;color:#fff;font-weight:700;letter-spacing:.04em}
.tlf-axes{display:flex;flex-wrap:wrap;gap:12px;margin:.7em 0}
.tlf-axes div{flex:1 1 260px;border:1px solid #d3d3da;border-radius:5px;padding:.45em .8em;font-size:.92em}
.tlf-axes b{display:block}
"""

_PAGE_STYLE = """
body{margin:0;background:#fff}
main.tlf{margin:0 auto;padding:24px 20px 40px}
h1{font-size:1.5em;line-height:1.25;margin:.2em 0 .7em}
.tlf h2{font-size:1.2em;margin:1.6em 0 .5em;border-bottom:1px solid #d3d3da;padding-bottom:.15em}
.tlf footer{margin-top:2.2em}
.tlf footer h2{font-size:1em}
@media print{main.tlf{max-width:none;padding:0}figure,tr,.tlf-axes,.tlf-tokens{break-inside:avoid}
 h2,h3,h4{break-after:avoid}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
