"""Pictures of results: heat maps of traces, an edit's gains on a text, scores, verdicts, and reports of them.

Each function takes a result and returns a `Picture`, which a notebook shows and which a file holds, complete and
offline. Nothing is computed here but the gains of `edit`. Every number that a colour stands for can be read as well, in
tooltips and tables.
"""

from __future__ import annotations

from tl_factedit.core.namespaces import shows
from tl_factedit.show.attacks import attack
from tl_factedit.show.edits import edit
from tl_factedit.show.footprints import footprint
from tl_factedit.show.page import Picture
from tl_factedit.show.redundancies import redundancy
from tl_factedit.show.reports import report
from tl_factedit.show.said import answers, elicited, ripples
from tl_factedit.show.score_tables import scores
from tl_factedit.show.trace_averages import average
from tl_factedit.show.traces import trace
from tl_factedit.show.verdicts import verdict

__all__ = [
    "Picture",
    "answers",
    "attack",
    "average",
    "edit",
    "elicited",
    "footprint",
    "redundancy",
    "report",
    "ripples",
    "scores",
    "trace",
    "verdict",
]

__dir__ = shows(__all__)
