"""AlphaEdit: MEMIT's way over the layers, with updates confined to where stored keys hardly lie.

    Δ = (P (KᵀK + K_pᵀK_p) + λ I)⁻¹ P Kᵀ R

Fang et al. 2024 (arXiv:2410.02355). P projects onto the eigenvectors of C = E[k kᵀ] with the smallest eigenvalues, so
Δ answers keys outside of them with exactly nothing; K_p are the keys of earlier edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.solve import Factors, in_null_space, null_space
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import bos_of, check_number
from tl_factedit.editing.layerwise import MEMIT_CONTEXTS, MEMIT_FIT, Solver, check_layerwise, layerwise_edit
from tl_factedit.editing.ledger import base_fingerprint
from tl_factedit.editing.objectives import Inject, Objective
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts


@dataclass(frozen=True)
class AlphaEdit:
    """The editor; call it with a model and facts.

    Attributes:
        stats: Second moments of the keys by layer: the layers to edit (what `key_stats` returns).
        threshold: Eigenvalues of C below it count as null (their rule, 0.02 for GPT-J; it scales with the keys).
        share: Or: the smallest eigenvalues that hold this share of C's trace do. The default, at 0.02.
        weight: λ, which keeps the update small.
        earlier: Edits whose keys this one is to keep, as in their sequences of edits (K_p).
        objective: What is wanted of the facts: `Inject` (their ``target_new``), `Erase`, `Amplify`, `Force`, `Reverse`.
        fit: How z is found; its clamp is 0.75, not ROME's 4.
        contexts: Prefixes to average over: how to sample them, or the texts themselves.
        prepend_bos: BOS policy; None for that of the statistics, or else the model's.
        memory: What activations may take while z is found, in GiB (None for a share of what is free): sets how many
            facts go together.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> stats = fe.key_stats(model, [3, 4, 5, 6, 7], texts)   # doctest: +SKIP
        >>> first = fe.AlphaEdit(stats)(model, facts)             # doctest: +SKIP
        >>> with first.applied(model):                            # doctest: +SKIP
        ...     second = fe.AlphaEdit(stats, earlier=[first])(model, others)
    """

    stats: Mapping[int, KeyStats]
    threshold: float | None = None
    share: float | None = None
    weight: float = 10.0
    earlier: Iterable[Edit] = ()
    objective: Objective = field(default_factory=Inject)
    fit: ValueFit = MEMIT_FIT
    contexts: SampledContexts | Sequence[str] = MEMIT_CONTEXTS
    prepend_bos: bool | None = None
    memory: float | None = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        object.__setattr__(self, "stats", check_layerwise(self, ridge=None))
        if self.threshold is None and self.share is None:
            object.__setattr__(self, "share", 0.02)
        if self.threshold is not None and self.share is not None:
            raise ValueError(f"threshold is {self.threshold} and share is {self.share}, needed one of the two")
        check_number("weight", self.weight)
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}, needed more than 0")
        if isinstance(self.earlier, Edit):
            raise ValueError("earlier is one Edit, needed a list of them: write [edit]")
        object.__setattr__(self, "earlier", tuple(self.earlier))
        for edit in self.earlier:
            if not isinstance(edit, Edit):
                raise ValueError(f"earlier has a {type(edit).__name__}, needed Edits, whose keys are to be kept")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}, needed more than 0 and less than 1: of C's trace")
        for stats in self.stats.values():
            if stats.is_identity:
                raise ValueError(
                    f"the statistics of layer {stats.layer} are the identity, in which no direction holds less than "
                    "another: collect them with key_stats"
                )

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Edit:
        """Make the edit; the weights are as before when it returns.

        Raises:
            ValueError: No facts, a fact that lacks what the objective needs, statistics or earlier edits of other
                weights, or no direction left.
            RuntimeError: The optimisation is not finite.
        """
        self._check_earlier(model)
        return layerwise_edit(self, model, facts, ridge=None)

    def _check_earlier(self, model: Model) -> None:
        if not self.earlier:
            return
        base = base_fingerprint(model)
        bos = bos_of(self.stats.values(), self.prepend_bos, model)
        for edit in self.earlier:
            if not edit.provenance.weights.matches(base):
                raise ValueError(
                    f"an earlier edit is of {edit.provenance.model!r} with weights {edit.provenance.weights}, but the "
                    f"model has weights {base}: its keys are none of this model"
                )
            if edit.provenance.prepend_bos != bos:
                raise ValueError(
                    f"an earlier edit was made with prepend_bos={edit.provenance.prepend_bos}, needed {bos} as here: "
                    "its keys are other ones"
                )

    @plain_torch()
    def solver(self, stats: KeyStats) -> Solver:
        """The closed form for one layer."""
        moment = stats.moment.double()
        projection = null_space(moment, threshold=self.threshold, share=self.share)
        kept = [edit.keys[stats.layer] for edit in self.earlier if stats.layer in edit.keys]
        before = torch.cat(kept) if kept else moment.new_zeros(0, len(moment))

        def solve(keys: Tensor, residuals: Tensor) -> Factors:
            where = keys.device
            return in_null_space(keys, residuals, projection.to(where), before.to(where), self.weight)

        return solve
