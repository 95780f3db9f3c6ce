"""Which matrices a change wrote, for attacks that do something to them, and how much of it such an attack takes away.

An attack on the weights may undo what was written, as silencing a cell does, or leave it in force. Its *cover* tells:
the share of the squared change of all written matrices, Σ ‖W' − W‖², that goes under it. From a half on (`OFF`) the
change is switched off, and what comes back then lies elsewhere; below it lies underneath.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_factedit.attacks.attack import OFF, Shows
from tl_factedit.backend.matrices import Matrix, differing, matrices, same_names, w_out
from tl_factedit.backend.protocol import Model, check_layer
from tl_factedit.backend.state import users_hooks
from tl_factedit.backend.weights import down_proj
from tl_factedit.measure.change import Change
from tl_factedit.measure.population import Part, Population


@dataclass(frozen=True, eq=False)
class Written:
    """What was written.

    Attributes:
        names: For each fact, the matrices that the change which serves it wrote.
        unedited: These matrices as they were, by name.
        compared: Whether all matrices of both models were compared, which takes models of one class.
        hooked: Whether a change hooks something into the model, so that weights don't make it what it is.
        layer: Of those that are a ``W_out`` the layer, by name.
    """

    names: tuple[tuple[str, ...], ...]
    unedited: dict[str, Tensor]
    compared: bool
    hooked: bool
    layer: dict[str, int]

    @classmethod
    def of(cls, population: Population, layers: Sequence[int] | None) -> Written:
        """Of a population; or the ``W_out`` of some layers, whatever was written.

        Raises:
            ValueError: There are none, or one is outside the model.
        """
        names: list[tuple[str, ...]] = [()] * len(population.facts)
        compared, hooked = True, False
        for part in population.parts:
            mine, all_of_them = _names(part, layers)
            if not mine:
                raise ValueError(
                    "no matrix differs from the unedited model's, needed layers=[...]"
                    if layers is None
                    else "layers is empty, needed one at least"
                )
            compared, hooked = compared and all_of_them, hooked or _hooks(part)
            for i in part.indices:
                names[i] = mine
        there = matrices(population.model)
        in_place = all(isinstance(part.changed, Change) for part in population.parts)
        used = {name: there[name] for each in names for name in each}
        kept = {name: matrix.W.clone() if in_place else matrix.W for name, matrix in used.items()}
        layer = {name: matrix.layer for name, matrix in used.items() if matrix.layer is not None}
        return cls(tuple(names), kept, compared, hooked, layer)

    @property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """For each fact, the layers whose ``W_out`` is among them."""
        return tuple(tuple(sorted(self.layer[name] for name in each if name in self.layer)) for each in self.names)

    def change(self, matrix: Matrix) -> Float[Tensor, "rows columns"]:
        """By how much a matrix of some model differs from the unedited one, in float64."""
        return matrix.W.double() - self.unedited[matrix.name].double().to(matrix.W.device)


def question(cover: Float[Tensor, "fact"]) -> Shows:
    """What an attack asks that takes away such shares of what was written (NaN: no matrix was written)."""
    mean = float(cover.nanmean())
    return "elsewhere" if not math.isnan(mean) and mean >= OFF else "underneath"


def _hooks(part: Part) -> bool:
    """Whether something is hooked into the changed model: a router, or an override by a hook."""
    own = len(users_hooks(part.unedited)) if isinstance(part.changed, Change) else 0
    with part.applied() as tested:
        return len(users_hooks(tested)) > own


def _names(part: Part, layers: Sequence[int] | None) -> tuple[tuple[str, ...], bool]:
    """The matrices that a change wrote, and whether all were compared."""
    if layers is not None:
        for layer in layers:
            check_layer(part.unedited, layer)
        return tuple(w_out(layer) for layer in sorted(set(layers))), False
    if isinstance(part.changed, Change):
        return tuple(w_out(layer) for layer in part.changed.layers), True
    one, other = matrices(part.unedited), matrices(part.changed)
    if same_names(one, other):
        return differing(one, other), True
    return _differing_w_out(part.unedited, part.changed, [m.layer for m in one.values() if m.layer is not None]), False


def _differing_w_out(unedited: Model, changed: Model, layers: Sequence[int]) -> tuple[str, ...]:
    """Of models of two classes, whose other matrices have other names and may be laid out otherwise."""
    return tuple(
        w_out(layer)
        for layer in layers
        if not torch.equal(down_proj(unedited, layer).W, down_proj(changed, layer).W.to(down_proj(unedited, layer).W))
    )
