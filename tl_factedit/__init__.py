"""tl_factedit: locate facts in a language model, edit them in its weights, and audit what the edit did.

``import tl_factedit as fe`` beside TransformerLens; every call takes a HookedTransformer or a
TransformerBridge. Importing it runs, seeds, logs and downloads nothing.

The names here are what most work needs. More of each kind stands in the namespaces: `locate`, `stats`, `editing`,
`editors`, `probes`, `attacks`, `evaluation`, `auditing`, `data`, `models` and `show`.
"""

from importlib.metadata import version as _version

from tl_factedit import attacks, auditing, data, editing, editors, evaluation, locate, models, probes, show, stats
from tl_factedit.attacks.routes import Route
from tl_factedit.auditing.audit import audit
from tl_factedit.auditing.calibration import Calibration
from tl_factedit.auditing.findings import Thresholds
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.backend.protocol import Model, UnsupportedModelError
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact
from tl_factedit.data.alignable import alignable
from tl_factedit.data.chat import chat_prompt
from tl_factedit.editing.composition import compose
from tl_factedit.editing.concerns import EditWarning
from tl_factedit.editing.edit import Edit, Editor
from tl_factedit.editing.export import export_hf, export_hf_
from tl_factedit.editing.ledger import edits_on, undo_all_
from tl_factedit.editing.objectives import Erase, Inject
from tl_factedit.editing.save_hf import save_hf
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editors.alphaedit import AlphaEdit
from tl_factedit.editors.emmet import Emmet
from tl_factedit.editors.finetune import FineTune
from tl_factedit.editors.knowledge_neurons import KnowledgeNeurons
from tl_factedit.editors.memit import Memit
from tl_factedit.editors.pmet import Pmet
from tl_factedit.editors.rome import Rome
from tl_factedit.editors.router import Router
from tl_factedit.evaluation.in_words import answers
from tl_factedit.evaluation.knowledge import known
from tl_factedit.evaluation.scores import Scores, evaluate
from tl_factedit.locate.corruption import GaussianNoise, GivenNoise
from tl_factedit.locate.hooks import noise_hook, restore_hook
from tl_factedit.locate.replacement import TokenReplacement
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import Trace
from tl_factedit.measure.population import Population
from tl_factedit.measure.reading import Probe, Reading, compare
from tl_factedit.probes.lens import LogitLens
from tl_factedit.stats.collect import key_stats
from tl_factedit.stats.key_stats import KeyStats

__version__ = _version("tl-factedit")

__all__ = [
    "Fact",
    "alignable",
    "chat_prompt",
    "known",
    "Model",
    "UnsupportedModelError",
    "causal_trace",
    "Trace",
    "noise_hook",
    "restore_hook",
    "GaussianNoise",
    "GivenNoise",
    "TokenReplacement",
    "key_stats",
    "KeyStats",
    "Rome",
    "Memit",
    "Emmet",
    "AlphaEdit",
    "Pmet",
    "FineTune",
    "KnowledgeNeurons",
    "Router",
    "ValueFit",
    "Inject",
    "Erase",
    "Edit",
    "Editor",
    "EditWarning",
    "compose",
    "edits_on",
    "undo_all_",
    "export_hf",
    "export_hf_",
    "save_hf",
    "Population",
    "Probe",
    "Reading",
    "compare",
    "LogitLens",
    "evaluate",
    "Scores",
    "answers",
    "Estimate",
    "audit",
    "Verdict",
    "Thresholds",
    "Route",
    "Calibration",
    "attacks",
    "auditing",
    "data",
    "editing",
    "editors",
    "evaluation",
    "locate",
    "models",
    "probes",
    "show",
    "stats",
]


def __dir__() -> list[str]:
    """The public face, and nothing of how it is put together."""
    return [*__all__, "__version__"]
