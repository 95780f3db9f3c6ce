"""tl_factedit: locate facts in a language model, edit them in its weights, and audit what the edit did.

``import tl_factedit as fe`` beside TransformerLens; every call takes a HookedTransformer or a
TransformerBridge. Importing it runs, seeds, logs and downloads nothing.
"""

from tl_factedit import data, models, show
from tl_factedit.attacks.context import ContextAttack, QuestionPrefix, RepeatPrefix, TextPrefix, attack_by_context
from tl_factedit.attacks.disjoint_relearning import DisjointRelearning, relearn_disjoint
from tl_factedit.attacks.knockout import KnockOut, knock_out
from tl_factedit.attacks.readout import ReadOut, read_out
from tl_factedit.attacks.relearning import Relearning, relearn, relearning_rate
from tl_factedit.attacks.reversal import Reversal, reverse_by_weights
from tl_factedit.attacks.routes import Route, Routes, follow_routes
from tl_factedit.auditing.audit import audit
from tl_factedit.auditing.findings import Thresholds
from tl_factedit.auditing.retained import Calibration, Retention, retention
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.backend.protocol import Model, UnsupportedModelError
from tl_factedit.backend.provenance import Provenance
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact
from tl_factedit.editing.composition import compose
from tl_factedit.editing.delta import Delta
from tl_factedit.editing.diagnostics import Diagnostics, EditWarning
from tl_factedit.editing.edit import Edit, Editor
from tl_factedit.editing.export import export_hf
from tl_factedit.editing.ledger import edits_on, undo_all_
from tl_factedit.editing.objectives import Amplify, EditTarget, Erase, Force, Inject, Objective, Reverse
from tl_factedit.editing.off_target import off_target_share
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editors.alphaedit import AlphaEdit
from tl_factedit.editors.emmet import Emmet
from tl_factedit.editors.finetune import FineTune
from tl_factedit.editors.knowledge_neurons import KnowledgeNeurons
from tl_factedit.editors.memit import Memit
from tl_factedit.editors.pmet import Pmet
from tl_factedit.editors.rome import Rome
from tl_factedit.editors.router import RoutedEdit, Router
from tl_factedit.evaluation.attribution import PositionAttribution, attribute_positions
from tl_factedit.evaluation.coverage import Coverage, gain_coverage
from tl_factedit.evaluation.dose import Dose, dose_curve
from tl_factedit.evaluation.edit_gains import Gains, gains
from tl_factedit.evaluation.erasure import ErasureSuccess, erasure_success
from tl_factedit.evaluation.mediation import Mediation, mediate
from tl_factedit.evaluation.same_subject import Specificity, specificity
from tl_factedit.evaluation.scores import Scores, evaluate
from tl_factedit.evaluation.text_drift import Drift, drift
from tl_factedit.locate import metrics
from tl_factedit.locate.agreement import CorruptionComparison, compare_corruptions
from tl_factedit.locate.calibration import calibrate_noise
from tl_factedit.locate.corruption import Corruption, GaussianNoise, GivenNoise, MultivariateNoise, UniformNoise
from tl_factedit.locate.hooks import noise_hook, restore_hook
from tl_factedit.locate.presets import hase2023, meng2022, zhang2023
from tl_factedit.locate.replacement import TokenReplacement
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import Trace
from tl_factedit.locate.units import UnitTrace, trace_units
from tl_factedit.measure.change import Change
from tl_factedit.measure.reading import Comparison, Probe, Reading, compare
from tl_factedit.probes.attributes import AttributeRate, Attributes, attributes_by_object
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.lens import LogitLens
from tl_factedit.probes.linear import Decoded, LinearProbe, OwnLinearProbe, Ruler, decode, train_ruler
from tl_factedit.probes.nulls import RandomWeights, excess_over_nulls, name_ngrams, one_hot_objects, subject_embeddings
from tl_factedit.probes.patchscope import CrossedPatchscope, Patchscope, crossed_patchscope, states_of_others
from tl_factedit.probes.permutation import Permutation, permutation_test
from tl_factedit.probes.residual import Residual, residual_knowledge
from tl_factedit.probes.scrubbing import Eraser, Erasure, erase_states, leace, random_subspace
from tl_factedit.probes.selectivity import ControlTask, control_task
from tl_factedit.probes.states import HiddenStates, read_states, read_states_edited
from tl_factedit.probes.tuned_lens import FixedAndRefitted, TunedLens, fixed_and_refitted, train_tuned_lens
from tl_factedit.stats.collect import key_stats
from tl_factedit.stats.convergence import Convergence, stats_convergence
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts, sample_texts

