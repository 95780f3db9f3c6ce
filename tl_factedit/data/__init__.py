"""Fact sets in their published layouts, as lists of `Fact`, and texts for key statistics. The only parser of files.

Objects get the space in front that makes them continuations. A record whose subject can't be
found in its own prompt is an error that names it, never skipped.
"""

from __future__ import annotations

from tl_factedit.core.namespaces import shows
from tl_factedit.data.benchmarks import counterfact, counterfact_brief, known_facts, zsre
from tl_factedit.data.columns import Facts, facts, to_frame
from tl_factedit.data.corpora import Corpus, corpus, python_manual
from tl_factedit.data.pairs import relations
from tl_factedit.data.real_world import world
from tl_factedit.data.ripple_files import knowedit, mquake, ripple_edits
from tl_factedit.data.selecting import Selected, select

__all__ = [
    "Corpus",
    "Facts",
    "corpus",
    "counterfact",
    "counterfact_brief",
    "facts",
    "knowedit",
    "known_facts",
    "mquake",
    "python_manual",
    "relations",
    "ripple_edits",
    "select",
    "Selected",
    "to_frame",
    "world",
    "zsre",
]

__dir__ = shows(__all__)
