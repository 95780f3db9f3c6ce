"""Knowledge neurons: the entries of keys that an object's probability depends on, and their rows of ``W_out``.

    Attr_i = k_i · ∫₀¹ ∂P(o | x) / ∂k_i (α k) dα          integrated gradients, at the last token of the prompt x

Dai et al. 2022 (arXiv:2104.08696, eq. 2), for causal models as in the baseline of Meng et al. 2022 (arXiv:2202.05262):
one layer's key at a time goes from 0 to what it is, and neurons that many wordings of a fact share are kept. Their rows
are set to 0, or moved from the old object's token to the new one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.memory import check_memory
from tl_factedit.backend.protocol import Model, as_layers, n_layers
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import Aligned, check_room, check_subject, continuation, encode, of_all
from tl_factedit.editing.delta import Delta, LayerUpdate
from tl_factedit.editing.description import describe
from tl_factedit.editing.edit import Edit
from tl_factedit.editing.inputs import EditInputs
from tl_factedit.editing.neuron_attribution import Prompt, attributions
from tl_factedit.editing.objectives import Erase, Inject, Objective
from tl_factedit.editing.off_target import keys_at


@dataclass(frozen=True)
class KnowledgeNeurons:
    """The editor; call it with a model and facts. The prompts of a fact are its own and its paraphrases.

    Note:
        Their code moves rows along token *embeddings*, which in GPT-2 and BERT are the columns of the unembedding as
        well. Where the two differ, what a row adds to the stream is read by the unembedding, the default here. For
        the old object it takes the model's own first choice; here it is ``target_true``. Of objects of several tokens
        it adds up all; here the first token counts at which the two differ.

        Where a norm follows the MLP (Gemma 2, OLMo 2), a shorter key is answered as the whole one nearly down to 0: the
        gradient lies there, where few steps see it, and ``Edit.fits[i]["rest"]`` is near 1.

    Attributes:
        threshold: Of a prompt those neurons are kept whose attribution is above this share of the largest, over all
            layers (Meng et al. take 0.2, Dai et al. 0.2 to 0.3).
        share: And of these, those that at least this share of a fact's prompts has in common.
        steps: How many points the integral is taken at.
        scale: How many times the tokens' vectors are taken off and put on.
        layers: Where to look; None for everywhere.
        objective: `Inject` replaces the object, `Erase` sets the rows to 0. There is no other way with neurons.
        vectors: What stands for a token: its column of the ``"unembedding"``, or its row of the ``"embedding"``.
        prepend_bos: BOS policy; None for the model's.
        memory: What activations may take, in GiB (None for a share of what is free): sets how many prompts are run at
            once.
        progress: Whether to show a bar on what takes longer than a second.

    Example:
        >>> edit = fe.KnowledgeNeurons()(model, [fact])           # doctest: +SKIP
        >>> edit.fits[0]["neurons"][:3]                           # doctest: +SKIP
        >>> fe.KnowledgeNeurons(objective=fe.Erase())(model, [fact])  # doctest: +SKIP
    """

    threshold: float = 0.2
    share: float = 0.4
    steps: int = 20
    scale: float = 2.0
    layers: int | Sequence[int] | None = None
    objective: Objective = field(default_factory=Inject)
    vectors: Literal["unembedding", "embedding"] = "unembedding"
    prepend_bos: bool | None = None
    memory: float | None = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        check_memory(self.memory)
        if not isinstance(self.objective, (Inject, Erase)):
            raise ValueError(
                f"objective is {self.objective!r}, needed Inject() or Erase(): neurons are found for the object that "
                "the model knows, and can be turned to another or off; take Rome or FineTune for other objectives"
            )
        check_settings(self, least={"steps": 1})
        for name in ("threshold", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needed a share between 0 and 1")
        if self.layers is not None:
            object.__setattr__(self, "layers", as_layers(self.layers))
            if not self.layers:
                raise ValueError("layers is empty, needed one at least, or None for all")

    @plain_torch()
    def __call__(self, model: Model, facts: Fact | Sequence[Fact]) -> Edit:
        """Make the edit; no weight of the model is written.

        Raises:
            ValueError: No facts, a fact without ``target_new`` to replace by, a layer outside the model, or a fact
                none of whose neurons is shared by enough prompts.
            RuntimeError: A probability is not finite.
        """
        layers = tuple(range(n_layers(model))) if self.layers is None else as_layers(self.layers)
        inputs = EditInputs.of(model, facts, layers, objective=self.objective, prepend_bos=self.prepend_bos)
        sites = {layer: down_proj(model, layer) for layer in layers}
        moves = None if isinstance(self.objective, Erase) else [self._move(model, row) for row in inputs.prompts]
        prompts = of_all(inputs.facts, lambda fact: _prompts(model, fact, inputs.prepend_bos))
        with frozen(model):
            shared = self._neurons(model, inputs.facts, prompts, sites)
            deltas = [
                _delta(sites[layer], [neurons.of(layer) for neurons in shared], moves)
                for layer in layers
                if any(neurons.of(layer) for neurons in shared)
            ]
            ends = [len(row.ids) - 1 for row in inputs.prompts]
            keys = keys_at(model, [row.ids for row in inputs.prompts], ends, deltas)
            return Edit.made(
                inputs,
                [LayerUpdate(delta, keys[delta.layer]) for delta in deltas],
                editor=describe(self),
                fits=[
                    {
                        "neurons": [list(neuron) for neuron in neurons.neurons],
                        "prompts": neurons.prompts,
                        "rest": neurons.rest,
                    }
                    for neurons in shared
                ],
                targets=self.objective.targets(model, inputs.facts, prepend_bos=inputs.prepend_bos),
                at="end",
            )

    def _neurons(
        self, model: Model, facts: Sequence[Fact], prompts: Sequence[list[Prompt]], sites: dict[int, DownProj]
    ) -> list[_Shared]:
        """The neurons of each fact."""
        found = attributions(
            model,
            [prompt for some in prompts for prompt in some],
            list(sites),
            steps=self.steps,
            memory=self.memory,
            progress=self.progress,
        )
        neurons = []
        for fact, some in zip(facts, prompts, strict=True):
            each = [next(found) for _ in some]
            scores = torch.stack([one.scores for one in each])  # [prompt layer d_mlp]
            most = scores.amax((1, 2), keepdim=True)
            kept = (scores > self.threshold * most) & (most > 0)
            shared = kept.sum(0) >= max(1.0, self.share * len(some))
            mean = scores.mean(0)
            gap = torch.stack([one.gap for one in each])
            kept_of = [(list(sites)[at], i, float(mean[at, i])) for at, i in shared.nonzero().tolist()]
            if not kept_of:
                raise ValueError(
                    f"no neuron of {fact.name!r} is shared by {self.share:.0%} of its {len(some)} prompts: lower share "
                    "or threshold, or give it paraphrases that the model answers alike"
                )
            neurons.append(
                _Shared(
                    neurons=tuple(sorted(kept_of, key=lambda neuron: -neuron[2])),
                    prompts=len(some),
                    rest=float((scores.sum(-1) - gap).abs().max() / gap.abs().max().clamp(min=1e-300)),
                )
            )
        return neurons

    def _move(self, model: Model, row: Aligned) -> Float[Tensor, "d_model"]:
        """What is added to the rows of a fact's neurons: from the old object's token to the new one's."""
        assert row.new_ids is not None
        pairs = zip_longest(row.true_ids.tolist(), row.new_ids.tolist())
        old, new = next((a, b) for a, b in pairs if a != b)  # `EditInputs` refuses objects of the same tokens
        return self.scale * (self._vector(model, new) - self._vector(model, old))

    def _vector(self, model: Any, token: int | None) -> Float[Tensor, "d_model"]:
        if token is None:  # one object is the beginning of the other
            return torch.zeros(model.cfg.d_model, dtype=torch.float64)
        vector = model.W_U[:, token] if self.vectors == "unembedding" else model.W_E[token]
        return vector.detach().double().cpu()


