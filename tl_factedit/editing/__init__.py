"""What an edit is, and what every editor shares."""

from tl_factedit.backend.provenance import Provenance
from tl_factedit.core.namespaces import shows
from tl_factedit.core.solve import Factors
from tl_factedit.editing.adam import Adam
from tl_factedit.editing.delta import Delta, LayerUpdate
from tl_factedit.editing.description import describe
from tl_factedit.editing.diagnostics import Diagnostics
from tl_factedit.editing.inputs import EditInputs
from tl_factedit.editing.layerwise import layerwise_edit
from tl_factedit.editing.ledger import forget_edits_
from tl_factedit.editing.objectives import Amplify, EditTarget, Force, Objective, Reverse
from tl_factedit.editing.off_target import off_target_share
from tl_factedit.editing.value_fit import Fitted
from tl_factedit.editing.value_methods import AdamSteps, LineSearch
from tl_factedit.editing.values import fit_values
from tl_factedit.measure.change import Change

__all__ = [
    "Provenance",
    "Factors",
    "Adam",
    "Delta",
    "LayerUpdate",
    "describe",
    "Diagnostics",
    "EditInputs",
    "layerwise_edit",
    "forget_edits_",
    "Amplify",
    "EditTarget",
    "Force",
    "Objective",
    "Reverse",
    "off_target_share",
    "Fitted",
    "AdamSteps",
    "LineSearch",
    "fit_values",
    "Change",
]

__dir__ = shows(__all__)
