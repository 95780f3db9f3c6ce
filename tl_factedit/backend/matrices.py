"""All matrices of a model, by name, each as [in, out] or [out, in] without further dimensions; which of them differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_factedit.backend.protocol import Model, UnsupportedModelError, n_layers
from tl_factedit.backend.weights import down_proj

WRAPPER = "_original_component."
"""What a bridge puts between the names of the modules that it wraps."""

JOINT, PART = ".qkv.", ".q."
"""Names of a joint matrix, and of a part of it."""


@dataclass(frozen=True)
class Matrix:
    """A parameter with two dimensions, live; heads that stand apart in it are side by side.

    Attributes:
        name: As it is told: ``"W_out of layer 3"``, otherwise the parameter's own name.
        param: The parameter itself.
        layer: Of a ``W_out`` its layer; None for all others.
        transposed: Whether the parameter is turned round.
    """

    name: str
    param: nn.Parameter
    layer: int | None = None
    transposed: bool = False

    @property
    def W(self) -> Float[Tensor, "rows columns"]:
        """The numbers; of a parameter with heads a copy, otherwise a live view."""
        data = self.param.detach()
        if data.ndim == 3:  # [head d_model d_head], or [head d_head d_model]
            data = data.flatten(0, 1) if data.shape[1] <= data.shape[2] else data.transpose(1, 2).flatten(0, 1)
        return data.T if self.transposed else data

    def write_(self, weight: Float[Tensor, "rows columns"]) -> None:
        """Overwrite the parameter in place."""
        weight = weight.T if self.transposed else weight
        data = self.param.detach()
        with torch.no_grad():
            if data.ndim == 3:
                heads = weight.unflatten(0, (len(data), -1))
                weight = heads if data.shape[1] <= data.shape[2] else heads.transpose(1, 2)
            data.copy_(weight)


def matrices(model: Model) -> dict[str, Matrix]:
    """All of a model's matrices, by name.

    A bridge lists the joint ``qkv`` of some architectures beside the three that it computes with; that one is left out.
    """
    outs = dict[int, tuple[int, bool]]()
    for layer in range(n_layers(model)):
        with suppress(UnsupportedModelError):
            site = down_proj(model, layer)
            outs[id(site.param)] = layer, site.transposed
    module: Any = model
    there = {name.replace(WRAPPER, ""): p for name, p in module.named_parameters()}
    found = dict[str, Matrix]()
    for name, p in there.items():
        joint = JOINT in name and name.replace(JOINT, PART) in there
        if p.ndim not in (2, 3) or not p.is_floating_point() or p.is_meta or joint:
            continue
        layer, transposed = outs.get(id(p), (None, False))
        called = name if layer is None else w_out(layer)
        found[called] = Matrix(called, p, layer, transposed)
    return found


def w_out(layer: int) -> str:
    """What a layer's ``W_out`` is called."""
    return f"W_out of layer {layer}"


def differing(unedited: Mapping[str, Matrix], changed: Mapping[str, Matrix]) -> tuple[str, ...]:
    """The names of the matrices that aren't equal bit for bit, of those that both models have."""
    return tuple(
        name
        for name, matrix in changed.items()
        if name in unedited
        and not (
            matrix.param.shape == unedited[name].param.shape
            and torch.equal(matrix.param.detach(), unedited[name].param.detach().to(matrix.param))
        )
    )


def same_names(one: Iterable[str], other: Iterable[str]) -> bool:
    """Whether two models have matrices of the same names, so that all can be compared."""
    return set(one) == set(other)
