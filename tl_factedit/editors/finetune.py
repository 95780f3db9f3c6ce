"""Fine-tuning of ``W_out`` in a few layers (FT), or the same held within a box around the old weights (FT-L).

    minimise   mean_facts  −1/T Σ_i log p(o_i | prompt, o_<i)      over W_out of the layers, by Adam
    subject to ‖W − W₀‖_∞ ≤ ε                                     (FT-L; FT has no ε)

The baselines of Meng et al. 2022 (arXiv:2202.05262, app. E.1); over a window of layers those of Hase et al. 2023
(arXiv:2301.04213). What is learnt is of full rank and answers every key, so that nothing keeps it to the fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tl_factedit.backend.memory import check_memory
from tl_factedit.backend.protocol import Model, as_layers, check_layer, n_layers
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import detach_caches, frozen, plain_torch
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.editing.delta import Delta, LayerUpdate
from tl_factedit.editing.description import describe
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import EditInputs, check_contexts, check_objective, prefixes
from tl_factedit.editing.objectives import Inject, Objective
from tl_factedit.editing.off_target import keys_at
from tl_factedit.editing.training_rows import TrainingRows
from tl_factedit.editing.weight_descent import WeightDescent
from tl_factedit.locate.trace_result import window_layers
from tl_factedit.stats.sampling import SampledContexts


@dataclass(frozen=True)
class FineTune:
    """The editor; call it with a model and facts.

    Note:
        Meng et al.'s code (baselines/ft/ft_main.py) scores all tokens of an object from the prompt's last position.
        Here each is scored after those before it, which is the same for objects of one token. Theirs also changes the
        bias, whose name holds that of the weight; here the weight alone is changed.

    Attributes:
        layers: The layers to change, or one.
        epsilon: ε, how far an entry may move: 5e-4 is Meng et al.'s for GPT-2 XL, 5e-5 for GPT-J. None for no bound.
        steps: Passes over the facts, with an update for each `batch` of them.
        lr: Step size of Adam.
        stop_below: Stop early once the mean loss is below. Ignored where an object is to become unlikely.
        batch: How many facts an update is made of, in the order given.
        objective: What is wanted of the facts. Where an object is to become unlikely, the loss is its probability.
        contexts: Prefixes to ask under, beside the bare prompt: how to sample them, or the texts themselves.
        prepend_bos: BOS policy; None for the model's.
        memory: What activations may take, in GiB (None for a share of what is free): sets how many facts are run at
            once, which changes the result by rounding alone.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> edit = fe.FineTune(8, epsilon=5e-4)(model, [fact])    # doctest: +SKIP
        >>> window = fe.FineTune.around(model, 8, width=5)        # doctest: +SKIP
        >>> edit = fe.FineTune(window, epsilon=1e-4)(model, [fact])  # doctest: +SKIP
    """

    layers: int | Sequence[int]
    epsilon: float | None = None
    steps: int = 25
    lr: float = 5e-4
    stop_below: float = 1e-2
    batch: int = 64
    objective: Objective = field(default_factory=Inject)
    contexts: SampledContexts | Sequence[str] = ()
    prepend_bos: bool | None = None
    memory: float | None = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Sort the layers, and check the numbers."""
        check_memory(self.memory)
        layers = as_layers(self.layers)
        if not layers:
            raise ValueError("layers is empty, needed one at least")
        object.__setattr__(self, "layers", layers)
        check_settings(self, least={"steps": 1, "batch": 1}, above={"epsilon": 0, "lr": 0})
        check_objective(self.objective)
        check_contexts(self.contexts)

    @staticmethod
    def around(model: Model, layer: int, width: int = 5) -> tuple[int, ...]:
        """The layers of a window, l−2 … l+2 for a width of 5, fewer at the model's ends (as a trace restores them)."""
        check_layer(model, layer)
        if width < 1:
            raise ValueError(f"width is {width}, needed at least 1")
        return tuple(window_layers(layer, width, n_layers(model)))

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Edit:
        """Make the edit; no weight of the model is written.

        Raises:
            ValueError: No facts, a fact that lacks what the objective needs, or a layer outside the model.
            RuntimeError: The optimisation is not finite.
        """
        inputs = EditInputs.of(model, facts, self._layers, objective=self.objective, prepend_bos=self.prepend_bos)
        sites = [down_proj(model, layer) for layer in self._layers]
        bos = inputs.prepend_bos
        contexts = prefixes(self.contexts, inputs)
        with frozen(model):
            targets = self.objective.targets(model, inputs.facts, prepend_bos=bos)
            rows = [TrainingRows.of(model, target, contexts, bos) for target in targets]
            try:
                tuned = WeightDescent(Runner(model), rows, sites, self).run()
            finally:
                detach_caches(model)
            deltas = [
                Delta.full(site.layer, (weight.double() - site.W.double()).cpu())
                for site, weight in zip(sites, tuned.weights, strict=True)
            ]
            keys = keys_at(model, [row.ids for row in inputs.prompts], [row.last for row in inputs.prompts], deltas)
            return Edit.made(
                inputs,
                [LayerUpdate(delta, keys[delta.layer]) for delta in deltas],
                editor=describe(self),
                contexts=contexts,
                fits=tuned.fits,
                targets=targets,
            )

    @property
    def _layers(self) -> tuple[int, ...]:
        assert isinstance(self.layers, tuple)
        return self.layers
