"""What a change does: scores, specificity, drift, gains."""

from tl_factedit.core.namespaces import shows
from tl_factedit.evaluation.attribution import PositionAttribution, attribute_positions
from tl_factedit.evaluation.cases import EditCase, Query, Question
from tl_factedit.evaluation.coverage import Coverage, gain_coverage
from tl_factedit.evaluation.dose import Dose, dose_curve
from tl_factedit.evaluation.edit_gains import Gains, gains
from tl_factedit.evaluation.elicitation import Elicited, elicit
from tl_factedit.evaluation.erasure import ErasureSuccess, erasure_success
from tl_factedit.evaluation.in_words import Answer, Answers
from tl_factedit.evaluation.mediation import Mediation, mediate
from tl_factedit.evaluation.published_scores import ThreeScores, magnitudes, rewrite_scores
from tl_factedit.evaluation.ripple_effects import Ripples, ripples
from tl_factedit.evaluation.same_subject import Specificity, specificity
from tl_factedit.evaluation.score_comparison import compare_scores
from tl_factedit.evaluation.teacher_forced import TokenAccuracy, token_accuracy
from tl_factedit.evaluation.text_drift import TextDrift, drift

__all__ = [
    "Answer",
    "Answers",
    "EditCase",
    "Query",
    "Question",
    "ThreeScores",
    "compare_scores",
    "magnitudes",
    "rewrite_scores",
    "Ripples",
    "ripples",
    "PositionAttribution",
    "attribute_positions",
    "Coverage",
    "gain_coverage",
    "Dose",
    "dose_curve",
    "Gains",
    "gains",
    "Elicited",
    "elicit",
    "ErasureSuccess",
    "erasure_success",
    "Mediation",
    "mediate",
    "Specificity",
    "specificity",
    "TextDrift",
    "drift",
    "TokenAccuracy",
    "token_accuracy",
]

__dir__ = shows(__all__)
