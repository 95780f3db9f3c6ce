"""Second moments of keys."""

from tl_factedit.core.namespaces import shows
from tl_factedit.stats.convergence import Convergence, stats_convergence
from tl_factedit.stats.sampling import SampledContexts, sample_texts

__all__ = [
    "Convergence",
    "stats_convergence",
    "SampledContexts",
    "sample_texts",
]

__dir__ = shows(__all__)