@dataclass(frozen=True)
class _Shared:
    """The neurons that a fact's prompts share.

    Attributes:
        neurons: (layer, index, mean attribution over the prompts), the largest first.
        prompts: How many there are.
        rest: The most by which a layer's attributions miss what they should add up to, as a share of the largest gap.
    """

    neurons: tuple[tuple[int, int, float], ...]
    prompts: int
    rest: float

    def of(self, layer: int) -> list[int]:
        """Those of one layer."""
        return [i for where, i, _ in self.neurons if where == layer]


def _prompts(model: Model, fact: Fact, prepend_bos: bool) -> list[Prompt]:
    check_subject(model.tokenizer, fact)
    texts = [fact.text, *(fact.fill(text) for text in fact.paraphrases)]
    found = [
        Prompt(
            encode(model.tokenizer, text, prepend_bos=prepend_bos)[0],
            continuation(model.tokenizer, text, fact.after(text, fact.old), prepend_bos=prepend_bos),
        )
        for text in texts
    ]
    for text, prompt in zip(texts, found, strict=True):
        check_room(prompt.ids, [prompt.target], getattr(model.cfg, "n_ctx", None), text)
    return found


def _delta(site: DownProj, neurons: Sequence[Sequence[int]], moves: Sequence[Float[Tensor, "d_model"]] | None) -> Delta:
    """The change of one layer: the neurons' rows moved, for each fact that has them, or (without moves) taken away."""
    rows = sorted({i for some in neurons for i in some})
    left = torch.zeros(len(site.W), len(rows), dtype=torch.float64)
    left[rows, range(len(rows))] = 1.0
    if moves is None:
        return Delta(site.layer, left, -site.W[rows].double().cpu())
    right = torch.zeros(len(rows), site.W.shape[1], dtype=torch.float64)
    for some, move in zip(neurons, moves, strict=True):
        right[[rows.index(i) for i in some]] += move
    return Delta(site.layer, left, right)
