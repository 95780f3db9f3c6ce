"""Ways back to the old object. One attack a file."""

from tl_factedit.attacks.attack import Attack, Case, Recovery
from tl_factedit.attacks.context import ContextAttack, QuestionPrefix, RepeatPrefix, TextPrefix
from tl_factedit.attacks.disjoint_relearning import DisjointRelearning
from tl_factedit.attacks.knockout import KnockOut
from tl_factedit.attacks.readout import ReadOut
from tl_factedit.attacks.relearning import Relearn, relearning_rate
from tl_factedit.attacks.reversal import WeightReversal
from tl_factedit.attacks.routes import FollowRoutes, Routes, follow_routes

__all__ = [
    "Attack",
    "Case",
    "ContextAttack",
    "DisjointRelearning",
    "FollowRoutes",
    "KnockOut",
    "QuestionPrefix",
    "ReadOut",
    "Recovery",
    "Relearn",
    "RepeatPrefix",
    "Routes",
    "TextPrefix",
    "WeightReversal",
    "follow_routes",
    "relearning_rate",
]
