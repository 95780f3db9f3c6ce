"""MEMIT: many facts at once over several layers, each layer a regularised least-squares update.

    Δ = C⁻¹Kᵀ (λ I + K C⁻¹Kᵀ)⁻¹ R

Meng et al. 2023 (arXiv:2210.07229). λ says what keeping other keys is worth: of a single fact the share
λ / (λ + kᵀC⁻¹k) of its residual is *not* met in a layer, and left to the layers above, or for good in the last. It is
reported for each fact and layer (`Diagnostics.unmet`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import factor
from tl_factedit.editing.layerwise import (
    MEMIT_CONTEXTS,
    MEMIT_FIT,
    Solver,
    check_layerwise,
    check_weight,
    layerwise_edit,
    regularised,
)
from tl_factedit.editing.objectives import Inject, Objective
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts


@dataclass(frozen=True)
class Memit:
    """The editor; call it with a model and facts.

    Attributes:
        stats: Second moments of the keys by layer: the layers to edit (what `key_stats` returns).
        weight: λ, in units of C = E[k kᵀ]: 15,000 is Meng et al.'s for GPT-J, 20,000 for GPT-2 XL. Look at
            `Diagnostics.unmet` for what it means on another model.
        unmet: Or: the share of what is asked of a layer that is to be left unmet, mean over facts, such as 0.1; λ is
            found for each layer.
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
        >>> edit = fe.Memit(stats)(model, facts)                  # doctest: +SKIP
        >>> edit.diagnostics[-1].unmet                            # doctest: +SKIP
    """

    stats: Mapping[int, KeyStats]
    weight: float | None = None
    unmet: float | None = None
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
        if self.weight is None and self.unmet is None:
            object.__setattr__(self, "weight", 15_000.0)
        check_weight(self.weight, self.unmet)

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
        return regularised(lower, self.weight, self.unmet)
