"""Ways back to the old object. One attack a file."""

from tl_factedit.attacks.context import ContextAttack, QuestionPrefix, RepeatPrefix, TextPrefix, attack_by_context
from tl_factedit.attacks.disjoint_relearning import DisjointRelearning, relearn_disjoint
from tl_factedit.attacks.knockout import KnockOut, knock_out
from tl_factedit.attacks.readout import ReadOut, read_out
from tl_factedit.attacks.relearning import Relearning, relearn, relearning_rate
from tl_factedit.attacks.reversal import Reversal, reverse_by_weights
from tl_factedit.attacks.routes import Routes, follow_routes

__all__ = [
    "ContextAttack",
    "QuestionPrefix",
    "RepeatPrefix",
    "TextPrefix",
    "attack_by_context",
    "DisjointRelearning",
    "relearn_disjoint",
    "KnockOut",
    "knock_out",
    "ReadOut",
    "read_out",
    "Relearning",
    "relearn",
    "relearning_rate",
    "Reversal",
    "reverse_by_weights",
    "Routes",
    "follow_routes",
]
