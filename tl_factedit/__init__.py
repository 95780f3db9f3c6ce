"""tl_factedit: locate facts in a language model, edit them in its weights, and audit what the edit did.

``import tl_factedit as fe`` beside TransformerLens; every call takes a HookedTransformer or a
TransformerBridge. Importing it runs, seeds, logs and downloads nothing.
"""

from tl_factedit import data, metrics, models, show
from tl_factedit.attribution import Attribution, attribute_positions
from tl_factedit.audit import Verdict, audit
from tl_factedit.change import Change
from tl_factedit.collateral import Asides, Drift, ask_asides, drift
from tl_factedit.context_attack import ContextAttack, QuestionPrefix, RepeatPrefix, TextPrefix, attack_by_context
from tl_factedit.contexts import SampledContexts, sample_texts
from tl_factedit.convergence import Convergence, stats_convergence
from tl_factedit.corruption import Corruption, GaussianNoise, GivenNoise, MultivariateNoise, UniformNoise
from tl_factedit.coverage import Coverage, gain_coverage
from tl_factedit.damage import noise_for_damage
from tl_factedit.edit import Delta, Diagnostics, Edit, Editor, EditWarning, compose, edits_on, spill, undo_all_
from tl_factedit.editors.alphaedit import AlphaEdit
from tl_factedit.editors.emmet import Emmet
from tl_factedit.editors.finetune import FineTune
from tl_factedit.editors.knowledge_neurons import KnowledgeNeurons
from tl_factedit.editors.memit import Memit
from tl_factedit.editors.pmet import Pmet
from tl_factedit.editors.rome import Rome
from tl_factedit.editors.router import RoutedEdit, Router
from tl_factedit.erasure import Eraser, Erasure, erase_states, leace, random_subspace
from tl_factedit.estimate import Estimate
from tl_factedit.evaluate import Scores, evaluate
from tl_factedit.export import export_hf
from tl_factedit.facts import Fact
from tl_factedit.forgetting import Forgotten, forgotten
from tl_factedit.gain import Dose, Gains, dose_curve, gains
from tl_factedit.hooks import noise_hook, restore_hook
from tl_factedit.knockout import KnockOut, knock_out
from tl_factedit.linear import LinearClassifier
from tl_factedit.mediation import Mediation, mediate
from tl_factedit.model import Model, UnsupportedModelError
from tl_factedit.objectives import Amplify, Erase, Force, Inject, Objective, Reverse, Wish
from tl_factedit.presets import hase2023, meng2022, zhang2023
from tl_factedit.probe import Comparison, Probe, Reading, compare
from tl_factedit.probes.attributes import AttributeRate, Attributes, attributes_by_object
from tl_factedit.probes.lens import LogitLens
from tl_factedit.probes.linear import Decoded, LinearProbe, OwnLinearProbe, Ruler, decode, train_ruler
from tl_factedit.probes.nulls import (
    ControlTask,
    Permutation,
    RandomWeights,
    control_task,
    excess_over_nulls,
    name_ngrams,
    one_hot_objects,
    permutation_test,
    subject_embeddings,
)
from tl_factedit.probes.patchscope import CrossedPatchscope, Patchscope, crossed_patchscope, states_of_others
from tl_factedit.probes.residual import Residual, residual_knowledge
from tl_factedit.probes.tuned_lens import FixedAndRefitted, TunedLens, fixed_and_refitted, train_tuned_lens
from tl_factedit.provenance import Provenance
from tl_factedit.readout import ReadOut, read_out
from tl_factedit.relearning import DisjointRelearning, Relearning, relearn, relearn_disjoint, relearning_rate
from tl_factedit.replacement import TokenReplacement
from tl_factedit.retention import Calibration, Retention, retention
from tl_factedit.reversal import Reversal, reverse_by_weights
from tl_factedit.routes import Route, Routes, follow_routes
from tl_factedit.side_by_side import SideBySide, trace_side_by_side
from tl_factedit.states import States, read_states, read_states_edited
from tl_factedit.stats import KeyStats, key_stats
from tl_factedit.trace import Trace, causal_trace
from tl_factedit.trace_units import UnitTrace, trace_units
from tl_factedit.values import ValueFit
from tl_factedit.verdict import Thresholds

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
    "trace_side_by_side",
    "SideBySide",
    "Corruption",
    "GaussianNoise",
    "UniformNoise",
    "MultivariateNoise",
    "GivenNoise",
    "TokenReplacement",
    "noise_for_damage",
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
    "Wish",
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
    "spill",
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
    "States",
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
    "Attribution",
    "gain_coverage",
    "Coverage",
    "ask_asides",
    "Asides",
    "forgotten",
    "Forgotten",
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
