"""Hidden states: the residual stream at the last subject token and at the last token, after every layer.

Probes of many facts are trained on them and read them. Each of a population of edits is read in a model of its own: the
change of one fact is applied, its states are kept, and the change is taken back.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.hook_names import component_hook, resid_pre
from tl_factedit.backend.packing import gather
from tl_factedit.backend.protocol import Component, HookFn, Model, UnsupportedModelError, bos_policy, model_name
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.tokens import Aligned, align_all, pad

POSITIONS = ("subject", "last")
"""The last token of the subject, and the last token of the prompt."""
INPUT = -1
"""The label of what enters the first block; other states are labelled by the block they come out of."""


@runtime_checkable
class Applicable(Protocol):
    """Anything that can be applied to a model and taken back: an `Edit`, an `Erasure`, `RandomWeights`."""

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """The changed model for the length of a ``with`` block."""
        ...


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
class HiddenStates:
    """One vector for each fact, layer and position.

    Attributes:
        values: [fact layer position d_model], float32, on the CPU.
        layers: Labels of the second axis: a block's number for its output, -1 for the input of the first block.
        positions: Labels of the third axis.
        facts: The facts whose prompts were run.
        model: What they were read from, in words: the name of a model, or of a change of it.
    """

    values: Float[Tensor, "fact layer position d_model"]
    layers: tuple[Hashable, ...]
    positions: tuple[Hashable, ...]
    facts: tuple[Fact, ...]
    model: str

    def __post_init__(self) -> None:
        """Check that labels and numbers fit."""
        labels = (len(self.facts), len(self.layers), len(self.positions))
        if tuple(self.values.shape[:3]) != labels:
            raise ValueError(f"states are {tuple(self.values.shape)}, but facts, layers and positions are {labels}")

    def __len__(self) -> int:
        return len(self.facts)

    def take(self, chosen: Sequence[int]) -> HiddenStates:
        """The states of some facts, by their indices."""
        return replace(self, values=self.values[list(chosen)], facts=tuple(self.facts[i] for i in chosen))

    def at(self, *, layer: Hashable, position: Hashable) -> Float[Tensor, "fact d_model"]:
        """The vectors of one layer and position."""
        for label, labels, what in ((layer, self.layers, "layer"), (position, self.positions, "position")):
            if label not in labels:
                raise ValueError(f"{what} {label!r} is not among the states' {labels}")
        return self.values[:, self.layers.index(layer), self.positions.index(position)]

    @classmethod
    @plain_torch()
    def of_features(cls, values: Float[Tensor, "fact feature"], facts: Sequence[Fact], name: str) -> HiddenStates:
        """Features of the facts' subjects in place of a model's states, as one cell: what a null is trained on."""
        return cls(values[:, None, None].float(), (name,), (POSITIONS[0],), tuple(facts), name)


@plain_torch()
def read_states(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    component: Component = "resid",
    template: str | None = None,
    prepend_bos: bool | None = None,
    label: str | None = None,
    batch_tokens: int = 2048,
) -> HiddenStates:
    """Hidden states of some facts in one model.

    Args:
        model: A model of either class; it is left as it is.
        facts: The facts whose prompts to run.
        component: What to keep: the residual stream (``"resid"``: what enters the first block, and what comes out of
            each block), or one of the model's other components, one row per block.
        template: Another template with one ``"{}"`` to ask with; None for each fact's prompt.
        prepend_bos: BOS policy; None for the model's default.
        label: What to call the model in results; None for its name.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: No facts; a subject or object that doesn't end on a token boundary.
        UnsupportedModelError: The model has no such hook.
    """
    facts = as_facts(facts)
    rows = _rows(model, facts, template, prepend_bos)
    with frozen(model), torch.no_grad():
        read = _Reader(model, component)
        values = read(rows, batch_tokens)
    return HiddenStates(values, read.layers, POSITIONS, facts, label or model_name(model))


@plain_torch()
def read_states_edited(
    model: Model,
    changes: Applicable | Sequence[Applicable],
    facts: Fact | Sequence[Fact],
    *,
    component: Component = "resid",
    template: str | None = None,
    prepend_bos: bool | None = None,
    label: str | None = None,
    batch_tokens: int = 2048,
) -> HiddenStates:
    """Hidden states of some facts in changed models: under one change for all, or each under a change of its own.

    Args:
        model: The unchanged model; it is left as it is.
        changes: One change, or as many as there are facts, in their order.
        facts: The facts whose prompts to run.
        component: As in `read_states`.
        template: As in `read_states`.
        prepend_bos: As in `read_states`.
        label: What to call the changed model in results; None for the model's name and "changed".
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: A list of changes that is longer or shorter than the facts; or as in `read_states`.
    """
    facts = as_facts(facts)
    label = label or f"{model_name(model)}, changed"
    rows = _rows(model, facts, template, prepend_bos)
    if not isinstance(changes, Sequence):
        with changes.applied(model), frozen(model), torch.no_grad():
            read = _Reader(model, component)
            return HiddenStates(read(rows, batch_tokens), read.layers, POSITIONS, facts, label)
    if len(changes) != len(rows):
        raise ValueError(
            f"{len(changes)} changes for {len(rows)} facts, needed one for each fact, or one change (not in a list)"
        )
    with frozen(model), torch.no_grad():
        read = _Reader(model, component)
        values = []
        for change, row in zip(changes, rows, strict=True):
            with change.applied(model):
                values.append(read([row], batch_tokens))
    return HiddenStates(torch.cat(values), read.layers, POSITIONS, facts, label)


def _rows(model: Model, facts: Sequence[Fact], template: str | None, prepend_bos: bool | None) -> list[Aligned]:
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    bos = bos_policy(model, prepend_bos)
    room = getattr(model.cfg, "n_ctx", None)
    return align_all(model.tokenizer, facts, prepend_bos=bos, template=template, room=room)


class _Reader:
    """Reads prompts of one model, which may be changed between two calls."""

    def __init__(self, model: Model, component: Component) -> None:
        self.runner = Runner(model)
        blocks = range(self.runner.n_layers)
        self.places = [component_hook(component, block) for block in blocks]
        self.layers: tuple[int, ...] = tuple(blocks)
        if component == "resid":
            self.places, self.layers = [resid_pre(0), *self.places], (INPUT, *blocks)

    def __call__(self, rows: Sequence[Aligned], batch_tokens: int) -> Float[Tensor, "fact layer position d_model"]:
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for attempt in that_fit([len(row.ids) for row in rows], batch_tokens):
            with attempt as batch:
                states = self._read([rows[i] for i in batch])
                for i, of_fact in zip(batch, states, strict=True):
                    found[i] = of_fact
        return torch.stack(found)

    def _read(self, rows: Sequence[Aligned]) -> Float[Tensor, "fact layer position d_model"]:
        at = torch.tensor([[row.last, len(row.ids) - 1] for row in rows])
        kept: dict[str, Tensor] = {}

        def keep(place: str) -> HookFn:
            def hook_fn(value: Tensor, hook: Any = None) -> None:
                # Gathered here, so that the whole streams of all layers needn't be held.
                kept[place] = gather(value.detach(), at).float().cpu()

            return hook_fn

        tokens = pad([row.ids for row in rows], fill=0)
        self.runner.capture(tokens, [], hooks=[(place, keep(place)) for place in self.places])
        missing = [place for place in self.places if place not in kept]
        if missing:
            raise UnsupportedModelError(f"hooks {missing} never fired in {model_name(self.runner.model)}")
        return torch.stack([kept[place] for place in self.places], 1)
