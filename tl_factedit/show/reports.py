"""A report: one file that opens offline."""

from __future__ import annotations

from pathlib import Path

from tl_factedit.attacks.attack import Recovery
from tl_factedit.attacks.redundancies import Redundancy
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.backend.state import plain_torch
from tl_factedit.core import files
from tl_factedit.editing.edit import Edit
from tl_factedit.evaluation.elicitation import Elicited
from tl_factedit.evaluation.in_words import Answers
from tl_factedit.evaluation.ripple_effects import Ripples
from tl_factedit.evaluation.scores import Scores
from tl_factedit.locate.trace_result import Trace
from tl_factedit.show.attacks import attack
from tl_factedit.show.markup import Html, join, tag
from tl_factedit.show.page import Picture, check_page, document
from tl_factedit.show.redundancies import redundancy
from tl_factedit.show.said import answers, elicited, ripples
from tl_factedit.show.score_tables import scores
from tl_factedit.show.trace_averages import average
from tl_factedit.show.traces import trace
from tl_factedit.show.verdicts import verdict

_Item = Picture | Trace | Verdict | Scores | Recovery | Redundancy | Answers | Ripples | Elicited | str


@plain_torch()
def report(path: str | Path, *items: _Item | tuple[str, _Item], title: str = "Fact editing report") -> Path:
    """Write one HTML file that needs nothing else: no network, no other file.

    Args:
        path: The file to write; a page that is there is replaced.
        items: Pictures and results (a `Trace`, `Verdict`, `Scores`, `Redundancy`, `Answers`, `Ripples` or `Elicited` is
            drawn by the function of this name, a `Recovery` by `attack`, a trace of several facts by `average`), plain
            text (an empty line begins a paragraph), or ``(heading, item)``.
        title: Title of the page.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to write.
        TypeError: An item is none of these.
        FileExistsError: Something else than a page is there.

    Example:
        >>> fe.show.report("report.html", "What I did.", ("Where it is", trace), verdict)  # doctest: +SKIP
    """
    if not items:
        raise ValueError("the report is empty, needed at least one picture, result or text")
    sections, pictures = [], []
    for item in items:
        heading, what = item if isinstance(item, tuple) else (None, item)
        if isinstance(what, str):
            sections.append(tag("section", heading and tag("h2", heading), *_paragraphs(what)))
            continue
        picture = _drawn(what)
        pictures.append(picture)
        sections.append(
            tag(
                "section",
                tag("h2", heading or picture.title),
                heading and tag("h3", picture.title),
                picture.body,
            )
        )
    path = files.pinned(path)
    check_page(path)
    provenance = [one for picture in pictures for one in picture.provenance]
    page = document(title, join(*sections, between="\n"), provenance, live=any(p.live for p in pictures))
    with files.replacing(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _drawn(what: object) -> Picture:
    if isinstance(what, Picture):
        return what
    if isinstance(what, Trace):
        return trace(what) if len(what.facts) == 1 else average(what)
    if isinstance(what, Verdict):
        return verdict(what)
    if isinstance(what, Scores):
        return scores(what)
    if isinstance(what, Recovery):
        return attack(what)
    if isinstance(what, Redundancy):
        return redundancy(what)
    if isinstance(what, Answers):
        return answers(what)
    if isinstance(what, Ripples):
        return ripples(what)
    if isinstance(what, Elicited):
        return elicited(what)
    hint = ": draw it with fe.show.edit(model, edit, text)" if isinstance(what, Edit) else ""
    raise TypeError(
        f"a report can't hold a {type(what).__name__}, needed a Picture, text, or a result that has one: "
        f"Trace, Verdict, Scores, Recovery, Redundancy, Answers, Ripples, Elicited{hint}"
    )


def _paragraphs(text: str) -> list[Html]:
    return [tag("p", part) for part in text.split("\n\n") if part.strip()]
