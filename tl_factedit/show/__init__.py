"""Pictures of results: heat maps of traces, edits' gains on a text, verdicts, scores, and reports of them.

Each function takes a result and returns a `Picture`, which a notebook shows and a file holds,
complete and offline. Nothing is computed here but `edit`'s gains; nothing inside the package
imports this file. Colours stand for numbers that are there to read as well (in tooltips and tables).
"""

from __future__ import annotations

from tl_factedit.show.attacks import attack
from tl_factedit.show.edits import edit
from tl_factedit.show.page import Picture
from tl_factedit.show.reports import report
from tl_factedit.show.score_tables import scores
from tl_factedit.show.traces import average, trace
from tl_factedit.show.verdicts import verdict

__all__ = ["Picture", "attack", "average", "edit", "report", "scores", "trace", "verdict"]
