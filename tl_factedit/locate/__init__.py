"""Where is a fact recalled? Causal tracing."""

from tl_factedit.core.namespaces import shows
from tl_factedit.locate import metrics
from tl_factedit.locate.agreement import CorruptionComparison, compare_corruptions
from tl_factedit.locate.calibration import calibrate_noise, embedding_std
from tl_factedit.locate.corruption import Corruption, MultivariateNoise, UniformNoise
from tl_factedit.locate.presets import hase2023, meng2022, zhang2023
from tl_factedit.locate.units import UnitTrace, trace_units

__all__ = [
    "metrics",
    "CorruptionComparison",
    "compare_corruptions",
    "calibrate_noise",
    "embedding_std",
    "Corruption",
    "MultivariateNoise",
    "UniformNoise",
    "hase2023",
    "meng2022",
    "zhang2023",
    "UnitTrace",
    "trace_units",
]

__dir__ = shows(__all__)
