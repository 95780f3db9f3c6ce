"""What an edit is, and what every editor shares."""

from tl_factedit.backend.provenance import Provenance
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.diagnostics import Diagnostics
from tl_factedit.editing.objectives import Amplify, EditTarget, Force, Objective, Reverse
from tl_factedit.editing.off_target import off_target_share
from tl_factedit.measure.change import Change

__all__ = [
    "Provenance",
    "Delta",
    "Diagnostics",
    "Amplify",
    "EditTarget",
    "Force",
    "Objective",
    "Reverse",
    "off_target_share",
    "Change",
]
