"""ROME: one fact, one layer, a rank-one update of ``W_out``.

    W += u ⊗ r / (uᵀ k*),   u = C⁻¹ k*,   r = v* − (k* W + b)

Meng et al. 2022 (arXiv:2202.05262, eq. 2). By default one key k* is used throughout, as in R-ROME
(Gupta et al. 2024, arXiv:2403.07175): the mean over contexts. ``variant="original"`` is Meng et al.'s
own code, which averages the key in u but divides by, and starts from, the bare prompt's key.
With `KeyStats.identity` the update is the plain ``k* ⊗ r / k*ᵀk*``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tl_factedit.backend.memory import check_memory
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact
from tl_factedit.core.kinds import check_one
from tl_factedit.core.solve import rank_one, whiten
from tl_factedit.editing.delta import Delta, LayerUpdate
from tl_factedit.editing.description import describe
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import (
    EditInputs,
    check_contexts,
    check_facts,
    check_fit,
    check_objective,
    check_ridge,
    factor,
    prefixes,
)
from tl_factedit.editing.objectives import Inject, Objective
from tl_factedit.editing.value_fit import Fitted, ValueFit
from tl_factedit.editing.values import fit_values
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts


@dataclass(frozen=True)
class Rome:
    """The editor; call it with a model and one fact.

    Note:
        R-ROME's code adds δ to the *bare* prompt's value and subtracts the *mean* output. Here
        r = δ (``target_ref="mean"``), since δ is what was optimised in every context;
        ``target_ref="bare"`` is their way.

    Attributes:
        stats: Second moment of the keys of the layer to edit (or what `key_stats` returned for one).
        variant: ``"consistent"`` (one key, R-ROME) or ``"original"`` (Meng et al.).
        target_ref: To which value δ is added in the consistent variant.
        objective: What is wanted of the fact: `Inject` (its ``target_new``), `Erase`, `Amplify`, `Force`, `Reverse`.
        fit: How v* is optimised.
        contexts: Prefixes to average over: how to sample them, or the texts themselves (the bare
            prompt is always the first).
        ridge: Added to C, as a share of its mean eigenvalue; 0 asks for ten tokens a dimension.
        prepend_bos: BOS policy; None for that of the statistics, or else the model's.
        memory: What activations may take while values are fitted, in GiB (None for a share of what is free): sets how
            many facts of `each` go together.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> edit = fe.Rome(stats[8])(model, [fact])               # doctest: +SKIP
        >>> edit.apply_(model)                                    # doctest: +SKIP
        >>> edit.undo_(model)                                     # doctest: +SKIP
        >>> edits = fe.Rome(stats[8]).each(model, facts)          # doctest: +SKIP
    """

    stats: KeyStats | Mapping[int, KeyStats]
    variant: Literal["consistent", "original"] = "consistent"
    target_ref: Literal["mean", "bare"] = "mean"
    objective: Objective = field(default_factory=Inject)
    fit: ValueFit = field(default_factory=ValueFit)
    contexts: SampledContexts | Sequence[str] = field(default_factory=SampledContexts)
    ridge: float = 0.0
    prepend_bos: bool | None = None
    memory: float | None = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Take the one layer out of a mapping, and check the choices."""
        check_memory(self.memory)
        if isinstance(self.stats, Mapping):
            if len(self.stats) != 1:
                raise ValueError(f"stats holds layers {sorted(self.stats)}, needed one: give Rome(stats[layer])")
            ((layer, stats),) = self.stats.items()
            check_one(stats, KeyStats, f"stats[{layer!r}]", "KeyStats: key_stats(model, layer, texts)[layer]")
            if stats.layer != layer:
                raise ValueError(
                    f"stats has the statistics of layer {stats.layer} under {layer}: give Rome(stats[layer])"
                )
            object.__setattr__(self, "stats", stats)
        if not isinstance(self.stats, KeyStats):
            raise ValueError(
                f"stats is a {type(self.stats).__name__}, needed KeyStats: key_stats(model, layer, texts)[layer], or "
                "KeyStats.identity(model, layer) for the plain update"
            )
        if self.variant not in ("consistent", "original"):
            raise ValueError(f"variant {self.variant!r} is unknown, needed 'consistent' or 'original'")
        if self.target_ref not in ("mean", "bare"):
            raise ValueError(f"target_ref {self.target_ref!r} is unknown, needed 'mean' or 'bare'")
        check_ridge(self.ridge)
        check_objective(self.objective)
        check_contexts(self.contexts)
        check_fit(self.fit)

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Edit:
        """Make the edit of one fact; the weights are as before when it returns.

        Raises:
            ValueError: Not exactly one fact, one that lacks what the objective needs, a layer outside the model,
                statistics of other weights, or a second moment that can't be inverted.
            RuntimeError: The optimisation is not finite.
        """
        if len(facts := check_facts(facts, self.objective)) != 1:
            raise ValueError(
                f"Rome writes one fact, got {len(facts)}: take Rome(...).each(model, facts), which makes an edit of "
                "each, and apply them one by one"
            )
        return self.each(model, facts)[0]

    @plain_torch()
    def each(self, model: Model, facts: Sequence[Fact]) -> list[Edit]:
        """Make an edit of each fact, as if it were the only one; the weights are as before when it returns.

        The same edits as calling Rome on each fact, up to rounding, in about half the time: contexts are drawn once,
        and the values of many facts are fitted together. What an `audit` of many single edits wants.

        Raises:
            ValueError: As for one fact; or a fact that is given twice.
            RuntimeError: An optimisation is not finite.
        """
        stats = self._stats
        inputs = EditInputs.of(
            model,
            facts,
            [stats.layer],
            objective=self.objective,
            stats=[stats],
            ridge=self.ridge,
            fit=self.fit,
            prepend_bos=self.prepend_bos,
        )
        bos = inputs.prepend_bos
        # Before any forward pass, as it may fail; the identity needs none.
        lower = None if stats.is_identity else factor(stats, self.ridge)
        contexts = prefixes(self.contexts, inputs)
        with frozen(model):
            # Each by itself, as some objectives look at all facts they are given (the spread of their embeddings).
            targets = [self.objective.targets(model, [fact], prepend_bos=bos)[0] for fact in inputs.facts]
            fits = fit_values(
                model,
                targets,
                stats.layer,
                contexts,
                fit=self.fit,
                prepend_bos=bos,
                memory=self.memory,
                progress=self.progress,
            )
            return [
                Edit.made(
                    inputs.only(i),
                    [self._update(fitted, lower)],
                    editor=describe(self),
                    contexts=contexts,
                    fits=[fitted.record],
                    targets=[target],
                )
                for i, (target, fitted) in enumerate(zip(targets, fits, strict=True))
            ]

    def _update(self, fitted: Fitted, lower: Tensor | None) -> LayerUpdate:
        """The rank-one update that writes a fitted value."""
        mean_key = fitted.keys.mean(0)
        direction = mean_key if lower is None else whiten(lower, mean_key)
        if self.variant == "original":
            key, now, ref = fitted.keys[0], fitted.outputs[0], fitted.outputs[0]
        else:
            key, now = mean_key, fitted.outputs.mean(0)
            ref = now if self.target_ref == "mean" else fitted.outputs[0]
        value = ref + fitted.delta
        layer = self._stats.layer
        try:
            factors = rank_one(direction, key, fitted.delta if self.variant == "original" else value - now)
        except ZeroDivisionError as error:
            raise ValueError(
                f"{error}: nothing can be written at layer {layer} for this subject (its key is "
                f"{'0' if not bool(key.any()) else 'orthogonal to the mean key'}); choose another layer"
            ) from error
        delta = Delta(layer, factors.left, factors.right)
        return LayerUpdate(delta, key[None], directions=direction[None], values=value[None])

    @property
    def _stats(self) -> KeyStats:
        assert isinstance(self.stats, KeyStats)
        return self.stats
