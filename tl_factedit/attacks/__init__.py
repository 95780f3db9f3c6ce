"""Ways back to the old object. One attack a file."""

from tl_factedit.attacks.attack import Attack, Case, Recovery
from tl_factedit.attacks.cells import Cell
from tl_factedit.attacks.context import ContextAttack, QuestionPrefix, RepeatPrefix, TextPrefix
from tl_factedit.attacks.disjoint_relearning import DisjointRelearning
from tl_factedit.attacks.drifting import Drift
from tl_factedit.attacks.footprints import Footprint, footprint
from tl_factedit.attacks.knockout import KnockOut
from tl_factedit.attacks.neutral import NeutralContexts, neutral_prefixes
from tl_factedit.attacks.readout import ReadOut
from tl_factedit.attacks.redundancies import Redundancy, redundancy
from tl_factedit.attacks.relearning import Relearn, relearning_rate
from tl_factedit.attacks.reversal import WeightReversal
from tl_factedit.attacks.rewording import Paraphrases
from tl_factedit.attacks.rounding import Rounding
from tl_factedit.attacks.routes import FollowRoutes, Routes, follow_routes
from tl_factedit.attacks.silencing import Silencing
from tl_factedit.core.namespaces import shows

__all__ = [
    "Attack",
    "Case",
    "Cell",
    "ContextAttack",
    "DisjointRelearning",
    "Drift",
    "FollowRoutes",
    "Footprint",
    "KnockOut",
    "NeutralContexts",
    "Paraphrases",
    "QuestionPrefix",
    "ReadOut",
    "Recovery",
    "Redundancy",
    "Relearn",
    "RepeatPrefix",
    "Rounding",
    "Routes",
    "Silencing",
    "TextPrefix",
    "WeightReversal",
    "follow_routes",
    "footprint",
    "neutral_prefixes",
    "redundancy",
    "relearning_rate",
]

__dir__ = shows(__all__)