__all__ = [
    "Fact",
    "noise_hook",
    "restore_hook",
    "causal_trace",
    "Trace",
    "meng2022",
    "hase2023",
    "zhang2023",
    "trace_units",
    "UnitTrace",
    "compare_corruptions",
    "CorruptionComparison",
    "Corruption",
    "GaussianNoise",
    "UniformNoise",
    "MultivariateNoise",
    "GivenNoise",
    "TokenReplacement",
    "calibrate_noise",
    "key_stats",
    "KeyStats",
    "stats_convergence",
    "Convergence",
    "sample_texts",
    "SampledContexts",
    "Rome",
    "Memit",
    "Emmet",
    "AlphaEdit",
    "Pmet",
    "FineTune",
    "KnowledgeNeurons",
    "Router",
    "RoutedEdit",
    "Objective",
    "EditTarget",
    "Inject",
    "Erase",
    "Amplify",
    "Force",
    "Reverse",
    "ValueFit",
    "Edit",
    "Editor",
    "edits_on",
    "undo_all_",
    "compose",
    "export_hf",
    "Delta",
    "Diagnostics",
    "EditWarning",
    "off_target_share",
    "gains",
    "Gains",
    "dose_curve",
    "Dose",
    "LogitLens",
    "train_tuned_lens",
    "TunedLens",
    "fixed_and_refitted",
    "FixedAndRefitted",
    "AttributeRate",
    "Attributes",
    "attributes_by_object",
    "Patchscope",
    "crossed_patchscope",
    "CrossedPatchscope",
    "states_of_others",
    "read_states",
    "read_states_edited",
    "HiddenStates",
    "train_ruler",
    "LinearClassifier",
    "Ruler",
    "decode",
    "Decoded",
    "LinearProbe",
    "OwnLinearProbe",
    "residual_knowledge",
    "Residual",
    "subject_embeddings",
    "name_ngrams",
    "one_hot_objects",
    "RandomWeights",
    "control_task",
    "ControlTask",
    "excess_over_nulls",
    "permutation_test",
    "Permutation",
    "leace",
    "random_subspace",
    "Eraser",
    "erase_states",
    "Erasure",
    "Probe",
    "Reading",
    "Comparison",
    "compare",
    "Change",
    "knock_out",
    "KnockOut",
    "follow_routes",
    "Route",
    "Routes",
    "read_out",
    "ReadOut",
    "attack_by_context",
    "ContextAttack",
    "RepeatPrefix",
    "QuestionPrefix",
    "TextPrefix",
    "relearn",
    "relearn_disjoint",
    "relearning_rate",
    "Relearning",
    "DisjointRelearning",
    "reverse_by_weights",
    "Reversal",
    "mediate",
    "Mediation",
    "attribute_positions",
    "PositionAttribution",
    "gain_coverage",
    "Coverage",
    "specificity",
    "Specificity",
    "erasure_success",
    "ErasureSuccess",
    "drift",
    "Drift",
    "retention",
    "Retention",
    "Calibration",
    "audit",
    "Verdict",
    "Thresholds",
    "evaluate",
    "Scores",
    "Estimate",
    "Provenance",
    "Model",
    "UnsupportedModelError",
    "data",
    "metrics",
    "models",
    "show",
]
