"""PMET: MEMIT with a target for the MLP alone, found while the attention is optimised beside it.

    δ_attn, δ_mlp  =  argmin  NLL + a · KL + b · (‖δ_attn‖ / ‖v_attn‖² + ‖δ_mlp‖ / ‖v_mlp‖²)
    Δ = C⁻¹Kᵀ (λ I + K C⁻¹Kᵀ)⁻¹ R,        R = (Z − W_out's answer in the last layer) / √(layers left)

Li et al. 2023 (arXiv:2308.08742). The two δ are added at the last subject token to what the attention and what
``W_out`` of the last edited layer hand on; δ_attn takes up what the attention would have to contribute and is
dropped, and Z = v_mlp + δ_mlp is what ``W_out`` is to answer there.
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

PMET_FIT = ValueFit(steps=30, lr=0.2, kl_weight=1.0, clamp=0.75, ease=0.1, stop_kl=0.01)
"""How Li et al. find the two δ."""


@dataclass(frozen=True)
class Pmet:
    """The editor; call it with a model and facts.

    Note:
        As in the hyperparameters that Li et al. give for GPT-J, ``W_out`` alone is written; their code can write the
        attention's output matrix too. Z is a target of ``W_out`` and not of the residual stream, as in that code: what
        the layers below write reaches it only through what they change in the last layer's key, so that the last
        layer, where all that is missing is asked for, writes most of it. Where the attention comes before the MLP, the
        key also lacks what δ_attn would have made of it.

    Attributes:
        stats: Second moments of the keys by layer: the layers to edit (what `key_stats` returns).
        weight: λ, in units of C = E[k kᵀ]: 6,000 is Li et al.'s for GPT-J. Look at `Diagnostics.unmet` for what it
            means on another model.
        unmet: Or: the share of what is asked of a layer that is to be left unmet, mean over facts; λ is found for each.
        objective: What is wanted of the facts: `Inject` (their ``target_new``), `Erase`, `Amplify`, `Force`, `Reverse`.
        fit: How the two δ are found, each with its own clamp. KL counts 16 times as much as for MEMIT; where the new
            object comes first everywhere, the NLL counts a tenth (`ValueFit.ease`), and the fit stops once KL is small
            (`ValueFit.stop_kl`).
        contexts: Prefixes to average over: how to sample them, or the texts themselves.
        ridge: Added to C, as a share of its mean eigenvalue; 0 asks for ten tokens a dimension.
        prepend_bos: BOS policy; None for that of the statistics, or else the model's.
        memory: What activations may take while Z is found, in GiB (None for a share of what is free): sets how many
            facts go together.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> stats = fe.key_stats(model, [3, 4, 5, 6, 7], texts)   # doctest: +SKIP
        >>> edit = fe.Pmet(stats)(model, facts)                   # doctest: +SKIP
        >>> edit.diagnostics[-1].unmet                            # doctest: +SKIP
    """

    stats: Mapping[int, KeyStats]
    weight: float | None = None
    unmet: float | None = None
    objective: Objective = field(default_factory=Inject)
    fit: ValueFit = PMET_FIT
    contexts: SampledContexts | Sequence[str] = MEMIT_CONTEXTS
    ridge: float = 0.0
    prepend_bos: bool | None = None
    memory: float | None = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        object.__setattr__(self, "stats", check_layerwise(self, ridge=self.ridge))
        if self.weight is None and self.unmet is None:
            object.__setattr__(self, "weight", 6_000.0)
        check_weight(self.weight, self.unmet)

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Edit:
        """Make the edit; the weights are as before when it returns.

        Raises:
            ValueError: No facts, a fact that lacks what the objective needs, statistics of other weights, or a second
                moment that can't be inverted.
            RuntimeError: The optimisation is not finite.
        """
        return layerwise_edit(self, model, facts, ridge=self.ridge, where="modules", divide="root")

    @plain_torch()
    def solver(self, stats: KeyStats) -> Solver:
        """The closed form for one layer."""
        lower = factor(stats, self.ridge)
        return regularised(lower, self.weight, self.unmet)
