"""A router: the new object from a side memory, by construction an override and no change of what the model knows.

At one layer, where a token's key comes near a stored one, the MLP's output is replaced by the stored value::

    value_t  ←  v*_i   where i = argmin ‖k_t − k*_i‖ / ‖k*_i‖, if that is at most the radius

The weights stay as they are, and switched off it is the old model bit for bit: what every audit must call inserted.
After the codebook of GRACE (Hartvigsen et al. 2022, arXiv:2211.11031), with values as ROME finds them and without its
splitting of entries; WISE (Wang et al. 2024, arXiv:2405.14768) routes to a second weight matrix instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from tl_factedit.backend.memory import check_memory
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.editing.description import describe
from tl_factedit.editing.inputs import EditInputs, check_contexts, check_fit, prefixes
from tl_factedit.editing.ledger import made_on
from tl_factedit.editing.objectives import EditTarget
from tl_factedit.editing.outcome import outcomes
from tl_factedit.editing.routed_edit import RoutedEdit
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editing.values import fit_values
from tl_factedit.stats.sampling import SampledContexts


@dataclass(frozen=True)
class Router:
    """The editor; call it with a model and facts.

    Attributes:
        layer: The block whose MLP it answers for.
        radius: How far a key may be from a stored one, as a share of the stored one's norm.
        fit: How the values are optimised.
        contexts: Prefixes to average over: how to sample them, or the texts themselves.
        prepend_bos: BOS policy; None for the model's.
        memory: What activations may take while values are found, in GiB (None for a share of what is free).
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> routed = fe.Router(layer=8)(model, [fact])            # doctest: +SKIP
        >>> with routed.applied(model): ...                       # doctest: +SKIP
    """

    layer: int
    radius: float = 0.25
    fit: ValueFit = field(default_factory=ValueFit)
    contexts: SampledContexts | Sequence[str] = field(default_factory=SampledContexts)
    prepend_bos: bool | None = None
    memory: float | None = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        check_memory(self.memory)
        check_settings(self, above={"radius": 0})
        check_contexts(self.contexts)
        check_fit(self.fit)

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> RoutedEdit:
        """Find keys and values as ROME does; the model is as before when it returns.

        Raises:
            ValueError: No facts, a fact without ``target_new``, a layer outside the model; two keys within a radius.
            RuntimeError: The optimisation is not finite.
        """
        inputs = EditInputs.of(model, facts, [self.layer], fit=self.fit, prepend_bos=self.prepend_bos, writes=False)
        contexts = prefixes(self.contexts, inputs)
        fitted = fit_values(
            model,
            inputs.facts,
            self.layer,
            contexts,
            fit=self.fit,
            prepend_bos=inputs.prepend_bos,
            memory=self.memory,
            progress=self.progress,
        )
        routed = RoutedEdit(
            facts=inputs.facts,
            layer=self.layer,
            keys=torch.stack([fit.keys.mean(0) for fit in fitted]).cpu(),
            values=torch.stack([fit.outputs.mean(0) + fit.delta for fit in fitted]).cpu(),
            radius=self.radius,
            editor=describe(self),
            contexts=contexts,
            fits=(),
            provenance=made_on(
                model, inputs.prepend_bos, inputs.base, [*contexts, *(fact.text for fact in inputs.facts)]
            ),
        )
        targets = [EditTarget(fact) for fact in inputs.facts]
        said = outcomes(model, targets, routed.hooks(model), prepend_bos=inputs.prepend_bos)
        return replace(
            routed,
            fits=tuple(
                {**fit.record, **outcome, "same_first_token": prompt.same_first_token}
                for fit, outcome, prompt in zip(fitted, said, inputs.prompts, strict=True)
            ),
        )
