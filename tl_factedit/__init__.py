"""tl_factedit: locate facts in a language model, edit them in its weights, and audit what the edit did.

``import tl_factedit as fe`` beside TransformerLens; every call takes a HookedTransformer or a
TransformerBridge. Importing it runs, seeds, logs and downloads nothing.
"""

from tl_factedit import data, metrics, models, show
from tl_factedit.audit import Verdict, audit
from tl_factedit.contexts import SampledContexts, sample_texts
from tl_factedit.corruption import Corruption, GaussianNoise, GivenNoise, MultivariateNoise, UniformNoise
from tl_factedit.damage import noise_for_damage
from tl_factedit.edit import Delta, Diagnostics, Edit, Editor, compose
from tl_factedit.editors.alphaedit import AlphaEdit
from tl_factedit.editors.emmet import Emmet
from tl_factedit.editors.memit import Memit
from tl_factedit.editors.rome import Rome
from tl_factedit.estimate import Estimate
from tl_factedit.evaluate import Scores, evaluate
from tl_factedit.export import export_hf
from tl_factedit.facts import Fact
from tl_factedit.gain import Dose, Gains, dose_curve, gains
from tl_factedit.hooks import noise_hook, restore_hook
from tl_factedit.model import Model, UnsupportedModelError
from tl_factedit.presets import hase2023, meng2022, zhang2023
from tl_factedit.probe import Comparison, Probe, Reading, compare
from tl_factedit.probes.lens import LogitLens
from tl_factedit.provenance import Provenance
from tl_factedit.replacement import TokenReplacement
from tl_factedit.side_by_side import SideBySide, trace_side_by_side
from tl_factedit.stats import KeyStats, key_stats
from tl_factedit.trace import Trace, causal_trace
from tl_factedit.trace_units import UnitTrace, trace_units
from tl_factedit.values import ValueFit

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
    "sample_texts",
    "SampledContexts",
    "Rome",
    "Memit",
    "Emmet",
    "AlphaEdit",
    "ValueFit",
    "Edit",
    "Editor",
    "compose",
    "export_hf",
    "Delta",
    "Diagnostics",
    "gains",
    "Gains",
    "dose_curve",
    "Dose",
    "LogitLens",
    "Probe",
    "Reading",
    "Comparison",
    "compare",
    "audit",
    "Verdict",
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
