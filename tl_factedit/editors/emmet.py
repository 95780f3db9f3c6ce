"""EMMET: as MEMIT, but every residual is met exactly.

    Δ = C⁻¹Kᵀ (K C⁻¹Kᵀ)⁻¹ R

Gupta et al. 2024 (arXiv:2403.14236): of all updates that write these values at these keys, the one that changes other
keys least. For one fact and layer it is ROME's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.solve import least_squares
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import check_number, factor
from tl_factedit.editing.layerwise import MEMIT_CONTEXTS, MEMIT_FIT, Solver, check_layerwise, layerwise_edit
from tl_factedit.editing.objectives import Inject, Objective
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts


@dataclass(frozen=True)
class Emmet:
    """The editor; call it with a model and facts.

    Attributes:
        stats: Second moments of the keys by layer: the layers to edit (what `key_stats` returns).
        weight: ε, added to K C⁻¹Kᵀ: 0 meets all residuals, which needs keys that aren't nearly the same; their code
            takes 0.1 for several facts. With C scaled by w there, it is MEMIT with λ = w ε.
        objective: What is wanted of the facts: `Inject` (their ``target_new``), `Erase`, `Amplify`, `Force`, `Reverse`.
        fit: How z is found; its clamp is 0.75, not ROME's 4.
        contexts: Prefixes to average over: how to sample them, or the texts themselves.
        ridge: Added to C, as a share of its mean eigenvalue; 0 asks for ten tokens a dimension.
        prepend_bos: BOS policy; None for that of the statistics, or else the model's.
        memory: What activations may take while z is found, in GiB (None for a share of what is free): sets how many
            facts go together.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> stats = fe.key_stats(model, [3, 4, 5, 6, 7], texts)   # doctest: +SKIP
        >>> edit = fe.Emmet(stats)(model, facts)                  # doctest: +SKIP
        >>> edit.diagnostics[-1].exactness                        # doctest: +SKIP
    """

    stats: Mapping[int, KeyStats]
    weight: float = 0.0
    objective: Objective = field(default_factory=Inject)
    fit: ValueFit = MEMIT_FIT
    contexts: SampledContexts | Sequence[str] = MEMIT_CONTEXTS
    ridge: float = 0.0
    prepend_bos: bool | None = None
    memory: float | None = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        object.__setattr__(self, "stats", check_layerwise(self, ridge=self.ridge))
        check_number("weight", self.weight)
        if not self.weight >= 0:
            raise ValueError(f"weight is {self.weight}, needed 0 or more")

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Edit:
        """Make the edit; the weights are as before when it returns.

        Raises:
            ValueError: No facts, a fact that lacks what the objective needs, statistics of other weights, or a second
                moment that can't be inverted.
            RuntimeError: The optimisation is not finite.
        """
        return layerwise_edit(self, model, facts, ridge=self.ridge)

    @plain_torch()
    def solver(self, stats: KeyStats) -> Solver:
        """The closed form for one layer."""
        lower = factor(stats, self.ridge)
        return lambda keys, residuals: least_squares(keys, residuals, lower.to(keys.device), self.weight)
